//! The `brig` command: parses, calls the Engine API, prints. No engine logic lives here.
//!
//! This file owns the way in and the way out: one runtime, one command, one exit status.

mod args;
mod client;
mod commands;
mod config;
mod context;
mod credential_helper;
mod fault;
mod images;
mod listing;
mod output;
mod parse;
mod progress;
mod registries;
mod streams;
mod template;
mod terminal;
mod units;
mod value;

use std::process::exit;

fn main() {
    let argv: Vec<String> = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    let code = commands::main(&argv);
    // A blocked read of standard input must not keep the process: leave at once.
    exit(code);
}
