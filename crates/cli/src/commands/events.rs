//! `brig events`.

use jiff::Timestamp;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::template::{Missing, Scope, Template};
use crate::value::Value;
use crate::{listing, output, units};

pub static COMMAND: Command = Command {
    name: "events",
    usage: "[OPTIONS]",
    about: "Show what happens in the engine, as it happens",
    flags: &[
        Flag::one("filter", "filter", "Show only what matches").short('f').as_list(),
        Flag::text("format", "'json', or a Go template"),
        Flag::text("since", "Begin with what happened after a time, or within a duration"),
        Flag::text("until", "End at a time, or a duration ago"),
    ],
    operands: Operands::None,
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let moment = |flag: &str| match matches.optional(flag) {
        Some(text) => units::point_in_time(text).map(Some).map_err(Fault::Said),
        None => Ok(None),
    };
    let template = match matches.text("format") {
        "" => None,
        "json" => Some("{{json .}}"),
        other => Some(other),
    };
    let template = template
        .map(|source| {
            Template::parse(source)
                .map_err(|error| Fault::Coded { text: format!("Error parsing format: {error}"), code: 64 })
        })
        .transpose()?;
    let filters = listing::filters(&matches.list("filter"))?;
    let mut lines = context
        .client
        .get("/events")
        .maybe("since", moment("since")?.as_deref())
        .maybe("until", moment("until")?.as_deref())
        .maybe("filters", filters.as_deref())
        .send()
        .await?
        .into_lines();
    while let Some(event) = lines.next().await? {
        match &template {
            None => output::line(&plain(&event)),
            Some(template) => {
                let text = template
                    .render(&Scope::new(&event, Missing::Fails))
                    .map_err(|error| Fault::said(error.to_string()))?;
                output::line(&text);
            }
        }
    }
    Ok(())
}

/// `TIME TYPE ACTION ID (attributes)`.
fn plain(event: &Value) -> String {
    let nanos = event.at("timeNano").int();
    let stamp = if nanos != 0 {
        Timestamp::from_nanosecond(i128::from(nanos)).unwrap_or(Timestamp::UNIX_EPOCH)
    } else {
        units::from_unix(event.at("time").int())
    };
    let actor = event.at("Actor");
    let mut attributes: Vec<String> = actor
        .at("Attributes")
        .entries()
        .iter()
        .map(|(key, value)| format!("{key}={}", value.text()))
        .collect();
    attributes.sort();
    let mut line = format!(
        "{} {} {} {}",
        units::rfc3339(stamp, true),
        event.at("Type").text(),
        event.at("Action").text(),
        actor.at("ID").text()
    );
    if !attributes.is_empty() {
        line = format!("{line} ({})", attributes.join(", "));
    }
    line
}
