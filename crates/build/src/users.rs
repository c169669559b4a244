//! `user[:group]` of RUN, WORKDIR and `--chown`, resolved in the stage's own passwd and group files.

use crate::error::{Result, invalid};
use crate::tree::Tree;

/// Who a step runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

fn table(tree: &Tree, path: &str) -> Result<String> {
    Ok(tree.read(path)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default())
}

/// For `--chown` and WORKDIR: a number alone is the group's as well.
pub(crate) fn owner(text: &str, tree: &Tree) -> Result<(u32, u32)> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    if let Ok(uid) = user.parse::<u32>()
        && group.is_none_or(|group| group.parse::<u32>().is_ok())
    {
        let gid = group.and_then(|group| group.parse().ok()).unwrap_or(uid);
        return Ok((uid, gid));
    }
    let resolved = resolve(text, tree)?;
    Ok((resolved.uid, resolved.gid))
}

/// For a program: with all of the user's groups.
pub(crate) fn resolve(text: &str, tree: &Tree) -> Result<User> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    if user.is_empty() && group.is_none() {
        return Ok(User { uid: 0, gid: 0, groups: vec![0] });
    }
    let (passwd, groups) = (table(tree, "etc/passwd")?, table(tree, "etc/group")?);
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok();
    let entry = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, ..] = fields[..] else { return None };
        let (uid, gid) = (uid.parse::<u32>().ok()?, gid.parse::<u32>().ok()?);
        (name == user || number == Some(uid)).then(|| (name.to_owned(), uid, gid))
    });
    let (name, uid, mut gid) = match (entry, number) {
        (Some((name, uid, gid)), _) => (name, uid, gid),
        (None, Some(uid)) => (String::new(), uid, 0),
        (None, None) => {
            return Err(invalid(format!("unable to find user {user}: no matching entries in passwd file")));
        }
    };
    let rows: Vec<(String, u32, String)> = groups
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let [name, _, gid, ..] = fields[..] else { return None };
            Some((name.to_owned(), gid.parse().ok()?, fields.get(3).copied().unwrap_or_default().to_owned()))
        })
        .collect();
    let mut also = Vec::new();
    match group {
        Some(group) => {
            let found = rows.iter().find(|(name, _, _)| name == group).map(|(_, gid, _)| *gid);
            gid = found.or_else(|| group.parse().ok()).ok_or_else(|| {
                invalid(format!("unable to find group {group}: no matching entries in group file"))
            })?;
        }
        None if !name.is_empty() => {
            also.extend(
                rows.iter()
                    .filter(|(_, _, members)| members.split(',').any(|m| m == name))
                    .map(|(_, gid, _)| *gid),
            );
        }
        None => {}
    }
    also.push(gid);
    also.sort_unstable();
    also.dedup();
    Ok(User { uid, gid, groups: also })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn names_and_numbers() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(
            dir.path().join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nann:x:1000:100::/:/bin/sh\n",
        )
        .unwrap();
        std::fs::write(dir.path().join("etc/group"), "root:x:0:\nusers:x:100:\nwheel:x:7:bob,ann\n").unwrap();
        let tree = Tree::layers(&[brigantine_image::Lower::directory(dir.path().to_owned())], Arc::default())
            .unwrap();
        assert_eq!(owner("5", &tree).unwrap(), (5, 5));
        assert_eq!(owner("5:6", &tree).unwrap(), (5, 6));
        assert_eq!(owner("ann", &tree).unwrap(), (1000, 100));
        assert_eq!(owner("ann:wheel", &tree).unwrap(), (1000, 7));
        assert_eq!(resolve("ann", &tree).unwrap(), User { uid: 1000, gid: 100, groups: vec![7, 100] });
        assert_eq!(resolve("", &tree).unwrap(), User { uid: 0, gid: 0, groups: vec![0] });
        assert_eq!(resolve("77", &tree).unwrap().gid, 0);
        assert!(owner("bob", &tree).is_err() && owner("ann:none", &tree).is_err());
    }
}
