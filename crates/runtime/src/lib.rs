//! OCI runtime: turns a spec, a root file system and some descriptors into a running container.
//!
//! Everything that can be decided is decided before the clone (`plan`); what runs between clone
//! and exec (`child`) only executes that plan, without allocation, lock or panic, and reports a
//! failure as one typed message. A security step that fails stops the container.

pub use oci_spec::runtime as spec;

pub mod cgroup;
pub mod cli;
mod error;
mod launch;
pub mod profile;
pub mod reaper;
pub mod seccomp;

pub use cgroup::Cgroup;
pub use error::{Error, Kind};
pub use launch::{Created, ExecRequest, Execed, Launch, OverlayOptions, Rootfs, Stdio, create, exec};
