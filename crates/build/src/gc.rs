//! Policies by which the cache is kept within bounds, in the form of `builder.gc` of `daemon.json`
//! (docs.docker.com/build/cache/garbage-collection).
//!
//! Invariant: policies are applied in order, and each of them to what the ones before have left.

use std::time::Duration;

use serde_json::Value;

use crate::Builder;
use crate::error::{Result, invalid};
use crate::prune::{Chosen, Prune, Pruned, Space};

const DAY: Duration = Duration::from_hours(24);

/// What the cache is kept to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gc {
    pub enabled: bool,
    /// Shares of the disk are made of it when the daemon starts; none means the defaults.
    policies: Vec<Policy>,
    defaults: Sizes,
}

/// One policy as it was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Policy {
    all: bool,
    chosen: Chosen,
    sizes: Sizes,
}

/// Sizes as they were written: bytes or shares of the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sizes {
    reserved: Option<Size>,
    max_used: Option<Size>,
    min_free: Option<Size>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    Bytes(u64),
    /// In hundredths.
    Share(u64),
}

impl Size {
    fn of(self, disk: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Share(share) => disk / 100 * share,
        }
    }
}

impl Default for Gc {
    fn default() -> Self {
        Self { enabled: true, policies: Vec::new(), defaults: Sizes::default() }
    }
}

impl Gc {
    /// Reads the value of `builder` in the configuration file.
    pub fn parse(builder: &Value) -> Result<Self, String> {
        let mut gc = Self::default();
        let mut known = Fields::of(builder, "builder")?;
        // Entitlements say what a build may ask for: nothing beyond the sandbox, whatever is set.
        known.take("entitlements");
        let Some(value) = known.take("gc") else { return known.none_left().map(|()| gc) };
        known.none_left()?;
        let mut fields = Fields::of(value, "builder.gc")?;
        if let Some(enabled) = fields.take("enabled") {
            gc.enabled = enabled.as_bool().ok_or("builder.gc.enabled must be true or false")?;
        }
        gc.defaults = sizes(&mut fields, "default")?;
        if let Some(policies) = fields.take("policy") {
            for policy in policies.as_array().ok_or("builder.gc.policy must be a list")? {
                gc.policies.push(parse_policy(policy)?);
            }
        }
        fields.none_left()?;
        Ok(gc)
    }

    /// The policies for a disk of this size, as BuildKit's defaults are where none are given.
    fn prunes(&self, disk: u64) -> Vec<Prune> {
        let space = |sizes: Sizes| Space {
            reserved: sizes.reserved.map_or(0, |size| size.of(disk)),
            max_used: sizes.max_used.map_or(0, |size| size.of(disk)),
            min_free: sizes.min_free.map_or(0, |size| size.of(disk)),
        };
        if !self.policies.is_empty() {
            let prune = |policy: &Policy| Prune {
                // A policy is about everything it does not leave out.
                all: true,
                chosen: policy.chosen.clone(),
                space: space(policy.sizes),
            };
            return self.policies.iter().map(prune).collect();
        }
        let given = self.defaults;
        let all = if given == Sizes::default() {
            Sizes {
                reserved: Some(Size::Share(10)),
                max_used: Some(Size::Share(75)),
                min_free: Some(Size::Share(20)),
            }
        } else {
            given
        };
        let space = space(all);
        let cheap = (512 << 20).max(space.reserved / 1000 * 138);
        vec![
            Prune {
                all: true,
                chosen: Chosen {
                    unused_for: Some(DAY * 2),
                    kinds: vec!["exec.cachemount".to_owned(), "source.local".to_owned()],
                    ..Chosen::default()
                },
                space: Space { max_used: cheap, ..Space::default() },
            },
            Prune { all: true, chosen: Chosen { unused_for: Some(DAY * 60), ..Chosen::default() }, space },
            Prune { all: true, space, ..Prune::default() },
        ]
    }
}

impl Builder {
    /// Keeps the cache within bounds. Blocks.
    pub fn collect(&self, gc: &Gc) -> Result<Pruned> {
        let mut all = Pruned::default();
        if !gc.enabled {
            return Ok(all);
        }
        for prune in gc.prunes(self.disk()?) {
            let pruned = self.prune(&prune)?;
            all.deleted.extend(pruned.deleted);
            all.reclaimed += pruned.reclaimed;
        }
        Ok(all)
    }
}

/// `unused-for=48h`, `type==exec.cachemount`, `id=…`: as filters of BuildKit and of `builder prune` are written.
pub fn filter(chosen: &mut Chosen, key: &str, value: &str) -> Result<()> {
    match key {
        "until" | "unused-for" => {
            let nanos = crate::dockerfile::instruction::duration(value)
                .ok_or_else(|| invalid(format!("invalid filter '{key}={value}': it is not a duration")))?;
            chosen.unused_for = Some(Duration::from_nanos(nanos.unsigned_abs()));
        }
        "type" => {
            // What others tell apart are kinds of steps here.
            let kind = match value {
                "exec.cachemount" | "source.local" => value,
                "regular" | "source.git.checkout" | "internal" | "frontend" => "regular",
                other => {
                    return Err(invalid(format!(
                        "invalid filter 'type={other}': regular, source.local and exec.cachemount are known"
                    )));
                }
            };
            chosen.kinds.push(kind.to_owned());
        }
        "id" => chosen.ids.push(value.to_owned()),
        "description" => chosen.description = Some(value.trim_matches('~').to_owned()),
        "shared" => chosen.shared = Some(!matches!(value, "false" | "0")),
        "private" => chosen.shared = Some(matches!(value, "false" | "0")),
        // What is in use is never taken; there are no others.
        "inuse" | "mutable" | "immutable" => {}
        other => return Err(invalid(format!("invalid filter '{other}'"))),
    }
    Ok(())
}

fn parse_policy(value: &Value) -> Result<Policy, String> {
    let mut fields = Fields::of(value, "builder.gc.policy")?;
    let mut policy = Policy { sizes: sizes(&mut fields, "")?, ..Policy::default() };
    if let Some(all) = fields.take("all") {
        policy.all = all.as_bool().ok_or("builder.gc.policy.all must be true or false")?;
    }
    if let Some(duration) = fields.take("keepDuration") {
        let text = duration.as_str().ok_or("builder.gc.policy.keepDuration must be a text, such as 48h")?;
        filter(&mut policy.chosen, "unused-for", text).map_err(|error| error.to_string())?;
    }
    let pairs: Vec<String> = match fields.take("filter") {
        None => Vec::new(),
        // A list of texts, or an object of them.
        Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        Some(Value::Object(all)) => {
            all.iter().map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default())).collect()
        }
        Some(_) => return Err("builder.gc.policy.filter must be a list of texts".to_owned()),
    };
    for pair in pairs {
        let (key, value) = pair.split_once('=').unwrap_or((pair.as_str(), "true"));
        filter(&mut policy.chosen, key.trim_end_matches('='), value.trim_start_matches('='))
            .map_err(|error| error.to_string())?;
    }
    fields.none_left()?;
    Ok(policy)
}

/// `reservedSpace`, `maxUsedSpace` and `minFreeSpace`, with a prefix, and the older `keepStorage`.
fn sizes(fields: &mut Fields<'_>, prefix: &str) -> Result<Sizes, String> {
    let mut take = |name: &str| -> Result<Option<Size>, String> {
        let key = if prefix.is_empty() {
            name.to_owned()
        } else {
            let mut letters = name.chars();
            let first = letters.next().map(|first| first.to_ascii_uppercase());
            format!("{prefix}{}{}", first.unwrap_or_default(), letters.as_str())
        };
        fields.take(&key).map(|value| size(value).ok_or_else(|| wrong(&key, value))).transpose()
    };
    let keep = take("keepStorage")?;
    let reserved = take("reservedSpace")?;
    Ok(Sizes {
        reserved: reserved.or(keep.filter(|_| !prefix.is_empty())),
        // In a policy it is a cap: what has been written so for years must hold.
        max_used: take("maxUsedSpace")?.or(keep),
        min_free: take("minFreeSpace")?,
    })
}

fn wrong(key: &str, value: &Value) -> String {
    format!("{key}: {value} is not a size, such as \"20GB\" or \"10%\"")
}

fn size(value: &Value) -> Option<Size> {
    if let Some(bytes) = value.as_u64() {
        return Some(Size::Bytes(bytes));
    }
    let text = value.as_str()?.trim();
    if let Some(share) = text.strip_suffix('%') {
        return share.trim().parse().ok().filter(|share| *share <= 100).map(Size::Share);
    }
    let bytes = crate::dockerfile::mount::bytes(text)?;
    u64::try_from(bytes).ok().map(Size::Bytes)
}

/// An object's fields, each to be taken once.
struct Fields<'v> {
    name: &'static str,
    left: Vec<(&'v String, &'v Value)>,
}

impl<'v> Fields<'v> {
    fn of(value: &'v Value, name: &'static str) -> Result<Self, String> {
        let object = value.as_object().ok_or_else(|| format!("{name} must be an object"))?;
        Ok(Self { name, left: object.iter().collect() })
    }

    /// As Go reads JSON: whatever the case.
    fn take(&mut self, key: &str) -> Option<&'v Value> {
        let position = self.left.iter().position(|(name, _)| name.eq_ignore_ascii_case(key))?;
        Some(self.left.swap_remove(position).1)
    }

    fn none_left(&self) -> Result<(), String> {
        match self.left.first() {
            None => Ok(()),
            Some((key, _)) => Err(format!("{}: {key} is not known", self.name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const GB: u64 = 1 << 30;

    #[test]
    fn policies_are_read_as_they_are_written() {
        let gc = Gc::parse(&json!({"gc": {"enabled": true, "policy": [
            {"keepStorage": "1GB", "filter": ["unused-for=48h", "type==exec.cachemount"]},
            {"reservedSpace": "10%", "maxUsedSpace": 5, "minFreeSpace": "2GB", "all": true, "keepDuration": "1h"},
        ]}}))
        .unwrap();
        let prunes = gc.prunes(100 * GB);
        assert_eq!(prunes.len(), 2);
        assert_eq!(prunes[0].space.max_used, GB);
        assert_eq!(prunes[0].chosen.unused_for, Some(DAY * 2));
        assert_eq!(prunes[0].chosen.kinds, ["exec.cachemount"]);
        assert_eq!(prunes[1].space, Space { reserved: 10 * GB, max_used: 5, min_free: 2 * GB });
        let gc = Gc::parse(&json!({"GC": {"defaultKeepStorage": "20GB"}})).unwrap();
        let all = gc.prunes(100 * GB).pop().unwrap();
        assert_eq!(all.space, Space { reserved: 20 * GB, max_used: 20 * GB, min_free: 0 });
        assert!(!Gc::parse(&json!({"gc": {"enabled": false}})).unwrap().enabled);
        assert_eq!(Gc::default().prunes(100 * GB).len(), 3);
        for (value, words) in [
            (json!([]), "builder must be an object"),
            (json!({"gx": 1}), "gx is not known"),
            (json!({"gc": {"defaultKeepStorage": "much"}}), "is not a size"),
            (json!({"gc": {"policy": [{"filter": ["color=red"]}]}}), "invalid filter 'color'"),
            (json!({"gc": {"policy": [{"filter": ["until=soon"]}]}}), "is not a duration"),
            (json!({"gc": {"policy": [{"maxUsedSpace": "120%"}]}}), "is not a size"),
        ] {
            let error = Gc::parse(&value).unwrap_err();
            assert!(error.contains(words), "{value}: {error}");
        }
    }
}
