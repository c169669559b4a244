//! Identifiers: 64 hex digits from the kernel's random source.

use rustix::rand::{GetRandomFlags, getrandom};

/// Fills `buffer` with random bytes. The kernel's source, once seeded, cannot fail for small requests.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0_u8; N];
    let mut filled = 0;
    while filled < N {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => unreachable!("getrandom(2) without flags failed: {error}"),
        }
    }
    bytes
}

/// A new identifier of 64 hex digits, never all digits in its short form: such a host name would read as a number.
pub(crate) fn new_id() -> String {
    loop {
        let id = hex::encode(random_bytes::<32>());
        if id[..12].bytes().any(|b| b.is_ascii_alphabetic()) {
            return id;
        }
    }
}

/// The first twelve digits, as people see it.
pub(crate) fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_64_hex_digits_and_differ() {
        let (a, b) = (new_id(), new_id());
        assert_ne!(a, b);
        assert_eq!(a.len(), 64);
        assert!(a.bytes().all(|c| c.is_ascii_hexdigit()));
        assert!(short(&a).bytes().any(|c| c.is_ascii_alphabetic()));
    }
}
