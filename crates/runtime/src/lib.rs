//! OCI runtime: turns a spec, a root file system and some descriptors into a running container.
//!
//! Everything that can be decided is decided before the clone (`plan`); what runs between clone
//! and exec (`child`) only executes that plan, without allocation, lock or panic, and reports a
//! failure as one typed message. A security step that fails stops the container.

pub use oci_spec::runtime as spec;

/// The version of runtime-spec that is followed.
pub(crate) const OCI_VERSION: &str = "1.3.0";

mod binary;
pub mod cgroup;
mod child;
pub mod cli;
mod compile;
mod copy;
mod covers;
mod describe;
mod error;
mod finish;
mod handover;
pub mod hooks;
mod identity;
mod idmap;
mod inside;
mod launch;
mod listener;
mod mounts;
mod netdev;
mod overlay;
mod plan;
pub mod profile;
pub mod reaper;
pub mod seccomp;
mod validate;

pub use cgroup::Cgroup;
pub use error::{Error, Kind};
pub use launch::{
    Common, Created, ExecRequest, Execed, Launch, OverlayOptions, Rootfs, Stdio, create, exec, start_waiting,
};
pub use listener::Listener;
pub use overlay::attach_root;
pub use validate::validate;
