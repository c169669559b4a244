//! `brig search`.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::context::Context;
use crate::fault::Outcome;
use crate::images::{self, AUTH_HEADER};
use crate::listing::{Listing, Row, ellipsis};

pub static COMMAND: Command = Command {
    name: "search",
    usage: "[OPTIONS] TERM",
    about: "Look for repositories in a registry ([HOST/]TERM)",
    flags: &[
        Flag::list("filter", "stars=N, is-official=true, is-automated=true").short('f'),
        Flag::text("format", "'table', 'table TEMPLATE', 'json', or a Go template"),
        Flag::one("limit", "int", "The most repositories to show").default("25"),
        Flag::switch("no-trunc", "Show descriptions in full"),
    ],
    operands: Operands::Exactly(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let term = matches.operand(0);
    let limit = matches.int("limit")?.unwrap_or(25);
    let mut filters = std::collections::BTreeMap::<&str, Vec<&str>>::new();
    for filter in matches.list("filter") {
        let (key, value) =
            filter.split_once('=').ok_or_else(|| matches.invalid("filter", filter, "is not key=value"))?;
        filters.entry(key).or_default().push(value);
    }
    let filters = serde_json::to_string(&filters).unwrap_or_default();
    let mut ask = context
        .client
        .get("/images/search")
        .query("term", term)
        .query("limit", &limit.to_string())
        .query("filters", &filters);
    // A term without a host is docker.io's, whose names would otherwise need a repository's form.
    if let Ok(reference) = images::parse(term) {
        let credentials = images::credentials(context, &reference)?;
        if !credentials.is_empty() {
            ask = ask.header(AUTH_HEADER, &credentials.header());
        }
    }
    let answer = ask.send().await?.value().await?;
    let full = matches.is("no-trunc");
    let rows = answer
        .list()
        .iter()
        .map(|found| {
            let description = found.at("description").text().replace(['\n', '\r'], " ");
            let mark = |yes: bool| if yes { "[OK]" } else { "" };
            Row::new()
                .with("Name", found.at("name").text())
                .with("Description", if full { description } else { ellipsis(&description, 45) })
                .with("StarCount", found.at("star_count").int().to_string())
                .with("IsOfficial", mark(found.at("is_official").bool()))
                .with("IsAutomated", mark(found.at("is_automated").bool()))
        })
        .collect();
    let listing = Listing {
        kind: "*search.searchContext",
        titles: &[
            ("Name", "NAME"),
            ("Description", "DESCRIPTION"),
            ("StarCount", "STARS"),
            ("IsOfficial", "OFFICIAL"),
            ("IsAutomated", "AUTOMATED"),
        ],
        table: "{{.Name}}\t{{.Description}}\t{{.StarCount}}\t{{.IsOfficial}}",
    };
    listing.print(matches.text("format"), rows)
}
