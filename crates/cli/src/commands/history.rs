//! `brig history`.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::client::encode;
use crate::context::Context;
use crate::fault::Outcome;
use crate::listing::{Listing, Row, ellipsis, short_id};
use crate::units;

pub static COMMAND: Command = Command {
    name: "history",
    usage: "[OPTIONS] IMAGE",
    about: "Show the history of an image",
    flags: &[
        Flag::text("format", "'table', 'table TEMPLATE', 'json', or a Go template"),
        Flag::switch("human", "Print sizes and dates in words").short('H').default("true"),
        Flag::switch("no-trunc", "Show everything in full"),
        Flag::text("platform", "Show this platform's variant"),
        Flag::switch("quiet", "Show IDs only").short('q'),
    ],
    operands: Operands::Exactly(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let answer = context
        .client
        .get(format!("/images/{}/history", encode(matches.operand(0))))
        .maybe("platform", matches.optional("platform"))
        .send()
        .await?
        .value()
        .await?;
    let (full, human) = (matches.is("no-trunc"), matches.is("human"));
    let rows = answer
        .list()
        .iter()
        .map(|step| {
            let id = step.at("Id").text();
            let created = step.at("Created").int();
            let by = step.at("CreatedBy").text().replace('\t', " ");
            let size = step.at("Size");
            Row::new()
                .with("ID", if full { id } else { short_id(id) })
                .with("CreatedAt", units::rfc3339(units::from_unix(created), false))
                .with(
                    "CreatedSince",
                    if human {
                        units::ago(created)
                    } else {
                        units::rfc3339(units::from_unix(created), false)
                    },
                )
                .with("CreatedBy", if full { by } else { ellipsis(&by, 45) })
                .with("Size", if human { units::human_size(size.float(), 3) } else { size.to_string() })
                .with("Comment", step.at("Comment").text())
        })
        .collect();
    let listing = Listing {
        kind: "*formatter.historyContext",
        titles: &[
            ("ID", "IMAGE"),
            ("CreatedSince", "CREATED"),
            ("CreatedAt", "CREATED AT"),
            ("CreatedBy", "CREATED BY"),
            ("Size", "SIZE"),
            ("Comment", "COMMENT"),
        ],
        table: if human {
            "{{.ID}}\t{{.CreatedSince}}\t{{.CreatedBy}}\t{{.Size}}\t{{.Comment}}"
        } else {
            "{{.ID}}\t{{.CreatedAt}}\t{{.CreatedBy}}\t{{.Size}}\t{{.Comment}}"
        },
    };
    let format = if matches.is("quiet") { "{{.ID}}" } else { matches.text("format") };
    listing.print(format, rows)
}
