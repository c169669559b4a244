//! `brig system df`.

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::{images, ps, volume};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::listing::{Listing, Row, short_id};
use crate::template::{Missing, Scope, Template};
use crate::value::Value;
use crate::{output, units};

pub static DF: Command = Command {
    name: "df",
    usage: "[OPTIONS]",
    about: "Show how much disk the engine uses",
    flags: &[
        Flag::text("format", "'table', 'table TEMPLATE', 'json', or a Go template"),
        Flag::switch("verbose", "Show each object").short('v'),
    ],
    operands: Operands::None,
    run: runs!(df),
    ..Command::EMPTY
};

const LISTING: Listing<'static> = Listing {
    kind: "*formatter.diskUsageContext",
    titles: &[
        ("Type", "TYPE"),
        ("TotalCount", "TOTAL"),
        ("Active", "ACTIVE"),
        ("Size", "SIZE"),
        ("Reclaimable", "RECLAIMABLE"),
    ],
    table: "{{.Type}}\t{{.TotalCount}}\t{{.Active}}\t{{.Size}}\t{{.Reclaimable}}",
};

struct Usage {
    name: &'static str,
    total: usize,
    active: usize,
    size: f64,
    reclaimable: f64,
    percent: bool,
}

async fn df(context: &Context, matches: Matches) -> Outcome {
    let format = matches.text("format");
    let answer = context.client.get("/system/df").send().await?.value().await?;
    if matches.is("verbose") {
        if matches!(format, "" | "table") {
            return verbose(&answer);
        }
        output::write(&objects(&answer, format)?);
        return Ok(());
    }
    let rows = [of_images(&answer), of_containers(&answer), of_volumes(&answer), of_cache(&answer)]
        .into_iter()
        .map(|usage| {
            let mut reclaimable = units::human_size(usage.reclaimable, 4);
            if usage.percent && usage.size > 0.0 {
                reclaimable = format!("{reclaimable} ({}%)", (usage.reclaimable * 100.0 / usage.size) as i64);
            }
            Row::new()
                .with("Type", usage.name)
                .with("TotalCount", usage.total.to_string())
                .with("Active", usage.active.to_string())
                .with("Size", units::human_size(usage.size, 4))
                .with("Reclaimable", reclaimable)
        })
        .collect();
    LISTING.print(format, rows)
}

fn of_images(answer: &Value) -> Usage {
    let images = answer.at("Images").list();
    let used = |image: &&Value| image.at("Containers").int() > 0;
    let size = answer.at("LayersSize").float();
    let in_use: f64 = images
        .iter()
        .filter(used)
        .map(|image| {
            let shared = image.at("SharedSize").float();
            if image.at("Size").int() < 0 || shared < 0.0 { 0.0 } else { image.at("Size").float() - shared }
        })
        .sum();
    Usage {
        name: "Images",
        total: images.len(),
        active: images.iter().filter(used).count(),
        size,
        reclaimable: (size - in_use).max(0.0),
        percent: true,
    }
}

fn of_containers(answer: &Value) -> Usage {
    let containers = answer.at("Containers").list();
    let active =
        |container: &&Value| matches!(container.at("State").text(), "running" | "paused" | "restarting");
    let sum = |wanted: bool| -> f64 {
        containers.iter().filter(|c| !wanted || !active(c)).map(|c| c.at("SizeRw").float()).sum()
    };
    Usage {
        name: "Containers",
        total: containers.len(),
        active: containers.iter().filter(active).count(),
        size: sum(false),
        reclaimable: sum(true),
        percent: true,
    }
}

fn of_volumes(answer: &Value) -> Usage {
    let volumes = answer.at("Volumes").list();
    let links = |volume: &&Value| volume.at("UsageData").at("RefCount").int() > 0;
    let size = |volume: &Value| volume.at("UsageData").at("Size").float().max(0.0);
    Usage {
        name: "Local Volumes",
        total: volumes.len(),
        active: volumes.iter().filter(links).count(),
        size: volumes.iter().map(size).sum(),
        reclaimable: volumes.iter().filter(|volume| !links(volume)).map(size).sum(),
        percent: true,
    }
}

fn of_cache(answer: &Value) -> Usage {
    let cache = answer.at("BuildCache").list();
    let in_use = |entry: &&Value| entry.at("InUse").bool();
    // What is shared is counted with the images.
    let size = |entry: &Value| if entry.at("Shared").bool() { 0.0 } else { entry.at("Size").float() };
    Usage {
        name: "Build Cache",
        total: cache.len(),
        active: cache.iter().filter(in_use).count(),
        size: cache.iter().map(size).sum(),
        reclaimable: cache.iter().filter(|entry| !in_use(entry)).map(size).sum(),
        percent: false,
    }
}

fn verbose(answer: &Value) -> Outcome {
    let mut text = "Images space usage:\n\n".to_owned();
    text.push_str(&images::USAGE.render("", image_rows(answer, false))?);
    text.push_str("\nContainers space usage:\n\n");
    let containers = Listing {
        kind: "*formatter.ContainerContext",
        titles: &[
            ("ID", "CONTAINER ID"),
            ("Image", "IMAGE"),
            ("Command", "COMMAND"),
            ("LocalVolumes", "LOCAL VOLUMES"),
            ("Size", "SIZE"),
            ("RunningFor", "CREATED"),
            ("Status", "STATUS"),
            ("Names", "NAMES"),
        ],
        table: "{{.ID}}\t{{.Image}}\t{{.Command}}\t{{.LocalVolumes}}\t{{.Size}}\t{{.RunningFor}}\t{{.Status}}\t{{.Names}}",
    };
    text.push_str(&containers.render("", container_rows(answer, false))?);
    text.push_str("\nLocal Volumes space usage:\n\n");
    text.push_str(&volume::USAGE.render("", volume_rows(answer))?);
    let cache = of_cache(answer);
    text = format!("{text}\nBuild cache usage: {}\n\n", units::human_size(cache.size, 4));
    text.push_str(&cache_table(answer, "")?);
    output::write(&text);
    Ok(())
}

/// All objects as one document for a template, which is executed once and not for each of them. As docker has it, a table's
/// template gives no titles here; it shortens ids, though, as other templates do not.
fn objects(answer: &Value, format: &str) -> Outcome<String> {
    let table = format.strip_prefix("table").filter(|rest| rest.starts_with([' ', '\t', '\\']));
    let full = table.is_none();
    let source = match format {
        "json" => "{{json .}}".to_owned(),
        format => table.unwrap_or(format).trim().replace("\\t", "\t").replace("\\n", "\n"),
    };
    let of = |name: &str, rows: Vec<Row>| {
        (name.to_owned(), Value::List(rows.into_iter().map(Row::into_document).collect()))
    };
    let all = Value::Map(vec![
        of("Images", image_rows(answer, full)),
        of("Containers", container_rows(answer, full)),
        of("Volumes", volume_rows(answer)),
        of("BuildCache", cache_rows(answer, full)),
    ]);
    let template =
        Template::parse(&source).map_err(|error| Fault::said(format!("template parsing error: {error}")))?;
    template
        .render(&Scope::new(&all, Missing::UnknownField(LISTING.kind)))
        .map_err(|error| Fault::said(error.to_string()))
}

fn image_rows(answer: &Value, full: bool) -> Vec<Row> {
    answer.at("Images").list().iter().map(|image| images::usage_row(image, full)).collect()
}

fn container_rows(answer: &Value, full: bool) -> Vec<Row> {
    answer
        .at("Containers")
        .list()
        .iter()
        .map(|container| {
            // Only what the container wrote: its image is counted above.
            let mut own = container.entries().to_vec();
            own.retain(|(key, _)| key != "SizeRootFs");
            ps::row(&Value::Map(own), full)
        })
        .collect()
}

fn volume_rows(answer: &Value) -> Vec<Row> {
    answer.at("Volumes").list().iter().map(volume::row).collect()
}

/// The build cache's objects, of an answer to `GET /system/df`.
pub fn cache_table(answer: &Value, format: &str) -> Outcome<String> {
    let entries = Listing {
        kind: "*formatter.buildCacheContext",
        titles: &[
            ("ID", "CACHE ID"),
            ("CacheType", "CACHE TYPE"),
            ("Size", "SIZE"),
            ("CreatedSince", "CREATED"),
            ("LastUsedSince", "LAST USED"),
            ("UsageCount", "USAGE"),
            ("Shared", "SHARED"),
        ],
        table: "{{.ID}}\t{{.CacheType}}\t{{.Size}}\t{{.CreatedSince}}\t{{.LastUsedSince}}\t{{.UsageCount}}\t{{.Shared}}",
    };
    entries.render(format, cache_rows(answer, false))
}

fn cache_rows(answer: &Value, full: bool) -> Vec<Row> {
    let stamp = |value: &Value| value.text().parse::<jiff::Timestamp>().ok();
    let since = |value: &Value| stamp(value).map_or(String::new(), |at| units::ago(at.as_second()));
    let at = |value: &Value| stamp(value).map_or(String::new(), units::go_time);
    let shown = |id: &str| if full { id.to_owned() } else { short_id(id).to_owned() };
    answer
        .at("BuildCache")
        .list()
        .iter()
        .map(|entry| {
            let in_use = entry.at("InUse").bool();
            let parents: Vec<&str> = entry.at("Parents").list().iter().map(Value::text).collect();
            Row::new()
                .with("ID", shown(entry.at("ID").text()) + if in_use { "*" } else { "" })
                .with("Parent", shown(&parents.join(", ")))
                .with("CacheType", entry.at("Type").text())
                .with("Description", entry.at("Description").text())
                .with("InUse", in_use.to_string())
                .with("Shared", entry.at("Shared").bool().to_string())
                .with("Size", units::human_size(entry.at("Size").float(), 3))
                .with("CreatedAt", at(entry.at("CreatedAt")))
                .with("CreatedSince", since(entry.at("CreatedAt")))
                .with("LastUsedAt", at(entry.at("LastUsedAt")))
                .with("LastUsedSince", since(entry.at("LastUsedAt")))
                .with("UsageCount", entry.at("UsageCount").int().to_string())
        })
        .collect()
}
