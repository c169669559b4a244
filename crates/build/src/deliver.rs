//! A result's files to the client's session: one by one, or as an archive.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::sync::Arc;

use brigantine_image::{Lease, layer};
use brigantine_session::{Entry, Kind, Session};
use rustix::fs::{FileType, OFlags};

use crate::error::{Context as _, Error, Result};
use crate::snapshot::hold;
use crate::solver::{Output, Solver};
use crate::tree::Tree;

/// Sends the files of a target. Blocks.
pub(crate) fn files(
    solver: &Solver,
    lease: &Lease,
    target: &Output,
    session: &Arc<Session>,
    runtime: &tokio::runtime::Handle,
    archive: bool,
) -> Result<()> {
    let held = hold(&solver.store, &solver.mounts, lease, &target.layers)?;
    let tree = Tree::layers(&held.lowers, Arc::clone(&solver.hashes))?;
    if archive {
        let root =
            tree.open(b"", OFlags::RDONLY | OFlags::DIRECTORY).doing(|| "open the result".to_owned())?;
        let path = format!("/proc/self/fd/{}", root.as_raw_fd());
        let mut output = session.archive(runtime)?;
        let packed = layer::pack(Path::new(&path), &mut output);
        // Why the client took no more says more than that it did not.
        output.finish()?;
        packed.map_err(|error| Error::Executor(format!("pack the result: {error}")))?;
        return Ok(());
    }
    let entries = listing(&tree)?;
    let open =
        |path: &[u8]| tree.open(path, OFlags::RDONLY | OFlags::NONBLOCK).map(File::from).map_err(Into::into);
    session.send_files(runtime, entries, open)?;
    Ok(())
}

/// Everything in a tree, as it is sent. Devices, pipes and sockets are left out.
fn listing(tree: &Tree) -> Result<Vec<Entry>> {
    let mut names: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut entries = Vec::new();
    for file in tree.walk("")? {
        if file.path.is_empty() {
            continue;
        }
        let stat = &file.stat;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink(tree.link(&file.path)?.into_bytes()),
            FileType::RegularFile => {
                let first = (stat.st_nlink > 1)
                    .then(|| names.entry((stat.st_dev, stat.st_ino)).or_insert_with(|| file.path.clone()))
                    .filter(|first| **first != file.path);
                match first {
                    Some(first) => Kind::HardLink(first.clone()),
                    None => Kind::File { size: stat.st_size.unsigned_abs() },
                }
            }
            _ => continue,
        };
        entries.push(Entry {
            kind,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: stat
                .st_mtime
                .saturating_mul(1_000_000_000)
                .saturating_add(stat.st_mtime_nsec.cast_signed()),
            path: file.path,
        });
    }
    Ok(entries)
}
