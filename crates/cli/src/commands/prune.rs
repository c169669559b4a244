//! `brig … prune`: removing what nothing uses, after asking.

use std::io::BufRead as _;

use crate::args::{Command, Flag, Matches, Operands};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::{listing, output, units};

const FORCE: Flag = Flag::switch("force", "Do not ask").short('f');
const FILTER: Flag =
    Flag::one("filter", "filter", "Prune only what matches (until=TIME, label=KEY=VALUE)").as_list();

pub static CONTAINER: Command = Command {
    name: "prune",
    usage: "[OPTIONS]",
    about: "Remove all stopped containers",
    flags: &[FILTER, FORCE],
    operands: Operands::None,
    run: |context, matches| {
        Box::pin(async move {
            ask(&matches, "This will remove all stopped containers.")?;
            let pruned = prune(context, "/containers/prune", &matches.list("filter")).await?;
            pruned.show("Deleted Containers:");
            pruned.total();
            Ok(())
        })
    },
    ..Command::EMPTY
};

pub static IMAGE: Command = Command {
    about: "Remove unused images",
    flags: &[
        Flag::switch("all", "Remove all images that no container uses, not only those without a name")
            .short('a'),
        FILTER,
        FORCE,
    ],
    run: |context, matches| {
        Box::pin(async move {
            let all = matches.is("all");
            ask(
                &matches,
                if all {
                    "This will remove all images without at least one container associated to them."
                } else {
                    "This will remove all dangling images."
                },
            )?;
            let dangling = format!("dangling={}", !all);
            let mut filters = matches.list("filter");
            filters.push(&dangling);
            let pruned = prune(context, "/images/prune", &filters).await?;
            pruned.show("Deleted Images:");
            pruned.total();
            Ok(())
        })
    },
    ..CONTAINER
};

pub static NETWORK: Command = Command {
    about: "Remove all networks that no container uses",
    flags: &[FILTER, FORCE],
    run: |context, matches| {
        Box::pin(async move {
            ask(&matches, "This will remove all custom networks not used by at least one container.")?;
            prune(context, "/networks/prune", &matches.list("filter")).await?.show("Deleted Networks:");
            Ok(())
        })
    },
    ..CONTAINER
};

pub static BUILDER: Command = Command {
    about: "Remove the build cache",
    flags: &[
        Flag::switch("all", "Remove cache mounts too").short('a'),
        FILTER,
        FORCE,
        Flag::text("max-used-space", "Keep what was used last, up to this size (10GB)").alias("keep-storage"),
        Flag::text("min-free-space", "Remove until so much is free on the disk"),
        Flag::text("reserved-space", "Keep so much in any case"),
    ],
    run: |context, matches| {
        Box::pin(async move {
            ask(&matches, "This will remove the build cache.")?;
            let mut path = format!("/build/prune?all={}", u8::from(matches.is("all")));
            for name in ["max-used-space", "min-free-space", "reserved-space"] {
                if let Some(bytes) = matches.bytes(name)? {
                    path.extend(["&", name, "=", &bytes.to_string()]);
                }
            }
            let pruned = prune(context, &path, &matches.list("filter")).await?;
            pruned.show("Deleted build cache objects:");
            pruned.total();
            Ok(())
        })
    },
    ..CONTAINER
};

pub static VOLUME: Command = Command {
    about: "Remove volumes that no container uses",
    flags: &[Flag::switch("all", "Remove named volumes too").short('a'), FILTER, FORCE],
    run: |context, matches| {
        Box::pin(async move {
            let all = matches.is("all");
            ask(
                &matches,
                if all {
                    "This will remove all local volumes not used by at least one container."
                } else {
                    "This will remove anonymous local volumes not used by at least one container."
                },
            )?;
            let mut filters = matches.list("filter");
            if all {
                filters.push("all=true");
            }
            let pruned = prune(context, "/volumes/prune", &filters).await?;
            pruned.show("Deleted Volumes:");
            pruned.total();
            Ok(())
        })
    },
    ..CONTAINER
};

pub static SYSTEM: Command = Command {
    about: "Remove stopped containers, and the networks and images that nothing uses",
    flags: &[
        Flag::switch("all", "Remove all images that no container uses, not only those without a name")
            .short('a'),
        FILTER,
        FORCE,
        Flag::switch("volumes", "Remove unnamed volumes too"),
    ],
    run: |context, matches| Box::pin(system(context, matches)),
    ..CONTAINER
};

async fn system(context: &Context, matches: Matches) -> Outcome {
    let (all, volumes) = (matches.is("all"), matches.is("volumes"));
    let mut list = vec!["all stopped containers", "all networks not used by at least one container"];
    if volumes {
        list.push("all anonymous volumes not used by at least one container");
    }
    list.push(if all {
        "all images without at least one container associated to them"
    } else {
        "all dangling images"
    });
    ask(&matches, &format!("This will remove:\n  - {}\n", list.join("\n  - ")))?;
    let filters = matches.list("filter");
    let mut space = 0.0;
    let pruned = prune(context, "/containers/prune", &filters).await?;
    pruned.show("Deleted Containers:");
    space += pruned.space;
    prune(context, "/networks/prune", &filters).await?.show("Deleted Networks:");
    if volumes {
        let without_until: Vec<&str> = filters.iter().copied().filter(|f| !f.starts_with("until")).collect();
        let pruned = prune(context, "/volumes/prune", &without_until).await?;
        pruned.show("Deleted Volumes:");
        space += pruned.space;
    }
    let dangling = format!("dangling={}", !all);
    let mut image_filters = filters.clone();
    image_filters.push(&dangling);
    let pruned = prune(context, "/images/prune", &image_filters).await?;
    pruned.show("Deleted Images:");
    space += pruned.space;
    output::line(&format!("Total reclaimed space: {}", units::human_size(space, 4)));
    Ok(())
}

struct Pruned {
    lines: Vec<String>,
    space: f64,
}

impl Pruned {
    fn show(&self, title: &str) {
        if !self.lines.is_empty() {
            output::line(&format!("{title}\n{}\n", self.lines.join("\n")));
        }
    }

    fn total(&self) {
        output::line(&format!("Total reclaimed space: {}", units::human_size(self.space, 4)));
    }
}

async fn prune(context: &Context, path: &str, filters: &[&str]) -> Outcome<Pruned> {
    let filters = listing::filters(filters)?;
    let answer = context.client.post(path).maybe("filters", filters.as_deref()).send().await?.value().await?;
    let mut lines = Vec::new();
    for key in ["ContainersDeleted", "NetworksDeleted", "VolumesDeleted", "ImagesDeleted", "CachesDeleted"] {
        for item in answer.at(key).list() {
            if item.entries().is_empty() {
                lines.push(item.text().to_owned());
            }
            for (verb, object) in item.entries() {
                lines.push(format!("{}: {}", verb.to_lowercase(), object.text()));
            }
        }
    }
    Ok(Pruned { lines, space: answer.at("SpaceReclaimed").float() })
}

/// Asks on standard output, reads the answer from standard input; anything but yes ends the command.
fn ask(matches: &Matches, what: &str) -> Outcome {
    if matches.is("force") {
        return Ok(());
    }
    output::write(&format!("WARNING! {what}\nAre you sure you want to continue? [y/N] "));
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer).map_err(Fault::io("reading the answer"))?;
    if read == 0 {
        output::line("");
    }
    match answer.trim().to_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Fault::Coded {
            text: format!("{} has been cancelled", matches.path().trim_start_matches("brig ")),
            code: 1,
        }),
    }
}
