//! Names of interfaces that fit into 15 bytes, whatever they belong to.

/// `prefix`, eight hex digits that follow from `owner` (FNV-1a), and `suffix`: at most 7 bytes of the two together.
pub(crate) fn hashed(prefix: &str, owner: &str, suffix: &str) -> String {
    format!("{prefix}{:08x}{suffix}", hash(owner))
}

pub(crate) fn hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}
