//! Reading the daemon's settings from the command line and the configuration file.
//!
//! Invariant: a setting is built, always so, warned about or refused; none is silently ignored. A key in the file
//! and its flag may not both be given.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

pub use super::table::{Built, Kind, SETTINGS, Setting};
use Built::{Always, Refuse, Warn, Yes};
use Kind::{Any, List, Number, Pools, Size, Switch, Text, Ulimits};

/// The settings that were given, by key, checked for their kind.
pub type Given = BTreeMap<&'static str, Value>;

/// What the command line said.
#[derive(Debug, Default)]
pub struct CommandLine {
    pub given: Given,
    pub config_file: Option<PathBuf>,
    pub validate: bool,
    pub help: bool,
    pub version: bool,
}

/// Why settings cannot be used; each is one line for the person who gave them.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("{0}\nSee 'brig daemon --help'")]
    Flag(String),
    #[error("read the configuration file {}", .path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the configuration file {} is not valid JSON", .path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("the configuration file {}: {message}", .path.display())]
    File { path: PathBuf, message: String },
    #[error("{name}: {message}")]
    Value { name: String, message: String },
}

/// Parses `brig daemon`'s arguments (without the program's and the command's name).
pub fn command_line(args: impl IntoIterator<Item = OsString>) -> Result<CommandLine, SettingsError> {
    use lexopt::Arg;
    let flag_error = |error: lexopt::Error| SettingsError::Flag(error.to_string());
    let mut parsed = CommandLine::default();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next().map_err(flag_error)? {
        let setting = match arg {
            Arg::Long("help") => {
                parsed.help = true;
                continue;
            }
            Arg::Short('h') => {
                parsed.help = true;
                continue;
            }
            Arg::Long("version") | Arg::Short('v') => {
                parsed.version = true;
                continue;
            }
            Arg::Long("validate") => {
                parsed.validate = true;
                continue;
            }
            Arg::Long("config-file") => {
                parsed.config_file = Some(PathBuf::from(parser.value().map_err(flag_error)?));
                continue;
            }
            Arg::Long(name) => SETTINGS
                .iter()
                .find(|setting| setting.flag == name && !setting.help.is_empty())
                .ok_or_else(|| SettingsError::Flag(format!("unknown flag: --{name}")))?,
            Arg::Short(letter) => {
                SETTINGS.iter().find(|setting| setting.short == Some(letter)).ok_or_else(|| {
                    SettingsError::Flag(format!("unknown shorthand flag: '{letter}' in -{letter}"))
                })?
            }
            Arg::Value(value) => {
                return Err(SettingsError::Flag(format!(
                    "brig daemon takes no arguments, but got {:?}",
                    value.to_string_lossy()
                )));
            }
        };
        let text = if setting.kind == Switch {
            parser.optional_value().map_or(Ok("true".to_owned()), OsString::into_string)
        } else {
            parser.value().map_err(flag_error)?.into_string()
        };
        let text =
            text.map_err(|_raw| SettingsError::Flag(format!("--{}: the value is not UTF-8", setting.flag)))?;
        add_flag(&mut parsed.given, setting, &text)
            .map_err(|message| SettingsError::Value { name: format!("--{}", setting.flag), message })?;
    }
    Ok(parsed)
}

/// Reads a configuration file's settings.
pub fn read_file(path: &Path) -> Result<Given, SettingsError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| SettingsError::Read { path: path.to_owned(), source })?;
    let fail = |message: String| SettingsError::File { path: path.to_owned(), message };
    if text.trim().is_empty() {
        return Ok(Given::new());
    }
    let object: Map<String, Value> = serde_json::from_str(&text)
        .map_err(|source| SettingsError::Json { path: path.to_owned(), source })?;
    let mut given = Given::new();
    let mut unknown = Vec::new();
    for (key, value) in object {
        let Some(setting) = SETTINGS.iter().find(|setting| setting.key == key) else {
            unknown.push(key);
            continue;
        };
        if value.is_null() {
            continue;
        }
        let value = check(setting, value).map_err(|message| fail(format!("{key}: {message}")))?;
        given.insert(setting.key, value);
    }
    if !unknown.is_empty() {
        return Err(fail(format!(
            "the following directives don't match any configuration option: {}",
            unknown.join(", ")
        )));
    }
    Ok(given)
}

/// Joins flags and file; a setting in both is an error, as it is for dockerd.
pub fn merge(flags: Given, file: Given, path: &Path) -> Result<Given, SettingsError> {
    let both: Vec<String> = flags
        .iter()
        .filter_map(|(key, flag)| {
            file.get(key).map(|in_file| format!("{key}: (from flag: {flag}, from file: {in_file})"))
        })
        .collect();
    if !both.is_empty() {
        return Err(SettingsError::File {
            path: path.to_owned(),
            message: format!(
                "the following directives are specified both as a flag and in the configuration file: {}",
                both.join(", ")
            ),
        });
    }
    let mut merged = file;
    merged.extend(flags);
    Ok(merged)
}

/// Refuses what is not built; returns the warnings for what has no effect.
pub fn review(given: &Given) -> Result<Vec<String>, SettingsError> {
    let mut warnings = Vec::new();
    for setting in SETTINGS {
        let Some(value) = given.get(setting.key) else { continue };
        match setting.built {
            Yes | Always => {}
            Warn(sentence) => warnings.push(format!("{} has no effect: {sentence}", setting.key)),
            Refuse(harmless, sentence) => {
                let shown = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                let empty = value.as_array().is_some_and(Vec::is_empty)
                    || value.as_object().is_some_and(Map::is_empty);
                if !empty && !harmless.contains(&shown.as_str()) {
                    return Err(SettingsError::Value {
                        name: setting.key.to_owned(),
                        message: format!("{shown} is refused: {sentence}"),
                    });
                }
            }
        }
    }
    Ok(warnings)
}

/// The text of `--help`.
pub fn help() -> String {
    let mut text = String::from(
        "Usage: brig daemon [OPTIONS]\n\nRuns the engine in the foreground and serves the Engine API.\n\nOptions:\n",
    );
    let mut line = |short: Option<char>, flag: &str, value: &str, help: &str| {
        let short = short.map_or_else(|| "    ".to_owned(), |letter| format!("-{letter}, "));
        let left = format!("  {short}--{flag}{value}");
        for part in [format!("{left:<42}"), " ".to_owned(), help.to_owned(), "\n".to_owned()] {
            text.push_str(&part);
        }
    };
    line(None, "config-file", " FILE", "Configuration file (default /etc/brigantine/daemon.json)");
    line(None, "validate", "", "Check the settings and exit");
    line(Some('v'), "version", "", "Print the version and exit");
    line(Some('h'), "help", "", "Print this help and exit");
    for setting in SETTINGS.iter().filter(|setting| !setting.help.is_empty()) {
        let value = match setting.kind {
            Switch => "",
            Number => " N",
            Size => " BYTES",
            Kind::Map | Ulimits | Kind::Runtimes | Kind::NetworkOptions => " NAME=VALUE",
            Text | List | Pools | Any => " VALUE",
        };
        line(setting.short, setting.flag, value, setting.help);
    }
    text
}

/// Adds one flag's text to what was given.
fn add_flag(given: &mut Given, setting: &'static Setting, text: &str) -> Result<(), String> {
    let list = |given: &mut Given, item: Value| {
        if let Value::Array(items) = given.entry(setting.key).or_insert_with(|| json!([])) {
            items.push(item);
        }
    };
    let entry = |given: &mut Given, name: &str, item: Value| {
        if let Value::Object(items) = given.entry(setting.key).or_insert_with(|| json!({})) {
            items.insert(name.to_owned(), item);
        }
    };
    match setting.kind {
        Switch => {
            let on = match text {
                "1" | "t" | "T" | "true" | "TRUE" | "True" => true,
                "0" | "f" | "F" | "false" | "FALSE" | "False" => false,
                other => return Err(format!("{other:?} is neither true nor false")),
            };
            given.insert(setting.key, json!(on));
        }
        Text => {
            given.insert(setting.key, json!(text));
        }
        Number => {
            let number: i64 = text.parse().map_err(|_error| format!("{text:?} is not a whole number"))?;
            given.insert(setting.key, json!(number));
        }
        Size => {
            given.insert(setting.key, json!(bytes(text)?));
        }
        List => list(given, json!(text)),
        Any => list(given, json!(text)),
        Kind::Map => {
            let (name, value) = text.split_once('=').unwrap_or((text, ""));
            entry(given, name, json!(value));
        }
        Kind::NetworkOptions => {
            let wrong = || format!("{text:?}: expected driver=option=value");
            let (driver, option) = text.split_once('=').ok_or_else(wrong)?;
            let (name, value) = option.split_once('=').ok_or_else(wrong)?;
            let known = given.get(setting.key).and_then(|all| all.get(driver)).cloned();
            let mut options = known.unwrap_or_else(|| json!({}));
            options[name] = json!(value);
            entry(given, driver, options);
        }
        Kind::Runtimes => {
            let (name, path) = text.split_once('=').ok_or_else(|| format!("{text:?}: expected name=path"))?;
            entry(given, name, check_runtime(name, json!({ "path": path }))?);
        }
        Pools => {
            let mut pool = Map::new();
            for part in text.split(',') {
                match part.split_once('=') {
                    Some(("base", base)) => pool.insert("base".to_owned(), json!(base)),
                    Some(("size", size)) => {
                        let size: u8 =
                            size.parse().map_err(|_error| format!("{size:?} is not a prefix length"))?;
                        pool.insert("size".to_owned(), json!(size))
                    }
                    _ => return Err(format!("{part:?}: expected base=SUBNET,size=PREFIX")),
                };
            }
            list(given, check_pool(Value::Object(pool))?);
        }
        Ulimits => {
            let (name, limits) =
                text.split_once('=').ok_or_else(|| format!("{text:?}: expected name=soft[:hard]"))?;
            let number =
                |text: &str| text.parse::<i64>().map_err(|_error| format!("{text:?} is not a whole number"));
            let (soft, hard) = match limits.split_once(':') {
                Some((soft, hard)) => (number(soft)?, number(hard)?),
                None => (number(limits)?, number(limits)?),
            };
            entry(given, name, check_ulimit(json!({"Name": name, "Soft": soft, "Hard": hard}))?);
        }
    }
    Ok(())
}

/// Checks and normalises a value from the file.
fn check(setting: &Setting, value: Value) -> Result<Value, String> {
    let wrong = |expected: &str, value: &Value| Err(format!("expected {expected}, got {value}"));
    match (setting.kind, value) {
        (Any, value) => Ok(value),
        (Switch, value @ Value::Bool(_)) => Ok(value),
        (Switch, value) => wrong("true or false", &value),
        (Text, value @ Value::String(_)) => Ok(value),
        (Text, value) => wrong("a string", &value),
        (Number, value) if value.is_i64() => Ok(value),
        (Number, value) => wrong("a whole number", &value),
        (Size, Value::String(text)) => bytes(&text).map(|size| json!(size)),
        (Size, value) if value.is_i64() => Ok(value),
        (Size, value) => wrong("a size", &value),
        (List, Value::Array(items)) if items.iter().all(Value::is_string) => Ok(Value::Array(items)),
        (List, value) => wrong("a list of strings", &value),
        (Kind::Map, Value::Object(items)) if items.values().all(Value::is_string) => Ok(Value::Object(items)),
        (Kind::Map, value) => wrong("an object of strings", &value),
        (Kind::NetworkOptions, Value::Object(items))
            if items
                .values()
                .all(|options| options.as_object().is_some_and(|all| all.values().all(Value::is_string))) =>
        {
            Ok(Value::Object(items))
        }
        (Kind::NetworkOptions, value) => wrong("an object of objects of strings", &value),
        (Kind::Runtimes, Value::Object(items)) => {
            let items: Result<Map<String, Value>, String> = items
                .into_iter()
                .map(|(name, runtime)| Ok((name.clone(), check_runtime(&name, runtime)?)))
                .collect();
            items.map(Value::Object)
        }
        (Kind::Runtimes, value) => wrong("an object of {\"path\":…,\"runtimeArgs\":[…]}", &value),
        (Pools, Value::Array(items)) => items.into_iter().map(check_pool).collect(),
        (Pools, value) => wrong("a list of {\"base\":…,\"size\":…}", &value),
        (Ulimits, Value::Object(items)) => {
            let items: Result<Map<String, Value>, String> =
                items.into_iter().map(|(name, value)| Ok((name, check_ulimit(value)?))).collect();
            items.map(Value::Object)
        }
        (Ulimits, value) => wrong("an object of {\"Name\":…,\"Soft\":…,\"Hard\":…}", &value),
    }
}

fn check_pool(pool: Value) -> Result<Value, String> {
    let fits = pool.get("base").is_some_and(Value::is_string) && pool.get("size").is_some_and(Value::is_u64);
    if fits { Ok(pool) } else { Err(format!("an address pool needs base and size, got {pool}")) }
}

fn check_runtime(name: &str, runtime: Value) -> Result<Value, String> {
    if name.is_empty() || name.starts_with('/') || name == "brig-runtime" {
        return Err(format!("{name:?} cannot be the name of another runtime"));
    }
    let Value::Object(parts) = &runtime else {
        return Err(format!("{name}: expected an object with a path, got {runtime}"));
    };
    for (key, value) in parts {
        match (key.as_str(), value) {
            ("path", Value::String(path)) if path.starts_with('/') => {}
            ("path", value) => return Err(format!("{name}: {value} is not an absolute path")),
            ("runtimeArgs", Value::Array(args)) if args.iter().all(Value::is_string) => {}
            ("runtimeArgs", value) => {
                return Err(format!("{name}: runtimeArgs: expected a list of strings, got {value}"));
            }
            (other, _) => {
                return Err(format!(
                    "{name}: {other} is not supported: a runtime is a program with runc's command line, given by path and runtimeArgs"
                ));
            }
        }
    }
    if parts.contains_key("path") { Ok(runtime) } else { Err(format!("{name}: a path is missing")) }
}

fn check_ulimit(limit: Value) -> Result<Value, String> {
    let number = |key: &str| limit.get(key).and_then(Value::as_i64);
    match (number("Soft"), number("Hard")) {
        (Some(soft), Some(hard)) if hard != -1 && (soft > hard || soft == -1) => {
            Err(format!("the soft limit {soft} is above the hard limit {hard}"))
        }
        (Some(_), Some(_)) => Ok(limit),
        _ => Err(format!("a limit needs Soft and Hard, got {limit}")),
    }
}

/// Bytes from `64`, `64k`, `64M`, `64MB`, `1GiB`: units of 1024.
pub fn bytes(text: &str) -> Result<i64, String> {
    let wrong = || format!("{text:?} is not a size such as 64M");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: i64 = number.parse().map_err(|_error| wrong())?;
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(args: &[&str]) -> Result<CommandLine, String> {
        command_line(args.iter().map(OsString::from)).map_err(|error| error.to_string())
    }

    #[test]
    fn flags_take_dockerds_forms() {
        let line = flags(&[
            "-D",
            "-l",
            "warn",
            "--icc=false",
            "-H",
            "unix:///a",
            "--host=fd://",
            "--log-opt",
            "max-size=1m",
            "--default-address-pool",
            "base=10.0.0.0/8,size=24",
            "--default-ulimit",
            "nofile=1024:2048",
            "--default-shm-size=1g",
            "--mtu",
            "1400",
        ])
        .unwrap();
        assert_eq!(line.given["debug"], json!(true));
        assert_eq!(line.given["icc"], json!(false));
        assert_eq!(line.given["hosts"], json!(["unix:///a", "fd://"]));
        assert_eq!(line.given["log-opts"], json!({"max-size": "1m"}));
        assert_eq!(line.given["default-address-pools"], json!([{"base": "10.0.0.0/8", "size": 24}]));
        assert_eq!(line.given["default-ulimits"]["nofile"]["Hard"], json!(2048));
        assert_eq!(line.given["default-shm-size"], json!(1 << 30));
        assert_eq!(line.given["mtu"], json!(1400));
    }

    #[test]
    fn what_is_unknown_or_wrong_is_named() {
        assert!(flags(&["--nonsense"]).unwrap_err().contains("unknown flag: --nonsense"));
        assert!(flags(&["extra"]).unwrap_err().contains("takes no arguments"));
        assert!(flags(&["--mtu", "big"]).unwrap_err().contains("--mtu: \"big\" is not a whole number"));
        assert!(flags(&["--debug=perhaps"]).unwrap_err().contains("neither true nor false"));
        assert!(flags(&["--default-ulimit", "nofile=9:3"]).unwrap_err().contains("above the hard limit"));
    }

    fn file(text: &str) -> Result<Given, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("daemon.json");
        std::fs::write(&path, text).unwrap();
        read_file(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn the_file_is_checked() {
        let given = file(r#"{"debug":true,"labels":["a=b"],"default-shm-size":"128M","mtu":null}"#).unwrap();
        assert_eq!(given["default-shm-size"], json!(128 << 20));
        assert!(!given.contains_key("mtu"));
        assert!(
            file(r#"{"colour":1,"debug":true}"#)
                .unwrap_err()
                .contains("don't match any configuration option: colour")
        );
        assert!(file(r#"{"debug":"yes"}"#).unwrap_err().contains("debug: expected true or false"));
        assert!(file("{").unwrap_err().contains("not valid JSON"));
        assert!(file("").unwrap().is_empty());
    }

    #[test]
    fn runtimes_are_programs_with_arguments() {
        let given = flags(&["--add-runtime", "crun=/usr/bin/crun"]).unwrap().given;
        assert_eq!(given["runtimes"], json!({"crun": {"path": "/usr/bin/crun"}}));
        assert!(flags(&["--add-runtime", "x=y"]).unwrap_err().contains("\"y\" is not an absolute path"));
        assert!(flags(&["--add-runtime", "lonely"]).unwrap_err().contains("expected name=path"));
        let given = file(r#"{"runtimes":{"r":{"path":"/bin/r","runtimeArgs":["--debug"]}}}"#).unwrap();
        assert_eq!(given["runtimes"]["r"]["runtimeArgs"], json!(["--debug"]));
        let error = file(r#"{"runtimes":{"k":{"runtimeType":"io.containerd.kata.v2"}}}"#).unwrap_err();
        assert!(error.contains("k: runtimeType is not supported"), "{error}");
    }

    #[test]
    fn a_setting_in_both_places_is_a_conflict() {
        let flags = flags(&["--debug"]).unwrap().given;
        let error =
            merge(flags, file(r#"{"debug":false}"#).unwrap(), Path::new("/f")).unwrap_err().to_string();
        assert!(error.contains("specified both as a flag and in the configuration file: debug: (from flag: true, from file: false)"), "{error}");
    }

    #[test]
    fn what_is_not_built_is_refused_or_warned_about() {
        let review = |args: &[&str]| review(&flags(args).unwrap().given).map_err(|error| error.to_string());
        assert!(review(&["--selinux-enabled"]).unwrap_err().contains("SELinux is not supported"));
        assert!(review(&["--tlsverify=false"]).is_ok());
        assert_eq!(review(&["--experimental"]).unwrap().len(), 1);
        assert!(review(&["--storage-driver", "overlay2", "--live-restore"]).unwrap().is_empty());
        assert!(review(&["--live-restore=false"]).unwrap_err().contains("outlive the daemon"));
    }
}
