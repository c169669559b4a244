//! One file, link or node at its place in the upper directory; what was there before is replaced.

use std::fs::File;
use std::io::{Read, Write as _};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, openat2, unlinkat, utimensat};
use rustix::io::Errno;

use super::{Attributes, Writer, kind, lossy};
use crate::error::{Context, Result, invalid};
use crate::tree::beneath;

impl Writer<'_> {
    /// Removes what the upper directory has at the place of a file; a directory there, or below, is in the way.
    fn clear(&self, target: &[u8]) -> Result<(Rc<OwnedFd>, Vec<u8>)> {
        let blocked = || invalid(format!("cannot replace to directory /{} with file", lossy(target)));
        match self.in_upper(target)? {
            Some(stat) if kind(&stat) == FileType::Directory => return Err(blocked()),
            Some(_) => {
                let (parent, name) = self.parent(target)?;
                unlinkat(&parent, &name[..], AtFlags::empty())
                    .doing(|| format!("replace /{}", lossy(target)))?;
                return Ok((parent, name));
            }
            None => {}
        }
        if let Some(lower) = self.lower
            && let Ok(text) = std::str::from_utf8(target)
            && lower.stat(text)?.is_some_and(|stat| kind(&stat) == FileType::Directory)
        {
            return Err(blocked());
        }
        self.parent(target)
    }

    pub(super) fn create(&self, target: &[u8]) -> Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = |(parent, name): (Rc<OwnedFd>, Vec<u8>)| {
            openat2(&*parent, &name[..], flags, Mode::from_raw_mode(0o600), beneath()).map(File::from)
        };
        let above = target.iter().rposition(|b| *b == b'/').map_or(&b""[..], |at| &target[..at]);
        if self.made.contains(above) {
            match open(self.parent(target)?) {
                // An earlier source has put something there.
                Err(Errno::EXIST) => {}
                other => return other.doing(|| format!("create /{}", lossy(target))),
            }
        }
        open(self.clear(target)?).doing(|| format!("create /{}", lossy(target)))
    }

    pub(super) fn dress_file(file: &File, attributes: Attributes) -> rustix::io::Result<()> {
        rustix::fs::fchown(file, Some(Uid::from_raw(attributes.uid)), Some(Gid::from_raw(attributes.gid)))?;
        rustix::fs::fchmod(file, Mode::from_raw_mode(attributes.mode))?;
        rustix::fs::futimens(file, &attributes.times())
    }

    pub(super) fn put_file(&self, target: &[u8], data: &mut dyn Read, attributes: Attributes) -> Result<()> {
        let what = || format!("write /{}", lossy(target));
        let mut out = self.create(target)?;
        let mut buffer = vec![0_u8; 128 << 10];
        loop {
            self.check()?;
            let n = data.read(&mut buffer).doing(what)?;
            if n == 0 {
                break;
            }
            out.write_all(&buffer[..n]).doing(what)?;
        }
        Self::dress_file(&out, attributes).doing(what)
    }

    pub(super) fn symlink(&self, link: &[u8], target: &[u8], attributes: Attributes) -> Result<()> {
        let what = || format!("make the link /{}", lossy(target));
        let (parent, name) = self.clear(target)?;
        rustix::fs::symlinkat(link, &parent, &name[..]).doing(what)?;
        let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
        rustix::fs::chownat(&parent, &name[..], Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .doing(what)?;
        utimensat(&parent, &name[..], &attributes.times(), AtFlags::SYMLINK_NOFOLLOW).doing(what)
    }

    pub(super) fn hard_link(&self, first: &[u8], target: &[u8]) -> Result<()> {
        if first == target {
            return Ok(());
        }
        let what = || format!("link /{}", lossy(target));
        let (from, from_name) = self.parent(first)?;
        let (parent, name) = self.clear(target)?;
        rustix::fs::linkat(&from, &from_name[..], &parent, &name[..], AtFlags::empty()).doing(what)
    }

    pub(super) fn node(
        &self,
        target: &[u8],
        file_type: FileType,
        device: u64,
        attributes: Attributes,
    ) -> Result<()> {
        let what = || format!("make the node /{}", lossy(target));
        let (parent, name) = self.clear(target)?;
        rustix::fs::mknodat(&parent, &name[..], file_type, Mode::from_raw_mode(attributes.mode), device)
            .doing(what)?;
        let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
        rustix::fs::chownat(&parent, &name[..], Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .doing(what)?;
        rustix::fs::chmodat(&parent, &name[..], Mode::from_raw_mode(attributes.mode), AtFlags::empty())
            .doing(what)?;
        utimensat(&parent, &name[..], &attributes.times(), AtFlags::SYMLINK_NOFOLLOW).doing(what)
    }
}
