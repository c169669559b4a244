//! Fields of headers: numbers, texts, times, the checksum.

use super::{BLOCK, Time};

/// Whether an archive may begin with these bytes.
pub(crate) fn is_header(head: &[u8]) -> bool {
    head.first_chunk().is_some_and(|block| checksum_matches(block) == Some(true))
}

/// `None` of what has no checksum where a header has it.
pub(super) fn checksum_matches(block: &[u8; BLOCK]) -> Option<bool> {
    let stated = octal(&block[148..156])?;
    let (mut unsigned, mut signed) = (0u64, 0i64);
    for (at, &byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&at) { b' ' } else { byte };
        unsigned += u64::from(byte);
        signed += i64::from(byte.cast_signed());
    }
    Some(stated == unsigned || i64::try_from(stated) == Ok(signed))
}

pub(super) fn padding(size: u64) -> u64 {
    let block = BLOCK as u64;
    (block - size % block) % block
}

/// A field up to its first zero byte.
pub(super) fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|&b| b == 0).unwrap_or(field.len());
    &field[..end]
}

/// Octal digits with spaces or zero bytes around; an empty field is 0.
pub(super) fn octal(field: &[u8]) -> Option<u64> {
    let blank = |b: &&u8| matches!(b, b' ' | b'\0');
    let start = field.iter().take_while(blank).count();
    let mut value = 0u64;
    let mut rest = field[start..].iter();
    for &byte in rest.by_ref() {
        match byte {
            b'0'..=b'7' => value = value.checked_mul(8)?.checked_add(u64::from(byte - b'0'))?,
            b' ' | b'\0' => break,
            _ => return None,
        }
    }
    Some(value)
}

/// Octal, or GNU's base 256 (first bit set, two's complement).
pub(super) fn number(field: &[u8]) -> Option<i128> {
    if field[0] & 0x80 == 0 {
        return octal(field).map(i128::from);
    }
    let negative = field[0] & 0x40 != 0;
    let mut value: i128 = if negative { -1 } else { 0 };
    for (at, &byte) in field.iter().enumerate() {
        let byte = if at == 0 { if negative { byte } else { byte & 0x7f } } else { byte };
        value = (value << 8) | i128::from(byte);
    }
    i64::try_from(value).ok().map(i128::from)
}

/// `[-]seconds[.fraction]`.
pub(super) fn pax_time(value: &[u8]) -> Option<Time> {
    let value = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = value.split_once('.').unwrap_or((value, ""));
    let negative = whole.starts_with('-');
    let seconds: i64 = if matches!(whole, "" | "-") { 0 } else { whole.parse().ok()? };
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let mut nanos = 0u32;
    for at in 0..9 {
        nanos = nanos * 10 + fraction.as_bytes().get(at).map_or(0, |b| u32::from(b - b'0'));
    }
    if negative && nanos > 0 {
        return Some(Time { seconds: seconds.checked_sub(1)?, nanos: 1_000_000_000 - nanos });
    }
    Some(Time { seconds, nanos })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_all_forms() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 1, 0]), Some(256));
        assert_eq!(number(&[0xff; 8]), Some(-1));
        assert_eq!(number(b"00x0644\0"), None);
        assert_eq!(number(&[0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), None);
    }

    #[test]
    fn times_with_fractions_and_signs() {
        assert_eq!(pax_time(b"1.5"), Some(Time { seconds: 1, nanos: 500_000_000 }));
        assert_eq!(pax_time(b"-1.25"), Some(Time { seconds: -2, nanos: 750_000_000 }));
        assert_eq!(pax_time(b"-3"), Some(Time { seconds: -3, nanos: 0 }));
        assert_eq!(pax_time(b"1.1234567891"), Some(Time { seconds: 1, nanos: 123_456_789 }));
        assert_eq!(pax_time(b"x"), None);
    }
}
