//! What is built: folders with their Dockerfiles, the same for everybody.
//!
//! Invariant: whatever a round changes is changed before anybody's turn, so that all see the same; nothing in a folder
//! depends on the machine.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{STAGES, Size};
use crate::say;

const SIX: &str = "FROM busybox:latest
WORKDIR /src
COPY library.txt ./
RUN cat library.txt >compiled && mkdir -p /out
COPY main.txt ./
RUN cat compiled main.txt >/out/program
RUN wc -c /out/program >/out/size
CMD [\"cat\", \"/out/size\"]
";

/// Its first round's files; each round has a name of its own for what is copied.
const LARGE: &str = "FROM busybox:latest AS made
RUN dd if=/dev/urandom of=/part bs=1M count=16 2>/dev/null; n=0; while [ $n -lt PARTS ]; do echo $n; cat /part; n=$((n+1)); done >/large; rm /part
FROM busybox:latest
ARG TO
COPY --from=made /large /copied/$TO
";

const MANY_FILES: &str = "FROM busybox:latest
COPY . /src
RUN test -f /src/d0/f0
";

const MANY_CLIENTS: &str = "FROM busybox:latest AS one
ARG ROUND
RUN n=0; while [ $n -lt 20000 ]; do n=$((n+1)); done; echo $ROUND $n >/one
FROM busybox:latest
COPY --from=one /one /one
RUN cat /one >/two
COPY file.txt /
";

const EXPORTED: &str = "FROM busybox:latest
ARG ROUND
COPY first /first
RUN echo $ROUND >/first/round
COPY second /second
";

/// The folders, below one directory.
pub struct Projects {
    dir: PathBuf,
    size: Size,
}

impl Projects {
    pub fn make(dir: &Path, size: Size) -> Result<Self> {
        let projects = Self { dir: dir.to_owned(), size };
        projects.write("six/Dockerfile", SIX)?;
        projects.write("six/library.txt", &"a library's line\n".repeat(20_000))?;
        projects.write("six/main.txt", "main\n")?;
        let mut text = String::new();
        for stage in 0..STAGES {
            writeln!(text, "FROM busybox:latest AS s{stage}")?;
            writeln!(text, "RUN n=0; while [ $n -lt 10000 ]; do n=$((n+1)); done; echo {stage} >/made")?;
        }
        text.push_str("FROM busybox:latest\n");
        for stage in 0..STAGES {
            writeln!(text, "COPY --from=s{stage} /made /all/{stage}")?;
        }
        projects.write("stages/Dockerfile", &text)?;
        let parts = (size.copied / 16).max(1);
        projects.write("large/Dockerfile", &LARGE.replace("PARTS", &parts.to_string()))?;
        projects.write("many/Dockerfile", MANY_CLIENTS)?;
        projects.write("many/file.txt", "a file\n")?;
        projects.write("exported/Dockerfile", EXPORTED)?;
        for (number, part) in ["first", "second"].into_iter().enumerate() {
            for file in 0..size.exported {
                // Half a mebibyte each that shrinks to about a third.
                let bytes = noise((number * 100_000 + file) as u64, 512 << 10);
                projects.write(&format!("exported/{part}/f{file}"), &bytes)?;
            }
        }
        Ok(projects)
    }

    fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.dir.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        Ok(fs::write(path, text)?)
    }

    /// Everybody's turn of this round of a row begins.
    pub fn next(&self, row: &str, round: usize) -> Result<()> {
        match row {
            "changed" => self.write("six/main.txt", &format!("main of round {round}\n")),
            // The rows after it use the last one.
            "cold" => self.files(round),
            "warm" | "touched" if !self.context().exists() => self.files(0),
            "touched" => {
                let file = self.context().join("d3/f7");
                Ok(fs::write(file, format!("changed in round {round}\n"))?)
            }
            _ => Ok(()),
        }
    }

    /// A folder of many files that nobody has seen, in the place of the last one.
    fn files(&self, round: usize) -> Result<()> {
        let dir = self.context();
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir_all(&dir)?;
        spread(&dir);
        say::note(&format!("{} files", self.size.files));
        fs::write(dir.join("Dockerfile"), MANY_FILES)?;
        let mut left = self.size.files;
        for number in 0.. {
            let below = dir.join(format!("d{number}"));
            fs::create_dir(&below)?;
            for file in 0..left.min(100) {
                let text = noise((round * 1_000_000 + number * 100 + file) as u64, 200 + file * 80);
                fs::write(below.join(format!("f{file}")), text)?;
            }
            left -= left.min(100);
            if left == 0 {
                break;
            }
        }
        rustix::fs::sync();
        Ok(())
    }

    pub fn six(&self) -> PathBuf {
        self.dir.join("six")
    }

    pub fn stages(&self) -> PathBuf {
        self.dir.join("stages")
    }

    pub fn context(&self) -> PathBuf {
        self.dir.join("context")
    }

    pub fn large(&self) -> PathBuf {
        self.dir.join("large")
    }

    pub fn many(&self) -> PathBuf {
        self.dir.join("many")
    }

    pub fn exported(&self) -> PathBuf {
        self.dir.join("exported")
    }

    /// Where a contender may put an archive.
    pub fn archive(&self, who: &str) -> PathBuf {
        self.dir.join(format!("{}.tar", who.replace([' ', ','], "-")))
    }

    pub fn clients(&self) -> usize {
        self.size.clients
    }
}

/// ext4 then puts the directories that are made here far from each other: what was removed a moment ago is not looked
/// through for each file. Elsewhere it is nothing.
fn spread(dir: &Path) {
    let Ok(dir) = fs::File::open(dir) else { return };
    let set = rustix::fs::ioctl_getflags(&dir)
        .and_then(|flags| rustix::fs::ioctl_setflags(&dir, flags | rustix::fs::IFlags::TOPDIR));
    set.unwrap_or_default();
}

/// Text of about that length, the same for the same number (xorshift).
fn noise(seed: u64, length: usize) -> String {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut text = String::with_capacity(length + 16);
    while text.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        for shift in [0, 20, 40] {
            text.push_str(WORDS[(state >> shift) as usize % WORDS.len()]);
            text.push(' ');
        }
    }
    text.truncate(length);
    text
}

const WORDS: [&str; 32] = [
    "anchor", "ballast", "bow", "bulkhead", "cable", "capstan", "cleat", "deck", "draught", "fathom",
    "galley", "gunwale", "halyard", "hatch", "helm", "hull", "jib", "keel", "knot", "lee", "mast", "mizzen",
    "oar", "port", "reef", "rigging", "rudder", "sail", "spar", "stern", "tiller", "yard",
];
