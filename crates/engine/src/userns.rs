//! Which ids of the host the ids in containers stand for: `--userns-remap`.
//!
//! Invariant: a remapping covers container ids from 0 on without a gap, and never with id 0 of the host.

use std::fmt::Write as _;
use std::path::Path;

use brigantine_runtime::spec::{LinuxIdMapping, LinuxIdMappingBuilder};

use crate::error::Context;
use crate::{Error, Result};

/// Docker's name for the user whose subordinate ids `default` takes.
const DEFAULT_USER: &str = "dockremap";

/// Ids that a container needs at least: Debian's `nobody` is 65534.
const LEAST: u32 = 65_536;

/// The kernel's `overflowuid` and `overflowgid`, as it has them unless told otherwise (proc_sys_fs(5)).
const OVERFLOW: u32 = 65_534;

/// A range of the host's ids: the first and how many.
type Range = (u32, u32);

/// The ranges that container ids 0, 1, … stand for, one after the other (subuid(5), subgid(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remap {
    uids: Vec<Range>,
    gids: Vec<Range>,
}

impl Remap {
    /// Reads `default`, `USER[:GROUP]` or `UID[:GID]` with the host's files.
    ///
    /// # Errors
    /// The user or group is unknown, or has fewer than 65,536 subordinate ids.
    pub fn from_host(setting: &str) -> Result<Self> {
        let read = |path: &str| std::fs::read_to_string(Path::new(path)).unwrap_or_default();
        Self::resolve(
            setting,
            &Files {
                passwd: read("/etc/passwd"),
                group: read("/etc/group"),
                subuid: read("/etc/subuid"),
                subgid: read("/etc/subgid"),
            },
        )
    }

    fn resolve(setting: &str, files: &Files) -> Result<Self> {
        let (user, group) = match setting.split_once(':') {
            Some((user, group)) if !user.is_empty() && !group.is_empty() => (user, group),
            Some(_) => return Err(Error::invalid(format!("{setting:?}: expected USER[:GROUP]"))),
            None if setting == "default" => (DEFAULT_USER, DEFAULT_USER),
            None => (setting, setting),
        };
        let user = named(user, "user", &files.passwd)?;
        // A group of the user's own name is what a bare user means; its subordinate ids are listed by that name.
        let group = if setting.contains(':') { named(group, "group", &files.group)? } else { user.clone() };
        Ok(Self {
            uids: ranges(&user, "/etc/subuid", &files.subuid)?,
            gids: ranges(&group, "/etc/subgid", &files.subgid)?,
        })
    }

    /// What a file's owner on the host is in the container: who is nobody there is shown as the kernel shows it.
    pub(crate) fn inside(&self, uid: u32, gid: u32) -> (u32, u32) {
        let of = |ranges: &[Range], id: u32| {
            let mut start = 0_u32;
            for (first, count) in ranges {
                match id.checked_sub(*first) {
                    Some(offset) if offset < *count => return start + offset,
                    _ => start = start.saturating_add(*count),
                }
            }
            OVERFLOW
        };
        (of(&self.uids, uid), of(&self.gids, gid))
    }

    /// What a user and a group of the container are on the host; `None` if one of them has no id there.
    pub(crate) fn outside(&self, uid: u32, gid: u32) -> Option<(u32, u32)> {
        let of = |ranges: &[Range], id: u32| {
            let mut left = id;
            for (first, count) in ranges {
                if left < *count {
                    return Some(first + left);
                }
                left -= count;
            }
            None
        };
        Some((of(&self.uids, uid)?, of(&self.gids, gid)?))
    }

    /// The highest group of a container.
    pub(crate) fn last_group(&self) -> u32 {
        self.gids.iter().fold(0_u32, |sum, (_, count)| sum.saturating_add(*count)).saturating_sub(1)
    }

    /// User and group maps as `/proc/<pid>/uid_map` takes them (user_namespaces(7)).
    pub(crate) fn lines(&self) -> (String, String) {
        let text = |ranges: &[Range]| {
            let mut text = String::new();
            let mut inside = 0_u32;
            for (first, count) in ranges {
                // Writing to a string does not fail.
                writeln!(text, "{inside} {first} {count}").ok();
                inside = inside.saturating_add(*count);
            }
            text
        };
        (text(&self.uids), text(&self.gids))
    }

    /// The same for a runtime specification: users, groups.
    pub(crate) fn mappings(&self) -> Result<(Vec<LinuxIdMapping>, Vec<LinuxIdMapping>)> {
        let list = |ranges: &[Range]| {
            let mut inside = 0_u32;
            let one = |(first, count): &Range| {
                let built = LinuxIdMappingBuilder::default()
                    .container_id(inside)
                    .host_id(*first)
                    .size(*count)
                    .build()
                    .doing(|| "describe an id mapping".to_owned());
                inside = inside.saturating_add(*count);
                built
            };
            ranges.iter().map(one).collect::<Result<Vec<_>>>()
        };
        Ok((list(&self.uids)?, list(&self.gids)?))
    }
}

/// The host's files as text.
#[derive(Debug, Default)]
struct Files {
    passwd: String,
    group: String,
    subuid: String,
    subgid: String,
}

/// A user or group by the two words that subuid(5) may know it by: its name and its number.
#[derive(Debug, Clone)]
struct Named {
    name: Option<String>,
    id: Option<u32>,
    kind: &'static str,
}

fn named(text: &str, kind: &'static str, file: &str) -> Result<Named> {
    let number: Option<u32> = text.parse().ok();
    let entry = file.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let id: u32 = fields.nth(1)?.parse().ok()?;
        (name == text || number == Some(id)).then(|| (name.to_owned(), id))
    });
    match entry {
        Some((name, id)) => Ok(Named { name: Some(name), id: Some(id), kind }),
        // Numbers need no entry.
        None if number.is_some() => Ok(Named { name: None, id: number, kind }),
        None => Err(Error::invalid(format!(
            "there is no {kind} {text:?}; `useradd --system --no-create-home {text}` makes one, and `usermod \
             --add-subuids FIRST-LAST --add-subgids FIRST-LAST {text}` gives it ids for containers"
        ))),
    }
}

fn ranges(who: &Named, path: &str, text: &str) -> Result<Vec<Range>> {
    let shown = who.name.clone().or_else(|| who.id.map(|id| id.to_string())).unwrap_or_default();
    let is_meant = |word: &str| {
        who.name.as_deref() == Some(word) || who.id.is_some() && word.parse::<u32>().ok() == who.id
    };
    let mut found: Vec<Range> = Vec::new();
    for line in text.lines() {
        let mut fields = line.split(':');
        if !fields.next().is_some_and(|word| is_meant(word.trim())) {
            continue;
        }
        let mut number = || fields.next()?.trim().parse::<u32>().ok();
        let (Some(first), Some(count)) = (number(), number()) else {
            return Err(Error::invalid(format!("{path}: {line:?} is not NAME:FIRST:COUNT")));
        };
        if first == 0 || count == 0 || first.checked_add(count).is_none() {
            return Err(Error::invalid(format!("{path}: {line:?} names no usable range of ids")));
        }
        found.push((first, count));
    }
    let total: u64 = found.iter().map(|(_, count)| u64::from(*count)).sum();
    if total < u64::from(LEAST) || total > u64::from(u32::MAX) {
        return Err(Error::invalid(format!(
            "{path} gives the {} {shown} {total} ids, containers need {LEAST}: `usermod --add-subuids FIRST-LAST \
             --add-subgids FIRST-LAST {shown}`",
            who.kind
        )));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> Files {
        Files {
            passwd: "root:x:0:0::/:/bin/sh\ndockremap:x:99:98::/:/bin/false\nsam:x:1000:1000::/:/bin/sh\n"
                .into(),
            group: "root:x:0:\nsam:x:1000:\nlab:x:50:\n".into(),
            subuid: "dockremap:231072:65536\nsam:100000:1000\n1000:300000:64536\n".into(),
            subgid: "dockremap:331072:65536\nsam:400000:70000\n50:500000:65536\n".into(),
        }
    }

    #[test]
    fn default_takes_dockers_user() {
        let remap = Remap::resolve("default", &files()).unwrap();
        assert_eq!(remap.lines(), ("0 231072 65536\n".into(), "0 331072 65536\n".into()));
    }

    #[test]
    fn ranges_follow_each_other_and_are_listed_by_name_or_number() {
        for setting in ["sam", "1000", "sam:sam", "1000:1000"] {
            let remap = Remap::resolve(setting, &files()).unwrap();
            assert_eq!(remap.lines().0, "0 100000 1000\n1000 300000 64536\n", "{setting}");
            assert_eq!(remap.lines().1, "0 400000 70000\n", "{setting}");
            let (uids, _) = remap.mappings().unwrap();
            assert_eq!((uids[1].container_id(), uids[1].host_id(), uids[1].size()), (1000, 300_000, 64536));
        }
        assert_eq!(Remap::resolve("sam:lab", &files()).unwrap().lines().1, "0 500000 65536\n");
    }

    #[test]
    fn owners_are_the_same_there_and_back() {
        let remap = Remap::resolve("sam", &files()).unwrap();
        for (inside, outside) in [((0, 0), (100_000, 400_000)), ((1000, 5), (300_000, 400_005))] {
            assert_eq!(remap.outside(inside.0, inside.1), Some(outside));
            assert_eq!(remap.inside(outside.0, outside.1), inside);
        }
        assert_eq!(remap.outside(65_536, 0), None);
        assert_eq!(remap.inside(0, 0), (65_534, 65_534));
        assert_eq!(remap.last_group(), 69_999);
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_what_to_do() {
        let refused = |setting: &str, files: &Files| Remap::resolve(setting, files).unwrap_err().to_string();
        assert!(refused("nobody-here", &files()).contains("useradd"));
        assert!(refused("root", &files()).contains("/etc/subuid gives the user root 0 ids"));
        assert!(refused("sam:", &files()).contains("USER[:GROUP]"));
        let mut zero = files();
        zero.subuid = "sam:0:65536\n".into();
        assert!(refused("sam", &zero).contains("no usable range"));
        zero.subuid = "sam:many\n".into();
        assert!(refused("sam", &zero).contains("NAME:FIRST:COUNT"));
    }
}
