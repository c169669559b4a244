//! `brig-runtime`: the OCI runtime command, the shim and the `--init` reaper.
fn main() {}
