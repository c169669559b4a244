//! ADD of an archive.

use std::fs::File;
use std::io;

use rustix::fs::FileType;

use super::{Attributes, CopyOptions, Writer, join_paths};
use crate::error::{Context, Result, invalid};
use crate::pattern::clean;
use crate::tree::join;

impl Writer<'_> {
    /// Unpacks an archive (compressed or not) into a directory.
    pub(super) fn unpack(&mut self, file: File, target: &str, options: &CopyOptions) -> Result<()> {
        let bad = |error: io::Error| invalid(format!("unpack the archive: {error}"));
        let mut archive = ::tar::Archive::new(crate::compression::decode(file).map_err(bad)?);
        let mut dirs: Vec<(String, Attributes)> = Vec::new();
        for entry in archive.entries().map_err(bad)? {
            self.check()?;
            let mut entry = entry.map_err(bad)?;
            let name = String::from_utf8(entry.path_bytes().into_owned())
                .map_err(|_bad| invalid("unpack the archive: a name in it is not valid UTF-8"))?;
            let relative = clean(&name);
            if relative.is_empty() || (!options.exclude.is_empty() && options.exclude.excludes(&relative)) {
                continue;
            }
            let path = join_paths(target, &relative);
            let header = entry.header();
            let mut attributes = Attributes {
                mode: header.mode().map_err(bad)? & 0o7777,
                uid: header.uid().map_err(bad)? as u32,
                gid: header.gid().map_err(bad)? as u32,
                seconds: header.mtime().map_err(bad)? as i64,
                nanos: 0,
            };
            let kind = header.entry_type();
            if let Some(owner) = options.owner {
                (attributes.uid, attributes.gid) = owner;
            }
            if let Some(chmod) = &options.chmod {
                attributes.mode = chmod.apply(attributes.mode, kind.is_dir());
            }
            // An archive may hold a link to a directory and then something in it: links above are resolved inside.
            let (dir, last_part) = path.rsplit_once('/').unwrap_or(("", &path));
            let dir = self.resolve(dir)?;
            let mut above = attributes;
            above.mode = 0o755;
            self.mkdirs(&dir, above)?;
            let path = join(&dir, last_part);
            let device = || -> io::Result<u64> {
                Ok(rustix::fs::makedev(
                    header.device_major()?.unwrap_or(0),
                    header.device_minor()?.unwrap_or(0),
                ))
            };
            match kind {
                kind if kind.is_dir() => {
                    self.mkdir(&path, attributes)?;
                    dirs.push((path, attributes));
                }
                kind if kind.is_symlink() => {
                    let link = entry.link_name_bytes().unwrap_or_default().into_owned();
                    self.symlink(&link, path.as_bytes(), attributes)?;
                }
                kind if kind.is_hard_link() => {
                    let link = entry.link_name_bytes().unwrap_or_default().into_owned();
                    let first = join_paths(target, &clean(&String::from_utf8_lossy(&link)));
                    self.hard_link(first.as_bytes(), path.as_bytes())?;
                }
                kind if kind.is_fifo() => self.node(path.as_bytes(), FileType::Fifo, 0, attributes)?,
                kind if kind.is_character_special() => {
                    let device = device().map_err(bad)?;
                    self.node(path.as_bytes(), FileType::CharacterDevice, device, attributes)?;
                }
                kind if kind.is_block_special() => {
                    let device = device().map_err(bad)?;
                    self.node(path.as_bytes(), FileType::BlockDevice, device, attributes)?;
                }
                kind if kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse() => {
                    self.put_file(path.as_bytes(), &mut entry, attributes)?;
                }
                _ => {}
            }
        }
        for (path, attributes) in dirs.into_iter().rev() {
            let (parent, name) = self.parent(path.as_bytes())?;
            Self::dress_dir(&parent, &name, attributes).doing(|| format!("set the mode of /{path}"))?;
        }
        Ok(())
    }
}
