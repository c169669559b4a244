//! Snapshotters: how a layer is kept on disk, and how it becomes a lower directory of a container's overlay.
//!
//! Every form of layer can stand in one stack with every other: which form a new one takes is a [`Storage`], what is
//! there stays as it is. [`Storage::best`] finds by trying what this kernel and this file system are able to do. Where
//! there is no overlay at all, an image's files are one plain tree ([`Storage::Copy`]), of which each container gets a
//! copy ([`crate::Replica`]).

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

use crate::error::{Error, IoContext as _, Result};
use crate::layer::{ARCHIVE, INDEX, Indexed};
use crate::temp::TempDir;

/// The form in which new layers are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Extracted into a directory.
    Overlay,
    /// The archive as one file with an EROFS index over it; needs Linux 6.12 and a file system that is itself mounted
    /// from a device.
    Erofs,
    /// Not at all: an image's layers are extracted over each other into one tree, for file systems that overlay refuses.
    Copy,
}

impl Storage {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Overlay => "overlay",
            Self::Erofs => "erofs",
            Self::Copy => "copy",
        }
    }

    /// The best form that works below `tmp`.
    pub(crate) fn best(tmp: &Path) -> Self {
        if probe_overlay(tmp).is_err() {
            return Self::Copy;
        }
        match probe_erofs(tmp) {
            Ok(()) => Self::Erofs,
            Err(_) => Self::Overlay,
        }
    }

    /// Fails with the reason where layers of this form could not be used.
    pub(crate) fn check(self, tmp: &Path) -> Result<()> {
        match self {
            Self::Copy => Ok(()),
            Self::Overlay => probe_overlay(tmp).map_err(|error| {
                Error::Invalid(format!(
                    "storage \"overlay\" does not work here (the file system has to take whiteouts and trusted \
                     attributes; \"copy\" works everywhere): {}",
                    error.chain()
                ))
            }),
            Self::Erofs => probe_overlay(tmp).and_then(|()| probe_erofs(tmp)).map_err(|error| {
                Error::Invalid(format!(
                    "storage \"erofs\" does not work here (it needs Linux 6.12 or later with EROFS and overlay, and the \
                     right to mount): {}",
                    error.chain()
                ))
            }),
        }
    }
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Storage {
    type Err = Error;

    /// The name of a form; docker's names for overlay and copy too.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "overlay" | "overlay2" | "overlayfs" => Ok(Self::Overlay),
            "erofs" => Ok(Self::Erofs),
            "copy" | "vfs" => Ok(Self::Copy),
            other => Err(Error::Invalid(format!(
                "storage {other:?} is not known: there are \"overlay\", \"erofs\" and \"copy\""
            ))),
        }
    }
}

/// Where a layer's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerFiles {
    Directory(PathBuf),
    Erofs { index: PathBuf, archive: PathBuf },
}

impl LayerFiles {
    /// Makes the layer usable as a lower directory.
    pub fn open(&self) -> Result<Lower> {
        match self {
            Self::Directory(path) => Ok(Lower::directory(path.clone())),
            Self::Erofs { index, archive } => {
                let mount = brigantine_sys::mount::open_erofs(index, archive).at("mount", index)?;
                let path = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
                Ok(Lower { path, shown: index.clone(), mount: Some(Arc::new(mount)) })
            }
        }
    }

    /// For people: the directory, or the index.
    pub fn shown(&self) -> &Path {
        match self {
            Self::Directory(path) => path,
            Self::Erofs { index, .. } => index,
        }
    }
}

/// A layer in use: a directory, or a mount that lasts as long as somebody has it. Clones share it, and so do
/// containers: files that several of them read are in memory once.
#[derive(Clone, Debug)]
pub struct Lower {
    path: PathBuf,
    shown: PathBuf,
    mount: Option<Arc<OwnedFd>>,
}

impl Lower {
    /// An ordinary directory.
    pub fn directory(path: PathBuf) -> Self {
        Self { shown: path.clone(), path, mount: None }
    }

    /// Good within this process for as long as this lives.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For people: the directory, or the file mounted.
    pub fn shown(&self) -> &Path {
        &self.shown
    }

    /// Whether somebody else has a clone of it.
    pub fn is_shared(&self) -> bool {
        self.mount.as_ref().is_some_and(|mount| Arc::strong_count(mount) > 1)
    }

    /// The mount, if it is one.
    pub fn mount(&self) -> Option<&Arc<OwnedFd>> {
        self.mount.as_ref()
    }
}

impl AsRef<Path> for Lower {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

/// A detached, read-only view of all `layers`, top first: of one alone the layer itself.
pub fn open_union(layers: &[Lower]) -> Result<OwnedFd> {
    let what = || layers.first().map(|layer| layer.path.clone()).unwrap_or_default();
    if let [one] = layers {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        return rustix::fs::open(&one.path, flags, Mode::empty()).at("open layer", what());
    }
    let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).at("mount layers", what())?;
    for layer in layers {
        fsconfig_set_string(fs.as_fd(), "lowerdir+", &layer.path).at("mount layers", what())?;
    }
    fsconfig_create(fs.as_fd()).at("mount layers", what())?;
    fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
        .at("mount layers", what())
}

/// Writes through an overlay whose directories are there, and hides a file with it: the way containers use it.
fn probe_overlay(tmp: &Path) -> Result<()> {
    let dir = TempDir::create(tmp, "probe")?;
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| dir.path().join(name));
    for dir in [&lower, &lower.join("dir"), &upper, &work] {
        std::fs::create_dir(dir).at("create", dir)?;
    }
    let file = lower.join("dir/file");
    std::fs::write(&file, b"below").at("write", &file)?;
    let what = || dir.path().to_owned();
    let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).at("mount an overlay", what())?;
    // By its descriptor, for a colon would part the path in two.
    let below = rustix::fs::open(&lower, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).at("open", &lower)?;
    let by_descriptor = PathBuf::from(format!("/proc/self/fd/{}", below.as_raw_fd()));
    for (key, value) in [("lowerdir", &by_descriptor), ("upperdir", &upper), ("workdir", &work)] {
        fsconfig_set_string(fs.as_fd(), key, value).at("mount an overlay", what())?;
    }
    fsconfig_create(fs.as_fd()).at("mount an overlay", what())?;
    let root = fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
        .at("mount an overlay", what())?;
    rustix::fs::unlinkat(&root, "dir/file", AtFlags::empty()).at("remove in an overlay", &file)?;
    // Made again, the directory is opaque: an attribute says so.
    rustix::fs::unlinkat(&root, "dir", AtFlags::REMOVEDIR).at("remove in an overlay", &lower)?;
    rustix::fs::mkdirat(&root, "dir", Mode::RWXU).at("create in an overlay", &lower)?;
    match rustix::fs::statat(&root, "dir/file", AtFlags::SYMLINK_NOFOLLOW) {
        Err(rustix::io::Errno::NOENT) => {}
        _ => return Err(Error::Invalid("a file that was removed through it is there again".to_owned())),
    }
    // The kernel says with a whiteout of its own whether the file system keeps them.
    let device = rustix::fs::mknodat(
        rustix::fs::CWD,
        lower.join("whiteout"),
        rustix::fs::FileType::CharacterDevice,
        Mode::empty(),
        0,
    );
    device.at("make a whiteout in", &lower)
}

/// Makes a layer, mounts it, puts an overlay on it and reads a file through that: the way containers use it.
fn probe_erofs(tmp: &Path) -> Result<()> {
    const TEXT: &[u8] = b"as it should be";
    let dir = TempDir::create(tmp, "probe")?;
    let mut archive = crate::tar::Writer::new(Vec::new());
    archive.append_bytes("file", TEXT, crate::tar::Time::default()).map_err(Error::Output)?;
    let archive = archive.finish().map_err(Error::Output)?;
    let layer = |source| Error::Layer { layer: "of the probe".to_owned(), source };
    match crate::layer::index(&archive[..], dir.path(), crate::Algorithm::Sha256).map_err(layer)? {
        Indexed::Whole(_) => {}
        Indexed::Unfit { reason, .. } => return Err(Error::Invalid(reason.to_owned())),
    }
    let files = LayerFiles::Erofs { index: dir.path().join(INDEX), archive: dir.path().join(ARCHIVE) };
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).at("create", &empty)?;
    let root = open_union(&[files.open()?, Lower::directory(empty)])?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&root, "file", flags, Mode::empty()).at("open", "file")?;
    let mut text = Vec::new();
    File::from(file).read_to_end(&mut text).at("read", "file")?;
    if text != TEXT {
        return Err(Error::Invalid("a file read through it is not what was written".to_owned()));
    }
    Ok(())
}
