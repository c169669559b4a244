//! Extended attributes that belong to a file's content: capabilities and users' own.

use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::XattrFlags;
use rustix::io::{Errno, Result};

/// The kernel's limits for a list and a value (xattr(7)).
const MOST: usize = 64 << 10;

/// A file's attributes by name, in order.
pub(crate) fn of(file: BorrowedFd<'_>) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    // Most files have none: that is found out without a buffer.
    match rustix::fs::flistxattr(file, &mut [] as &mut [u8]) {
        Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Ok(_) => {}
        Err(error) => return Err(error),
    }
    let mut list = vec![0_u8; MOST];
    let length = rustix::fs::flistxattr(file, &mut list)?;
    let mut value = vec![0_u8; MOST];
    let mut all = Vec::new();
    for name in list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty() && !is_the_hosts(name))
    {
        match rustix::fs::fgetxattr(file, OsStr::from_bytes(name), &mut value) {
            Ok(n) => all.push((name.to_vec(), value[..n].to_vec())),
            Err(Errno::NODATA) => {}
            Err(error) => return Err(error),
        }
    }
    all.sort();
    Ok(all)
}

/// What the kernel or this host's policy has put there.
fn is_the_hosts(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.")
        || name.starts_with(b"user.overlay.")
        || matches!(name, b"security.selinux" | b"security.ima" | b"security.evm")
}

/// Gives one file the attributes of another.
pub(crate) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
    for (name, value) in of(from)? {
        match rustix::fs::fsetxattr(to, OsStr::from_bytes(&name), &value, XattrFlags::empty()) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
