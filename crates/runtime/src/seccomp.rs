//! Seccomp: an OCI filter description compiled to a BPF program, once, for many containers.

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::spec::LinuxSeccomp;

/// A compiled filter with its load flags. Plain data: cache it by the spec it came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    pub(crate) code: Vec<(u16, u8, u8, u32)>,
    pub(crate) flags: u32,
}

/// Compiles `filter` for this machine.
pub fn compile(filter: &LinuxSeccomp) -> Result<Program, Error> {
    let _ = filter;
    Err(Error::unsupported("seccomp is not built yet"))
}
