//! Identities of steps and builds.

/// 32 random hexadecimal digits.
pub(crate) fn new() -> String {
    let mut bytes = [0_u8; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                // Without a source of randomness the time and the process still tell steps of one engine apart.
                tracing::error!(%error, "get random bytes");
                let now = crate::records::now().to_be_bytes();
                bytes[..8].copy_from_slice(&now);
                bytes[8..12].copy_from_slice(&std::process::id().to_be_bytes());
                break;
            }
        }
    }
    hex::encode(bytes)
}
