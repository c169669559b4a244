//! `brig volume`: create, ls, rm.

use bollard_stubs::models::VolumeCreateRequest;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::client::encode;
use crate::commands::{chosen_format, for_each};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::listing::{self, Listing, Row};
use crate::output;
use crate::parse::environment::pairs;
use crate::value::Value;

pub static CREATE: Command = Command {
    name: "create",
    usage: "[OPTIONS] [VOLUME]",
    about: "Create a volume",
    flags: &[
        Flag::text("driver", "Driver of the volume").short('d').default("local"),
        Flag::list("label", "Set a label"),
        Flag::text("name", "Name of the volume").hidden(),
        Flag::one("opt", "map", "Set an option of the driver").short('o').as_list(),
    ],
    operands: Operands::AtMost(1),
    run: runs!(create),
    ..Command::EMPTY
};

pub static LIST: Command = Command {
    name: "ls",
    usage: "[OPTIONS]",
    about: "List volumes",
    flags: &[
        Flag::one("filter", "filter", "Show only what matches").short('f').as_list(),
        Flag::text("format", "'table', 'table TEMPLATE', 'json', or a Go template"),
        Flag::switch("quiet", "Show names only").short('q'),
    ],
    operands: Operands::None,
    run: runs!(list),
    ..Command::EMPTY
};

pub static REMOVE: Command = Command {
    name: "rm",
    usage: "[OPTIONS] VOLUME [VOLUME...]",
    about: "Remove one or more volumes",
    flags: &[Flag::switch("force", "Do not mind a volume that is not there").short('f')],
    operands: Operands::AtLeast(1),
    run: runs!(remove),
    ..Command::EMPTY
};

async fn create(context: &Context, matches: Matches) -> Outcome {
    let operand = matches.operands().first().map(String::as_str);
    if operand.is_some() && matches.given("name") {
        return Err(Fault::said(
            "conflicting options: cannot specify a volume-name through both --name and as a positional arg",
        ));
    }
    let name = operand.or(matches.optional("name")).unwrap_or_default();
    let body = VolumeCreateRequest {
        name: Some(name.to_owned()),
        driver: Some(matches.text("driver").to_owned()),
        driver_opts: Some(pairs(&matches.list("opt"))),
        labels: Some(pairs(&matches.list("label"))),
        ..VolumeCreateRequest::default()
    };
    let answer = context.client.post("/volumes/create").json(&body)?.send().await?.value().await?;
    output::line(answer.at("Name").text());
    Ok(())
}

const TITLES: &[(&str, &str)] = &[
    ("Name", "VOLUME NAME"),
    ("Driver", "DRIVER"),
    ("Scope", "SCOPE"),
    ("Availability", "AVAILABILITY"),
    ("Mountpoint", "MOUNTPOINT"),
    ("Labels", "LABELS"),
    ("Links", "LINKS"),
    ("Size", "SIZE"),
    ("Group", "GROUP"),
    ("Status", "STATUS"),
];

async fn list(context: &Context, matches: Matches) -> Outcome {
    let mut format = chosen_format(context, matches.text("format"), "volumesFormat")?;
    if matches.is("quiet") && !matches.given("format") {
        "{{.Name}}".clone_into(&mut format);
    }
    let filters = listing::filters(&matches.list("filter"))?;
    let answer =
        context.client.get("/volumes").maybe("filters", filters.as_deref()).send().await?.value().await?;
    let mut volumes: Vec<&Value> = answer.at("Volumes").list().iter().collect();
    volumes.sort_by(|a, b| a.at("Name").text().cmp(b.at("Name").text()));
    let listing =
        Listing { kind: "*formatter.volumeContext", titles: TITLES, table: "{{.Driver}}\t{{.Name}}" };
    listing.print(&format, volumes.into_iter().map(row).collect())
}

pub const USAGE: Listing<'static> =
    Listing { kind: "*formatter.volumeContext", titles: TITLES, table: "{{.Name}}\t{{.Links}}\t{{.Size}}" };

pub fn row(volume: &Value) -> Row {
    let labels = volume.at("Labels");
    let usage = volume.at("UsageData");
    let known = !usage.is_null();
    let size = usage.at("Size").float();
    let none = "N/A".to_owned();
    Row::new()
        .with("Availability", "N/A")
        .with("Driver", volume.at("Driver").text())
        .with("Group", "N/A")
        .with("Labels", listing::labels(labels))
        .with("Links", if known { usage.at("RefCount").int().to_string() } else { none.clone() })
        .with("Mountpoint", volume.at("Mountpoint").text())
        .with("Name", volume.at("Name").text())
        .with("Scope", volume.at("Scope").text())
        .with("Size", if known && size >= 0.0 { crate::units::human_size(size, 4) } else { none })
        .with("Status", "N/A")
        .hidden("Label", labels.clone())
}

async fn remove(context: &Context, matches: Matches) -> Outcome {
    for_each(matches.operands(), async |name| {
        context
            .client
            .delete(format!("/volumes/{}", encode(name)))
            .flag("force", matches.is("force"))
            .done()
            .await
    })
    .await
}
