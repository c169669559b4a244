//! COPY and ADD: what was selected in a source, put where it is to be.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;

use rustix::fs::{FileType, OFlags, Stat};

use super::{Attributes, CopyOptions, Writer, clean_absolute, join_paths, kind, lossy};
use crate::error::{Context, Result, invalid};
use crate::tree::{Entry, Selected, Tree, join};
use crate::xattrs;

impl Writer<'_> {
    /// COPY and ADD of what was selected in `source`.
    pub fn copy(
        &mut self,
        source: &Tree,
        selected: &[Selected],
        destination: &str,
        many: bool,
        options: &CopyOptions,
    ) -> Result<()> {
        for one in selected {
            self.check()?;
            if options.parents {
                let root = self.resolve(&clean_absolute(destination))?;
                self.copy_with_parents(source, one, &root, options)?;
            } else {
                self.copy_one(source, one, destination, many, options)?;
            }
        }
        Ok(())
    }

    fn copy_one(
        &mut self,
        source: &Tree,
        one: &Selected,
        destination: &str,
        many: bool,
        options: &CopyOptions,
    ) -> Result<()> {
        let owner = options.owner.unwrap_or((0, 0));
        if one.dir {
            let target = self.resolve(&clean_absolute(destination))?;
            return self.copy_tree(source, one, &target, options);
        }
        if options.unpack
            && let Some(file) = archive(source, &one.path)?
        {
            let target = self.resolve(&clean_absolute(destination))?;
            let attributes = self.plain(0o755, owner);
            self.mkdirs(&target, attributes)?;
            return self.unpack(file, &target, options);
        }
        if !options.exclude.is_empty() && options.exclude.excludes(&one.name) {
            return Ok(());
        }
        let target = self.target(destination, &one.name, many, owner)?;
        for entry in source.walk(&one.path)? {
            self.put_entry(source, &entry, target.as_bytes(), options, true)?;
        }
        Ok(())
    }

    /// `--parents`: the source keeps its path, from a `/./` on where it has one.
    fn copy_with_parents(
        &mut self,
        source: &Tree,
        one: &Selected,
        root: &str,
        options: &CopyOptions,
    ) -> Result<()> {
        let target = join_paths(root, &one.name);
        let mut from = String::new();
        let parent = target.rsplit_once('/').map(|(dir, _)| dir.to_owned()).unwrap_or_default();
        let skip = root.split('/').filter(|p| !p.is_empty()).count();
        let mut here = String::new();
        for (depth, part) in parent.split('/').filter(|p| !p.is_empty()).enumerate() {
            here = join(&here, part);
            let mut attributes = self.plain(0o755, options.owner.unwrap_or((0, 0)));
            if depth >= skip {
                from = join(&from, part);
                if let Some(stat) = source.stat(&from)? {
                    attributes = Self::attributes(source, &stat, options);
                }
            }
            self.mkdir(&here, attributes)?;
        }
        if one.dir {
            return self.copy_tree(source, one, &target, options);
        }
        for entry in source.walk(&one.path)? {
            self.put_entry(source, &entry, target.as_bytes(), options, true)?;
        }
        Ok(())
    }

    /// The contents of a directory into another.
    fn copy_tree(
        &mut self,
        source: &Tree,
        one: &Selected,
        target: &str,
        options: &CopyOptions,
    ) -> Result<()> {
        let mut dirs: Vec<(Vec<u8>, Attributes)> = Vec::new();
        for entry in source.walk(&one.path)? {
            self.check()?;
            let relative = &entry.path[one.path.len()..];
            let relative = relative.strip_prefix(b"/").unwrap_or(relative);
            if relative.is_empty() {
                // What a directory is copied to is a new one, unless the source keeps its path (`--parents`).
                let attributes = if options.parents {
                    Self::attributes(source, &entry.stat, options)
                } else {
                    self.plain(0o755, options.owner.unwrap_or((0, 0)))
                };
                let mut above = attributes;
                above.mode = 0o755;
                if let Some((dir, _)) = target.rsplit_once('/') {
                    let dir = dir.to_owned();
                    self.mkdirs(&dir, above)?;
                }
                if !target.is_empty() && self.mkdir(target, attributes)? {
                    dirs.push((target.as_bytes().to_vec(), attributes));
                } else if let Some(stat) = self.in_upper(target.as_bytes())? {
                    dirs.push((target.as_bytes().to_vec(), Attributes::of(&stat)));
                }
                continue;
            }
            if !options.exclude.is_empty() && options.exclude.excludes(&String::from_utf8_lossy(relative)) {
                continue;
            }
            let mut path = target.as_bytes().to_vec();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(relative);
            if kind(&entry.stat) == FileType::Directory {
                let attributes = Self::attributes(source, &entry.stat, options);
                let text = String::from_utf8(path.clone()).map_err(|_bad| {
                    invalid(format!("the directory name {} is not valid UTF-8", lossy(&path)))
                })?;
                self.mkdirs(&text, attributes)?;
                dirs.push((path, attributes));
            } else {
                if !options.exclude.is_empty() {
                    // Directories that were left out come with what is in them.
                    let text = String::from_utf8_lossy(&path).into_owned();
                    if let Some((dir, _)) = text.rsplit_once('/') {
                        let attributes = self.plain(0o755, options.owner.unwrap_or((0, 0)));
                        self.mkdirs(dir, attributes)?;
                    }
                }
                self.put_entry(source, &entry, &path, options, false)?;
            }
        }
        // Last, for the files written into them have touched their times.
        for (path, attributes) in dirs.into_iter().rev() {
            if path.is_empty() {
                continue;
            }
            let (parent, name) = self.parent(&path)?;
            Self::dress_dir(&parent, &name, attributes)
                .doing(|| format!("set the mode of /{}", lossy(&path)))?;
        }
        Ok(())
    }

    fn attributes(source: &Tree, stat: &Stat, options: &CopyOptions) -> Attributes {
        let mut attributes = Attributes::of(stat);
        if source.ownerless() {
            (attributes.uid, attributes.gid) = (0, 0);
        }
        if let Some(owner) = options.owner {
            (attributes.uid, attributes.gid) = owner;
        }
        if let Some(chmod) = &options.chmod {
            attributes.mode = chmod.apply(attributes.mode, kind(stat) == FileType::Directory);
        }
        attributes
    }

    /// One file, link or device.
    fn put_entry(
        &mut self,
        source: &Tree,
        entry: &Entry,
        target: &[u8],
        options: &CopyOptions,
        _top: bool,
    ) -> Result<()> {
        let what = || format!("copy /{}", lossy(&entry.path));
        let attributes = Self::attributes(source, &entry.stat, options);
        match kind(&entry.stat) {
            FileType::RegularFile => {
                let key = (entry.stat.st_dev, entry.stat.st_ino);
                if entry.stat.st_nlink > 1 {
                    if let Some(first) = self.links.get(&key).cloned() {
                        return self.hard_link(&first, target);
                    }
                    self.links.insert(key, target.to_vec());
                }
                let file =
                    File::from(source.open(&entry.path, OFlags::RDONLY | OFlags::NONBLOCK).doing(what)?);
                let out = self.create(target)?;
                copy_data(&file, &out, entry.stat.st_size).doing(what)?;
                if !source.ownerless() {
                    xattrs::copy(file.as_fd(), out.as_fd()).doing(what)?;
                }
                Self::dress_file(&out, attributes).doing(what)
            }
            FileType::Symlink => {
                let link = source.link(&entry.path)?;
                self.symlink(link.to_bytes(), target, attributes)
            }
            file_type @ (FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice) => {
                self.node(target, file_type, entry.stat.st_rdev, attributes)
            }
            // Sockets live only while somebody listens.
            _ => Ok(()),
        }
    }
}

/// The file, if it is an archive that ADD unpacks.
fn archive(source: &Tree, path: &str) -> Result<Option<File>> {
    let what = || format!("read /{path}");
    let Some(stat) = source.stat(path)? else { return Ok(None) };
    if kind(&stat) != FileType::RegularFile {
        return Ok(None);
    }
    let open = || source.open(path.as_bytes(), OFlags::RDONLY | OFlags::NONBLOCK).map(File::from).doing(what);
    Ok(if crate::compression::is_archive(open()?).doing(what)? { Some(open()?) } else { None })
}

/// Files up to this many bytes are read and written at once.
const SMALL: i64 = 64 << 10;

/// Shares the blocks where the file system can, else copies inside the kernel where it can.
fn copy_data(mut from: &File, mut to: &File, size: i64) -> io::Result<()> {
    if size <= SMALL {
        let mut data = Vec::with_capacity(usize::try_from(size).unwrap_or_default() + 1);
        from.read_to_end(&mut data)?;
        return to.write_all(&data);
    }
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    io::copy(&mut from, &mut to).map(drop)
}
