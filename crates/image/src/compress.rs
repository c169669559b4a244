//! Compression: told by the first bytes, never by a name; decoded as a stream with bounded memory.

use std::io::{self, BufRead, BufReader, Read};

/// Largest window or dictionary a stream may ask for, as a power of two.
const WINDOW_LOG_MAX: u32 = 27;
const XZ_MEMORY_MAX: u64 = 512 << 20;
const BUFFER: usize = 1 << 17;

/// How a stream is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Bzip2,
    Xz,
    Zstd,
}

impl Compression {
    /// Told from the first bytes of the stream; six are enough.
    pub fn of(head: &[u8]) -> Self {
        // A zstd stream may begin with a skippable frame.
        let skippable =
            head.len() >= 4 && (0x50..=0x5f).contains(&head[0]) && head[1..4] == [0x2a, 0x4d, 0x18];
        match head {
            [0x1f, 0x8b, 8, ..] => Self::Gzip,
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Self::Bzip2,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ if skippable => Self::Zstd,
            _ => Self::None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::None => "plain",
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
        }
    }
}

/// Yields the uncompressed bytes of what `reader` yields.
pub fn decode<'a>(mut reader: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut head = Vec::with_capacity(8);
    Read::by_ref(&mut reader).take(8).read_to_end(&mut head)?;
    let compression = Compression::of(&head);
    let whole = io::Cursor::new(head).chain(reader);
    if compression == Compression::None {
        return Ok(Box::new(whole));
    }
    let whole = BufReader::with_capacity(BUFFER, Source { inner: whole, failed: false });
    let decoder: Box<dyn Decoder + 'a> = match compression {
        Compression::None | Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        Compression::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(whole)),
        Compression::Xz => {
            let stream =
                liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_MAX, liblzma::stream::CONCATENATED)?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(whole, stream))
        }
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(whole)?;
            decoder.window_log_max(WINDOW_LOG_MAX)?;
            Box::new(decoder)
        }
    };
    Ok(Box::new(Decoded { decoder, compression }))
}

/// The same of what has its bytes in a buffer: what is not compressed is read from there.
pub(crate) fn decode_buffered<'a>(mut reader: impl BufRead + 'a) -> io::Result<Box<dyn BufRead + 'a>> {
    let mut head = Vec::with_capacity(8);
    Read::by_ref(&mut reader).take(8).read_to_end(&mut head)?;
    let compression = Compression::of(&head);
    let whole = io::Cursor::new(head).chain(reader);
    if compression == Compression::None {
        return Ok(Box::new(whole));
    }
    Ok(Box::new(BufReader::with_capacity(BUFFER, decode(whole)?)))
}

/// The compressed side; remembers that an error was its own rather than the decoder's.
struct Source<R> {
    inner: R,
    failed: bool,
}

impl<R: Read> Read for Source<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buf).inspect_err(|error| self.failed |= error.kind() != io::ErrorKind::Interrupted)
    }
}

trait Decoder: Read {
    fn source_failed(&self) -> bool;
}

impl<R: Read> Decoder for flate2::bufread::MultiGzDecoder<BufReader<Source<R>>> {
    fn source_failed(&self) -> bool {
        self.get_ref().get_ref().failed
    }
}

impl<R: Read> Decoder for bzip2::bufread::MultiBzDecoder<BufReader<Source<R>>> {
    fn source_failed(&self) -> bool {
        self.get_ref().get_ref().failed
    }
}

impl<R: Read> Decoder for liblzma::bufread::XzDecoder<BufReader<Source<R>>> {
    fn source_failed(&self) -> bool {
        self.get_ref().get_ref().failed
    }
}

impl<R: Read> Decoder for zstd::stream::read::Decoder<'_, BufReader<Source<R>>> {
    fn source_failed(&self) -> bool {
        self.get_ref().get_ref().failed
    }
}

struct Decoded<'a> {
    decoder: Box<dyn Decoder + 'a>,
    compression: Compression,
}

impl Read for Decoded<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.decoder.read(buf).map_err(|error| {
            if self.decoder.source_failed() || error.kind() == io::ErrorKind::Interrupted {
                return error;
            }
            let name = self.compression.name();
            match error.kind() {
                io::ErrorKind::UnexpectedEof => {
                    io::Error::new(io::ErrorKind::UnexpectedEof, format!("the {name} data is truncated"))
                }
                _ => {
                    io::Error::new(io::ErrorKind::InvalidData, format!("the {name} data is corrupt: {error}"))
                }
            }
        })
    }
}

/// What a source of a stream's beginning must be read through to see it without consuming it.
pub(crate) fn peek(reader: &mut impl BufRead) -> io::Result<Compression> {
    Ok(Compression::of(reader.fill_buf()?))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn compressed() -> Vec<(&'static str, Vec<u8>)> {
        let data = sample();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&data).unwrap();
        let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        bzip2.write_all(&data).unwrap();
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(&data).unwrap();
        vec![
            ("gzip", gzip.finish().unwrap()),
            ("bzip2", bzip2.finish().unwrap()),
            ("xz", xz.finish().unwrap()),
            ("zstd", zstd::encode_all(&data[..], 1).unwrap()),
            ("plain", data),
        ]
    }

    fn sample() -> Vec<u8> {
        (0..60_000u32).flat_map(|n| (n.wrapping_mul(2_654_435_761) >> 20).to_le_bytes()).collect()
    }

    fn read(data: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        decode(data)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn every_form_is_told_and_decoded() {
        for (name, data) in compressed() {
            assert!(read(&data).unwrap() == sample(), "{name}");
        }
        assert_eq!(read(b"").unwrap(), b"");
        assert_eq!(read(b"abc").unwrap(), b"abc");
    }

    #[test]
    fn several_members_read_as_one_stream() {
        for (name, data) in compressed().into_iter().take(4) {
            let twice = [data.clone(), data].concat();
            assert_eq!(read(&twice).unwrap().len(), 2 * sample().len(), "{name}");
        }
        // zstd:chunked and eStargz carry their index in a skippable frame or a member of its own.
        let mut chunked = zstd::encode_all(&b"hello"[..], 1).unwrap();
        chunked.extend_from_slice(&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4]);
        assert_eq!(read(&chunked).unwrap(), b"hello");
        let skippable_first = [&chunked[chunked.len() - 12..], &chunked[..chunked.len() - 12]].concat();
        assert_eq!(read(&skippable_first).unwrap(), b"hello");
    }

    #[test]
    fn truncation_and_damage_are_told_apart_by_name() {
        for (name, data) in compressed().into_iter().take(4) {
            let error = read(&data[..data.len() / 2]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{name}: {error}");
            assert_eq!(error.to_string(), format!("the {name} data is truncated"));
            if name == "zstd" {
                // Its checksum is optional; a layer's digest finds what passes here.
                continue;
            }
            let mut damaged = data.clone();
            let middle = damaged.len() / 2;
            for byte in &mut damaged[middle..middle + 64] {
                *byte ^= 0x5a;
            }
            match read(&damaged) {
                Ok(_) => panic!("{name}: the damage was not seen"),
                Err(error) => assert!(error.to_string().contains(name), "{name}: {error}"),
            }
        }
    }
}
