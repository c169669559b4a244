//! The only crate with unsafe: system calls the ecosystem's crates lack
