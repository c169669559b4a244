//! RPM packages: the headers in its database, SQLite's or `ndb`'s (rpm-software-management.github.io/rpm, "Header
//! format" and lib/backend).
//!
//! Invariant: every number in a database is checked against what is there before it is believed.

use std::io::{self, Write as _};

use rusqlite::{Connection, OpenFlags};

use crate::files::Files;
use crate::package::{Kind, Package, purl};
use crate::{Distribution, Found};

const NAME: u32 = 1000;
const VERSION: u32 = 1001;
const RELEASE: u32 = 1002;
const EPOCH: u32 = 1003;
const VENDOR: u32 = 1011;
const LICENSE: u32 = 1014;
const ARCH: u32 = 1022;

pub(crate) fn packages(files: &Files<'_>, of: &Distribution, found: &mut Found) -> io::Result<()> {
    for dir in ["var/lib/rpm", "usr/lib/sysimage/rpm", "usr/share/rpm"] {
        let path = format!("{dir}/rpmdb.sqlite");
        if let Some(database) = files.read(&path)? {
            match sqlite(&database) {
                Ok(headers) => add(&headers, of, &path, found),
                Err(error) => found.unread.push(format!("{path}: {error}")),
            }
            return Ok(());
        }
        let path = format!("{dir}/Packages.db");
        if let Some(database) = files.read(&path)? {
            match ndb(&database) {
                Some(headers) => add(&headers, of, &path, found),
                None => found.unread.push(format!("{path}: not a database of rpm's")),
            }
            return Ok(());
        }
        let path = format!("{dir}/Packages");
        if files.read(&path)?.is_some() {
            found.unread.push(format!("{path}: Berkeley databases, of rpm before 4.16, are not read"));
            return Ok(());
        }
    }
    Ok(())
}

fn sqlite(database: &[u8]) -> Result<Vec<Vec<u8>>, Box<dyn std::error::Error>> {
    let mut copy = tempfile::NamedTempFile::new()?;
    copy.write_all(database)?;
    copy.flush()?;
    let connection = Connection::open_with_flags(copy.path(), OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    let mut statement = connection.prepare("SELECT blob FROM Packages ORDER BY hnum")?;
    let headers = statement.query_map([], |row| row.get(0))?.collect::<Result<Vec<Vec<u8>>, _>>()?;
    Ok(headers)
}

/// Slots of 16 bytes from byte 32 on lead to blobs in blocks of 16 bytes; numbers have the low byte first.
fn ndb(database: &[u8]) -> Option<Vec<Vec<u8>>> {
    let number = |at: usize| database.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    if database.get(..4)? != b"RpmP" {
        return None;
    }
    let pages = usize::try_from(number(12)?).ok()?;
    let end = pages.checked_mul(4096)?.min(database.len());
    let mut headers = Vec::new();
    let mut slot = 32;
    while slot + 16 <= end {
        let (index, block) = (number(slot + 4)?, usize::try_from(number(slot + 8)?).ok()?);
        if database.get(slot..slot + 4)? != b"Slot" {
            return None;
        }
        slot += 16;
        if index == 0 {
            continue;
        }
        let at = block.checked_mul(16)?;
        if database.get(at..at + 4)? != b"BlbS" || number(at + 4)? != index {
            return None;
        }
        let length = usize::try_from(number(at + 12)?).ok()?;
        headers.push(database.get(at + 16..(at + 16).checked_add(length)?)?.to_vec());
    }
    Some(headers)
}

fn add(headers: &[Vec<u8>], of: &Distribution, source: &str, found: &mut Found) {
    for raw in headers {
        let Some(header) = Header::parse(raw) else {
            found.unread.push(format!("{source}: a header in it is malformed"));
            continue;
        };
        let (Some(name), Some(version)) = (header.text(NAME), header.text(VERSION)) else { continue };
        // Keys that packages are signed with are kept as if they were packages.
        if name == "gpg-pubkey" {
            continue;
        }
        let release = header.text(RELEASE).unwrap_or_default();
        let full = if release.is_empty() { version } else { format!("{version}-{release}") };
        let arch = header.text(ARCH).unwrap_or_default();
        let mut package = Package::of_distribution(Kind::Rpm, of, &name, &full, &arch, source);
        if let Some(epoch) = header.number(EPOCH) {
            let namespaced = if of.id.is_empty() { name.clone() } else { format!("{}/{name}", of.id) };
            let epoch_text = epoch.to_string();
            package.version = format!("{epoch}:{full}");
            package.purl = purl(Kind::Rpm, &namespaced, &full, &[("arch", &arch), ("epoch", &epoch_text)]);
        }
        package.license = header.text(LICENSE).unwrap_or_default();
        package.supplier = header.text(VENDOR).unwrap_or_default();
        found.packages.insert(package);
    }
}

/// Two counts, an index of 16 bytes each, and the data it leads into; numbers have the high byte first.
struct Header<'h> {
    index: &'h [u8],
    data: &'h [u8],
}

impl<'h> Header<'h> {
    fn parse(raw: &'h [u8]) -> Option<Self> {
        let number = |at: usize| raw.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes);
        let entries = usize::try_from(number(0)?).ok()?.checked_mul(16)?;
        let length = usize::try_from(number(4)?).ok()?;
        let index = raw.get(8..entries.checked_add(8)?)?;
        let start = entries + 8;
        let data = raw.get(start..start.checked_add(length)?)?;
        Some(Self { index, data })
    }

    fn value(&self, tag: u32) -> Option<(u32, &'h [u8])> {
        self.index.chunks_exact(16).find_map(|entry| {
            let number = |at: usize| entry[at..at + 4].try_into().ok().map(u32::from_be_bytes);
            (number(0)? == tag).then_some(())?;
            Some((number(4)?, self.data.get(usize::try_from(number(8)?).ok()?..)?))
        })
    }

    fn text(&self, tag: u32) -> Option<String> {
        let (kind, data) = self.value(tag)?;
        // STRING, STRING_ARRAY and I18NSTRING.
        if !matches!(kind, 6 | 8 | 9) {
            return None;
        }
        let end = data.iter().position(|byte| *byte == 0)?;
        Some(String::from_utf8_lossy(&data[..end]).into_owned())
    }

    fn number(&self, tag: u32) -> Option<u32> {
        let (kind, data) = self.value(tag)?;
        (kind == 4).then(|| data.get(..4)?.try_into().ok().map(u32::from_be_bytes))?
    }
}
