//! Kernel settings of the network under `/proc/sys/net`. Which namespace's is decided by the thread that
//! opens the file. A setting is written only when it differs, so a read-only `/proc/sys` that is already
//! right is no obstacle.

use std::fs;
use std::io;

use crate::error::Error;

/// Sets `/proc/sys/net/<path>`.
pub(crate) fn ensure(path: &str, value: &str) -> Result<(), Error> {
    let file = format!("/proc/sys/net/{path}");
    write_if_different(&file, value).map_err(|source| Error::Sysctl {
        path: file.clone(),
        key: format!("net.{}", path.replace('.', "\0").replace('/', ".").replace('\0', "/")),
        value: value.to_owned(),
        source,
    })
}

/// Makes room in the kernel's tables of neighbours, which all network namespaces share, for that many. It has 1,024 by
/// default, and those beyond that are not reached. Only the machine's own namespace has the setting.
pub(crate) fn make_room_for_neighbours(count: u32) {
    for family in ["ipv4", "ipv6"] {
        for (name, value) in [("gc_thresh3", count), ("gc_thresh2", count / 2)] {
            let path = format!("/proc/sys/net/{family}/neigh/default/{name}");
            let Ok(present) = fs::read_to_string(&path) else { continue };
            if present.trim().parse::<u32>().is_ok_and(|present| present < value)
                && let Err(error) = fs::write(&path, value.to_string())
            {
                tracing::warn!(path, value, %error, "the table of neighbours may be too small for all containers");
            }
        }
    }
}

/// Whether the kernel has IPv6 here at all.
pub(crate) fn has_ipv6() -> bool {
    std::path::Path::new("/proc/sys/net/ipv6").is_dir()
}

/// Whether new interfaces here get no addresses of IPv6 unless it is turned on.
pub(crate) fn has_ipv6_off() -> bool {
    !has_ipv6() || ["all", "default"].iter().any(|of| is_set(&format!("ipv6/conf/{of}/disable_ipv6")))
}

/// Whether `/proc/sys/net/<path>` is there and not 0.
pub(crate) fn is_set(path: &str) -> bool {
    fs::read_to_string(format!("/proc/sys/net/{path}")).is_ok_and(|value| value.trim() != "0")
}

/// Makes the host forward IPv6. A host that forwards takes no router advertisements unless told to explicitly, and
/// would lose the route it learned that way: interfaces that take them now go on doing so.
pub(crate) fn forward_ipv6() -> Result<(), Error> {
    const DIR: &str = "/proc/sys/net/ipv6/conf";
    if fs::read_to_string(format!("{DIR}/all/forwarding")).is_ok_and(|value| value.trim() != "0") {
        return Ok(());
    }
    let entries = fs::read_dir(DIR).map_err(|source| Error::Sysctl {
        path: DIR.to_owned(),
        key: "net.ipv6.conf.all.forwarding".to_owned(),
        value: "1".to_owned(),
        source,
    })?;
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let path = format!("{DIR}/{name}/accept_ra");
        // An interface may vanish meanwhile; `all` decides nothing here.
        if name != "all" && fs::read_to_string(path).is_ok_and(|value| value.trim() == "1") {
            match ensure(&format!("ipv6/conf/{name}/accept_ra"), "2") {
                Err(Error::Sysctl { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                result => result?,
            }
        }
    }
    ensure("ipv6/conf/all/forwarding", "1")
}

/// Sets a container's `net.*` setting, in the calling thread's namespace.
pub(crate) fn set_for_container(key: &str, value: &str) -> io::Result<()> {
    let path = container_path(key).ok_or(io::ErrorKind::InvalidInput)?;
    write_if_different(&path, value)
}

/// `net.ipv4.conf.eth0.rp_filter`, or with slashes if a name has dots. Nothing outside `net`.
fn container_path(key: &str) -> Option<String> {
    let parts: Vec<&str> =
        if key.contains('/') { key.split('/').collect() } else { key.split('.').collect() };
    let is_plain = parts.iter().all(|part| !part.is_empty() && *part != "." && *part != "..");
    (parts.first() == Some(&"net") && parts.len() > 1 && is_plain)
        .then(|| format!("/proc/sys/{}", parts.join("/")))
}

fn write_if_different(file: &str, value: &str) -> io::Result<()> {
    if fs::read_to_string(file)?.trim() == value.trim() { Ok(()) } else { fs::write(file, value) }
}

/// The host's range for ports chosen by the kernel; the kernel's default if it cannot be read.
pub(crate) fn local_port_range() -> (u16, u16) {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut numbers = text.split_ascii_whitespace().map(str::parse::<u16>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(first)), Some(Ok(last))) if 0 < first && first <= last => (first, last),
        _ => (32768, 60999),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn container_settings_stay_within_net() {
        let path = |key| container_path(key);
        assert_eq!(path("net.ipv4.ip_forward").as_deref(), Some("/proc/sys/net/ipv4/ip_forward"));
        assert_eq!(
            path("net/ipv4/conf/eth0.1/forwarding").as_deref(),
            Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding")
        );
        for key in
            ["kernel.hostname", "net", "net..x", "net/../kernel/hostname", "", "/net/ipv4", "net.ipv4."]
        {
            assert_eq!(path(key), None, "{key}");
        }
    }

    #[test]
    fn the_port_range_is_usable() {
        let (first, last) = local_port_range();
        assert!(0 < first && first <= last);
    }
}
