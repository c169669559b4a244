//! A disk with a volatile cache: what was written to it is lost at a power cut unless it was flushed.
//!
//! It is a FUSE file with a loop device on top and a real kernel file system on that: the loop driver turns the file
//! system's flushes (REQ_OP_FLUSH and FUA) into fsync of the file. Invariant: until [`Disk::cut`] the file shows every
//! write, in `durable` are those before the last fsync only.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, UNIX_EPOCH},
};

use fuser::{
    BackgroundSession, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request,
    Session, SessionACL, WriteFlags,
};

use crate::Sandbox;

/// The unit that a disk writes whole or not at all.
const SECTOR: u64 = 512;
const NAME: &str = "disk";
const FILE: INodeNo = INodeNo(2);

/// Which kernel file system is on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Ext4,
    Xfs,
}

/// What of the writes since the last flush a power cut leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// None of them.
    All,
    /// Of each sector the old or the new content, by chance: disks reorder what was not flushed.
    Some { seed: u64 },
}

/// A disk that is mounted in a sandbox.
#[derive(Debug)]
pub struct Disk {
    state: Arc<Mutex<State>>,
    /// Where the FUSE file system is mounted in the sandbox.
    fuse: PathBuf,
    target: PathBuf,
    durable: PathBuf,
    _session: BackgroundSession,
}

#[derive(Debug)]
struct State {
    /// Everything written.
    current: File,
    /// What was flushed.
    durable: File,
    /// Sectors written since.
    pending: BTreeMap<u64, [u8; SECTOR as usize]>,
    size: u64,
    cut: bool,
    flushes: u64,
}

impl Disk {
    /// Makes an empty disk as a file in `dir`.
    #[track_caller]
    pub fn format(dir: &Path, format: Format, bytes: u64) -> PathBuf {
        let path = dir.join("disk-0");
        File::create(&path).and_then(|file| file.set_len(bytes)).expect("a sparse file");
        let mut command = match format {
            Format::Ext4 => Command::new("mkfs.ext4"),
            Format::Xfs => Command::new("mkfs.xfs"),
        };
        must(command.arg("-q").arg(&path));
        path
    }

    /// Mounts what the file `durable` holds at `target` in the sandbox. From now on the file gets what is flushed.
    #[track_caller]
    pub fn mount(sandbox: &Sandbox, durable: &Path, target: &Path) -> Self {
        let current = durable.with_extension("current");
        must(Command::new("cp").arg("--sparse=always").args([durable, &current]));
        let open = |path: &Path| File::options().read(true).write(true).open(path).expect("the disk's file");
        let file = open(&current);
        // It is nobody's but ours.
        fs::remove_file(&current).expect("remove the disk's file");
        let size = file.metadata().expect("its size").len();
        let state = State {
            current: file,
            durable: open(durable),
            pending: BTreeMap::new(),
            size,
            cut: false,
            flushes: 0,
        };
        let state = Arc::new(Mutex::new(state));
        let device = open(Path::new("/dev/fuse"));
        let fuse = sandbox.dir().join("fuse");
        fs::create_dir_all(&fuse).expect("a mount point");
        let mut mount = sandbox.command("mount");
        mount.args(["-i", "-t", "fuse", "-o", "fd=0,rootmode=40000,user_id=0,group_id=0", "disk"]);
        must(mount.arg(&fuse).stdin(Stdio::from(device.try_clone().expect("dup"))));
        let session = Session::from_fd(
            Cache(Arc::clone(&state)),
            device.into(),
            SessionACL::All,
            fuser::Config::default(),
        )
        .expect("a FUSE session");
        let session = session.spawn().expect("a thread for the disk");
        // The loop device goes with the mount.
        must(sandbox.command("mount").args(["-o", "loop"]).arg(fuse.join(NAME)).arg(target));
        Self { state, fuse, target: target.to_owned(), durable: durable.to_owned(), _session: session }
    }

    /// How often it was flushed.
    pub fn flushes(&self) -> u64 {
        self.state().flushes
    }

    /// Cuts the power: from this moment on nothing reaches the disk any more, and what of the past did is as `cut`
    /// says. What still runs does not know yet.
    pub fn cut(&self, cut: Cut) {
        let mut state = self.state();
        assert!(!state.cut, "the power is cut already");
        if let Cut::Some { seed } = cut {
            let mut chance = seed | 1;
            let pending = std::mem::take(&mut state.pending);
            for (sector, bytes) in pending {
                // xorshift64: whatever, as long as it can be had again.
                chance ^= chance << 13;
                chance ^= chance >> 7;
                chance ^= chance << 17;
                if chance & 4 == 0 {
                    state.durable.write_all_at(&bytes, sector * SECTOR).expect("write the disk's file");
                }
            }
        }
        state.pending.clear();
        state.cut = true;
    }

    /// Takes the dead disk out: the file with what was durable. Nothing may use it any more.
    #[track_caller]
    pub fn take_out(self, sandbox: &Sandbox) -> PathBuf {
        must(sandbox.command("umount").arg(&self.target));
        must(sandbox.command("umount").arg("-l").arg(&self.fuse));
        self.durable.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[track_caller]
fn must(command: &mut Command) {
    let output = command.output().expect("nsenter");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The file system with the one file.
struct Cache(Arc<Mutex<State>>);

impl Cache {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let is_file = inode == FILE;
        FileAttr {
            ino: inode,
            size: if is_file { self.state().size } else { 0 },
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_file { FileType::RegularFile } else { FileType::Directory },
            perm: if is_file { 0o600 } else { 0o700 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

const FOR_EVER: Duration = Duration::from_hours(1);

impl Filesystem for Cache {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == NAME {
            reply.entry(&FOR_EVER, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOR_EVER, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let state = self.state();
        let mut bytes = vec![0; u64::from(size).min(state.size.saturating_sub(offset)) as usize];
        match state.current.read_exact_at(&mut bytes, offset) {
            Ok(()) => reply.data(&bytes),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = self.state();
        if state.current.write_all_at(data, offset).is_err() {
            return reply.error(Errno::ENOSPC);
        }
        if !state.cut {
            assert!(
                offset.is_multiple_of(SECTOR) && (data.len() as u64).is_multiple_of(SECTOR),
                "a block device is written in sectors"
            );
            for (number, bytes) in data.chunks_exact(SECTOR as usize).enumerate() {
                let sector = offset / SECTOR + number as u64;
                state.pending.insert(sector, bytes.try_into().expect("a sector"));
            }
        }
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = self.state();
        state.flushes += 1;
        for (sector, bytes) in std::mem::take(&mut state.pending) {
            if state.durable.write_all_at(&bytes, sector * SECTOR).is_err() {
                return reply.error(Errno::ENOSPC);
            }
        }
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}
