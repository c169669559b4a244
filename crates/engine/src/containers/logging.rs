//! Log drivers: which there are, their options, and what a container's monitor is told to do.
//!
//! Invariant: whatever the driver, a file is kept beside it from which `logs` reads (docker's dual logging), unless
//! `cache-disabled` says otherwise. What a request says is checked when the container is created; names are resolved
//! and collectors are tried when it starts.

mod address;
mod fluentd;
mod gelf;
mod syslog;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use brigantine_shim::{CollectedLog, JournaldConfig, JsonFileLog, LogConfig, Retry, SinkConfig, SinkKind};

use super::Record;
use super::logs::log_path;
use crate::{Error, Result};

/// The drivers there are, for `info`.
pub const DRIVERS: &[&str] = &["fluentd", "gelf", "journald", "json-file", "local", "none", "syslog"];

/// Bytes that wait for a collector when nothing else is asked for.
const BUFFER: u64 = 1 << 20;
const JOURNAL: &str = "/run/systemd/journal/socket";

/// Options of every driver.
const COMMON: &[&str] = &["mode", "max-buffer-size"];
const ATTRIBUTES: &[&str] = &["labels", "labels-regex", "env", "env-regex", "tag"];
const FILE: &[&str] = &["max-size", "max-file", "compress"];
const CACHE: &[&str] = &["cache-disabled", "cache-max-size", "cache-max-file", "cache-compress"];

/// Checks a driver's name and options.
pub(super) fn check(driver: &str, options: Option<&HashMap<String, String>>) -> Result<()> {
    let known: Vec<&[&str]> = match driver {
        "json-file" => vec![COMMON, ATTRIBUTES, FILE],
        "local" => vec![COMMON, FILE],
        "none" => vec![],
        "journald" => vec![COMMON, ATTRIBUTES, CACHE],
        "syslog" => vec![COMMON, ATTRIBUTES, CACHE, syslog::OPTIONS],
        "fluentd" => vec![COMMON, ATTRIBUTES, CACHE, fluentd::OPTIONS],
        "gelf" => vec![COMMON, ATTRIBUTES, CACHE, gelf::OPTIONS],
        "awslogs" | "splunk" | "etwlogs" | "gcplogs" => {
            return Err(Error::not_implemented(format!(
                "the log driver {driver} is not built: use one of {}",
                DRIVERS.join(", ")
            )));
        }
        other => return Err(Error::invalid(format!("logger: no log driver named '{other}' is registered"))),
    };
    for (name, value) in options.into_iter().flatten() {
        if !known.iter().any(|known| known.contains(&name.as_str())) {
            return Err(Error::invalid(format!("unknown log opt '{name}' for {driver} log driver")));
        }
        let wrong = || Error::invalid(format!("invalid value for log option {name}: {value}"));
        let fine = match name.as_str() {
            "max-size" | "cache-max-size" => value == "-1" || size(value).is_some(),
            "max-file" | "cache-max-file" => value.parse::<u32>().is_ok_and(|files| files >= 1),
            "max-buffer-size" => size(value).is_some(),
            "compress" | "cache-compress" | "cache-disabled" => boolean(value).is_some(),
            "mode" => matches!(value.as_str(), "" | "blocking" | "non-blocking"),
            "labels-regex" | "env-regex" => {
                regex::Regex::new(value).map_err(|error| wrong().because(error))?;
                true
            }
            "tag" => {
                expand(value, |_| Some(String::new()))?;
                true
            }
            name if name.starts_with("syslog-") => syslog::is_valid(name, value)?,
            name if name.starts_with("fluentd-") => fluentd::is_valid(name, value)?,
            name if name.starts_with("gelf-") => gelf::is_valid(name, value),
            _ => true,
        };
        if !fine {
            return Err(wrong());
        }
    }
    if driver == "gelf" {
        gelf::check(options)?;
    }
    let mode = options.and_then(|options| options.get("mode")).map(String::as_str);
    if mode != Some("non-blocking") && options.is_some_and(|options| options.contains_key("max-buffer-size"))
    {
        return Err(Error::invalid(
            "logger: max-buffer-size option is only supported with 'mode=non-blocking'",
        ));
    }
    Ok(())
}

/// Whether nothing is kept that could be read.
pub(super) fn is_unreadable(record: &Record) -> bool {
    let options = Options::of(record);
    match options.driver {
        "none" => true,
        "json-file" | "local" => false,
        _ => options.flag("cache-disabled"),
    }
}

/// Whether the log's file is part of the driver, and so of inspect's `LogPath`.
pub(super) fn has_path(record: &Record) -> bool {
    matches!(Options::of(record).driver, "json-file")
}

/// A container's driver and options.
struct Options<'a> {
    driver: &'a str,
    options: Option<&'a HashMap<String, String>>,
}

impl<'a> Options<'a> {
    fn of(record: &'a Record) -> Self {
        let config = record.host_config.log_config.as_ref();
        let driver = config.and_then(|config| config.typ.as_deref()).filter(|driver| !driver.is_empty());
        Self {
            driver: driver.unwrap_or("json-file"),
            options: config.and_then(|config| config.config.as_ref()),
        }
    }

    fn get(&self, name: &str) -> Option<&'a str> {
        self.options?.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn flag(&self, name: &str) -> bool {
        self.get(name).and_then(boolean).unwrap_or_default()
    }

    /// The file, by options that begin with `prefix`.
    fn file(&self, path: PathBuf, prefix: &str) -> JsonFileLog {
        let get = |name: &str| self.get(&format!("{prefix}{name}"));
        let mut log = JsonFileLog::new(path);
        if let Some(bytes) = get("max-size").and_then(|text| if text == "-1" { Some(0) } else { size(text) })
        {
            log.max_size = bytes;
            // With a size alone docker's json-file keeps one file.
            if self.driver == "json-file" {
                log.max_files = 1;
            }
        }
        if let Some(files) = get("max-file").and_then(|text| text.parse().ok()) {
            log.max_files = files;
        }
        log.compress = get("compress").and_then(boolean).unwrap_or(self.driver != "json-file");
        log
    }
}

/// What the monitor is told about the log. Blocks: names are resolved, collectors are tried.
pub(super) fn monitor_config(record: &Record, dir: &Path, host_name: &str) -> Result<LogConfig> {
    let options = Options::of(record);
    let path = log_path(dir, &record.id);
    let kind = match options.driver {
        "none" => return Ok(LogConfig::None),
        "json-file" => {
            let mut log = options.file(path, "");
            log.attrs = attributes(record, &options)?;
            if let Some(tag) = options.get("tag") {
                log.attrs.insert("tag".to_owned(), tag_of(record, tag)?);
            }
            return Ok(LogConfig::JsonFile(log));
        }
        "local" => return Ok(LogConfig::JsonFile(options.file(path, ""))),
        "syslog" => syslog::sink(record, &options, host_name)?,
        "journald" => journald(record, &options)?,
        "fluentd" => fluentd::sink(record, &options)?,
        "gelf" => gelf::sink(record, &options, host_name)?,
        other => return Err(Error::invalid(format!("logger: no log driver named '{other}' is registered"))),
    };
    let buffer = options
        .get("max-buffer-size")
        .or_else(|| options.get("fluentd-buffer-limit").filter(|_| options.driver == "fluentd"))
        .and_then(size)
        .unwrap_or(BUFFER);
    let blocking = options.get("mode") != Some("non-blocking") && !fluentd::is_asynchronous(&options);
    let retry = match options.driver {
        "fluentd" => fluentd::retry(&options),
        "gelf" => gelf::retry(&options),
        _ => Retry::default(),
    };
    let mut file = (!options.flag("cache-disabled")).then(|| options.file(path, "cache-"));
    if let Some(file) = &mut file {
        file.attrs = attributes(record, &options)?;
    }
    Ok(LogConfig::Collected(Box::new(CollectedLog {
        file,
        sink: SinkConfig { kind, buffer, blocking, retry },
    })))
}

fn journald(record: &Record, options: &Options<'_>) -> Result<SinkKind> {
    let tag = tag_of(record, options.get("tag").unwrap_or(DEFAULT_TAG))?;
    let mut fields: BTreeMap<String, String> = [
        ("CONTAINER_ID", crate::ids::short(&record.id).to_owned()),
        ("CONTAINER_ID_FULL", record.id.clone()),
        ("CONTAINER_NAME", record.name.clone()),
        ("CONTAINER_TAG", tag.clone()),
        ("IMAGE_NAME", record.image().to_owned()),
        ("SYSLOG_IDENTIFIER", tag),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    for (name, value) in attributes(record, options)? {
        let name: String = name
            .to_ascii_uppercase()
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
            .collect();
        let name = name.trim_start_matches('_');
        if !name.is_empty() {
            fields.insert(name.to_owned(), value);
        }
    }
    if !Path::new(JOURNAL).exists() {
        return Err(no_driver(&format!("journald is not there: {JOURNAL} does not exist")));
    }
    Ok(SinkKind::Journald(JournaldConfig { socket: JOURNAL.into(), fields }))
}

fn no_driver(why: &str) -> Error {
    Error::internal(format!(
        "failed to create task for container: failed to initialize logging driver: {why}"
    ))
}

fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// `10m` as bytes.
fn size(text: &str) -> Option<u64> {
    let lower = text.trim().to_ascii_lowercase();
    let lower = lower.strip_suffix("ib").or_else(|| lower.strip_suffix('b')).unwrap_or(&lower);
    let (digits, shift) = match lower.as_bytes().last()? {
        b'k' => (&lower[..lower.len() - 1], 10),
        b'm' => (&lower[..lower.len() - 1], 20),
        b'g' => (&lower[..lower.len() - 1], 30),
        _ => (lower, 0),
    };
    digits.trim().parse::<u64>().ok()?.checked_mul(1 << shift).filter(|bytes| *bytes > 0)
}

/// The labels and variables that go with every line.
fn attributes(record: &Record, options: &Options<'_>) -> Result<BTreeMap<String, String>> {
    let mut attributes = BTreeMap::new();
    let labels = record.config.labels.iter().flatten().map(|(name, value)| (name.as_str(), value.as_str()));
    let variables = record.config.env.iter().flatten().filter_map(|variable| variable.split_once('='));
    let mut add = |list: &str, pattern: &str, all: &mut dyn Iterator<Item = (&str, &str)>| -> Result<()> {
        let names: Vec<&str> = options.get(list).unwrap_or_default().split(',').map(str::trim).collect();
        let pattern = options
            .get(pattern)
            .map(|text| {
                regex::Regex::new(text).map_err(|error| Error::invalid(pattern.to_owned()).because(error))
            })
            .transpose()?;
        for (name, value) in all {
            if names.contains(&name) || pattern.as_ref().is_some_and(|pattern| pattern.is_match(name)) {
                attributes.insert(name.to_owned(), value.to_owned());
            }
        }
        Ok(())
    };
    add("labels", "labels-regex", &mut labels.into_iter())?;
    add("env", "env-regex", &mut variables.into_iter())?;
    Ok(attributes)
}

const DEFAULT_TAG: &str = "{{.ID}}";

fn tag_of(record: &Record, template: &str) -> Result<String> {
    expand(template, |field| {
        Some(match field {
            ".ID" => crate::ids::short(&record.id).to_owned(),
            ".FullID" => record.id.clone(),
            ".Name" => record.name.clone(),
            ".ImageID" => {
                let id = record.image_id.trim_start_matches("sha256:");
                crate::ids::short(id).to_owned()
            }
            ".ImageFullID" => record.image_id.clone(),
            ".ImageName" => record.image().to_owned(),
            ".DaemonName" => "docker".to_owned(),
            _ => return None,
        })
    })
}

/// Replaces each `{{.Field}}`.
fn expand(template: &str, value: impl Fn(&str) -> Option<String>) -> Result<String> {
    const FIELDS: [&str; 7] =
        [".ID", ".FullID", ".Name", ".ImageID", ".ImageFullID", ".ImageName", ".DaemonName"];
    let wrong = |what: &str| {
        Error::invalid(format!("invalid log tag {template:?}: {what}; the fields are {}", FIELDS.join(", ")))
    };
    let mut out = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        out.push_str(before);
        let (field, behind) = after.split_once("}}").ok_or_else(|| wrong("a }} is missing"))?;
        let field = field.trim();
        if !FIELDS.contains(&field) {
            return Err(wrong(&format!("{field} is not one of its fields")));
        }
        out.push_str(&value(field).unwrap_or_default());
        rest = behind;
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(driver: &str, pairs: &[(&str, &str)]) -> Result<()> {
        let options = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        check(driver, Some(&options))
    }

    #[test]
    fn drivers_and_options_are_checked() {
        assert!(with("json-file", &[("max-size", "10m"), ("max-file", "3")]).is_ok());
        assert!(with("json-file", &[("max-size", "big")]).is_err());
        assert_eq!(
            with("json-file", &[("x", "y")]).unwrap_err().to_string(),
            "unknown log opt 'x' for json-file log driver"
        );
        assert_eq!(
            check("x", None).unwrap_err().to_string(),
            "logger: no log driver named 'x' is registered"
        );
        assert!(with("syslog", &[("syslog-address", "ftp://x")]).is_err());
        assert!(with("syslog", &[("syslog-facility", "local9")]).is_err());
        assert!(with("fluentd", &[("fluentd-address", "h:1"), ("tag", "{{.Nope}}")]).is_err());
        assert!(with("local", &[("max-buffer-size", "1m")]).is_err());
        assert!(with("local", &[("mode", "non-blocking"), ("max-buffer-size", "1m")]).is_ok());
        assert_eq!(size("10m"), Some(10 << 20));
    }

    #[test]
    fn tags_are_templates() {
        let expanded = expand("a-{{.Name}}/{{ .ID }}", |field| Some(field.to_owned())).unwrap();
        assert_eq!(expanded, "a-.Name/.ID");
        expand("{{.Name", |_| None).unwrap_err();
    }
}
