//! What nobody can do without: the bytes copied, the layers' files made, by the plainest programs there are.
//!
//! Invariant: the programs are metered as the contenders are, and what they wrote is removed outside of the measured time.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result};

use super::{
    super::figure::{Figure, figure},
    LONGEST, Station, source,
};
use crate::say;

pub type Floor = (&'static str, fn(&Station<'_>) -> Result<Figure>);

/// All blobs from the registry.
pub const BLOBS: Floor = ("skopeo copy to a directory", copy_blobs);

/// The whole image's bytes.
pub const COPY: Floor =
    ("cp of the archive", |station| shell(station, r#"cp --reflink=never "$0" "$1/archive""#));

/// As what is loaded is on the disk at the end. Not by reference: the bytes are what is measured.
pub const SYNCED_COPY: Floor = ("a copy of the archive, synced", |station| {
    shell(station, r#"cp --reflink=never "$0" "$1/archive" && sync "$1/archive""#)
});

/// As many bytes as a layout of plain layers and their files.
pub const TWO_COPIES: Floor = ("two copies of it at once, synced", |station| {
    shell(
        station,
        r#"copy() { cp --reflink=never "$1" "$2" && sync "$2"; }
        copy "$0" "$1/1" & first=$!
        copy "$0" "$1/2" && wait "$first""#,
    )
});

/// A layout of plain layers and their files. Each layer's directory lies where the file system has room for inodes, as
/// ours do, where it can be told so.
pub const UNPACKED: Floor = ("a copy, and tar -x of its layers, two at once, synced", |station| {
    shell(
        station,
        r#"cp --reflink=never "$0" "$1/archive" & copy=$!
        mkdir "$1/layers" && { chattr +T "$1/layers" 2>/dev/null || true; } &&
        tar -tf "$0" | grep '^[0-9a-f]*\.tar$' | xargs -P2 -I{} sh -c '
            mkdir "$1/layers/{}" && tar -xOf "$0" {} | tar -x --numeric-owner -C "$1/layers/{}"' "$0" "$1" &&
        wait "$copy" && sync -f "$1/layers""#,
    )
});

fn copy_blobs(station: &Station<'_>) -> Result<Figure> {
    measured(station, |to| {
        let mut command = station.contender.sandbox().net_command("skopeo");
        command.args(["copy", "--insecure-policy", "--src-tls-verify=false"]);
        command.arg(format!("docker://{}", source("first"))).arg(format!("dir:{}", to.display()));
        command
    })
}

/// The script's `$0` is the archive, `$1` a directory of its own.
fn shell(station: &Station<'_>, script: &str) -> Result<Figure> {
    measured(station, |to| {
        let mut command = Command::new("bash");
        command.args(["-e", "-o", "pipefail", "-c", script]).arg(&station.image.archive).arg(to);
        command
    })
}

fn measured(station: &Station<'_>, command: impl FnOnce(&Path) -> Command) -> Result<Figure> {
    let to = station.contender.sandbox().dir().join("floor");
    fs::create_dir(&to)?;
    station.image.read_archive()?;
    let meter = station.contender.meter().context("a contender for images is metered")?;
    let command = super::super::limited(&command(&to), LONGEST);
    let figure = figure(meter, || say::read(&mut meter.metered(command)).map(drop))?;
    fs::remove_dir_all(to)?;
    Ok(figure)
}
