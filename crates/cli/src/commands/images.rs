//! `brig images`: the list of images.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::chosen_format;
use crate::context::Context;
use crate::fault::Outcome;
use crate::listing::{self, Listing, Row, short_id};
use crate::units;
use crate::value::Value;

pub static COMMAND: Command = Command {
    name: "images",
    usage: "[OPTIONS] [REPOSITORY[:TAG]]",
    about: "List images",
    flags: &[
        Flag::switch("all", "Show intermediate images too").short('a'),
        Flag::switch("digests", "Show digests"),
        Flag::one("filter", "filter", "Show only what matches").short('f').as_list(),
        Flag::text("format", "'table', 'table TEMPLATE', 'json', or a Go template"),
        Flag::switch("no-trunc", "Show everything in full"),
        Flag::switch("quiet", "Show IDs only").short('q'),
        Flag::switch("tree", "Show images by the layers they share"),
    ],
    operands: Operands::AtMost(1),
    run: runs!(run),
    ..Command::EMPTY
};

const TITLES: &[(&str, &str)] = &[
    ("Repository", "REPOSITORY"),
    ("Tag", "TAG"),
    ("Digest", "DIGEST"),
    ("ID", "IMAGE ID"),
    ("CreatedSince", "CREATED"),
    ("CreatedAt", "CREATED AT"),
    ("Size", "SIZE"),
    ("VirtualSize", "SIZE"),
    ("SharedSize", "SHARED SIZE"),
    ("UniqueSize", "UNIQUE SIZE"),
    ("Containers", "CONTAINERS"),
];

async fn run(context: &Context, matches: Matches) -> Outcome {
    if matches.is("tree") {
        return super::explore::tree(context, matches).await;
    }
    let mut format = chosen_format(context, matches.text("format"), "imagesFormat")?;
    let quiet = matches.is("quiet");
    if quiet && !matches.given("format") {
        "{{.ID}}".clone_into(&mut format);
    }
    let mut given = matches.list("filter");
    let by_name = matches.operands().first().map(|name| format!("reference={name}"));
    given.extend(by_name.as_deref());
    let filters = listing::filters(&given)?;
    let answer = context
        .client
        .get("/images/json")
        .flag("all", matches.is("all"))
        .maybe("filters", filters.as_deref())
        .send()
        .await?
        .value()
        .await?;
    let full = matches.is("no-trunc");
    let digests = matches.is("digests") || format.contains(".Digest");
    let mut images: Vec<&Value> = answer.list().iter().collect();
    images.sort_by_key(|image| std::cmp::Reverse(image.at("Created").int()));
    let rows: Vec<Row> = images.iter().flat_map(|image| rows(image, full, digests, quiet)).collect();
    let table = if matches.is("digests") {
        "{{.Repository}}\t{{.Tag}}\t{{.Digest}}\t{{.ID}}\t{{.CreatedSince}}\t{{.Size}}"
    } else {
        "{{.Repository}}\t{{.Tag}}\t{{.ID}}\t{{.CreatedSince}}\t{{.Size}}"
    };
    Listing { kind: "*formatter.imageContext", titles: TITLES, table }.print(&format, rows)
}

const NONE: &str = "<none>";

/// One row for each tag, or one for an image without any.
fn rows(image: &Value, full: bool, digests: bool, quiet: bool) -> Vec<Row> {
    let known = |list: &str| -> Vec<String> {
        image
            .at(list)
            .list()
            .iter()
            .map(|name| name.text().to_owned())
            .filter(|name| !name.starts_with(NONE))
            .collect()
    };
    let (tags, references) = (known("RepoTags"), known("RepoDigests"));
    let split = |reference: &str, by: char| {
        reference
            .rsplit_once(by)
            .map_or((reference.to_owned(), NONE.to_owned()), |(a, b)| (a.to_owned(), b.to_owned()))
    };
    let mut found: Vec<(String, String, String)> = Vec::new();
    for tag in &tags {
        let (repository, tag) = split(tag, ':');
        let own: Vec<String> = references
            .iter()
            .map(|r| split(r, '@'))
            .filter(|(name, _)| *name == repository)
            .map(|(_, d)| d)
            .collect();
        if own.is_empty() || !digests {
            found.push((repository, tag, own.first().cloned().unwrap_or_else(|| NONE.to_owned())));
        } else {
            found.extend(own.into_iter().map(|digest| (repository.clone(), tag.clone(), digest)));
        }
    }
    for reference in &references {
        let (repository, digest) = split(reference, '@');
        if !found.iter().any(|(known, ..)| *known == repository) {
            found.push((repository, NONE.to_owned(), digest));
        }
    }
    if found.is_empty() {
        found.push((NONE.to_owned(), NONE.to_owned(), NONE.to_owned()));
    }
    if quiet {
        found.truncate(1);
    }
    found.into_iter().map(|(repository, tag, digest)| row(image, &repository, &tag, &digest, full)).collect()
}

fn row(image: &Value, repository: &str, tag: &str, digest: &str, full: bool) -> Row {
    let id = image.at("Id").text();
    let created = image.at("Created").int();
    let size = image.at("Size").float();
    let shared = image.at("SharedSize").float();
    let known = |value: &Value| value.int() >= 0 && !value.is_null();
    let shared_known = known(image.at("SharedSize"));
    let not_known = || "N/A".to_owned();
    Row::new()
        .with("ID", if full { id } else { short_id(id) })
        .with("Repository", repository)
        .with("Tag", tag)
        .with("Digest", digest)
        .with("CreatedSince", units::ago(created))
        .with("CreatedAt", units::go_time(units::from_unix(created)))
        .with("Size", units::human_size(size, 3))
        .with("VirtualSize", units::human_size(size, 4))
        .with("SharedSize", if shared_known { units::human_size(shared, 4) } else { not_known() })
        .with("UniqueSize", if shared_known { units::human_size(size - shared, 4) } else { not_known() })
        .with(
            "Containers",
            if known(image.at("Containers")) { image.at("Containers").to_string() } else { not_known() },
        )
}

/// An image by its first tag, with what `system df -v` knows of it.
pub fn usage_row(image: &Value, full: bool) -> Row {
    let first = image.at("RepoTags").list().first().map(Value::text).filter(|tag| !tag.starts_with(NONE));
    let (repository, tag) = first.and_then(|name| name.rsplit_once(':')).unwrap_or((NONE, NONE));
    row(image, repository, tag, "", full)
}

pub const USAGE: Listing<'static> = Listing {
    kind: "*formatter.imageContext",
    titles: TITLES,
    table: "{{.Repository}}\t{{.Tag}}\t{{.ID}}\t{{.CreatedSince}}\t{{.Size}}\t{{.SharedSize}}\t{{.UniqueSize}}\t{{.Containers}}",
};
