//! `user[:group]` of a container or exec, resolved against the container's own passwd and group files.

use std::collections::BTreeSet;

use crate::rootfs::LayerRoot;
use crate::{Error, Result};

/// Who a process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn passwd(text: &str) -> impl Iterator<Item = Passwd<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        Some(Passwd { name, uid, gid, home })
    })
}

fn groups(text: &str) -> impl Iterator<Item = Group<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some(Group { name, gid, members: fields.next().unwrap_or_default() })
    })
}

/// Resolves `spec` with the files below `root`; `extra` are the groups of `--group-add`.
pub(crate) fn resolve(spec: &str, extra: &[String], root: &LayerRoot) -> Result<User> {
    let text = |path: &str| -> Result<String> {
        Ok(root.read(path)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default())
    };
    let passwd_file = text("/etc/passwd")?;
    let wants_groups = !spec.is_empty() || !extra.is_empty();
    let group_file = if wants_groups { text("/etc/group")? } else { String::new() };
    resolve_in(spec, extra, &passwd_file, &group_file)
}

fn resolve_in(spec: &str, extra: &[String], passwd_file: &str, group_file: &str) -> Result<User> {
    let (user, group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok();
    let entry = passwd(passwd_file).find(|entry| entry.name == user || number == Some(entry.uid));
    let (uid, mut gid) = match (&entry, number) {
        (Some(entry), _) => (entry.uid, entry.gid),
        (None, Some(uid)) if i32::try_from(uid).is_ok() => (uid, 0),
        (None, Some(_)) => {
            return Err(Error::invalid(format!("uids and gids must be in range 0-{}", i32::MAX)));
        }
        (None, None) => {
            return Err(Error::invalid(format!(
                "unable to find user {user}: no matching entries in passwd file"
            )));
        }
    };
    let mut also = BTreeSet::new();
    match group {
        Some(group) => gid = group_id(group, group_file)?,
        None => {
            if let Some(entry) = &entry {
                also.extend(
                    groups(group_file)
                        .filter(|g| g.members.split(',').any(|m| m == entry.name))
                        .map(|g| g.gid),
                );
            }
        }
    }
    for group in extra {
        also.insert(group_id(group, group_file)?);
    }
    also.insert(gid);
    let home = entry.map(|entry| entry.home).filter(|home| !home.is_empty()).unwrap_or("/").to_owned();
    Ok(User { uid, gid, groups: also.into_iter().collect(), home })
}

fn group_id(group: &str, group_file: &str) -> Result<u32> {
    let number = group.parse::<u32>().ok();
    match (groups(group_file).find(|g| g.name == group || number == Some(g.gid)), number) {
        (Some(found), _) => Ok(found.gid),
        (None, Some(gid)) if i32::try_from(gid).is_ok() => Ok(gid),
        (None, Some(_)) => Err(Error::invalid(format!("uids and gids must be in range 0-{}", i32::MAX))),
        (None, None) => {
            Err(Error::invalid(format!("unable to find group {group}: no matching entries in group file")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\nbroken\nweb:x:33:44:web:/var/www:/usr/sbin/nologin\n";
    const GROUP: &str = "root:x:0:\nweb:x:44:\naudio:x:29:web,root\nvideo:x:55:web\n";

    fn user(spec: &str, extra: &[&str]) -> Result<User> {
        resolve_in(spec, &extra.iter().map(|e| (*e).to_owned()).collect::<Vec<_>>(), PASSWD, GROUP)
    }

    #[test]
    fn names_numbers_and_groups() {
        assert_eq!(
            user("", &[]).unwrap(),
            User { uid: 0, gid: 0, groups: vec![0, 29], home: "/root".into() }
        );
        assert_eq!(
            user("web", &[]).unwrap(),
            User { uid: 33, gid: 44, groups: vec![29, 44, 55], home: "/var/www".into() }
        );
        assert_eq!(user("33", &[]).unwrap().gid, 44);
        assert_eq!(
            user("web:audio", &["7"]).unwrap(),
            User { uid: 33, gid: 29, groups: vec![7, 29], home: "/var/www".into() }
        );
        assert_eq!(
            user("1000:1000", &[]).unwrap(),
            User { uid: 1000, gid: 1000, groups: vec![1000], home: "/".into() }
        );
    }

    #[test]
    fn unknown_names_are_named() {
        assert_eq!(
            user("who", &[]).unwrap_err().to_string(),
            "unable to find user who: no matching entries in passwd file"
        );
        assert_eq!(
            user("web:what", &[]).unwrap_err().to_string(),
            "unable to find group what: no matching entries in group file"
        );
        assert!(user("4294967295", &[]).is_err());
    }
}
