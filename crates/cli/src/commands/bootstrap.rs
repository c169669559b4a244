//! `brig image bootstrap`: a base image from a distribution's own signed packages, without a registry.
//!
//! mmdebstrap resolves, verifies and unpacks; this file decides what goes in. Nothing in the result depends on the clock
//! or the machine: the same packages make the same image, digest and all.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};

use brigantine_image::bootstrap::{BootstrapConfig, image_from_rootfs_tar};

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::{load, upload, version};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::{images, output, units};

pub static COMMAND: Command = Command {
    name: "bootstrap",
    usage: "[OPTIONS] DISTRIBUTION:SUITE [NAME[:TAG]]",
    about: "Make a base image from a distribution's signed packages (debian:bookworm, ubuntu:noble, …)",
    flags: &[
        Flag::list("include", "Add these packages (comma-separated)"),
        Flag::text("mirror", "Take packages from this mirror instead of the host's"),
        Flag::text("output", "Write the image's archive to this file instead of loading it").short('o'),
        Flag::switch("quiet", "Do not show what mmdebstrap does").short('q'),
        Flag::text("variant", "mmdebstrap's variant: essential, apt, minbase, important, …")
            .default("minbase"),
    ],
    operands: Operands::Between(1, 2),
    run: runs!(run),
    ..Command::EMPTY
};

/// A suite of a distribution, under any of its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Suite {
    family: &'static str,
    codename: &'static str,
    version: &'static str,
}

const SUITES: &[Suite] = &[
    Suite { family: "debian", codename: "bullseye", version: "11" },
    Suite { family: "debian", codename: "bookworm", version: "12" },
    Suite { family: "debian", codename: "trixie", version: "13" },
    Suite { family: "debian", codename: "forky", version: "14" },
    Suite { family: "debian", codename: "sid", version: "unstable" },
    Suite { family: "ubuntu", codename: "focal", version: "20.04" },
    Suite { family: "ubuntu", codename: "jammy", version: "22.04" },
    Suite { family: "ubuntu", codename: "noble", version: "24.04" },
    Suite { family: "ubuntu", codename: "plucky", version: "25.04" },
    Suite { family: "ubuntu", codename: "questing", version: "25.10" },
];

/// What the plain name of a distribution means.
const DEFAULTS: &[(&str, &str)] = &[("debian", "bookworm"), ("ubuntu", "noble")];

impl Suite {
    fn parse(text: &str) -> Result<Self, String> {
        let (family, suite) = text.split_once(':').unwrap_or((text, "latest"));
        let known = || SUITES.iter().filter(move |suite| suite.family == family);
        if known().next().is_none() {
            return Err(format!(
                "{text}: only debian and ubuntu can be bootstrapped, as debian:bookworm or ubuntu:noble"
            ));
        }
        let suite = suite.trim_end_matches("-slim");
        let wanted = match suite {
            "latest" => {
                DEFAULTS.iter().find(|(name, _)| *name == family).map_or(suite, |(_, codename)| codename)
            }
            other => other,
        };
        known().find(|suite| suite.codename == wanted || suite.version == wanted).copied().ok_or_else(|| {
            let names: Vec<_> = known().map(|suite| suite.codename).collect();
            format!(
                "{text}: {family} has no suite {wanted:?} that is known here; known are {}",
                names.join(", ")
            )
        })
    }

    fn keyring(&self) -> PathBuf {
        PathBuf::from(format!("/usr/share/keyrings/{}-archive-keyring.gpg", self.family))
    }

    fn keyring_package(&self) -> &'static str {
        if self.family == "debian" { "debian-archive-keyring" } else { "ubuntu-keyring" }
    }

    fn components(&self) -> &'static str {
        if self.family == "debian" { "main" } else { "main universe" }
    }

    /// The suites that belong to a release: itself, its updates, its security fixes.
    fn pockets(&self, mirrors: &Mirrors) -> Vec<(String, String)> {
        let name = self.codename;
        let mut all = vec![(mirrors.main.clone(), name.to_owned())];
        if matches!(name, "sid" | "forky") {
            return all;
        }
        all.push((mirrors.main.clone(), format!("{name}-updates")));
        if let Some(security) = &mirrors.security {
            all.push((security.clone(), format!("{name}-security")));
        }
        all
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Mirrors {
    main: String,
    security: Option<String>,
}

/// The mirrors the host itself uses for this family, so that proxies and local mirrors keep working.
fn mirrors(suite: &Suite, given: Option<&str>, sources: &Path) -> Result<Mirrors, String> {
    if let Some(mirror) = given {
        let main = mirror.trim_end_matches('/').to_owned();
        // Ubuntu's security pocket is in the same archive; Debian's stands beside it on the same host.
        let security = if suite.family == "ubuntu" {
            Some(main.clone())
        } else {
            main.strip_suffix("/debian").map(|base| format!("{base}/debian-security"))
        };
        return Ok(Mirrors { main, security });
    }
    let entries = host_sources(sources);
    let ends = |uri: &str, name: &str| uri.trim_end_matches('/').ends_with(name);
    let find = |name: &str| {
        entries.iter().find(|uri| ends(uri, name)).map(|uri| uri.trim_end_matches('/').to_owned())
    };
    match suite.family {
        "debian" => match find("/debian") {
            Some(main) => Ok(Mirrors {
                main,
                security: find("/debian-security"),
            }),
            None => Err("the host's apt sources name no mirror of Debian: give one with --mirror".to_owned()),
        },
        _ => match find("/ubuntu") {
            Some(main) => Ok(Mirrors { security: Some(main.clone()), main }),
            None => Err("the host's apt sources name no mirror of Ubuntu: give one with --mirror (http://HOST/ubuntu)".to_owned()),
        },
    }
}

/// Every repository address in the host's apt configuration, in both of its formats.
fn host_sources(dir: &Path) -> Vec<String> {
    let mut files = vec![dir.join("sources.list")];
    if let Ok(entries) = fs::read_dir(dir.join("sources.list.d")) {
        let mut more: Vec<PathBuf> =
            entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
        more.sort();
        files.extend(more);
    }
    let mut found = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        for line in text.lines().map(str::trim) {
            if let Some(list) = line.strip_prefix("URIs:") {
                found.extend(list.split_whitespace().map(str::to_owned));
            } else if line.starts_with("deb ") {
                found.extend(line.split_whitespace().find(|word| word.contains("://")).map(str::to_owned));
            }
        }
    }
    found
}

async fn run(context: &Context, matches: Matches) -> Outcome {
    let suite = Suite::parse(matches.operand(0)).map_err(Fault::Said)?;
    let mirrors = mirrors(&suite, matches.optional("mirror"), Path::new("/etc/apt")).map_err(Fault::Said)?;
    let name = match matches.operand(1) {
        "" => format!(
            "{}:{}",
            suite.family,
            matches.operand(0).split_once(':').map_or("latest", |(_, tag)| tag)
        ),
        name => name.to_owned(),
    };
    let reference = images::parse(&name)?.or_latest();
    need("mmdebstrap", "mmdebstrap")?;
    if !suite.keyring().exists() {
        return Err(Fault::said(format!(
            "{} is missing: it verifies the packages' signatures; apt-get install {}",
            suite.keyring().display(),
            suite.keyring_package()
        )));
    }
    let work = tempfile::Builder::new()
        .prefix("brig-bootstrap-")
        .tempdir()
        .map_err(Fault::io("creating a temporary directory"))?;
    let rootfs = work.path().join("rootfs.tar");
    let epoch = debootstrap(&suite, &mirrors, &matches, &rootfs, work.path())?;
    let variant = matches.text("variant");
    let packages = matches.list("include").join(",");
    let created_by = format!(
        "mmdebstrap --variant={variant}{} {}",
        if packages.is_empty() { String::new() } else { format!(" --include={packages}") },
        suite.codename
    );
    let config = BootstrapConfig {
        reference,
        architecture: version::architecture().to_owned(),
        variant: (version::architecture() == "arm64").then(|| "v8".to_owned()),
        created: units::from_unix(epoch).to_string(),
        created_by,
        comment: None,
        cmd: vec!["bash".to_owned()],
        env: vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()],
        labels: vec![("org.opencontainers.image.version".to_owned(), suite.version.to_owned())],
    };
    let archive = work.path().join("image.tar");
    let made = {
        let input = File::open(&rootfs).map_err(Fault::io(format_args!("opening {}", rootfs.display())))?;
        let output =
            File::create(&archive).map_err(Fault::io(format_args!("creating {}", archive.display())))?;
        let mut output = std::io::BufWriter::new(output);
        let made = image_from_rootfs_tar(std::io::BufReader::new(input), &config, &mut output)
            .map_err(|error| Fault::said(format!("making the image: {error}")))?;
        output.flush().map_err(Fault::io(format_args!("writing {}", archive.display())))?;
        made
    };
    if let Some(target) = matches.optional("output") {
        fs::copy(&archive, target).map_err(Fault::io(format_args!("writing {target}")))?;
        output::line(&made.image.to_string());
        return Ok(());
    }
    let path = archive.to_string_lossy().into_owned();
    load::send(context, upload::body_of(upload::open(&path)?), false, None).await
}

fn need(program: &str, package: &str) -> Outcome {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&paths).any(|dir| dir.join(program).exists()) {
        return Ok(());
    }
    Err(Fault::said(format!(
        "{program} is missing: it makes the root file system; apt-get install {package}"
    )))
}

/// What goes out of the root file system: what the next `apt-get update` makes anew, and what has the clock in it.
const EMPTIED: &[&str] =
    &["/var/cache/apt", "/var/lib/apt/lists", "/var/log", "/var/cache/ldconfig", "/var/cache/debconf"];

/// Makes the root file system's archive; returns the time everything in it is dated by.
fn debootstrap(
    suite: &Suite,
    mirrors: &Mirrors,
    matches: &Matches,
    rootfs: &Path,
    work: &Path,
) -> Outcome<i64> {
    let epoch = release_time(suite, mirrors, work)?;
    let mut process = Process::new("mmdebstrap");
    process
        .env("SOURCE_DATE_EPOCH", epoch.to_string())
        .env("LC_ALL", "C.UTF-8")
        .arg("--mode=auto")
        .arg("--format=tar")
        .arg(format!("--variant={}", matches.text("variant")))
        .arg(format!("--components={}", suite.components().replace(' ', ",")))
        .arg(format!("--keyring={}", suite.keyring().display()))
        .arg("--aptopt=Acquire::Languages none")
        .arg("--dpkgopt=path-exclude=/usr/share/man/*")
        .arg("--dpkgopt=path-exclude=/usr/share/doc/*")
        .arg("--dpkgopt=path-include=/usr/share/doc/*/copyright")
        .arg("--dpkgopt=path-exclude=/usr/share/info/*");
    for include in matches.list("include") {
        process.arg(format!("--include={include}"));
    }
    process.arg(format!("--customize-hook={}", clean_hook()));
    process.arg(suite.codename).arg(rootfs);
    for (uri, pocket) in suite.pockets(mirrors) {
        process.arg(format!("deb {uri} {pocket} {}", suite.components()));
    }
    let quiet = matches.is("quiet");
    if quiet {
        process.arg("--quiet");
    }
    process.stdin(Stdio::null()).stdout(Stdio::null()).stderr(if quiet {
        Stdio::piped()
    } else {
        Stdio::inherit()
    });
    let done = process
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .map_err(Fault::io("starting mmdebstrap"))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        return Err(Fault::said(format!(
            "mmdebstrap could not make {}: {}\n{}",
            suite.codename,
            done.status,
            said.trim_end()
        )));
    }
    Ok(epoch)
}

/// A shell line that mmdebstrap runs with the new root as `$1`.
fn clean_hook() -> String {
    let mut lines: Vec<String> = EMPTIED
        .iter()
        .map(|dir| format!("find \"$1{dir}\" -mindepth 1 ! -type d -delete 2>/dev/null || true"))
        .collect();
    // An empty machine-id is filled when a machine boots; no image has an identity.
    lines.push("if [ -e \"$1/etc/machine-id\" ]; then : > \"$1/etc/machine-id\"; fi".to_owned());
    lines.push("rm -f \"$1/var/lib/dbus/machine-id\" \"$1/etc/hostname\" \"$1/etc/resolv.conf\"".to_owned());
    lines.push("rm -f \"$1\"/etc/passwd- \"$1\"/etc/group- \"$1\"/etc/shadow- \"$1\"/etc/gshadow- \"$1\"/etc/subuid- \"$1\"/etc/subgid-".to_owned());
    // Days since 1970 of the last password change: the day of the build otherwise.
    lines.push("if [ -e \"$1/etc/shadow\" ]; then days=$((SOURCE_DATE_EPOCH / 86400)); sed -i \"s/^\\([^:]*:[^:]*:\\)[0-9]*:/\\1$days:/\" \"$1/etc/shadow\"; fi".to_owned());
    lines.push("mkdir -p \"$1/var/cache/apt/archives/partial\" \"$1/var/lib/apt/lists/partial\"".to_owned());
    lines.join("; ")
}

/// When the newest of the suite's pockets was published: the packages change only when this does.
fn release_time(suite: &Suite, mirrors: &Mirrors, work: &Path) -> Outcome<i64> {
    let apt = work.join("apt");
    for dir in ["lists/partial", "cache", "etc/apt.conf.d", "etc/preferences.d", "etc/trusted.gpg.d"] {
        fs::create_dir_all(apt.join(dir))
            .map_err(Fault::io(format_args!("creating {}", apt.join(dir).display())))?;
    }
    let sources: Vec<String> = suite
        .pockets(mirrors)
        .iter()
        .map(|(uri, pocket)| {
            format!("deb [signed-by={}] {uri} {pocket} {}\n", suite.keyring().display(), suite.components())
        })
        .collect();
    let list = apt.join("sources.list");
    fs::write(&list, sources.concat()).map_err(Fault::io(format_args!("writing {}", list.display())))?;
    fs::write(apt.join("status"), "").map_err(Fault::io("writing an empty package status"))?;
    let option = |name: &str, path: &str| format!("{name}={}", apt.join(path).display());
    let done = Process::new("apt-get")
        .args(["-o", &option("Dir::State::lists", "lists"), "-o", &option("Dir::State::status", "status")])
        .args(["-o", &option("Dir::Cache", "cache"), "-o", &option("Dir::Etc::sourcelist", "sources.list")])
        .args(["-o", "Dir::Etc::sourceparts=-", "-o", "APT::Sandbox::User=root"])
        // The indices themselves are mmdebstrap's to fetch: the signed Release files are enough here.
        .args([
            "-o",
            "Acquire::Languages=none",
            "-o",
            "Acquire::IndexTargets::deb::Packages::DefaultEnabled=false",
        ])
        .args(["-qq", "update"])
        .stdin(Stdio::null())
        .output()
        .map_err(Fault::io("starting apt-get"))?;
    if !done.status.success() {
        return Err(Fault::said(format!(
            "apt-get could not verify {}: {}",
            suite.codename,
            String::from_utf8_lossy(&done.stderr).trim_end()
        )));
    }
    let mut newest = None;
    let entries = fs::read_dir(apt.join("lists")).map_err(Fault::io("reading the Release files"))?;
    for entry in entries.filter_map(Result::ok) {
        if !entry.file_name().to_string_lossy().ends_with("Release") {
            continue;
        }
        let mut text = String::new();
        File::open(entry.path())
            .and_then(|mut file| file.read_to_string(&mut text))
            .map_err(Fault::io("reading a Release file"))?;
        newest = newest.max(text.lines().find_map(|line| line.strip_prefix("Date: ")).and_then(release_date));
    }
    newest.ok_or_else(|| {
        Fault::said(format!("no Release file of {} says when it was published", suite.codename))
    })
}

/// `Sat, 17 May 2025 09:13:39 UTC` as a unix time.
fn release_date(text: &str) -> Option<i64> {
    let text = text.trim().replace("UTC", "+0000").replace("GMT", "+0000");
    jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(&text).ok().map(jiff::Timestamp::as_second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_have_many_names() {
        assert_eq!(Suite::parse("debian:12").unwrap().codename, "bookworm");
        assert_eq!(Suite::parse("debian:trixie").unwrap().version, "13");
        assert_eq!(Suite::parse("debian").unwrap().codename, "bookworm");
        assert_eq!(Suite::parse("ubuntu:24.04").unwrap().codename, "noble");
        assert!(Suite::parse("alpine:3").unwrap_err().contains("only debian and ubuntu"));
        assert!(Suite::parse("debian:potato").unwrap_err().contains("potato"));
    }

    #[test]
    fn the_hosts_mirrors_are_used() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sources.list.d")).unwrap();
        fs::write(
            dir.path().join("sources.list.d/a.sources"),
            "Types: deb\nURIs: http://mirror.test/debian\nSuites: bookworm\n\nTypes: deb\nURIs: http://mirror.test/debian-security/\n",
        )
        .unwrap();
        let suite = Suite::parse("debian:bookworm").unwrap();
        let found = mirrors(&suite, None, dir.path()).unwrap();
        assert_eq!(found.main, "http://mirror.test/debian");
        assert_eq!(found.security.as_deref(), Some("http://mirror.test/debian-security"));
        let pockets: Vec<String> = suite.pockets(&found).into_iter().map(|(_, pocket)| pocket).collect();
        assert_eq!(pockets, ["bookworm", "bookworm-updates", "bookworm-security"]);
        let noble = Suite::parse("ubuntu:noble").unwrap();
        assert!(mirrors(&noble, None, dir.path()).unwrap_err().contains("--mirror"));
    }

    #[test]
    fn release_dates_parse() {
        assert_eq!(release_date("Sat, 17 May 2025 09:13:39 UTC"), Some(1_747_473_219));
    }
}
