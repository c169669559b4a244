//! What the kernel's `ip_tables` and `ip6_tables` say of a table, without reading it.

use std::os::fd::AsRawFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};

use crate::check;

/// `IPT_SO_GET_INFO` and `IP6T_SO_GET_INFO` (linux/netfilter_ipv4/ip_tables.h).
const GET_INFO: libc::c_int = 64;

/// `struct ipt_getinfo`, in bytes: a name of 32, then 13 numbers.
const SIZE: usize = 84;

/// Where a table's hooks begin and how many rules of which size it has, as the kernel lays it out: it is another after
/// nearly every change. Of the calling thread's network namespace.
pub fn info(is_ipv4: bool, table: &str) -> Result<Vec<u8>, Errno> {
    let (family, level) =
        if is_ipv4 { (AddressFamily::INET, libc::SOL_IP) } else { (AddressFamily::INET6, libc::SOL_IPV6) };
    let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW))?;
    if table.len() >= 32 {
        return Err(Errno::NAMETOOLONG);
    }
    let mut buffer = vec![0_u8; SIZE];
    buffer[..table.len()].copy_from_slice(table.as_bytes());
    let mut length = SIZE as libc::socklen_t;
    let place = buffer.as_mut_ptr().cast();
    // SAFETY: the kernel reads the name and writes at most `length` bytes, which is the buffer's size.
    let done = unsafe { libc::getsockopt(socket.as_raw_fd(), level, GET_INFO, place, &raw mut length) };
    check(done.into())?;
    Ok(buffer)
}
