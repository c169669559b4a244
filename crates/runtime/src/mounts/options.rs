//! The options of a mount entry.

use brigantine_sys::mount::{Change, attr, propagation};

use crate::error::Error;

/// A mount's options, sorted by what they act on.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub bind: bool,
    pub recursive: bool,
    pub remount: bool,
    pub copy_up: bool,
    /// Whether ids are mapped, and recursively.
    pub idmap: Option<bool>,
    /// Whether an attribute of the mount itself is named, be it as one that it is not to have.
    pub named: bool,
    pub set: u64,
    /// A mode of access times is among them where one is named: relatime is none of the bits.
    pub clear: u64,
    pub recursive_set: u64,
    pub recursive_clear: u64,
    /// (bits, recursively).
    pub propagation: Vec<(u64, bool)>,
    /// For the file system itself.
    pub parameters: Vec<(String, Option<String>)>,
}

impl Options {
    pub fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Self, Error> {
        let mut o = Self::default();
        for word in words {
            if word.contains('\0') {
                return Err(Error::invalid(format!("mount option {word:?}: zero byte")));
            }
            if o.attribute(word) || o.propagation(word) {
                continue;
            }
            match word {
                "" | "defaults" | "async" | "loud" => {}
                "bind" => o.bind = true,
                "rbind" => (o.bind, o.recursive) = (true, true),
                "remount" => o.remount = true,
                "tmpcopyup" => o.copy_up = true,
                "idmap" => o.idmap = Some(false),
                "ridmap" => o.idmap = Some(true),
                _ => o.parameters.push(match word.split_once('=') {
                    Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                    None => (word.to_owned(), None),
                }),
            }
        }
        Ok(o)
    }

    fn attribute(&mut self, word: &str) -> bool {
        let (name, recursive) = match word.strip_prefix('r') {
            Some(rest) if RECURSIVE.contains(&word) => (rest, true),
            _ => (word, false),
        };
        let (set, clear) = match name {
            "ro" => (attr::RDONLY, 0),
            "rw" => (0, attr::RDONLY),
            "nosuid" => (attr::NOSUID, 0),
            "suid" => (0, attr::NOSUID),
            "nodev" => (attr::NODEV, 0),
            "dev" => (0, attr::NODEV),
            "noexec" => (attr::NOEXEC, 0),
            "exec" => (0, attr::NOEXEC),
            "nosymfollow" => (attr::NOSYMFOLLOW, 0),
            "symfollow" => (0, attr::NOSYMFOLLOW),
            "nodiratime" => (attr::NODIRATIME, 0),
            "diratime" => (0, attr::NODIRATIME),
            "noatime" => (attr::NOATIME, attr::ATIME),
            "strictatime" => (attr::STRICTATIME, attr::ATIME),
            "relatime" | "atime" | "norelatime" | "nostrictatime" => (0, attr::ATIME),
            _ => return false,
        };
        let (into_set, into_clear) = if recursive {
            (&mut self.recursive_set, &mut self.recursive_clear)
        } else {
            self.named = true;
            if matches!(name, "atime" | "diratime" | "norelatime" | "nostrictatime") {
                self.unsay(name);
                return true;
            }
            (&mut self.set, &mut self.clear)
        };
        *into_set = *into_set & !clear | set;
        *into_clear = *into_clear & !set | clear;
        true
    }

    /// Takes back an earlier word on access times; what the source of a bind mount has stays, as mount(8) has it.
    fn unsay(&mut self, word: &str) {
        let (bit, mode) = match word {
            "atime" => (attr::NOATIME, self.set & attr::NOATIME != 0),
            "nostrictatime" => (attr::STRICTATIME, self.set & attr::STRICTATIME != 0),
            "norelatime" => (0, self.set & attr::ATIME == 0),
            _ => (attr::NODIRATIME, false),
        };
        self.set &= !bit;
        if mode {
            self.clear &= !attr::ATIME;
        }
    }

    fn propagation(&mut self, word: &str) -> bool {
        let Some(found) = parse_propagation(word) else { return false };
        self.propagation.push(found);
        true
    }
}

const RECURSIVE: &[&str] = &[
    "rro",
    "rrw",
    "rnosuid",
    "rsuid",
    "rnodev",
    "rdev",
    "rnoexec",
    "rexec",
    "rnosymfollow",
    "rsymfollow",
    "rnodiratime",
    "rdiratime",
    "rnoatime",
    "rstrictatime",
    "rrelatime",
    "ratime",
    "rnorelatime",
    "rnostrictatime",
];

/// `private`, `rslave`, … as (bits, recursively).
pub(crate) fn parse_propagation(word: &str) -> Option<(u64, bool)> {
    Some(match word {
        "private" => (propagation::PRIVATE, false),
        "rprivate" => (propagation::PRIVATE, true),
        "slave" => (propagation::SLAVE, false),
        "rslave" => (propagation::SLAVE, true),
        "shared" => (propagation::SHARED, false),
        "rshared" => (propagation::SHARED, true),
        "unbindable" => (propagation::UNBINDABLE, false),
        "runbindable" => (propagation::UNBINDABLE, true),
        _ => return None,
    })
}

/// What becomes of attributes that the source of a bind mount has and its options do not name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unnamed {
    Kept,
    /// They go as soon as any is named, but for modes of access times, as with runc: who says one says all.
    Dropped,
    /// The same, but what forbids something stays: in a user namespace nobody may take it away.
    Locked,
}

/// What forbids something, and stays with a mount that is handed down to another user namespace.
const FORBIDS: u64 = attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC;

/// What becomes of the mount itself.
fn plain(options: &Options, unnamed: Unnamed) -> Change {
    let mut clear = options.clear;
    if options.named && unnamed != Unnamed::Kept {
        clear |= attr::NOSYMFOLLOW;
        if unnamed == Unnamed::Dropped {
            clear |= FORBIDS;
        }
        if (clear & attr::ATIME) | (options.set & attr::NODIRATIME) != 0 {
            clear |= attr::ATIME | attr::NODIRATIME;
        }
        clear &= !options.set | attr::ATIME;
    }
    Change { set: options.set, clear, propagation: 0 }
}

/// What the options make of a tree: (change, recursively), in order.
pub(super) fn changes(options: &Options, unnamed: Unnamed) -> Vec<(Change, bool)> {
    let plain = plain(options, unnamed);
    let below = Change { set: options.recursive_set, clear: options.recursive_clear, propagation: 0 };
    let mut all = vec![(plain, false), (below, true)];
    all.retain(|(change, _)| !change.is_nothing());
    if options.propagation.is_empty() {
        match &mut all[..] {
            // All there is to a single mount goes in one call.
            [(only, false)] if !options.recursive => only.propagation = propagation::PRIVATE,
            _ => all.push((Change { propagation: propagation::PRIVATE, ..Change::default() }, true)),
        }
    }
    let propagation = options.propagation.iter();
    all.extend(
        propagation.map(|&(bits, recursive)| (Change { propagation: bits, ..Change::default() }, recursive)),
    );
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_sorted() {
        let o = Options::parse(["rbind", "rro", "nosuid", "rprivate", "size=64k", "noatime"]).unwrap();
        assert!(o.bind && o.recursive);
        assert_eq!(o.recursive_set, attr::RDONLY);
        assert_eq!(o.set, attr::NOSUID | attr::NOATIME);
        assert_eq!(o.clear, attr::ATIME);
        assert_eq!(o.propagation, [(propagation::PRIVATE, true)]);
        assert_eq!(o.parameters, [("size".to_owned(), Some("64k".to_owned()))]);
    }

    #[test]
    fn words_on_access_times_take_back_what_was_said() {
        let said = |words: &[&str]| {
            let o = Options::parse(words.iter().copied()).unwrap();
            (o.set, o.clear)
        };
        for words in [["noatime", "atime"], ["strictatime", "nostrictatime"], ["relatime", "norelatime"]] {
            assert_eq!(said(&words), (0, 0), "{words:?}");
        }
        assert_eq!(said(&["nodiratime", "diratime"]), (0, 0));
        assert_eq!(said(&["noatime", "nostrictatime", "norelatime"]), (attr::NOATIME, attr::ATIME));
    }

    #[test]
    fn what_is_not_named_goes_as_soon_as_something_is() {
        let change = |words: &[&str], unnamed| {
            let all = changes(&Options::parse(words.iter().copied()).unwrap(), unnamed);
            (all[0].0.set, all[0].0.clear)
        };
        let (dropped, locked) = (Unnamed::Dropped, Unnamed::Locked);
        assert_eq!(change(&["bind"], dropped), (0, 0));
        assert_eq!(change(&["rbind", "rro"], dropped), (attr::RDONLY, 0));
        let others = FORBIDS & !attr::RDONLY | attr::NOSYMFOLLOW;
        assert_eq!(change(&["bind", "ro"], dropped), (attr::RDONLY, others));
        assert_eq!(change(&["bind", "ro"], locked), (attr::RDONLY, attr::NOSYMFOLLOW));
        assert_eq!(change(&["bind", "ro"], Unnamed::Kept), (attr::RDONLY, 0));
        assert_eq!(change(&["bind", "dev"], locked), (0, attr::NODEV | attr::NOSYMFOLLOW));
        let times = attr::ATIME | attr::NODIRATIME | attr::NOSYMFOLLOW;
        assert_eq!(change(&["bind", "relatime"], locked), (0, times));
        assert_eq!(change(&["bind", "noatime"], locked), (attr::NOATIME, times));
        assert_eq!(
            change(&["bind", "nodiratime"], locked),
            (attr::NODIRATIME, attr::ATIME | attr::NOSYMFOLLOW)
        );
        assert_eq!(change(&["bind", "atime"], locked), (0, attr::NOSYMFOLLOW));
    }

    #[test]
    fn the_last_word_wins() {
        assert_eq!(Options::parse(["ro", "rw"]).unwrap().set, 0);
        assert_eq!(Options::parse(["rw", "ro"]).unwrap().clear, 0);
    }
}
