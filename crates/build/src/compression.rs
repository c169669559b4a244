//! Archives by their content: which compression, and whether it is a tar archive at all.

use std::io::{self, BufRead, BufReader, Read};

/// Reads through whatever compression the content shows.
pub(crate) fn decode<'r>(source: impl Read + 'r) -> io::Result<Box<dyn Read + 'r>> {
    let mut source = BufReader::with_capacity(1 << 17, source);
    let head = peek(&mut source, 6)?;
    Ok(match &head[..] {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(source)),
        [b'B', b'Z', b'h', ..] => Box::new(bzip2::bufread::MultiBzDecoder::new(source)),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => Box::new(liblzma::bufread::XzDecoder::new_multi_decoder(source)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::stream::read::Decoder::with_buffer(source)?),
        _ => Box::new(source),
    })
}

/// Whether it is a tar archive, compressed or not.
pub(crate) fn is_archive(source: impl Read) -> io::Result<bool> {
    let mut block = [0_u8; 512];
    let mut have = 0;
    let mut source = match decode(source) {
        Ok(source) => source,
        Err(_not_that) => return Ok(false),
    };
    while have < block.len() {
        match source.read(&mut block[have..]) {
            Ok(0) => break,
            Ok(n) => have += n,
            // Something that only begins like a compressed file.
            Err(_not_that) => return Ok(false),
        }
    }
    Ok(have == block.len() && is_header(&block))
}

/// A tar header's checksum is right.
pub(crate) fn is_header(block: &[u8; 512]) -> bool {
    let text: String = block[148..156].iter().map(|b| char::from(*b)).collect();
    let text = text.trim_matches(|c: char| c == '\0' || c == ' ');
    let Ok(stated) = u32::from_str_radix(text, 8) else { return false };
    let actual: u32 = block
        .iter()
        .enumerate()
        .map(|(at, b)| if (148..156).contains(&at) { 32 } else { u32::from(*b) })
        .sum();
    stated == actual && block[0] != 0
}

fn peek(source: &mut impl BufRead, wanted: usize) -> io::Result<Vec<u8>> {
    let buffer = source.fill_buf()?;
    Ok(buffer[..buffer.len().min(wanted)].to_vec())
}
