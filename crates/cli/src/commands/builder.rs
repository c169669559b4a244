//! `brig builder …`: the build cache, and why steps ran again.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::system;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::listing::{Listing, Row};
use crate::value::Value;
use crate::{output, units};

pub static DU: Command = Command {
    name: "du",
    usage: "[OPTIONS]",
    about: "Show what the build cache takes",
    flags: &[Flag::text("format", "'table', 'table TEMPLATE', 'json', or a Go template")],
    operands: Operands::None,
    run: runs!(du),
    ..Command::EMPTY
};

pub static EXPLAIN: Command = Command {
    name: "explain",
    usage: "[BUILD]",
    about: "Say of each step of a build (the last one) why it was or was not cached",
    flags: &[],
    operands: Operands::Between(0, 1),
    run: |context, matches| {
        Box::pin(async move { explain(context, matches.operands().first().map(String::as_str)).await })
    },
    ..Command::EMPTY
};

pub static HISTORY: Command = Command {
    name: "history",
    usage: "[OPTIONS]",
    about: "List the last builds",
    flags: &[Flag::text("format", "'table', 'table TEMPLATE', 'json', or a Go template")],
    operands: Operands::None,
    run: runs!(history),
    ..Command::EMPTY
};

async fn du(context: &Context, matches: Matches) -> Outcome {
    let answer = context.client.get("/system/df").query("type", "build-cache").send().await?.value().await?;
    output::write(&system::cache_table(&answer, matches.text("format"))?);
    let sum = |wanted: fn(&Value) -> bool| {
        let all = answer.at("BuildCache").list();
        units::human_size(all.iter().filter(|one| wanted(one)).map(|one| one.at("Size").float()).sum(), 3)
    };
    if matches.text("format").is_empty() {
        output::line(&format!(
            "Reclaimable:  {}",
            sum(|one| !one.at("InUse").bool() && !one.at("Shared").bool())
        ));
        output::line(&format!("Total:        {}", sum(|_| true)));
    }
    Ok(())
}

async fn builds(context: &Context) -> Outcome<Value> {
    context.client.get("/build/history").send().await?.value().await
}

/// Seconds between two of an object's times, which are in nanoseconds.
fn took(of: &Value) -> String {
    let nanos = of.at("Ended").int().saturating_sub(of.at("Started").int()).max(0);
    format!("{:.1}s", nanos as f64 / 1e9)
}

async fn history(context: &Context, matches: Matches) -> Outcome {
    let listing = Listing {
        kind: "*build.record",
        titles: &[
            ("ID", "BUILD ID"),
            ("Name", "NAME"),
            ("Status", "STATUS"),
            ("Cached", "CACHED"),
            ("CreatedAt", "CREATED"),
            ("Duration", "DURATION"),
        ],
        table: "{{.ID}}\t{{.Name}}\t{{.Status}}\t{{.Cached}}\t{{.CreatedAt}}\t{{.Duration}}",
    };
    let all = builds(context).await?;
    let rows = all.list().iter().map(|build| {
        let steps = build.at("Steps").list();
        let cached = steps.iter().filter(|step| step.at("Cached").bool()).count();
        Row::new()
            .with("ID", build.at("Id").text().get(..12).unwrap_or_default())
            .with("Name", build.at("Tags").list().first().map_or("", Value::text))
            .with("Status", build.at("Outcome").text())
            .with("Cached", format!("{cached}/{}", steps.len()))
            .with("CreatedAt", units::ago(build.at("Started").int() / 1_000_000_000))
            .with("Duration", took(build))
    });
    listing.print(matches.text("format"), rows.collect())
}

/// `brig build explain`: the build whose id begins so, or the last.
pub async fn explain(context: &Context, wanted: Option<&str>) -> Outcome {
    let all = builds(context).await?;
    let found = all.list().iter().find(|build| wanted.is_none_or(|id| build.at("Id").text().starts_with(id)));
    let Some(build) = found else {
        return Err(Fault::said(match wanted {
            Some(id) => format!("no build {id} is on record: see brig builder history"),
            None => "no build is on record yet".to_owned(),
        }));
    };
    let id = build.at("Id").text();
    output::line(&format!(
        "build {} {} after {}",
        id.get(..12).unwrap_or(id),
        build.at("Outcome").text(),
        took(build)
    ));
    for step in build.at("Steps").list() {
        let (why, error) = (step.at("Why").text(), step.at("Error").text());
        let state = match (step.at("Cached").bool(), step.at("Ended").int(), why, error) {
            (true, ..) => "cached".to_owned(),
            (_, 0, ..) => "cut off".to_owned(),
            (_, _, "", "") => format!("done in {}", took(step)),
            (_, _, why, "") => format!("run in {}: {why}", took(step)),
            (_, _, _, error) => format!("failed: {}", error.lines().next().unwrap_or_default()),
        };
        output::line(&format!("{}\n    {state}", step.at("Name").text()));
    }
    if build.at("Outcome").text() == "failed" {
        output::line(build.at("Result").text());
    }
    Ok(())
}
