//! The writer: pax archives that depend on their entries alone, byte for byte.

use std::io::{self, Read, Write};

use super::{BLOCK, Entry, Kind, Time};

/// Largest value of an eight-byte octal field.
const OCTAL8_MAX: u64 = 0o777_7777;
/// Largest value of a twelve-byte octal field.
const OCTAL12_MAX: u64 = 0o777_7777_7777;

/// Writes an archive. Call [`Self::finish`] at the end.
pub struct Writer<W> {
    output: W,
}

impl<W: Write> Writer<W> {
    pub fn new(output: W) -> Self {
        Self { output }
    }

    /// Writes an entry whose data is `data`, of exactly `entry.stored` bytes. Sparse files are written in full.
    pub fn append(&mut self, entry: &Entry, data: &mut dyn Read) -> io::Result<()> {
        self.header(entry)?;
        let copied = io::copy(&mut data.take(entry.stored), &mut self.output)?;
        if copied != entry.stored {
            let path = String::from_utf8_lossy(&entry.path);
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{path}: has {copied} bytes, {} were expected", entry.stored),
            ));
        }
        self.pad(copied)
    }

    /// Writes a regular file of the given content, owned by root.
    pub fn append_bytes(&mut self, path: &str, content: &[u8], mtime: Time) -> io::Result<()> {
        let entry = Entry {
            path: path.as_bytes().to_vec(),
            mode: 0o644,
            mtime,
            stored: content.len() as u64,
            size: content.len() as u64,
            ..Entry::default()
        };
        self.append(&entry, &mut &content[..])
    }

    /// Writes a directory, owned by root.
    pub fn append_dir(&mut self, path: &str, mtime: Time) -> io::Result<()> {
        let entry = Entry {
            path: path.as_bytes().to_vec(),
            kind: Kind::Directory,
            mode: 0o755,
            mtime,
            ..Entry::default()
        };
        self.append(&entry, &mut io::empty())
    }

    /// Ends the archive and returns what it was written to.
    pub fn finish(mut self) -> io::Result<W> {
        self.output.write_all(&[0; 2 * BLOCK])?;
        self.output.flush()?;
        Ok(self.output)
    }

    fn pad(&mut self, written: u64) -> io::Result<()> {
        let rest = (written % BLOCK as u64) as usize;
        if rest > 0 {
            self.output.write_all(&[0; BLOCK][rest..])?;
        }
        Ok(())
    }

    fn header(&mut self, entry: &Entry) -> io::Result<()> {
        let mut records = Vec::new();
        let seconds = u64::try_from(entry.mtime.seconds).ok().filter(|s| *s <= OCTAL12_MAX);
        if entry.path.len() > 100 {
            record(&mut records, b"path", &entry.path);
        }
        if entry.link.len() > 100 {
            record(&mut records, b"linkpath", &entry.link);
        }
        if entry.mtime.nanos != 0 || seconds.is_none() {
            record(&mut records, b"mtime", time_text(entry.mtime).as_bytes());
        }
        for (name, id) in [(&b"uid"[..], entry.uid), (b"gid", entry.gid)] {
            if u64::from(id) > OCTAL8_MAX {
                record(&mut records, name, id.to_string().as_bytes());
            }
        }
        if entry.stored > OCTAL12_MAX {
            record(&mut records, b"size", entry.stored.to_string().as_bytes());
        }
        let mut xattrs: Vec<_> = entry.xattrs.iter().collect();
        xattrs.sort();
        for (name, value) in xattrs {
            record(&mut records, &[b"SCHILY.xattr.", &name[..]].concat(), value);
        }
        if !records.is_empty() {
            let mut block = [0u8; BLOCK];
            let name = entry.path.rsplit(|&b| b == b'/').find(|part| !part.is_empty()).unwrap_or_default();
            put(&mut block[..100], &[b"PaxHeaders.0/", name].concat());
            fields(&mut block, 0o644, 0, 0, records.len() as u64, 0);
            block[156] = b'x';
            self.finish_header(&mut block)?;
            self.output.write_all(&records)?;
            self.pad(records.len() as u64)?;
        }
        let mut block = [0u8; BLOCK];
        put(&mut block[..100], &entry.path);
        put(&mut block[157..257], &entry.link);
        let small = |id: u32| Some(u64::from(id)).filter(|id| *id <= OCTAL8_MAX).unwrap_or_default();
        let stored = Some(entry.stored).filter(|size| *size <= OCTAL12_MAX).unwrap_or_default();
        fields(
            &mut block,
            entry.mode & 0o7777,
            small(entry.uid),
            small(entry.gid),
            stored,
            seconds.unwrap_or_default(),
        );
        block[156] = match entry.kind {
            Kind::File => b'0',
            Kind::HardLink => b'1',
            Kind::Symlink => b'2',
            Kind::CharDevice => b'3',
            Kind::BlockDevice => b'4',
            Kind::Directory => b'5',
            Kind::Fifo => b'6',
        };
        if matches!(entry.kind, Kind::CharDevice | Kind::BlockDevice) {
            octal(&mut block[329..337], u64::from(entry.device.0));
            octal(&mut block[337..345], u64::from(entry.device.1));
        }
        self.finish_header(&mut block)
    }

    fn finish_header(&mut self, block: &mut [u8; BLOCK]) -> io::Result<()> {
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[148..156].fill(b' ');
        let sum: u64 = block.iter().map(|&b| u64::from(b)).sum();
        octal(&mut block[148..155], sum);
        self.output.write_all(block)
    }
}

fn fields(block: &mut [u8; BLOCK], mode: u32, uid: u64, gid: u64, size: u64, mtime: u64) {
    octal(&mut block[100..108], u64::from(mode));
    octal(&mut block[108..116], uid);
    octal(&mut block[116..124], gid);
    octal(&mut block[124..136], size);
    octal(&mut block[136..148], mtime);
}

/// Octal digits with a zero byte at the end.
fn octal(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    let text = format!("{value:0digits$o}");
    field[..digits].copy_from_slice(&text.as_bytes()[text.len() - digits..]);
    field[digits] = 0;
}

fn put(field: &mut [u8], text: &[u8]) {
    let n = text.len().min(field.len());
    field[..n].copy_from_slice(&text[..n]);
}

/// Appends `<length> <key>=<value>\n`.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = 1 + key.len() + 1 + value.len() + 1;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(length.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

fn time_text(time: Time) -> String {
    let total = i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
    let sign = if total < 0 { "-" } else { "" };
    let (seconds, nanos) = (total.unsigned_abs() / 1_000_000_000, total.unsigned_abs() % 1_000_000_000);
    if nanos == 0 {
        return format!("{sign}{seconds}");
    }
    let fraction = format!("{nanos:09}");
    format!("{sign}{seconds}.{}", fraction.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::super::Reader;
    use super::*;
    use proptest::prelude::*;

    fn entries() -> impl Strategy<Value = Entry> {
        (
            "[a-zé/]{1,300}",
            "[a-z/.]{0,200}",
            0u32..0o10000,
            any::<u32>(),
            (-5_000_000_000i64..50_000_000_000, 0u32..1_000_000_000),
            proptest::collection::vec(
                ("user\\.[a-z]{1,8}", proptest::collection::vec(any::<u8>(), 0..40)),
                0..3,
            ),
            0u64..2000,
            0usize..7,
        )
            .prop_map(|(path, link, mode, id, (seconds, nanos), mut xattrs, size, kind)| {
                xattrs.sort();
                xattrs.dedup_by(|a, b| a.0 == b.0);
                let kinds = [
                    Kind::File,
                    Kind::HardLink,
                    Kind::Symlink,
                    Kind::CharDevice,
                    Kind::BlockDevice,
                    Kind::Directory,
                    Kind::Fifo,
                ];
                let kind = kinds[kind];
                let mut path = path.into_bytes();
                if kind == Kind::File {
                    path.push(b'f');
                }
                let stored = if kind == Kind::File { size } else { 0 };
                let device = match kind {
                    Kind::CharDevice | Kind::BlockDevice => (id % 4096, id % 1000),
                    _ => (0, 0),
                };
                Entry {
                    path,
                    link: link.into_bytes(),
                    kind,
                    mode,
                    uid: id,
                    gid: id ^ 1,
                    mtime: Time { seconds, nanos },
                    stored,
                    size: stored,
                    sparse: None,
                    device,
                    xattrs: xattrs.into_iter().map(|(n, v)| (n.into_bytes(), v)).collect(),
                }
            })
    }

    proptest! {
        #[test]
        fn the_reader_reads_back_what_was_written(all in proptest::collection::vec(entries(), 0..5)) {
            let mut writer = Writer::new(Vec::new());
            for entry in &all {
                writer.append(entry, &mut io::repeat(b'x')).unwrap();
            }
            let data = writer.finish().unwrap();
            prop_assert_eq!(data.len() % BLOCK, 0);
            let mut reader = Reader::new(&data[..]);
            let mut entry = Entry::default();
            for expected in &all {
                prop_assert!(reader.next(&mut entry).unwrap());
                prop_assert_eq!(&entry, expected);
            }
            prop_assert!(!reader.next(&mut entry).unwrap());
        }
    }
}
