//! Headers that say more about the entry that follows, or about all: pax (POSIX.1-2001, `SCHILY.xattr`) and GNU's long names.

use std::io::BufRead;

use super::field::{padding, pax_time, text};
use super::{Reader, Result, Time};

/// Largest pax header or GNU long name.
const SPECIAL_MAX: u64 = 1 << 20;

/// What pax and GNU headers say about the entry that follows.
#[derive(Default)]
pub(super) struct Extended {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub mtime: Option<Time>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub sparse: PaxSparse,
}

#[derive(Default)]
pub(super) struct PaxSparse {
    pub name: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub map: Option<Vec<u64>>,
    pub version_one: bool,
}

impl<R: BufRead> Reader<R> {
    fn special(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > SPECIAL_MAX {
            return Err(
                self.malformed(format!("an extended header of {size} bytes: at most {SPECIAL_MAX} are read"))
            );
        }
        let mut data = std::mem::take(&mut self.special);
        data.resize(size as usize, 0);
        self.read_exact(&mut data)?;
        self.discard_exact(padding(size))?;
        Ok(data)
    }

    pub(super) fn long_text(&mut self, size: u64) -> Result<Vec<u8>> {
        let data = self.special(size)?;
        let long = text(&data).to_vec();
        self.special = data;
        Ok(long)
    }

    pub(super) fn pax_global(&mut self, size: u64) -> Result<()> {
        let data = self.special(size)?;
        let mut total: usize = self.global.iter().map(|(k, v)| k.len() + v.len()).sum();
        let mut at = 0;
        while let Some((key, value)) = self.next_record(&data, &mut at)? {
            self.global.retain(|(known, _)| known != key);
            if !value.is_empty() {
                total += key.len() + value.len();
                self.global.push((key.to_vec(), value.to_vec()));
            }
        }
        if total as u64 > SPECIAL_MAX {
            return Err(self.malformed("global headers are too large"));
        }
        self.special = data;
        Ok(())
    }

    pub(super) fn pax(&mut self, extended: &mut Extended, size: u64) -> Result<()> {
        let data = self.special(size)?;
        let mut at = 0;
        while let Some((key, value)) = self.next_record(&data, &mut at)? {
            self.record(extended, key, value)?;
        }
        self.special = data;
        Ok(())
    }

    /// `<length> <key>=<value>\n`, the length counting all of it.
    fn next_record<'a>(&self, data: &'a [u8], at: &mut usize) -> Result<Option<(&'a [u8], &'a [u8])>> {
        let rest = &data[*at..];
        if rest.is_empty() || rest[0] == 0 {
            return Ok(None);
        }
        let bad = || self.malformed("malformed extended header");
        let space = rest.iter().take(20).position(|&b| b == b' ').ok_or_else(bad)?;
        let length: usize =
            std::str::from_utf8(&rest[..space]).ok().and_then(|n| n.parse().ok()).ok_or_else(bad)?;
        if length < space + 3 || length > rest.len() || rest[length - 1] != b'\n' {
            return Err(bad());
        }
        let record = &rest[space + 1..length - 1];
        let equals = record.iter().position(|&b| b == b'=').ok_or_else(bad)?;
        *at += length;
        Ok(Some((&record[..equals], &record[equals + 1..])))
    }

    pub(super) fn record(&self, extended: &mut Extended, key: &[u8], value: &[u8]) -> Result<()> {
        let bad = |what: &str| self.malformed(format!("{what} in an extended header is not a number"));
        let decimal = |what: &str| -> Result<u64> {
            std::str::from_utf8(value).ok().and_then(|n| n.parse().ok()).ok_or_else(|| bad(what))
        };
        let id = |what: &str| -> Result<u32> {
            u32::try_from(decimal(what)?).map_err(|_large| self.malformed(format!("{what} is out of range")))
        };
        let some = (!value.is_empty()).then(|| value.to_vec());
        match key {
            b"path" => extended.path = some,
            b"linkpath" => extended.link = some,
            b"size" => extended.size = some.map(|_| decimal("size")).transpose()?,
            b"uid" => extended.uid = some.map(|_| id("uid")).transpose()?,
            b"gid" => extended.gid = some.map(|_| id("gid")).transpose()?,
            b"mtime" => {
                extended.mtime = some.map(|_| pax_time(value).ok_or_else(|| bad("mtime"))).transpose()?;
            }
            b"GNU.sparse.name" => extended.sparse.name = some,
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => extended.sparse.size = Some(decimal("size")?),
            b"GNU.sparse.major" => extended.sparse.version_one = value == b"1",
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                let number = decimal("sparse map")?;
                extended.sparse.map.get_or_insert_default().push(number);
            }
            b"GNU.sparse.map" => {
                let mut map = Vec::new();
                for number in value.split(|&b| b == b',').filter(|n| !n.is_empty()) {
                    let number = std::str::from_utf8(number).ok().and_then(|n| n.parse().ok());
                    map.push(number.ok_or_else(|| bad("sparse map"))?);
                }
                extended.sparse.map = Some(map);
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.")
                    && !name.is_empty()
                    && !name.contains(&0)
                {
                    extended.xattrs.retain(|(known, _)| known != name);
                    extended.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }
}
