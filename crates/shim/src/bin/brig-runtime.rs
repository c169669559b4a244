//! `brig-runtime`: one small static executable that is three programs. `brig-runtime shim …` is a container's monitor,
//! `brig-runtime init -- …` (or a name ending in `init`) is the reaper inside a container, and anything else is the OCI
//! runtime command.

#![no_main]

use std::ffi::OsString;
use std::path::Path;

use brigantine_sys::arena::Arena;

brigantine_sys::entry!(program);

/// Commands are over in milliseconds; whoever stays does without.
#[global_allocator]
static MEMORY: Arena<{ 512 << 10 }> = Arena::new();

fn program() -> u8 {
    let mut args = brigantine_sys::entry::args().into_iter();
    let name = args.next().unwrap_or_default();
    let named_init =
        Path::new(&name).file_name().and_then(|n| n.to_str()).is_some_and(|n| n.ends_with("init"));
    let mut args = args.peekable();
    let first = args.peek().and_then(|a| a.to_str()).unwrap_or_default();
    if named_init || matches!(first, "shim" | "init") {
        MEMORY.close();
    }
    match first {
        "shim" if !named_init => brigantine_shim::monitor::main(),
        "init" if !named_init => {
            args.next();
            reaper(args)
        }
        _ if named_init => reaper(args),
        _ => brigantine_runtime::cli::main(args),
    }
}

/// The reaper takes the program and its arguments, with or without a `--` before them.
fn reaper(args: impl Iterator<Item = OsString>) -> u8 {
    let mut args = args.peekable();
    args.next_if(|a| a == "--");
    brigantine_runtime::reaper::main(args)
}
