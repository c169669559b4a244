//! Real programs built on a real distribution: C with a compiler that apt installs inside RUN, Rust with a toolchain that
//! is mounted. Packages come from a repository in a named context: a build needs no network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use brigantine_testkit::{Client, Output, fixtures};

use crate::Host;

/// The packages' repository as a folder.
fn repository(host: &Host) -> PathBuf {
    let dir = host.dir().join("repository");
    fs::create_dir(&dir).unwrap();
    let unpacked = Command::new("tar").arg("-xf").arg(fixtures::repository()).arg("-C").arg(&dir).status();
    assert!(unpacked.unwrap().success());
    dir
}

/// What rustc needs of this machine's toolchain for programs that are linked statically, by links of files.
fn toolchain(host: &Host) -> PathBuf {
    let found = Command::new("rustc").args(["--print", "sysroot"]).output().unwrap();
    let sysroot = PathBuf::from(String::from_utf8(found.stdout).unwrap().trim());
    let dir = host.dir().join("toolchain");
    let take = |folder: &str, wanted: &dyn Fn(&str) -> bool| {
        fs::create_dir_all(dir.join(folder)).unwrap();
        // Not every processor's toolchain has a linker of its own.
        let Ok(entries) = fs::read_dir(sysroot.join(folder)) else { return };
        for entry in entries {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let (from, to) = (sysroot.join(folder).join(&name), dir.join(folder).join(&name));
            if wanted(&name) && from.is_file() {
                fs::hard_link(&from, &to).or_else(|_| fs::copy(&from, &to).map(drop)).unwrap();
            }
        }
    };
    let target = format!("lib/rustlib/{}-unknown-linux-gnu", std::env::consts::ARCH);
    take("bin", &|name| name == "rustc");
    take("lib", &|name| name.contains(".so"));
    take(&format!("{target}/lib"), &|name| {
        matches!(Path::new(name).extension().and_then(|e| e.to_str()), Some("rlib" | "rmeta"))
    });
    take(&format!("{target}/bin"), &|_| true);
    take(&format!("{target}/bin/gcc-ld"), &|_| true);
    dir
}

fn build(host: &Host, dir: &Path, args: &[&str]) -> Output {
    let all = ["build"].iter().chain(args).copied().chain([dir.to_str().unwrap()]);
    let output = host.cli(all).run();
    assert_eq!(output.code, 0, "{args:?}: {output}");
    output
}

const DOCKERFILE: &str = r#"# syntax=docker/dockerfile:1
FROM debian:bookworm AS tools
RUN <<EOT
set -e
rm -rf /etc/apt/sources.list /etc/apt/sources.list.d /etc/apt/apt.conf.d/docker-clean
echo 'deb [trusted=yes] copy:/repository ./' > /etc/apt/sources.list
echo 'Binary::apt::APT::Keep-Downloaded-Packages "true";' > /etc/apt/apt.conf.d/keep
echo force-unsafe-io > /etc/dpkg/dpkg.cfg.d/quick
EOT
ARG MORE=""
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt,sharing=locked \
    --mount=from=packages,target=/repository \
    apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev $MORE

FROM tools AS c
WORKDIR /src
COPY --link hello.c .
RUN --mount=type=cache,target=/objects gcc -O2 -c -o /objects/hello.o hello.c && gcc -static -o /hello /objects/hello.o

FROM tools AS rust
WORKDIR /src
COPY hello.rs .
RUN --mount=from=toolchain,target=/rust /rust/bin/rustc --edition 2024 -O -C target-feature=+crt-static -o /hello-rust hello.rs

FROM scratch AS one
COPY --from=c /hello /
CMD ["/hello", "world"]

FROM one AS both
COPY --from=rust --chmod=755 /hello-rust /bin/
ENTRYPOINT ["/bin/hello-rust"]
"#;

const HELLO_C: &str = "#include <stdio.h>\nint main(int n, char **v) { printf(\"hello %s from C\\n\", n > 1 ? v[1] : \"nobody\"); return 0; }\n";
const HELLO_RUST: &str =
    "fn main() { println!(\"hello {} from Rust\", std::env::args().nth(1).unwrap_or_default()); }\n";

#[test]
fn programs_in_c_and_rust_are_built_with_packages_that_apt_installs() {
    let host = Host::new(Client::Brig);
    host.load(&fixtures::debian());
    let dir = host.dir().join("ctx");
    fs::create_dir(&dir).unwrap();
    for (name, text) in [("Dockerfile", DOCKERFILE), ("hello.c", HELLO_C), ("hello.rs", HELLO_RUST)] {
        fs::write(dir.join(name), text).unwrap();
    }
    let packages = format!("packages={}", repository(&host).display());
    let args = ["--network", "none", "--build-context", &packages];
    let first = build(&host, &dir, &[&args[..], &["-t", "c:1", "--target", "one"]].concat()).stdout;
    assert!(first.contains("Setting up gcc ("), "{first}");
    assert!(!first.contains("rustc"), "only what the target needs is built: {first}");
    assert_eq!(host.cli(["run", "--rm", "c:1"]).ok(), "hello world from C");
    let files = host.cli(["image", "inspect", "-f", "{{len .RootFS.Layers}}", "c:1"]).ok();
    assert_eq!(files, "1");

    // The source changed: the packages stay installed.
    fs::write(dir.join("hello.c"), HELLO_C.replace("hello ", "good morning ")).unwrap();
    let second = build(&host, &dir, &[&args[..], &["-t", "c:2", "--target", "one"]].concat()).stdout;
    assert!(!second.contains("Setting up gcc ("), "{second}");
    assert_eq!(host.cli(["run", "--rm", "c:2"]).ok(), "good morning world from C");

    // Another package: those that were fetched before are in the cache mount, and nothing of it in the image.
    let third = build(
        &host,
        &dir,
        &[&args[..], &["-t", "t:1", "--target", "tools", "--build-arg", "MORE=make"]].concat(),
    );
    let fetched: Vec<&str> =
        third.stdout.lines().filter(|line| line.starts_with("Get:") && line.contains("gcc")).collect();
    assert!(third.stdout.contains("Setting up make (") && fetched.is_empty(), "{fetched:?} {}", third.stdout);
    let script = "find /var/cache/apt /var/lib/apt -name '*.deb' -o -name '*Packages*' | wc -l; gcc --version | head -n 1; make --version | head -n 1";
    let shown = host.cli(["run", "--rm", "t:1", "sh", "-c", script]).ok();
    assert!(shown.starts_with("0\ngcc (Debian") && shown.contains("GNU Make"), "{shown}");
    let caches = host.cli(["builder", "cache", "ls", "--format", "{{.ID}}"]).ok();
    assert!(caches.lines().any(|id| id == "/var/cache/apt"), "{caches}");

    // Rust, with this machine's compiler for the time of one step.
    let toolchain = format!("toolchain={}", toolchain(&host).display());
    build(&host, &dir, &[&args[..], &["--build-context", &toolchain, "-t", "both"]].concat());
    assert_eq!(host.cli(["run", "--rm", "both", "world"]).ok(), "hello world from Rust");
    assert_eq!(
        host.cli(["run", "--rm", "--entrypoint", "/hello", "both", "you"]).ok(),
        "good morning you from C"
    );
}
