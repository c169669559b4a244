//! A container's class of service in the resctrl file system (Intel RDT and its like on other processors): what share of
//! caches and memory bandwidth its processes have. The rules are runtime-spec's, config-linux, "Intel RDT".

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind};
use crate::spec::LinuxIntelRdt;

/// A class that processes are put in, and what of it is the container's own to remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Class {
    dir: PathBuf,
    /// Nobody else's: it has the container's id for a name.
    own: bool,
    /// The container's monitoring group in it.
    monitor: Option<PathBuf>,
}

impl Class {
    /// Makes or finds the class that is asked for; on failure nothing is left.
    pub fn make(id: &str, wish: &LinuxIntelRdt) -> Result<Self, Error> {
        let table = super::read(Path::new("/proc/self/mountinfo"))?;
        Self::make_in(&mounted(&table)?, id, wish)
    }

    fn make_in(root: &Path, id: &str, wish: &LinuxIntelRdt) -> Result<Self, Error> {
        let named = wish.clos_id().as_deref().filter(|name| !name.is_empty());
        let name = named.unwrap_or(id);
        if name.contains(['/', '\0', '\n']) || [".", "..", "info", "mon_groups", "mon_data"].contains(&name) {
            return Err(Error::invalid(format!("intelRdt.closID {name:?} cannot be the name of a class")));
        }
        let lines = lines(wish)?;
        let mut class = Self { dir: root.join(name), own: named.is_none(), monitor: None };
        let what = || format!("making the class of service {}", class.dir.display());
        let there = match fs::create_dir(&class.dir) {
            Ok(()) => false,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && named.is_some() => true,
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => {
                return Err(Error::new(Kind::Os, format!("{}: the processor has no more of them", what())));
            }
            Err(e) => return Err(Error::os(what(), e)),
        };
        let filled = class.fill(there, named.is_some(), &lines).and_then(|()| {
            if wish.enable_monitoring().unwrap_or_default() {
                let group = class.dir.join("mon_groups").join(id);
                fs::create_dir(&group)
                    .map_err(|e| Error::os(format!("making the monitoring group {}", group.display()), e))?;
                class.monitor = Some(group);
            }
            Ok(())
        });
        if filled.is_err() && !there {
            // The first failure is the one to tell.
            drop(fs::remove_dir(&class.dir));
        }
        filled.map(|()| class)
    }

    fn fill(&self, there: bool, named: bool, lines: &[String]) -> Result<(), Error> {
        let shown = self.dir.display();
        match (there, lines) {
            (false, []) if named => Err(Error::invalid(format!(
                "intelRdt.closID: the class {shown} does not exist, and no schema is given to make it with"
            ))),
            (_, []) => Ok(()),
            (false, lines) => self.write(lines),
            (true, lines) => {
                // Somebody else's processes may be in it.
                let has: Vec<String> = super::read(&self.dir.join("schemata"))?.lines().map(normal).collect();
                match lines.iter().find(|line| !has.contains(&normal(line))) {
                    None => Ok(()),
                    Some(line) => Err(Error::invalid(format!(
                        "intelRdt: the class {shown} exists with another schema than {line:?}: it has {}",
                        has.join(", ")
                    ))),
                }
            }
        }
    }

    /// Changes its schemata: lines like `L3:0=ff`.
    pub fn write(&self, lines: &[String]) -> Result<(), Error> {
        let file = self.dir.join("schemata");
        let text: String = lines.iter().flat_map(|line| [line.trim(), "\n"]).collect();
        fs::write(&file, &text).map_err(|e| {
            // The kernel has words for what it does not like.
            let info = self.dir.parent().map(|root| root.join("info/last_cmd_status"));
            let why = info.and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
            let why = Some(why.trim()).filter(|w| !w.is_empty() && *w != "ok").map(|w| format!(" ({w})"));
            Error::os(format!("writing {text:?} to {}{}", file.display(), why.unwrap_or_default()), e)
        })
    }

    /// Puts a process with one thread in it.
    pub fn enter(&self, pid: i32) -> Result<(), Error> {
        for dir in [Some(&self.dir), self.monitor.as_ref()].into_iter().flatten() {
            let file = dir.join("tasks");
            fs::write(&file, pid.to_string())
                .map_err(|e| Error::os(format!("writing {pid} to {}", file.display()), e))?;
        }
        Ok(())
    }

    pub fn delete(&self) -> Result<(), Error> {
        let own = self.own.then_some(&self.dir);
        for dir in [self.monitor.as_ref(), own].into_iter().flatten() {
            match fs::remove_dir(dir) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::os(format!("removing {}", dir.display()), e));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The schemata's lines that are asked for.
fn lines(wish: &LinuxIntelRdt) -> Result<Vec<String>, Error> {
    let whole = wish.schemata().as_deref().unwrap_or_default();
    let cache = wish.l3_cache_schema().as_deref().unwrap_or_default();
    let bandwidth = wish.mem_bw_schema().as_deref().unwrap_or_default();
    let is_bandwidth = |line: &&str| line.trim_start().starts_with("MB:");
    if let Some(line) = bandwidth.lines().find(|line| !is_bandwidth(line)) {
        return Err(Error::invalid(format!("intelRdt.memBwSchema: {line:?} does not begin with \"MB:\"")));
    }
    let mut lines: Vec<&str> = cache.lines().collect();
    if !bandwidth.is_empty() {
        lines.retain(|line| !is_bandwidth(line));
    }
    lines.extend(bandwidth.lines());
    // Written last, these win.
    lines.extend(whole.iter().map(String::as_str));
    Ok(lines.into_iter().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect())
}

/// A line of a schemata in one spelling: the kernel pads, and masks may have zeros before them.
fn normal(line: &str) -> String {
    let (resource, cells) = line.split_once(':').unwrap_or((line, ""));
    let cells = cells.split(';').map(|cell| {
        let (id, value) = cell.split_once('=').unwrap_or((cell, ""));
        let value = value.trim().trim_start_matches('0').to_ascii_lowercase();
        format!("{}={value}", id.trim())
    });
    format!("{}:{}", resource.trim(), cells.collect::<Vec<_>>().join(";"))
}

/// Where a mountinfo table has the resctrl file system.
fn mounted(table: &str) -> Result<PathBuf, Error> {
    let found = table.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        kind.starts_with("resctrl ").then(|| mount.split(' ').nth(4)).flatten()
    });
    found.map(PathBuf::from).ok_or_else(|| {
        Error::unsupported(
            "linux.intelRdt is given, but no resctrl file system is mounted: this kernel or processor has none, or it is \
             to be mounted first (mount -t resctrl resctrl /sys/fs/resctrl)",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn wish(json: Value) -> LinuxIntelRdt {
        serde_json::from_value(json).unwrap()
    }

    fn made(root: &Path, json: Value) -> Result<Class, String> {
        Class::make_in(root, "box", &wish(json)).map_err(|e| e.to_string())
    }

    fn text(path: &Path) -> String {
        fs::read_to_string(path).unwrap_or_default()
    }

    #[test]
    fn a_class_of_its_own_has_the_containers_id_and_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let class =
            made(dir.path(), json!({"l3CacheSchema": "L3:0=f;1=f0\nMB:0=10", "memBwSchema": "MB:0=20;1=70"}))
                .unwrap();
        let own = dir.path().join("box");
        assert_eq!(text(&own.join("schemata")), "L3:0=f;1=f0\nMB:0=20;1=70\n");
        class.enter(17).unwrap();
        assert_eq!(text(&own.join("tasks")), "17");
        // Only the real file system removes a directory with its files.
        fs::remove_file(own.join("schemata")).unwrap();
        fs::remove_file(own.join("tasks")).unwrap();
        class.delete().unwrap();
        assert!(!own.exists());
        class.delete().unwrap();
    }

    #[test]
    fn a_named_class_is_shared_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let gold = dir.path().join("gold");
        assert!(made(dir.path(), json!({"closID": "gold"})).unwrap_err().contains("does not exist"));
        assert!(!gold.exists(), "what was made is left");
        let class =
            made(dir.path(), json!({"closID": "gold", "schemata": ["L3:0=0ff", "MB:0=100"]})).unwrap();
        assert_eq!(text(&gold.join("schemata")), "L3:0=0ff\nMB:0=100\n");
        // As the kernel shows it.
        fs::write(gold.join("schemata"), "    MB:0=100\n    L3:0=00FF\n").unwrap();
        assert_eq!(made(dir.path(), json!({"closID": "gold", "l3CacheSchema": "L3:0=ff"})).unwrap(), class);
        let differs = made(dir.path(), json!({"closID": "gold", "l3CacheSchema": "L3:0=f"})).unwrap_err();
        assert!(differs.contains("exists with another schema than \"L3:0=f\""), "{differs}");
        assert!(made(dir.path(), json!({"closID": "gold"})).is_ok());
        class.delete().unwrap();
        assert!(gold.exists());
    }

    #[test]
    fn a_monitoring_group_is_the_containers_own() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("gold/mon_groups")).unwrap();
        let class = made(dir.path(), json!({"closID": "gold", "enableMonitoring": true})).unwrap();
        class.enter(5).unwrap();
        let group = dir.path().join("gold/mon_groups/box");
        assert_eq!(
            (text(&group.join("tasks")), text(&dir.path().join("gold/tasks"))),
            ("5".into(), "5".into())
        );
        fs::remove_file(group.join("tasks")).unwrap();
        class.delete().unwrap();
        assert!(!group.exists() && dir.path().join("gold").exists());
    }

    #[test]
    fn what_cannot_be_a_class_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["..", "a/b", "info", "mon_groups"] {
            assert!(made(dir.path(), json!({"closID": name})).unwrap_err().contains("cannot be the name"));
        }
        let says = made(dir.path(), json!({"memBwSchema": "L3:0=1"})).unwrap_err();
        assert!(says.contains("does not begin with \"MB:\""), "{says}");
        let table = "30 23 0:26 / /sys/fs/resctrl rw shared:5 - resctrl resctrl rw\n";
        assert_eq!(mounted(table).unwrap(), Path::new("/sys/fs/resctrl"));
        assert!(mounted("30 23 0:26 / /proc rw - proc proc rw\n").is_err());
    }
}
