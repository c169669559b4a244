//! The streaming reader: one entry at a time, bounded memory whatever the archive says.

mod extended;
mod field;
mod sparse;

use std::io::{self, BufRead};

use extended::Extended;
pub(crate) use field::is_header;
use field::{checksum_matches, number, padding, text};

use super::{BLOCK, Entry, Kind, Time};

/// Why an archive cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    #[error("reading the archive")]
    Read(#[source] io::Error),
    #[error("the archive ends early, {position} bytes in")]
    Truncated { position: u64 },
    #[error("malformed archive at byte {position}: {problem}")]
    Malformed { position: u64, problem: String },
}

type Result<T> = std::result::Result<T, TarError>;

/// Reads an archive.
pub struct Reader<R> {
    input: R,
    position: u64,
    /// Data of the current entry not read yet.
    remaining: u64,
    /// What pads it to a whole block.
    padding: u64,
    /// Records that hold for all entries to come.
    global: Vec<(Vec<u8>, Vec<u8>)>,
    special: Vec<u8>,
}

/// The current entry's data.
impl<R: BufRead> io::Read for Reader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let data = self.data().map_err(io::Error::other)?;
        let n = data.len().min(buf.len());
        buf[..n].copy_from_slice(&data[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl<R: BufRead> Reader<R> {
    pub fn new(input: R) -> Self {
        Self { input, position: 0, remaining: 0, padding: 0, global: Vec::new(), special: Vec::new() }
    }

    pub fn into_inner(self) -> R {
        self.input
    }

    /// Bytes of the archive read so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    fn malformed(&self, problem: impl Into<String>) -> TarError {
        TarError::Malformed { position: self.position, problem: problem.into() }
    }

    /// Fills in the next entry; false at the end of the archive.
    pub fn next(&mut self, entry: &mut Entry) -> Result<bool> {
        self.skip_rest()?;
        let mut extended = Extended::default();
        let mut any_extended = false;
        if !self.global.is_empty() {
            let global = std::mem::take(&mut self.global);
            for (key, value) in &global {
                self.record(&mut extended, key, value)?;
            }
            self.global = global;
        }
        let mut block = [0u8; BLOCK];
        loop {
            if !self.header(&mut block)? {
                if any_extended {
                    return Err(TarError::Truncated { position: self.position });
                }
                return Ok(false);
            }
            let size = self.number(&block[124..136], "size")?;
            match block[156] {
                b'x' | b'X' => self.pax(&mut extended, size)?,
                b'g' => self.pax_global(size)?,
                b'L' => extended.path = Some(self.long_text(size)?),
                b'K' => extended.link = Some(self.long_text(size)?),
                // A volume label, and a directory's list of names in an incremental backup.
                b'V' | b'D' => self.discard(size)?,
                _ => {
                    self.fill_in(entry, &block, size, extended)?;
                    return Ok(true);
                }
            }
            any_extended = !matches!(block[156], b'g' | b'V' | b'D');
        }
    }

    /// Some of the current entry's data; empty when all of it was consumed.
    pub fn data(&mut self) -> Result<&[u8]> {
        if self.remaining == 0 {
            return Ok(&[]);
        }
        let position = self.position;
        let available = self.input.fill_buf().map_err(TarError::Read)?;
        if available.is_empty() {
            return Err(TarError::Truncated { position });
        }
        let n = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(available.len());
        Ok(&available[..n])
    }

    pub fn consume(&mut self, n: usize) {
        self.input.consume(n);
        self.position += n as u64;
        self.remaining -= n as u64;
    }

    /// Reads what follows the end of the archive: padding that belongs to its digest.
    pub fn drain(&mut self) -> Result<()> {
        loop {
            let n = self.input.fill_buf().map_err(TarError::Read)?.len();
            if n == 0 {
                return Ok(());
            }
            self.input.consume(n);
            self.position += n as u64;
        }
    }

    fn skip_rest(&mut self) -> Result<()> {
        let rest = self.remaining + self.padding;
        (self.remaining, self.padding) = (0, 0);
        self.discard_exact(rest)
    }

    /// Discards data of this size with its padding.
    fn discard(&mut self, size: u64) -> Result<()> {
        let padding = padding(size);
        let Some(total) = size.checked_add(padding) else { return Err(self.malformed("size out of range")) };
        self.discard_exact(total)
    }

    fn discard_exact(&mut self, mut rest: u64) -> Result<()> {
        while rest > 0 {
            let available = self.input.fill_buf().map_err(TarError::Read)?.len();
            if available == 0 {
                return Err(TarError::Truncated { position: self.position });
            }
            let n = usize::try_from(rest).unwrap_or(usize::MAX).min(available);
            self.input.consume(n);
            self.position += n as u64;
            rest -= n as u64;
        }
        Ok(())
    }

    fn read_exact(&mut self, mut target: &mut [u8]) -> Result<()> {
        while !target.is_empty() {
            let available = self.input.fill_buf().map_err(TarError::Read)?;
            if available.is_empty() {
                return Err(TarError::Truncated { position: self.position });
            }
            let n = available.len().min(target.len());
            let (head, tail) = target.split_at_mut(n);
            head.copy_from_slice(&available[..n]);
            target = tail;
            self.input.consume(n);
            self.position += n as u64;
        }
        Ok(())
    }

    /// Reads and checks a header; false at the end of the archive.
    fn header(&mut self, block: &mut [u8; BLOCK]) -> Result<bool> {
        if self.input.fill_buf().map_err(TarError::Read)?.is_empty() {
            return Ok(false);
        }
        self.read_exact(block)?;
        if block.iter().all(|&b| b == 0) {
            if self.input.fill_buf().map_err(TarError::Read)?.is_empty() {
                return Ok(false);
            }
            self.read_exact(block)?;
            if block.iter().any(|&b| b != 0) {
                return Err(self.malformed("a lone zero block"));
            }
            return Ok(false);
        }
        match checksum_matches(block) {
            Some(true) => Ok(true),
            Some(false) => Err(self.malformed("header checksum does not match")),
            None => Err(self.malformed("not a tar header")),
        }
    }

    fn number(&self, field: &[u8], what: &str) -> Result<u64> {
        let value = number(field).ok_or_else(|| self.malformed(format!("{what} is not a number")))?;
        u64::try_from(value).map_err(|_negative| self.malformed(format!("{what} is negative")))
    }

    fn id(&self, field: &[u8], what: &str) -> Result<u32> {
        u32::try_from(self.number(field, what)?)
            .map_err(|_large| self.malformed(format!("{what} is out of range")))
    }

    fn fill_in(
        &mut self,
        entry: &mut Entry,
        block: &[u8; BLOCK],
        size: u64,
        extended: Extended,
    ) -> Result<()> {
        entry.clear();
        let magic = &block[257..265];
        if let Some(path) = extended.sparse.name.or(extended.path) {
            entry.path = path;
        } else {
            let prefix = if magic.starts_with(b"ustar\0") { text(&block[345..500]) } else { &[] };
            if !prefix.is_empty() {
                entry.path.extend_from_slice(prefix);
                entry.path.push(b'/');
            }
            entry.path.extend_from_slice(text(&block[..100]));
        }
        match extended.link {
            Some(link) => entry.link = link,
            None => entry.link.extend_from_slice(text(&block[157..257])),
        }
        if entry.path.contains(&0) || entry.link.contains(&0) {
            return Err(self.malformed("a name contains a zero byte"));
        }
        entry.mode = (self.number(&block[100..108], "mode")? & 0o7777) as u32;
        entry.uid = match extended.uid {
            Some(uid) => uid,
            None => self.id(&block[108..116], "uid")?,
        };
        entry.gid = match extended.gid {
            Some(gid) => gid,
            None => self.id(&block[116..124], "gid")?,
        };
        entry.mtime = match extended.mtime {
            Some(mtime) => mtime,
            None => Time {
                seconds: number(&block[136..148])
                    .and_then(|n| i64::try_from(n).ok())
                    .ok_or_else(|| self.malformed("mtime is not a number"))?,
                nanos: 0,
            },
        };
        entry.kind = match block[156] {
            0 | b'0' | b'7' | b'S' if entry.path.ends_with(b"/") && block[156] != b'S' => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(self.malformed(format!(
                    "entry {:?} has unknown type {:?}",
                    String::from_utf8_lossy(&entry.path),
                    other as char
                )));
            }
        };
        if matches!(entry.kind, Kind::CharDevice | Kind::BlockDevice) {
            entry.device =
                (self.id(&block[329..337], "device number")?, self.id(&block[337..345], "device number")?);
        }
        entry.xattrs.extend(extended.xattrs);
        // Only files have data; some writers state the size of a link's target. A directory written as a file with
        // a slash at the end may have data nobody wants.
        let as_file = matches!(block[156], 0 | b'0' | b'7' | b'S');
        let stored = if as_file { extended.size.unwrap_or(size) } else { 0 };
        if stored > i64::MAX as u64 {
            return Err(self.malformed("size out of range"));
        }
        self.remaining = stored;
        self.padding = padding(stored);
        if entry.kind != Kind::File {
            return Ok(());
        }
        entry.stored = stored;
        entry.size = stored;
        if block[156] == b'S' {
            entry.size = self.number(&block[483..495], "size")?;
            entry.sparse = Some(self.gnu_sparse(block)?);
        } else if extended.sparse.version_one {
            let map = self.sparse_map_in_data()?;
            entry.stored = self.remaining;
            entry.size =
                extended.sparse.size.ok_or_else(|| self.malformed("sparse file without its size"))?;
            entry.sparse = Some(map);
        } else if let Some(map) = extended.sparse.map {
            entry.size =
                extended.sparse.size.ok_or_else(|| self.malformed("sparse file without its size"))?;
            if !map.len().is_multiple_of(2) {
                return Err(self.malformed("odd sparse map"));
            }
            entry.sparse = Some(map.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect());
        }
        if let Some(map) = &entry.sparse {
            self.check_sparse(map, entry.stored, entry.size)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read_all(data: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>> {
        let mut reader = Reader::new(data);
        let mut entry = Entry::default();
        let mut all = Vec::new();
        while reader.next(&mut entry)? {
            let mut content = Vec::new();
            loop {
                let chunk = reader.data()?;
                if chunk.is_empty() {
                    break;
                }
                content.extend_from_slice(chunk);
                let n = chunk.len();
                reader.consume(n);
            }
            all.push((entry.clone(), content));
        }
        reader.drain()?;
        Ok(all)
    }

    #[test]
    fn reads_what_the_tar_crate_writes() {
        let mut builder = ::tar::Builder::new(Vec::new());
        let mut header = ::tar::Header::new_gnu();
        header.set_size(5);
        header.set_mode(0o4755);
        header.set_uid(3_000_000);
        header.set_cksum();
        let long = format!("dir/{}/file", "x".repeat(150));
        builder.append_data(&mut header, &long, &b"hello"[..]).unwrap();
        builder.append_pax_extensions([("SCHILY.xattr.user.a", &b"b=c\nd"[..]), ("mtime", b"7.25")]).unwrap();
        let mut header = ::tar::Header::new_ustar();
        header.set_size(0);
        header.set_entry_type(::tar::EntryType::Symlink);
        builder.append_link(&mut header, "link", "target").unwrap();
        let all = read_all(&builder.into_inner().unwrap()).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].0.path, long.as_bytes());
        assert_eq!((all[0].0.mode, all[0].0.uid), (0o4755, 3_000_000));
        assert_eq!(all[0].1, b"hello");
        assert_eq!(all[1].0.kind, Kind::Symlink);
        assert_eq!(all[1].0.link, b"target");
        assert_eq!(all[1].0.mtime, Time { seconds: 7, nanos: 250_000_000 });
        assert_eq!(all[1].0.xattrs, [(b"user.a".to_vec(), b"b=c\nd".to_vec())]);
    }

    #[test]
    fn truncation_is_told_wherever_it_happens() {
        let mut builder = ::tar::Builder::new(Vec::new());
        let mut header = ::tar::Header::new_gnu();
        header.set_size(700);
        header.set_cksum();
        builder.append_data(&mut header, "file", &[7u8; 700][..]).unwrap();
        let data = builder.into_inner().unwrap();
        for cut in (1..1024).filter(|cut| cut % 512 != 0 || *cut == 512) {
            assert!(matches!(read_all(&data[..cut]), Err(TarError::Truncated { .. })), "cut at {cut}");
        }
    }

    #[test]
    fn a_huge_extended_header_is_refused_before_it_is_read() {
        let mut header = ::tar::Header::new_ustar();
        header.set_entry_type(::tar::EntryType::XHeader);
        header.set_size(1 << 40);
        header.set_cksum();
        let error = read_all(header.as_bytes()).unwrap_err();
        assert!(error.to_string().contains("extended header"), "{error}");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(data in proptest::collection::vec(any::<u8>(), 0..2048)) {
            drop(read_all(&data));
        }

        #[test]
        fn a_damaged_archive_never_panics(at in 0usize..4096, value in any::<u8>()) {
            let mut builder = ::tar::Builder::new(Vec::new());
            builder.append_pax_extensions([("GNU.sparse.map", &b"0,5"[..]), ("GNU.sparse.size", b"9")]).unwrap();
            let mut header = ::tar::Header::new_ustar();
            header.set_size(5);
            header.set_cksum();
            builder.append_data(&mut header, "f", &b"hello"[..]).unwrap();
            let mut data = builder.into_inner().unwrap();
            let at = at % data.len();
            data[at] = value;
            // The checksum is made right again, so that the damage gets past it.
            for block in data.chunks_mut(512) {
                if block.len() == 512 && block[257..262] == *b"ustar" {
                    let sum: u32 = block.iter().enumerate()
                        .map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) }).sum();
                    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
                }
            }
            drop(read_all(&data));
        }
    }
}
