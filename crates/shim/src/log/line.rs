//! One line of the log: cutting output into lines, writing and reading them.

use serde::Deserialize;

/// Longest piece of a line.
pub(crate) const PIECE: usize = 16 << 10;

/// Which stream output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Source {
    /// The name in the log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// A line (or piece) of the log as it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The bytes the container wrote; a piece without a final newline is continued by the next of the same stream.
    pub bytes: Vec<u8>,
    /// Where they came from.
    pub source: Source,
    /// When they were read from the container, as RFC 3339 text.
    pub time: String,
}

impl Line {
    /// Read one line of a log file; `None` if it is not one (torn by a crash, or foreign).
    pub fn parse(line: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Raw<'a> {
            #[serde(borrow)]
            log: &'a serde_json::value::RawValue,
            stream: &'a str,
            time: &'a str,
        }
        let raw: Raw<'_> = serde_json::from_slice(line).ok()?;
        let source = match raw.stream {
            "stdout" => Source::Stdout,
            "stderr" => Source::Stderr,
            _ => return None,
        };
        Some(Self { bytes: decode(raw.log.get())?, source, time: raw.time.to_owned() })
    }
}

/// Undo [`encode`]: the bytes of a JSON string literal that is known to be well-formed.
fn decode(literal: &str) -> Option<Vec<u8>> {
    let text = literal.strip_prefix('"')?.strip_suffix('"')?.as_bytes();
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.iter().position(|&b| b == b'\\') {
        bytes.extend_from_slice(&rest[..at]);
        let escape = *rest.get(at + 1)?;
        rest = &rest[at + 2..];
        bytes.push(match escape {
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'b' => 8,
            b'f' => 12,
            b'u' => {
                let unit = hex(rest)?;
                rest = &rest[4..];
                let low = |rest: &[u8]| {
                    rest.strip_prefix(b"\\u").and_then(hex).filter(|u| (0xdc00..0xe000).contains(u))
                };
                let scalar = match unit {
                    0xdc80..=0xdcff => {
                        bytes.push((unit - 0xdc00) as u8);
                        continue;
                    }
                    0xd800..=0xdbff => match low(rest) {
                        Some(second) => {
                            rest = &rest[6..];
                            0x10000 + ((unit - 0xd800) << 10) + (second - 0xdc00)
                        }
                        None => 0xfffd,
                    },
                    _ => unit,
                };
                let scalar = char::from_u32(scalar).unwrap_or(char::REPLACEMENT_CHARACTER);
                bytes.extend_from_slice(scalar.encode_utf8(&mut [0; 4]).as_bytes());
                continue;
            }
            other => other,
        });
    }
    bytes.extend_from_slice(rest);
    Some(bytes)
}

fn hex(text: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(text.get(..4)?).ok()?;
    u32::from_str_radix(digits, 16).ok()
}

/// Append `bytes` as the inside of a JSON string, escaped as Go's encoder does it.
pub(crate) fn encode(out: &mut Vec<u8>, bytes: &[u8]) {
    for chunk in bytes.utf8_chunks() {
        encode_text(out, chunk.valid().as_bytes());
        for &byte in chunk.invalid() {
            escape(out, 0xdc00 + u16::from(byte));
        }
    }
}

fn encode_text(out: &mut Vec<u8>, text: &[u8]) {
    let mut from = 0;
    let mut at = 0;
    while at < text.len() {
        let byte = text[at];
        if !SPECIAL[byte as usize] {
            at += 1;
            continue;
        }
        // Only the separators U+2028 and U+2029 of what begins with this byte are escaped.
        if byte == 0xe2 && !(text[at + 1] == 0x80 && text[at + 2] & 0xfe == 0xa8) {
            at += 3;
            continue;
        }
        out.extend_from_slice(&text[from..at]);
        match byte {
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            0xe2 => {
                escape(out, 0x2028 + u16::from(text[at + 2] & 1));
                at += 2;
            }
            _ => escape(out, u16::from(byte)),
        }
        at += 1;
        from = at;
    }
    out.extend_from_slice(&text[from..]);
}

fn escape(out: &mut Vec<u8>, unit: u16) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |shift: u16| DIGITS[usize::from(unit >> shift & 15)];
    out.extend_from_slice(&[b'\\', b'u', digit(12), digit(8), digit(4), digit(0)]);
}

/// Bytes that may need an escape.
static SPECIAL: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 0x20 {
        table[byte] = true;
        byte += 1;
    }
    table[b'"' as usize] = true;
    table[b'\\' as usize] = true;
    table[b'<' as usize] = true;
    table[b'>' as usize] = true;
    table[b'&' as usize] = true;
    table[0xe2] = true;
    table
};

/// Cuts one stream into lines and pieces.
#[derive(Debug, Default)]
pub(crate) struct Splitter {
    begun: Vec<u8>,
}

impl Splitter {
    /// Take a chunk of output and hand on the pieces that are complete: lines with their newline, and pieces of 16 KiB of longer
    /// lines (a little less where that would cut a character).
    pub(crate) fn push(&mut self, mut chunk: &[u8], mut piece: impl FnMut(&[u8])) {
        while !chunk.is_empty() {
            let room = PIECE - self.begun.len();
            let window = &chunk[..chunk.len().min(room)];
            if let Some(newline) = window.iter().position(|&b| b == b'\n') {
                let (line, rest) = chunk.split_at(newline + 1);
                chunk = rest;
                if self.begun.is_empty() {
                    piece(line);
                } else {
                    self.begun.extend_from_slice(line);
                    piece(&self.begun);
                    self.begun.clear();
                }
                continue;
            }
            self.begun.extend_from_slice(window);
            chunk = &chunk[window.len()..];
            if self.begun.len() == PIECE {
                let cut = PIECE - cut_character(&self.begun);
                piece(&self.begun[..cut]);
                self.begun.drain(..cut);
            }
        }
    }

    /// The end of the stream: hand on what is left of a line without newline.
    pub(crate) fn finish(&mut self, mut piece: impl FnMut(&[u8])) {
        if !self.begun.is_empty() {
            piece(&self.begun);
        }
        self.begun = Vec::new();
    }

    /// Give memory back when nothing is kept.
    pub(crate) fn shrink(&mut self) {
        self.begun.shrink_to_fit();
    }
}

/// How many bytes at the end are the beginning of a UTF-8 character whose rest is missing.
fn cut_character(bytes: &[u8]) -> usize {
    for back in 1..=3.min(bytes.len()) {
        let needs = match bytes[bytes.len() - back] {
            0x80..=0xbf => continue,
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            _ => 1,
        };
        return if needs > back { back } else { 0 };
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn literal(bytes: &[u8]) -> String {
        let mut out = Vec::new();
        encode(&mut out, bytes);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn text_is_escaped_as_dockers_encoder_does() {
        assert_eq!(literal(b"plain \x7f\n"), "plain \x7f\\n");
        assert_eq!(literal(b"a\"b\\c\r\td"), "a\\\"b\\\\c\\r\\u0009d");
        assert_eq!(literal(b"<a> & \x1b[0m"), "\\u003ca\\u003e \\u0026 \\u001b[0m");
        assert_eq!(literal("\u{20ac}\u{2028}\u{2029}\u{202a}é😀".as_bytes()), "€\\u2028\\u2029\u{202a}é😀");
    }

    #[test]
    fn bytes_that_are_no_text_come_back_whole() {
        assert_eq!(literal(b"\xff\xc3"), "\\udcff\\udcc3");
        let mut seed = 1_u32;
        for length in 0..500 {
            let bytes: Vec<u8> = (0..length)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (seed >> 24) as u8
                })
                .collect();
            let line = format!("{{\"log\":\"{}\",\"stream\":\"stderr\",\"time\":\"t\"}}", literal(&bytes));
            let read = Line::parse(line.as_bytes()).unwrap();
            assert_eq!((read.bytes, read.source), (bytes, Source::Stderr));
        }
    }

    #[test]
    fn lines_of_other_writers_are_read() {
        let line = br#"{"log":"\ud83d\ude00\/\t\ufffd\n","stream":"stdout","attrs":{"a":"b"},"time":"2026-01-01T00:00:00Z"}"#;
        let read = Line::parse(line).unwrap();
        assert_eq!(read.bytes, "😀/\t\u{fffd}\n".as_bytes());
        assert_eq!(Line::parse(br#"{"log":"torn"#), None);
        assert_eq!(Line::parse(br#"{"log":7,"stream":"stdout","time":""}"#), None);
    }

    fn split(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut splitter = Splitter::default();
        let mut pieces = Vec::new();
        for chunk in chunks {
            splitter.push(chunk, |p| pieces.push(p.to_vec()));
        }
        splitter.finish(|p| pieces.push(p.to_vec()));
        pieces
    }

    #[test]
    fn lines_are_put_together_and_long_ones_cut() {
        assert_eq!(split(&[b"a\nb", b"c\n\n", b"d"]), [&b"a\n"[..], b"bc\n", b"\n", b"d"]);
        let long = vec![b'x'; PIECE + 5];
        assert_eq!(split(&[&long]).iter().map(Vec::len).collect::<Vec<_>>(), [PIECE, 5]);
        let mut exact = vec![b'x'; PIECE - 1];
        exact.push(b'\n');
        assert_eq!(split(&[&exact[..9], &exact[9..]]), [exact]);
    }

    #[test]
    fn a_cut_spares_characters() {
        let mut long = vec![b'x'; PIECE - 2];
        long.extend_from_slice("€uro".as_bytes());
        let pieces = split(&[&long]);
        assert_eq!(pieces[0].len(), PIECE - 2);
        assert_eq!(pieces[1], "€uro".as_bytes());
    }
}
