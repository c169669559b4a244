//! Maps of sparse files: GNU's own, and those of pax, versions 0 and 1.

use std::io::BufRead;

use super::{BLOCK, Reader, Result};

/// Most segments of one sparse file.
const SEGMENTS_MAX: usize = 1 << 20;

impl<R: BufRead> Reader<R> {
    pub(super) fn check_sparse(&self, map: &[(u64, u64)], stored: u64, size: u64) -> Result<()> {
        let (mut end, mut total) = (0u64, 0u64);
        for &(offset, length) in map {
            let next = offset.checked_add(length);
            match next {
                Some(next) if offset >= end && next <= size => end = next,
                _ => return Err(self.malformed("sparse map out of order or out of range")),
            }
            total += length;
        }
        if total != stored || size > i64::MAX as u64 {
            return Err(self.malformed("sparse map does not agree with the data"));
        }
        Ok(())
    }

    pub(super) fn gnu_sparse(&mut self, block: &[u8; BLOCK]) -> Result<Vec<(u64, u64)>> {
        let mut map = Vec::new();
        let mut more = self.gnu_segments(&block[386..482], &mut map)? && block[482] != 0;
        let mut next = [0u8; BLOCK];
        while more {
            self.read_exact(&mut next)?;
            more = self.gnu_segments(&next[..504], &mut map)? && next[504] != 0;
            if map.len() > SEGMENTS_MAX {
                return Err(self.malformed("too many sparse segments"));
            }
        }
        Ok(map)
    }

    /// False when the list ended within these.
    fn gnu_segments(&self, fields: &[u8], map: &mut Vec<(u64, u64)>) -> Result<bool> {
        for pair in fields.chunks_exact(24) {
            if pair[0] == 0 {
                return Ok(false);
            }
            map.push((
                self.number(&pair[..12], "sparse offset")?,
                self.number(&pair[12..], "sparse length")?,
            ));
        }
        Ok(true)
    }

    /// Format 1.0: the map stands before the data, as decimal lines padded to a block.
    pub(super) fn sparse_map_in_data(&mut self) -> Result<Vec<(u64, u64)>> {
        let mut block = [0u8; BLOCK];
        let mut at = BLOCK;
        let mut line = |reader: &mut Self| -> Result<u64> {
            let mut value: Option<u64> = None;
            loop {
                if at == BLOCK {
                    if reader.remaining < BLOCK as u64 {
                        return Err(reader.malformed("sparse map cut short"));
                    }
                    reader.read_exact(&mut block)?;
                    reader.remaining -= BLOCK as u64;
                    at = 0;
                }
                let byte = block[at];
                at += 1;
                match (byte, value) {
                    (b'\n', Some(value)) => return Ok(value),
                    (b'0'..=b'9', _) => {
                        value = value
                            .unwrap_or_default()
                            .checked_mul(10)
                            .and_then(|v| v.checked_add(u64::from(byte - b'0')));
                        if value.is_none() {
                            return Err(reader.malformed("sparse map number out of range"));
                        }
                    }
                    _ => return Err(reader.malformed("sparse map is not a list of numbers")),
                }
            }
        };
        let count = line(self)?;
        if count > SEGMENTS_MAX as u64 {
            return Err(self.malformed("too many sparse segments"));
        }
        let mut map = Vec::new();
        for _ in 0..count {
            let offset = line(self)?;
            let length = line(self)?;
            map.push((offset, length));
        }
        Ok(map)
    }
}
