//! The same Dockerfiles built by docker's BuildKit (Debian's dockerd 20.10) and by us, with the same client: the same
//! file trees and configurations, but for what is listed here.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::time::Duration;

use brigantine_testkit::{Engine, Flavor, fixtures};
use serde_json::Value;

/// Dockerfiles, by what they are about. Every one is built for the context of [`fill`].
const CASES: &[(&str, &str)] = &[
    (
        "copy",
        "FROM busybox\nCOPY a /x\nCOPY a b/ /y/\nCOPY b /z\nCOPY b/. /w/\nCOPY *.txt /t/\nCOPY link /followed\nCOPY links /links\nCOPY --chown=3:4 a /o/a\nCOPY --chown=9 b /o/b\nCOPY mode /modes/\nCOPY . /all\n",
    ),
    (
        "add",
        "FROM busybox\nADD archive.tar.gz /un/\nADD archive.tar.gz b/c /un2/\nADD a /plain\nADD --chown=7:8 archive.tar.gz /owned/\n",
    ),
    (
        "workdir",
        "FROM busybox\nWORKDIR /one/two\nWORKDIR three\nRUN pwd > here\nUSER 12:13\nWORKDIR /own\nCOPY a .\nWORKDIR /own/../other\n",
    ),
    (
        "run",
        "FROM busybox\nRUN mkdir -p /etc && echo daemon:x:1:1:d:/d:/bin/sh > /etc/passwd && echo daemon:x:1: > /etc/group\nRUN umask && id > /id && echo $HOME $PATH > /env && pwd >> /env\nRUN [\"sh\", \"-c\", \"echo exec > /exec\"]\nSHELL [\"/bin/sh\", \"-e\", \"-c\"]\nRUN echo shell > /shell\nUSER daemon\nRUN id > /tmp/id; echo $HOME >> /tmp/id\nUSER 1234:5678\nRUN id -u > /tmp/u; id -g > /tmp/g; echo ${HOME} > /tmp/h\n",
    ),
    (
        "changes",
        "FROM busybox\nRUN mkdir /d /d/e && echo 1 > /d/a && echo 2 > /d/e/b && ln /d/a /d/h && ln -s a /d/s && chmod 4755 /d/a && chown 9:9 /d/e && mknod /d/p p\nRUN rm /d/a && rm -r /d/e && mkdir /d/e && echo 3 > /d/e/new\nRUN mv /d /moved && touch -d '2001-02-03 04:05:06' /moved/s2\nRUN rm /bin/true && rm -rf /tmp && ln -s /var /tmp\n",
    ),
    (
        "stages",
        "FROM busybox AS one\nRUN mkdir -p /r/sub && echo r > /r/f && echo s > /r/sub/g && ln -s f /r/l && chmod 700 /r/f && chown 5:6 /r/sub\nFROM scratch AS two\nCOPY --from=one /r /r\nCOPY --from=0 /r/l /link\nFROM busybox\nCOPY --from=two / /two/\nCOPY --from=one /r/f /r/sub/ /flat/\nCOPY --from=busybox /bin/busybox /copied\nCOPY --from=one --chown=1:2 /r /owned\n",
    ),
    (
        "config",
        "ARG V=global\nFROM busybox\nARG V\nARG W=w\nENV A=1 B=\"two words\" C=$V-$W\nENV D ${A:-x}${N:-none}${A:+set}\nLABEL a=b \"c d\"=\"e f\" v=$V\nEXPOSE 80 443/tcp 53/udp\nVOLUME /data [\"/x\"]\nVOLUME [\"/json\", \"/list\"]\nSTOPSIGNAL SIGINT\nUSER nobody\nHEALTHCHECK --interval=5s --timeout=3s --retries=2 CMD test -e /x\nENTRYPOINT [\"sh\"]\nCMD [\"-c\", \"echo $A\"]\nMAINTAINER me\n",
    ),
    ("onbuild", "FROM busybox\nONBUILD COPY a /later\nONBUILD RUN echo x > /y\nCMD echo shell form\n"),
    (
        "mounts",
        "FROM busybox\nRUN --mount=type=cache,target=/c echo 1 > /c/f && cp /c/f /got\nRUN --mount=type=tmpfs,target=/t touch /t/x && ls /t > /tmpfs\nRUN --mount=type=bind,source=b,target=/b cat /b/c > /bound\nRUN --mount=type=bind,from=busybox,source=/bin,target=/deep/er/bin ls /deep/er/bin/busybox > /other\n",
    ),
    (
        "args",
        "FROM busybox\nARG ONE\nARG TWO=2\nRUN echo \"$ONE $TWO $HTTP_PROXY\" > /args\nENV TWO=env\nRUN echo $TWO > /two\nARG TWO=again\nRUN echo $TWO > /three\nCOPY $ONE /by-arg\n",
    ),
    (
        "volumes",
        "FROM busybox\nRUN mkdir /v && echo 1 > /v/before\nVOLUME /v\nRUN echo 2 > /v/after\nCOPY a /v/copied\n",
    ),
    ("scratch", "FROM scratch\nCOPY a /a\nCOPY b /\nENV X=y\nCMD [\"/a\"]\n"),
];

/// The context: files, links, modes, an archive, and what the ignore file leaves out.
fn fill(dir: &Path) {
    for (path, text) in [
        ("a", "A"),
        ("b/c", "C"),
        ("b/d/e", "E"),
        ("one.txt", "1"),
        ("two.txt", "2"),
        ("mode/x", "x"),
        ("mode/y", "y"),
        ("left/out", ""),
        ("left/in", "in"),
        ("junk.tmp", ""),
        (".dockerignore", "left/*\n!left/in\n**/*.tmp\n.dockerignore\nDockerfile\n"),
    ] {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    }
    let mode =
        |path: &str, mode| fs::set_permissions(dir.join(path), fs::Permissions::from_mode(mode)).unwrap();
    mode("mode/x", 0o751);
    mode("mode/y", 0o4711);
    mode("mode", 0o1777);
    fs::create_dir(dir.join("links")).unwrap();
    symlink("../b/c", dir.join("links/up")).unwrap();
    symlink("nowhere", dir.join("links/broken")).unwrap();
    symlink("b/d", dir.join("link")).unwrap();
    fs::hard_link(dir.join("a"), dir.join("b/hard")).unwrap();
    let mut layer = fixtures::Layer::default();
    layer.dir("in", 0o750).file("in/file", 0o640, b"archived").symlink("in/l", "file");
    fs::write(dir.join("archive.tar"), layer.finish()).unwrap();
    let packed =
        std::process::Command::new("gzip").args(["-n9", "archive.tar"]).current_dir(dir).status().unwrap();
    assert!(packed.success());
    let mut dirs = std::process::Command::new("find");
    dirs.args([".", "-type", "d", "!", "-name", "mode", "-exec", "chmod", "755", "{}", "+"]);
    assert!(dirs.current_dir(dir).status().unwrap().success());
}

/// A file of a result: kind, mode, owner, link, contents.
type File = (char, u32, (u64, u64), String, Vec<u8>);

fn tree(archive: &Path) -> BTreeMap<String, File> {
    let mut files = BTreeMap::new();
    let mut archive = tar::Archive::new(fs::File::open(archive).unwrap());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path =
            entry.path().unwrap().to_string_lossy().trim_matches('/').trim_start_matches("./").to_owned();
        if path.is_empty() || path == "." {
            continue;
        }
        let header = entry.header();
        let kind = match header.entry_type() {
            tar::EntryType::Directory => 'd',
            tar::EntryType::Symlink => 'l',
            tar::EntryType::Link => 'h',
            tar::EntryType::Fifo => 'p',
            _ => '-',
        };
        let (mode, owner) = (header.mode().unwrap() & 0o7777, (header.uid().unwrap(), header.gid().unwrap()));
        let link =
            entry.link_name().unwrap().map(|link| link.to_string_lossy().into_owned()).unwrap_or_default();
        let mut contents = Vec::new();
        entry.read_to_end(&mut contents).unwrap();
        let mut file = (kind, mode, owner, link, contents);
        if kind == 'h' {
            // Which of several names is the file is up to the packer.
            let to = file.3.trim_matches('/').trim_start_matches("./").to_owned();
            if let Some(first) = files.get(&to).cloned() {
                file = first;
            }
        }
        files.insert(path, file);
    }
    files
}

/// What of an image's configuration can be seen.
fn configuration(engine: &Engine, name: &str) -> Value {
    let inspected: Value = serde_json::from_str(&engine.docker(["inspect", name]).ok()).unwrap();
    let image = &inspected[0];
    let mut config = serde_json::Map::new();
    for key in [
        "Env",
        "Cmd",
        "Entrypoint",
        "WorkingDir",
        "User",
        "Labels",
        "ExposedPorts",
        "Volumes",
        "StopSignal",
        "Shell",
        "Healthcheck",
        "OnBuild",
    ] {
        let value = image["Config"][key].clone();
        let nothing = match &value {
            Value::Null => true,
            Value::String(text) => text.is_empty(),
            Value::Array(all) => all.is_empty(),
            Value::Object(all) => all.is_empty(),
            _ => false,
        };
        if !nothing {
            config.insert(key.to_owned(), value);
        }
    }
    for key in ["Architecture", "Os", "Author"] {
        config.insert(key.to_owned(), image[key].clone());
    }
    config.insert("Layers".to_owned(), image["RootFS"]["Layers"].as_array().map_or(0, Vec::len).into());
    let history =
        engine.docker(["history", "--no-trunc", "--format", "{{.CreatedBy}}|{{.Comment}}", name]).ok();
    config.insert("History".to_owned(), history.lines().map(comparable).collect());
    if let Some(Value::String(dir)) = config.get_mut("WorkingDir") {
        *dir = dir.replace("/own/../other", "/other");
    }
    Value::Object(config)
}

/// A line of history without what docker 20.10's BuildKit wrote in another way than later ones.
fn comparable(line: &str) -> String {
    let words = line.split(' ').filter(|word| !word.starts_with("--chown="));
    let line = words.collect::<Vec<_>>().join(" ");
    for instruction in ["HEALTHCHECK ", "EXPOSE ", "WORKDIR "] {
        if line.starts_with(instruction) {
            return instruction.trim_end().to_owned();
        }
    }
    match (
        line.strip_prefix("ARG "),
        line.strip_prefix("RUN |").and_then(|rest| rest.split_once(" /bin/sh ")),
    ) {
        (Some(rest), _) => format!("ARG {}", rest.split(['=', '|']).next().unwrap_or_default()),
        (_, Some((_, command))) => format!("RUN /bin/sh {command}"),
        _ => line,
    }
}

/// Files that are known to differ: what an archive holds belongs to whom `--chown` names; a program has its own group
/// among the further ones, as in a container; mount points are taken back, as later BuildKits do.
const KNOWN: &[(&str, &str)] = &[
    ("add", "owned/in"),
    ("add", "owned/in/file"),
    ("add", "owned/in/l"),
    ("run", "id"),
    ("run", "tmp/id"),
    ("mounts", "b"),
    ("mounts", "c"),
    ("mounts", "deep"),
    ("mounts", "deep/er"),
    ("mounts", "deep/er/bin"),
    ("mounts", "t"),
];

#[test]
fn the_same_dockerfiles_give_the_same_trees_and_configurations() {
    let ours = Engine::builder().flavor(Flavor::Brig).busybox().start();
    let docker = Engine::builder().flavor(Flavor::Dockerd).busybox().start();
    let dir = ours.dir().join("context");
    fs::create_dir(&dir).unwrap();
    fill(&dir);
    let mut wrong = Vec::new();
    for (name, dockerfile) in CASES {
        fs::write(dir.join("Dockerfile"), dockerfile).unwrap();
        let build = |engine: &Engine| {
            let archive = engine.dir().join("result.tar");
            let output = format!("type=tar,dest={}", archive.display());
            let args = ["build", "--network=none", "--progress=plain", "--build-arg=ONE=a"];
            let place = dir.to_str().unwrap();
            let limit = Duration::from_mins(3);
            engine.buildkit(args.iter().copied().chain(["-t", name, place])).limit(limit).exits(0);
            engine.buildkit(args.iter().copied().chain(["-o", &output, place])).limit(limit).exits(0);
            (tree(&archive), configuration(engine, name))
        };
        let ((our_tree, our_config), (their_tree, their_config)) = (build(&ours), build(&docker));
        let paths: std::collections::BTreeSet<&String> = our_tree.keys().chain(their_tree.keys()).collect();
        for path in paths {
            let (ours, theirs) = (our_tree.get(path), their_tree.get(path));
            if ours != theirs && !KNOWN.contains(&(*name, path.as_str())) {
                let brief = |file: Option<&File>| {
                    file.map(|(kind, mode, owner, link, contents)| {
                        let contents =
                            String::from_utf8_lossy(&contents[..contents.len().min(60)]).into_owned();
                        format!("{kind} {mode:o} {owner:?} {link} {contents:?}")
                    })
                };
                wrong.push(format!("{name}: {path}: ours {:?}, docker's {:?}", brief(ours), brief(theirs)));
            }
        }
        if our_config != their_config {
            wrong.push(format!("{name}: ours {our_config:#}, docker's {their_config:#}"));
        }
    }
    assert!(wrong.is_empty(), "{} differences:\n{}", wrong.len(), wrong.join("\n"));
}
