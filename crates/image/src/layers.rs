//! Layers ready for use, side by side, each made once: `layers/<diff id>/meta.json` and beside it the tree (`diff`), or
//! the archive (`data.tar`) with its EROFS index (`index.erofs`). Where there is no overlay, a layer is nothing but what
//! is known of it, and `trees/<chain id>/` has the files of whole images in the same way.
//!
//! An uncompressed blob and the archive of its layer are the same bytes: one file with two names.
//!
//! Invariant: a layer's directory is there only when it is complete and its uncompressed archive had the digest its
//! name says. Layers are derived from blobs and are not synced one by one: `meta.json` notes the boot they were made
//! in, and one that a power cut may have torn is made again from its blob.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};

use crate::content::Content;
use crate::digest::{Algorithm, Digest};
use crate::error::{Error, IoContext as _, Result};
use crate::layer::{self, ARCHIVE, Applied, DiffId, INDEX, Indexed};
use crate::snapshot::{LayerFiles, Storage};
use crate::temp::{self, TempDir};

const TREE: &str = "diff";

/// What is known of an extracted layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerInfo {
    pub diff_id: Digest,
    /// Sum of the lengths of its regular files: what Docker counts.
    pub size: u64,
    /// What it takes on disk, in whole blocks.
    pub disk: u64,
    /// Number of entries.
    pub entries: u64,
    /// Digest of its EROFS index, if it is kept as its archive with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    index: Option<Digest>,
    /// It was only looked at: its files are in the trees of images that have it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    bare: bool,
    /// The boot it was extracted in, until it is known to be on disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unsettled: Option<String>,
}

/// What a layer was made as.
#[derive(Debug, Default)]
struct Form {
    /// Digest of its EROFS index.
    index: Option<Digest>,
    bare: bool,
}

impl Form {
    /// Of the index that has just been written.
    fn of_index(temp: &TempDir) -> Result<Self> {
        let path = temp.path().join(INDEX);
        let index = fs::read(&path).at("read", path)?;
        Ok(Self { index: Some(Digest::sha256(&index)), bare: false })
    }
}

/// A layer that is made and not visible yet; without [`Layers::place`] it goes.
#[derive(Debug)]
pub(crate) struct Prepared {
    temp: TempDir,
    applied: Applied,
    form: Form,
}

impl Prepared {
    pub fn diff_id(&self) -> &Digest {
        &self.applied.diff_id
    }
}

/// An uncompressed archive that was kept, whatever it is.
pub(crate) struct Kept {
    pub digest: Digest,
    /// The layer, if it is one.
    pub unindexed: Option<Unindexed>,
}

/// A kept archive that is a layer's and has no index yet.
pub(crate) struct Unindexed {
    temp: TempDir,
    archive: layer::Unindexed,
}

impl Unindexed {
    pub fn diff_id(&self) -> &Digest {
        self.archive.diff_id()
    }

    /// Writes the index. `None` where the form has no room for it: who needs the layer makes it otherwise, or hears why
    /// it cannot.
    pub fn index(self) -> Result<Option<Prepared>> {
        match self.archive.write(self.temp.path()) {
            Ok(Indexed::Whole(applied)) => {
                Ok(Some(Prepared { form: Form::of_index(&self.temp)?, temp: self.temp, applied }))
            }
            Ok(Indexed::Unfit { .. }) | Err(_) => Ok(None),
        }
    }
}

impl LayerInfo {
    /// Whether it has no files of its own.
    pub fn is_bare(&self) -> bool {
        self.bare
    }
}

#[derive(Debug)]
pub(crate) struct Layers {
    root: PathBuf,
    tmp: PathBuf,
    known: Mutex<HashMap<Digest, LayerInfo>>,
    /// One extraction of a layer at a time within this process.
    making: Mutex<HashMap<Digest, Arc<Mutex<()>>>>,
    /// The form of new layers: as told, or found at the first.
    storage: OnceLock<Storage>,
}

fn boot_id() -> &'static str {
    static BOOT: OnceLock<String> = OnceLock::new();
    BOOT.get_or_init(|| {
        fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
    })
}

impl Layers {
    /// Those in `dir` of the store at `root`.
    pub fn new(root: &Path, dir: &str, storage: Option<Storage>) -> Self {
        Self {
            root: root.join(dir),
            tmp: root.join("tmp"),
            known: Mutex::default(),
            making: Mutex::default(),
            storage: storage.map_or_else(OnceLock::new, OnceLock::from),
        }
    }

    /// The form of new layers.
    pub fn storage(&self) -> Storage {
        *self.storage.get_or_init(|| Storage::best(&self.tmp))
    }

    fn dir(&self, diff_id: &Digest) -> PathBuf {
        match diff_id.algorithm() {
            Algorithm::Sha256 => self.root.join(diff_id.hex()),
            Algorithm::Sha512 => self.root.join(format!("sha512-{}", diff_id.hex())),
        }
    }

    /// Where the layer's files are.
    pub fn files(&self, diff_id: &Digest) -> Result<LayerFiles> {
        let dir = self.dir(diff_id);
        Ok(match self.get(diff_id)? {
            Some(info) if info.index.is_some() => {
                LayerFiles::Erofs { index: dir.join(INDEX), archive: dir.join(ARCHIVE) }
            }
            _ => LayerFiles::Directory(dir.join(TREE)),
        })
    }

    /// Where the files of an extracted layer or a whole image are.
    pub fn tree(&self, id: &Digest) -> PathBuf {
        self.dir(id).join(TREE)
    }

    /// An empty directory, for images without layers.
    pub fn empty_tree(&self) -> Result<PathBuf> {
        let path = self.root.join(".empty");
        fs::create_dir_all(&path).at("create", &path)?;
        Ok(path)
    }

    /// The layer, if it is there and whole.
    pub fn get(&self, diff_id: &Digest) -> Result<Option<LayerInfo>> {
        let dir = self.dir(diff_id);
        if let Some(info) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(diff_id)
            && dir.exists()
        {
            return Ok(self.usable(info.clone()));
        }
        let path = dir.join("meta.json");
        let raw = match fs::read(&path) {
            Ok(raw) => raw,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).at("read", path),
        };
        let Ok(info) = serde_json::from_slice::<LayerInfo>(&raw) else { return Ok(None) };
        if info.diff_id != *diff_id || info.unsettled.as_deref().is_some_and(|boot| boot != boot_id()) {
            return Ok(None);
        }
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(diff_id.clone(), info.clone());
        Ok(self.usable(info))
    }

    /// One that was only looked at is of use only where all are.
    fn usable(&self, info: LayerInfo) -> Option<LayerInfo> {
        (!info.bare || self.storage() == Storage::Copy).then_some(info)
    }

    /// Extracts a layer unless it is there. `source` is opened only when it is needed and may be compressed.
    pub fn make<R: Read>(&self, diff_id: &Digest, source: impl FnOnce() -> Result<R>) -> Result<LayerInfo> {
        self.once(diff_id, || source().and_then(|reader| self.extract(diff_id, reader)))
    }

    /// The same of a blob: where that is the uncompressed archive itself, its bytes are not kept a second time.
    /// Tells as well whether the blob was read, and so seen to be the layer's.
    pub fn make_of_blob(
        &self,
        diff_id: &Digest,
        blob: &Digest,
        content: &Content,
    ) -> Result<(LayerInfo, bool)> {
        let mut read = false;
        let info = self.once(diff_id, || {
            read = true;
            if blob == diff_id
                && self.storage() == Storage::Erofs
                && let Some(info) = self.index_blob(diff_id, &content.path(blob))?
            {
                return Ok(info);
            }
            self.extract(diff_id, content.open(blob)?)
        })?;
        Ok((info, read))
    }

    /// Gives the archive a second name and indexes it there; `None` where that cannot be done.
    fn index_blob(&self, diff_id: &Digest, blob: &Path) -> Result<Option<LayerInfo>> {
        let layer_error = |source| Error::Layer { layer: diff_id.to_string(), source };
        let temp = TempDir::create(&self.tmp, "layer")?;
        if fs::hard_link(blob, temp.path().join(ARCHIVE)).is_err() {
            return Ok(None);
        }
        let found = layer::index_in_place(temp.path(), diff_id.algorithm()).map_err(layer_error)?;
        let Indexed::Whole(applied) = found else { return Ok(None) };
        if applied.diff_id != *diff_id {
            return Err(layer_error(layer::LayerError::DiffId { actual: applied.diff_id }));
        }
        let form = Form::of_index(&temp)?;
        self.finish(temp, &applied, form).map(Some)
    }

    /// Makes the files of a whole image unless they are there: `fill` extracts its layers into an empty directory.
    pub fn make_tree(&self, chain_id: &Digest, fill: impl FnOnce(&Path) -> Result<()>) -> Result<LayerInfo> {
        self.once(chain_id, || {
            let temp = TempDir::create(&self.tmp, "tree")?;
            let tree = temp.path().join(TREE);
            fs::create_dir(&tree).at("create", &tree)?;
            fill(&tree)?;
            let measured = crate::tree::measure(&tree).at("read", &tree)?;
            let applied = Applied {
                diff_id: chain_id.clone(),
                size: measured.size,
                disk: measured.disk,
                entries: measured.entries,
            };
            self.finish(temp, &applied, Form::default())
        })
    }

    /// Makes a layer unless it is there, one at a time.
    fn once(&self, diff_id: &Digest, make: impl FnOnce() -> Result<LayerInfo>) -> Result<LayerInfo> {
        let turn = Arc::clone(
            self.making.lock().unwrap_or_else(PoisonError::into_inner).entry(diff_id.clone()).or_default(),
        );
        let result = {
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            match self.get(diff_id) {
                Ok(Some(info)) => Ok(info),
                Ok(None) => make(),
                Err(error) => Err(error),
            }
        };
        let mut making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::strong_count(&turn) == 2 {
            making.remove(diff_id);
        }
        result
    }

    fn extract(&self, diff_id: &Digest, reader: impl Read) -> Result<LayerInfo> {
        let layer_error = |source| Error::Layer { layer: diff_id.to_string(), source };
        let temp = TempDir::create(&self.tmp, "layer")?;
        let (applied, form) =
            self.fill(reader, &temp, DiffId::Hashed(diff_id.algorithm()), &diff_id.to_string())?;
        if applied.diff_id != *diff_id {
            return Err(layer_error(layer::LayerError::DiffId { actual: applied.diff_id }));
        }
        self.finish(temp, &applied, form)
    }

    /// Extracts a layer whose diff id is known only at the end; `hold` is told it before the layer becomes visible.
    pub fn make_unnamed(
        &self,
        name: &str,
        reader: impl Read,
        hold: impl FnOnce(&Digest) -> Result<()>,
    ) -> Result<LayerInfo> {
        let temp = TempDir::create(&self.tmp, "layer")?;
        let (applied, form) = self.fill(reader, &temp, DiffId::Hashed(Algorithm::Sha256), name)?;
        hold(&applied.diff_id)?;
        self.finish(temp, &applied, form)
    }

    /// Makes a layer of whatever diff id, out of sight.
    pub fn prepare(&self, reader: impl Read, diff_id: DiffId<'_>, name: &str) -> Result<Prepared> {
        let temp = TempDir::create(&self.tmp, "layer")?;
        let (applied, form) = self.fill(reader, &temp, diff_id, name)?;
        Ok(Prepared { temp, applied, form })
    }

    /// Keeps an uncompressed archive as `path`, which is its layer as soon as it has an index.
    pub fn keep(&self, reader: impl Read, algorithm: Algorithm, path: &Path) -> Result<Kept> {
        let temp = TempDir::create(&self.tmp, "layer")?;
        let layer_error = |source| Error::Layer { layer: "of the archive".to_owned(), source };
        let layer::Kept { digest, model } =
            layer::keep(reader, temp.path(), algorithm).map_err(layer_error)?;
        fs::hard_link(temp.path().join(ARCHIVE), path).at("link", path)?;
        // Who needs what is none as a layer hears why.
        let unindexed = model.ok().map(|archive| Unindexed { temp, archive });
        Ok(Kept { digest, unindexed })
    }

    /// Makes a prepared layer visible, unless it is there.
    pub fn place(&self, prepared: Prepared) -> Result<LayerInfo> {
        let Prepared { temp, applied, form } = prepared;
        let diff_id = applied.diff_id.clone();
        self.once(&diff_id, || self.finish(temp, &applied, form))
    }

    /// Makes a layer's files in the form in use.
    fn fill(
        &self,
        reader: impl Read,
        temp: &TempDir,
        diff_id: DiffId<'_>,
        name: &str,
    ) -> Result<(Applied, Form)> {
        let layer_error = |source| Error::Layer { layer: name.to_owned(), source };
        let tree = temp.path().join(TREE);
        let make_tree = || fs::create_dir(&tree).at("create", &tree);
        match self.storage() {
            Storage::Overlay => {
                make_tree()?;
                Ok((layer::apply_named(reader, &tree, diff_id).map_err(layer_error)?, Form::default()))
            }
            Storage::Copy => {
                let applied = layer::inspect_named(reader, diff_id).map_err(layer_error)?;
                Ok((applied, Form { bare: true, ..Form::default() }))
            }
            Storage::Erofs => {
                match layer::index_named(reader, temp.path(), diff_id).map_err(layer_error)? {
                    Indexed::Whole(applied) => Ok((applied, Form::of_index(temp)?)),
                    Indexed::Unfit { diff_id, .. } => {
                        // The format has no room for it; the archive is there, and goes when it is extracted.
                        let archive = temp.path().join(ARCHIVE);
                        let file = fs::File::open(&archive).at("open", &archive)?;
                        make_tree()?;
                        let applied = layer::apply(file, &tree, diff_id.algorithm()).map_err(layer_error)?;
                        debug_assert_eq!(applied.diff_id, diff_id, "what is kept is the archive itself");
                        fs::remove_file(&archive).at("remove", &archive)?;
                        let index = temp.path().join(INDEX);
                        match fs::remove_file(&index) {
                            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                                return Err(error).at("remove", index);
                            }
                            _ => {}
                        }
                        Ok((applied, Form::default()))
                    }
                }
            }
        }
    }

    fn finish(&self, temp: TempDir, applied: &Applied, form: Form) -> Result<LayerInfo> {
        let info = LayerInfo {
            diff_id: applied.diff_id.clone(),
            size: applied.size,
            disk: applied.disk,
            entries: applied.entries,
            index: form.index,
            bare: form.bare,
            unsettled: Some(boot_id().to_owned()),
        };
        write_meta(&temp.path().join("meta.json"), &info)?;
        let target = self.dir(&info.diff_id);
        if self.get(&info.diff_id)?.is_none() && target.exists() {
            // Torn by a power cut: out of the way.
            drop(TempDir::adopt(&self.tmp, &target)?);
        }
        temp.publish(&target)?;
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(info.diff_id.clone(), info.clone());
        Ok(info)
    }

    /// Takes a directory that a builder made as the layer of this diff id: it is moved. When the layer is there
    /// already, or is better made of its blob, the directory stays where it is.
    pub fn adopt(
        &self,
        diff_id: &Digest,
        upper: &Path,
        packed: layer::Packed,
        content: &Content,
    ) -> Result<LayerInfo> {
        if let Some(info) = self.get(diff_id)? {
            return Ok(info);
        }
        match self.storage() {
            Storage::Overlay => {}
            Storage::Erofs | Storage::Copy => {
                return self.make_of_blob(diff_id, diff_id, content).map(|(info, _)| info);
            }
        }
        let temp = TempDir::create(&self.tmp, "layer")?;
        let tree = temp.path().join(TREE);
        fs::rename(upper, &tree).at("rename", upper)?;
        let disk = packed.size.next_multiple_of(4096).max(packed.entries * 512);
        self.finish(
            temp,
            &Applied { diff_id: diff_id.clone(), size: packed.size, disk, entries: packed.entries },
            Form::default(),
        )
    }

    /// Makes everything extracted so far durable, so that it is kept across a power cut.
    pub fn settle(&self) -> Result<()> {
        let unsettled: Vec<LayerInfo> = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.values().filter(|info| info.unsettled.is_some()).cloned().collect()
        };
        if unsettled.is_empty() {
            return Ok(());
        }
        let root = fs::File::open(&self.root).at("open", &self.root)?;
        rustix::fs::syncfs(&root).at("sync", &self.root)?;
        for mut info in unsettled {
            info.unsettled = None;
            let dir = self.dir(&info.diff_id);
            let fresh = dir.join("meta.json.new");
            let written = write_meta(&fresh, &info).and_then(|()| {
                let path = dir.join("meta.json");
                fs::rename(&fresh, &path).at("rename", path)
            });
            match written {
                Ok(()) => {}
                // Removed meanwhile.
                Err(_) if !dir.exists() => continue,
                Err(error) => return Err(error),
            }
            if let Some(known) =
                self.known.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&info.diff_id)
            {
                known.unsettled = None;
            }
        }
        Ok(())
    }

    /// Whether a layer's index is what was written.
    pub fn index_is_whole(&self, diff_id: &Digest, index: &Path) -> Result<bool> {
        let Some(info) = self.get(diff_id)? else { return Ok(false) };
        let raw = fs::read(index).at("read", index)?;
        Ok(info.index == Some(Digest::sha256(&raw)))
    }

    /// Every layer directory there is.
    pub fn walk(&self) -> Result<Vec<Digest>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.root).at("read", &self.root)? {
            let name = entry.at("read", &self.root)?.file_name();
            let Some(name) = name.to_str() else { continue };
            let digest = match name.strip_prefix("sha512-") {
                Some(hex) => Digest::from_hex(Algorithm::Sha512, hex),
                None => Digest::from_hex(Algorithm::Sha256, name),
            };
            found.extend(digest.ok());
        }
        Ok(found)
    }

    /// What a layer takes on disk beside the blobs.
    pub fn disk(&self, info: &LayerInfo) -> u64 {
        info.disk.saturating_sub(self.shared(&info.diff_id))
    }

    /// Bytes of the layer's archive that a blob has as well.
    fn shared(&self, diff_id: &Digest) -> u64 {
        match fs::metadata(self.dir(diff_id).join(ARCHIVE)) {
            Ok(archive) if archive.nlink() > 1 => archive.len().next_multiple_of(4096),
            _ => 0,
        }
    }

    /// Takes a layer out of sight; its bytes are given back when the returned directory is dropped.
    pub fn take(&self, diff_id: &Digest) -> Result<Option<(TempDir, u64)>> {
        let disk = self.get(diff_id)?.map_or(0, |info| self.disk(&info));
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(diff_id);
        let dir = self.dir(diff_id);
        if !dir.exists() {
            return Ok(None);
        }
        let taken = TempDir::adopt(&self.tmp, &dir)?;
        temp::sync_parent(&dir)?;
        Ok(Some((taken, disk)))
    }
}

fn write_meta(path: &Path, info: &LayerInfo) -> Result<()> {
    let raw = serde_json::to_vec(info)
        .map_err(|source| Error::Json { what: "a layer's meta.json".to_owned(), source })?;
    fs::write(path, raw).at("write", path)
}
