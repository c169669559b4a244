//! The sections of a program, as far as they are asked for (ELF specification, chapter 4).
//!
//! Invariant: only the headers and what is asked for are read, however large the program is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use crate::files::Seen;

/// No section that is of interest is larger.
const MAX_SECTION: u64 = 64 << 20;

pub(crate) struct Elf {
    file: File,
    sections: Vec<Section>,
}

struct Section {
    name: String,
    offset: u64,
    size: u64,
}

/// How numbers are written in it.
#[derive(Clone, Copy)]
struct Form {
    wide: bool,
    little: bool,
}

impl Form {
    fn number(self, raw: &[u8], at: usize, length: usize) -> Option<u64> {
        let bytes = raw.get(at..at + length)?;
        let fold = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
        Some(if self.little { bytes.iter().rev().fold(0, fold) } else { bytes.iter().fold(0, fold) })
    }
}

impl Elf {
    /// `None` when it is no program in this form, or its headers make no sense.
    pub fn open(file: &Seen<'_>) -> io::Result<Option<Self>> {
        let file = file.open()?;
        let mut head = [0; 64];
        if file.read_exact_at(&mut head, 0).is_err() || head[..4] != *b"\x7fELF" {
            return Ok(None);
        }
        let sections = sections(&file, &head);
        Ok(sections.map(|sections| Self { file, sections }))
    }

    /// A section's content.
    pub fn section(&mut self, name: &str) -> Option<Vec<u8>> {
        let section = self.sections.iter().find(|section| section.name == name)?;
        read(&self.file, section.offset, section.size)
    }
}

fn read(file: &File, offset: u64, size: u64) -> Option<Vec<u8>> {
    let length = file.metadata().ok()?.len();
    if size > MAX_SECTION || offset.checked_add(size)? > length {
        return None;
    }
    let mut content = vec![0; usize::try_from(size).ok()?];
    file.read_exact_at(&mut content, offset).ok()?;
    Some(content)
}

fn sections(file: &File, head: &[u8; 64]) -> Option<Vec<Section>> {
    let form = Form { wide: head[4] == 2, little: head[5] == 1 };
    let (table, size, count, names) = if form.wide {
        (
            form.number(head, 40, 8)?,
            form.number(head, 58, 2)?,
            form.number(head, 60, 2)?,
            form.number(head, 62, 2)?,
        )
    } else {
        (
            form.number(head, 32, 4)?,
            form.number(head, 46, 2)?,
            form.number(head, 48, 2)?,
            form.number(head, 50, 2)?,
        )
    };
    if table == 0 || size < 40 {
        return None;
    }
    let raw = read(file, table, size.checked_mul(count)?)?;
    let placed = |index: u64| {
        let at = usize::try_from(index.checked_mul(size)?).ok()?;
        let name = form.number(&raw, at, 4)?;
        let (offset, length) = if form.wide {
            (form.number(&raw, at + 24, 8)?, form.number(&raw, at + 32, 8)?)
        } else {
            (form.number(&raw, at + 16, 4)?, form.number(&raw, at + 20, 4)?)
        };
        Some((usize::try_from(name).ok()?, offset, length))
    };
    let (_, offset, length) = placed(names)?;
    let texts = read(file, offset, length)?;
    let mut all = Vec::new();
    for index in 0..count {
        let (name, offset, size) = placed(index)?;
        let name =
            texts.get(name..).and_then(|text| text.split(|byte| *byte == 0).next()).unwrap_or_default();
        all.push(Section { name: String::from_utf8_lossy(name).into_owned(), offset, size });
    }
    Some(all)
}
