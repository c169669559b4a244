//! `RUN --mount`: what is mounted, and how it is written.

use std::collections::BTreeMap;

use super::flags::boolean;

/// What a `--mount` is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountKind {
    Bind,
    Cache,
    Tmpfs,
    Secret,
    Ssh,
}

/// A decoded `--mount`; variables are filled in already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub kind: MountKind,
    pub from: Option<String>,
    pub source: Option<String>,
    pub target: Option<String>,
    pub id: Option<String>,
    pub env: Option<String>,
    pub read_only: Option<bool>,
    pub required: bool,
    /// `shared`, `private` or `locked`.
    pub sharing: String,
    pub size: Option<i64>,
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

impl Mount {
    /// Decodes `type=cache,target=/x`; values go through `expand`, but that of `from`.
    pub fn parse(text: &str, expand: &dyn Fn(&str) -> Result<String, String>) -> Result<Self, String> {
        let mut fields: BTreeMap<String, String> = BTreeMap::new();
        for field in csv(text)? {
            let (key, value) = match field.split_once('=') {
                Some((key, value)) => {
                    let key = key.trim().to_ascii_lowercase();
                    let value = if key == "from" { value.to_owned() } else { expand(value)? };
                    (key, Some(value))
                }
                None => (field.trim().to_ascii_lowercase(), None),
            };
            let key = match key.as_str() {
                "src" => "source".to_owned(),
                "dst" | "destination" => "target".to_owned(),
                "ro" => "readonly".to_owned(),
                "rw" => "readwrite".to_owned(),
                _ => key,
            };
            let value = match (value, key.as_str()) {
                (Some(value), _) => value,
                (None, "readonly" | "readwrite" | "required") => "true".to_owned(),
                (None, _) => return Err(format!("invalid field '{field}' must be a key=value pair")),
            };
            fields.insert(key, value);
        }
        let kind =
            match fields.remove("type").unwrap_or_else(|| "bind".to_owned()).to_ascii_lowercase().as_str() {
                "bind" => MountKind::Bind,
                "cache" => MountKind::Cache,
                "tmpfs" => MountKind::Tmpfs,
                "secret" => MountKind::Secret,
                "ssh" => MountKind::Ssh,
                other => return Err(format!("unsupported mount type {other:?}")),
            };
        let allowed: &[&str] = match kind {
            MountKind::Bind => &["target", "source", "from", "readonly", "readwrite"],
            MountKind::Cache => {
                &["id", "target", "readonly", "readwrite", "sharing", "from", "source", "mode", "uid", "gid"]
            }
            MountKind::Tmpfs => &["target", "size"],
            MountKind::Secret => &["id", "source", "target", "env", "required", "mode", "uid", "gid"],
            MountKind::Ssh => &["id", "target", "required", "mode", "uid", "gid"],
        };
        if let Some(key) = fields.keys().find(|key| !allowed.contains(&key.as_str())) {
            return Err(format!("unexpected key '{key}' for mount type '{}'", kind.as_str()));
        }
        let flag = |name: &str| -> Result<Option<bool>, String> {
            fields.get(name).map(|value| boolean(name, Some(value.as_str()))).transpose()
        };
        let number = |name: &str, radix: u32| -> Result<Option<u32>, String> {
            fields
                .get(name)
                .map(|value| {
                    u32::from_str_radix(value, radix)
                        .map_err(|_bad| format!("invalid value {value} for {name}"))
                })
                .transpose()
        };
        let sharing =
            fields.get("sharing").cloned().unwrap_or_else(|| "shared".to_owned()).to_ascii_lowercase();
        if !matches!(sharing.as_str(), "shared" | "private" | "locked") {
            return Err(format!("unsupported sharing value {sharing:?}"));
        }
        let read_only = match (flag("readonly")?, flag("readwrite")?) {
            (Some(read_only), None) => Some(read_only),
            (None, Some(writable)) => Some(!writable),
            (None, None) => None,
            _ => return Err("readonly and readwrite exclude each other".to_owned()),
        };
        let mount = Self {
            kind,
            from: fields.get("from").cloned(),
            source: fields.get("source").cloned(),
            target: fields.get("target").cloned(),
            id: fields.get("id").cloned(),
            env: fields.get("env").cloned(),
            read_only,
            required: flag("required")?.unwrap_or_default(),
            sharing,
            size: fields
                .get("size")
                .map(|size| bytes(size).ok_or_else(|| format!("invalid value {size} for size")))
                .transpose()?,
            mode: number("mode", 8)?,
            uid: number("uid", 10)?,
            gid: number("gid", 10)?,
        };
        if matches!(kind, MountKind::Bind | MountKind::Cache | MountKind::Tmpfs) && mount.target.is_none() {
            return Err(format!("mount type '{}' needs target=", kind.as_str()));
        }
        Ok(mount)
    }
}

impl MountKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bind => "bind",
            Self::Cache => "cache",
            Self::Tmpfs => "tmpfs",
            Self::Secret => "secret",
            Self::Ssh => "ssh",
        }
    }
}

/// One record of comma-separated values; a field in double quotes may hold commas, `""` is a quote.
pub fn csv(text: &str) -> Result<Vec<String>, String> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let Some(last) = fields.last_mut() else { break };
        match c {
            '"' if quoted && chars.next_if_eq(&'"').is_some() => last.push('"'),
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            c => last.push(c),
        }
    }
    if quoted { Err(format!("a quote in {text:?} is not closed")) } else { Ok(fields) }
}

/// `64m` in bytes.
pub fn bytes(text: &str) -> Option<i64> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit()).unwrap_or(lower.len());
    let number: i64 = lower[..digits].parse().ok()?;
    let shift = match lower[digits..].trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}
