//! CVE-2019-5736 and kin: a container reaches the executable of the process that makes it as `/proc/<pid>/exe`, by being
//! asked to run `/proc/self/exe` under another name. It may run it; it must not be able to change it.

#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

mod bundle;
mod common;

use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::Path;

use brigantine_sys::SealedExe;
use bundle::{Bundle, add_libraries};
use common::{Fixture, read_output};

/// Leads to the runtime's own executable, whoever runs it.
const BAIT: &str = "/bin/bait";

/// Run below the runtime (as its reaper): takes a descriptor of its executable, then writes by every way there is, in the
/// end when nobody runs it any more, which is when a file on disk would give in. Says so in `/tmp/result`.
const ATTACK: &str = r#"
exec 3</proc/$PPID/exe || { echo "not opened" >/tmp/result; exit; }
attack() {
    (echo changed >/proc/self/fd/3) 2>/dev/null && echo "$1: truncated" >>/tmp/log
    (echo changed >>/proc/self/fd/3) 2>/dev/null && echo "$1: appended" >>/tmp/log
    (echo changed | dd of=/proc/self/fd/3 conv=notrunc) 2>/dev/null && echo "$1: written" >>/tmp/log
}
: >/tmp/log
for pid in ${ONE-1} $PPID; do
    (echo changed >/proc/$pid/exe) 2>/dev/null && echo "exe of $pid: truncated" >>/tmp/log
done
attack "while it runs"
[ $PPID = 1 ] || kill -9 $PPID
for i in 1 2 3 4 5 6 7 8; do
    sleep 0.05
    attack "afterwards"
done
echo "end" >>/tmp/log
cat /tmp/log >/tmp/result.new
mv /tmp/result.new /tmp/result
"#;

fn arm(root: &Path) {
    add_libraries(root);
    symlink("/proc/self/exe", root.join(BAIT.trim_start_matches('/'))).unwrap();
    symlink("busybox", root.join("bin/mv")).unwrap();
}

fn result(root: &Path) -> String {
    let file = root.join("tmp/result");
    bundle::eventually("the attack ends", || file.exists());
    let result = fs::read_to_string(&file).unwrap();
    fs::remove_file(&file).unwrap();
    result
}

/// A runtime on disk that the test may lose.
fn victim(dir: &str) -> std::path::PathBuf {
    let exe = Path::new(dir).join("brig-runtime");
    fs::copy(bundle::runtime(), &exe).unwrap();
    exe
}

#[test]
fn the_command_lines_executable_cannot_be_written_by_an_execd_process() {
    let mut bundle = Bundle::sleeping();
    let root = Path::new(bundle.dir()).join("rootfs");
    arm(&root);
    bundle.exe = victim(bundle.dir());
    let before = fs::read(&bundle.exe).unwrap();
    let done = bundle.run(&["exec", &bundle.id, BAIT, "init", "--", "/bin/sh", "-c", ATTACK]);
    assert_eq!(done.code, 137, "the reaper was there and has been killed: {done:?}");
    assert_eq!(result(&root), "end\n");
    assert!(fs::read(&bundle.exe).unwrap() == before, "the runtime on disk was changed");
}

#[test]
fn the_command_lines_executable_cannot_be_written_by_a_container() {
    let mut bundle = Bundle::new(&[BAIT, "init", "--", "/bin/sh", "-c", ATTACK]);
    // With the host's process numbers: the end of a first process of its own would be everybody's end, and
    // while it runs even a file on disk cannot be written.
    bundle.configure(|c| {
        c["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| n["type"] != "pid");
        c["process"]["env"] = serde_json::json!(["PATH=/bin", "ONE="]);
    });
    let root = Path::new(bundle.dir()).join("rootfs");
    arm(&root);
    bundle.exe = victim(bundle.dir());
    let before = fs::read(&bundle.exe).unwrap();
    bundle.good(&["create", "--bundle", bundle.dir(), &bundle.id]);
    bundle.good(&["start", &bundle.id]);
    assert_eq!(result(&root), "end\n");
    assert!(fs::read(&bundle.exe).unwrap() == before, "the runtime on disk was changed");
}

fn content(exe: &SealedExe) -> Vec<u8> {
    let mut file = fs::File::open(exe.path()).unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn the_monitors_executable_cannot_be_written() {
    let args = [BAIT, "init", "--", "/bin/sh", "-c"];
    let script = format!("{ATTACK}\nexec sleep 1000");
    let fixture = Fixture::new(&[&args[..], &[&script]].concat());
    let root = fixture.temp.path().join("root");
    arm(&root);
    let on_disk = fs::read(common::runtime()).unwrap();
    assert!(content(&fixture.exe) == on_disk);
    let running = fixture.start();
    assert_eq!(result(&root), "end\n");
    assert!(content(&fixture.exe) == on_disk, "the copy in memory was changed");

    let mut exec = running.client.exec(&fixture.exec("e", &[&args[..], &[ATTACK]].concat())).unwrap();
    assert_eq!(read_output(&mut exec.stream).exec.unwrap().exit_code, 137);
    assert_eq!(result(&root), "end\n");
    assert!(content(&fixture.exe) == on_disk, "the copy in memory was changed");
    assert!(fs::read(common::runtime()).unwrap() == on_disk, "the file on disk was changed");
}
