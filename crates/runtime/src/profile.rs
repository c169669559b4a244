//! Docker's default confinement, as data: what a container gets unless somebody asks otherwise.

use crate::error::Error;
use crate::spec::{Capability, LinuxDevice, LinuxSeccomp, Mount};

/// What decides which parts of the default filter apply.
#[derive(Debug, Clone, Default)]
pub struct SeccompContext {
    /// The container's bounding capabilities.
    pub capabilities: Vec<Capability>,
    /// `(major, minor)`; `None`: the running kernel's.
    pub kernel: Option<(u32, u32)>,
}

/// The fourteen capabilities of a default container.
pub fn capabilities() -> Vec<Capability> {
    use Capability as C;
    vec![
        C::Chown,
        C::DacOverride,
        C::Fsetid,
        C::Fowner,
        C::Mknod,
        C::NetRaw,
        C::Setgid,
        C::Setuid,
        C::Setfcap,
        C::Setpcap,
        C::NetBindService,
        C::SysChroot,
        C::Kill,
        C::AuditWrite,
    ]
}

/// Every capability that this kernel knows (`--privileged`).
pub fn all_capabilities() -> Vec<Capability> {
    Vec::new()
}

pub fn masked_paths() -> Vec<String> {
    Vec::new()
}

pub fn readonly_paths() -> Vec<String> {
    Vec::new()
}

/// proc, dev, devpts, sysfs, cgroup, mqueue and shm, in mounting order.
pub fn mounts(shm_size: u64) -> Vec<Mount> {
    let _ = shm_size;
    Vec::new()
}

/// Devices beyond those every container gets from the runtime: none by default.
pub fn devices() -> Vec<LinuxDevice> {
    Vec::new()
}

/// The cgroup device rules of a default container.
pub fn device_rules() -> Vec<crate::spec::LinuxDeviceCgroup> {
    Vec::new()
}

/// Docker's default filter for a container with these capabilities.
pub fn seccomp(context: &SeccompContext) -> Result<LinuxSeccomp, Error> {
    let _ = context;
    Err(Error::unsupported("the default filter is not built yet"))
}

/// A user's own profile in docker's JSON format.
pub fn parse_seccomp(json: &[u8], context: &SeccompContext) -> Result<LinuxSeccomp, Error> {
    let _ = (json, context);
    Err(Error::unsupported("profiles are not built yet"))
}
