//! The Dockerfile language as a whole, on a real base image: what each instruction, flag and form makes of files and
//! configuration. Rules that need no image are tables beside the parser and the conversion.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::PathBuf;

use brigantine_testkit::{Client, Output};
use serde_json::{Value, json};

use crate::Host;

mod refused;
mod remote;

/// An engine to build on; numbers the builds.
struct Yard {
    host: Host,
    builds: std::cell::Cell<u32>,
}

/// A file of a context.
enum Given<'f> {
    Text(&'f str),
    Bytes(Vec<u8>),
    Link(&'f str),
}

impl Yard {
    fn new() -> Self {
        Self { host: Host::new(Client::Brig), builds: std::cell::Cell::default() }
    }

    /// A folder with a Dockerfile and these files, the image's name after it.
    fn folder(&self, dockerfile: &[u8], files: &[(&str, Given<'_>)]) -> (PathBuf, String) {
        let number = self.builds.get();
        self.builds.set(number + 1);
        let dir = self.host.dir().join(format!("context-{number}"));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("Dockerfile"), dockerfile).unwrap();
        for (path, given) in files {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match given {
                Given::Text(text) => fs::write(path, text).unwrap(),
                Given::Bytes(bytes) => fs::write(path, bytes).unwrap(),
                Given::Link(target) => symlink(target, path).unwrap(),
            }
        }
        (dir, format!("built:{number}"))
    }

    #[track_caller]
    fn build(&self, dockerfile: &[u8], files: &[(&str, Given<'_>)], flags: &[&str]) -> (Output, String) {
        let (dir, tag) = self.folder(dockerfile, files);
        let dir = dir.to_str().unwrap();
        let args: Vec<&str> = ["build", "-t", &tag].iter().chain(flags).copied().chain([dir]).collect();
        (self.host.cli(args).run(), tag)
    }

    /// Builds and runs `script` as root in what came out: its output.
    #[track_caller]
    fn shows_with(
        &self,
        dockerfile: &str,
        files: &[(&str, Given<'_>)],
        flags: &[&str],
        script: &str,
        wanted: &str,
    ) {
        let (output, tag) = self.build(dockerfile.as_bytes(), files, flags);
        assert_eq!(output.code, 0, "{dockerfile}\n{output}");
        let run = ["run", "--rm", "--network", "none", "--entrypoint", "sh", "-u", "0", &tag, "-c", script];
        assert_eq!(self.host.cli(run).ok(), wanted.trim_end(), "{dockerfile}");
    }

    #[track_caller]
    fn shows(&self, dockerfile: &str, files: &[(&str, Given<'_>)], script: &str, wanted: &str) {
        self.shows_with(dockerfile, files, &[], script, wanted);
    }

    /// Builds and compares parts of the image's configuration.
    #[track_caller]
    fn configures(&self, dockerfile: &str, wanted: &Value) {
        let (output, tag) = self.build(dockerfile.as_bytes(), &[], &[]);
        assert_eq!(output.code, 0, "{dockerfile}\n{output}");
        let image: Value = serde_json::from_str(&self.host.cli(["image", "inspect", &tag]).ok()).unwrap();
        for (name, value) in wanted.as_object().unwrap() {
            assert_eq!(&image[0]["Config"][name], value, "{name} of {dockerfile}");
        }
    }

    /// A build that must fail, and in these words.
    #[track_caller]
    fn refuses(&self, dockerfile: &[u8], files: &[(&str, Given<'_>)], flags: &[&str], words: &str) {
        let (output, tag) = self.build(dockerfile, files, flags);
        let shown = String::from_utf8_lossy(&dockerfile[..dockerfile.len().min(300)]);
        assert_ne!(output.code, 0, "{shown}\n{output}");
        assert!(
            output.stdout.contains(words) || output.stderr.contains(words),
            "{words:?} is missing: {shown}\n{output}"
        );
        assert_ne!(self.host.cli(["image", "inspect", &tag]).run().code, 0, "{shown}");
    }
}

#[test]
fn lines_quotes_and_heredocs() {
    let yard = Yard::new();
    let windows = b"\xef\xbb\xbfFROM busybox\r\nRUN echo a > /a\r\nCMD [\"x\"]\r\n";
    let (output, tag) = yard.build(windows, &[], &[]);
    assert_eq!(output.code, 0, "{output}");
    assert_eq!(yard.host.cli(["run", "--rm", &tag, "cat", "/a"]).ok(), "a");
    yard.shows("# escape=`\nFROM busybox\nRUN echo a `\n # a comment\n  b > /a\n", &[], "cat /a", "a b");
    yard.shows("from busybox as one\nrun echo 1 > /a\nFrom ONE\ncopy --from=One /a /b\n", &[], "cat /b", "1");
    let heredocs = r#"FROM busybox
RUN <<-EOT
	echo tabs > /a
	EOT
RUN <<'EOT'
X=5
echo $X > /b
EOT
RUN <<EOT
#!/bin/sh -e
echo "$0" > /z
EOT
RUN cat <<A >/c && cat <<B >>/c
one
A
two
B
RUN 3<<EOT cat <&3 > /d
three
EOT
ENV V=val
COPY <<A <<"B" /h/
$V ${V:+x}
A
$V
B
COPY <<-EOT /i
	tab$V
	EOT
ADD <<EOT /j
j
EOT
"#;
    let script = "cat /a /b /z /c /d /h/A /h/B /i /j; stat -c %a /h/A";
    yard.shows(heredocs, &[], script, "tabs\n5\n/dev/pipes/EOT\none\ntwo\nthree\nval x\n$V\ntabval\nj\n644");
}

#[test]
fn variables_and_arguments() {
    let yard = Yard::new();
    yard.shows(
        r#"FROM busybox
ENV v=a.b.c e= path=/usr/local/bin/x
ENV a=${v:-d} b=${u:-d} c=${e:-d} d=${e-d} f=${v:+w} g=${u:+w} h=${e+w} i=${v#*.} j=${v##*.} k=${v%.*} l=${v%%.*} m=${v/./_} n=${v//./_} o=\$v p='$v' q="$v" r=${u:-${v}} s=${path##*/}
RUN env | grep -E '^[a-s]=' | sort > /o
"#,
        &[],
        "cat /o",
        "a=a.b.c\nb=d\nc=d\nd=\ne=\nf=w\ng=\nh=w\ni=b.c\nj=c\nk=a.b\nl=a\nm=a_b.c\nn=a_b_c\no=$v\np=$v\nq=a.b.c\nr=a.b.c\ns=x",
    );
    yard.refuses(b"FROM busybox\nARG x\nENV y=${x:?is needed}\n", &[], &[], "is needed");
    yard.shows_with(
        r#"ARG G=glob
ARG V=1
FROM busybox
ARG G
ARG V=2 W=${V}x
ARG N
RUN echo "$G $V $W [$N] [$HTTP_PROXY]" > /a
ENV W=env
ARG W=arg
RUN echo $W > /b
"#,
        &[],
        &["--build-arg", "N=n", "--build-arg", "HTTP_PROXY=p"],
        "cat /a /b; echo [$HTTP_PROXY]",
        "glob 2 2x [n] [p]\narg\n[]",
    );
    let platform = "FROM --platform=$BUILDPLATFORM busybox
ARG TARGETPLATFORM TARGETOS BUILDPLATFORM TARGETSTAGE TARGETVARIANT
RUN echo $TARGETPLATFORM $TARGETOS $BUILDPLATFORM $TARGETSTAGE [$TARGETVARIANT] > /o
";
    let machine = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let platform_here = format!("linux/{machine} linux linux/{machine} default []");
    yard.shows(platform, &[], "cat /o", &platform_here);
}

#[test]
fn instructions_that_configure() {
    let yard = Yard::new();
    let dockerfile = r#"FROM busybox
LABEL a=1 "b c"='d e' f="g\
h"
LABEL old style value
ENV legacy some value here
ENV A=1 B="$legacy x" C=$A
EXPOSE 90-92/tcp 53/UDP 80
STOPSIGNAL SIGUSR1
SHELL ["/bin/sh","-ec"]
HEALTHCHECK --interval=5s --timeout=1m30s --start-period=2s --start-interval=1s --retries=4 CMD wget x
VOLUME /v /w
VOLUME ["/x","/y z"]
WORKDIR /a
WORKDIR b
WORKDIR $A
USER 5:6
ENTRYPOINT ["/e"]
CMD ["c"]
MAINTAINER me
"#;
    yard.configures(
        dockerfile,
        &json!({
            "Labels": { "a": "1", "b c": "d e", "f": "gh", "old": "style value" },
            "ExposedPorts": { "53/udp": {}, "80/tcp": {}, "90/tcp": {}, "91/tcp": {}, "92/tcp": {} },
            "StopSignal": "SIGUSR1", "Shell": ["/bin/sh", "-ec"], "WorkingDir": "/a/b/1", "User": "5:6",
            "Entrypoint": ["/e"], "Cmd": ["c"],
            "Healthcheck": { "Test": ["CMD-SHELL", "wget x"], "Interval": 5_000_000_000_u64,
                "Timeout": 90_000_000_000_u64, "StartPeriod": 2_000_000_000, "StartInterval": 1_000_000_000, "Retries": 4 },
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "legacy=some value here",
                "A=1", "B=some value here x", "C="],
            "Volumes": { "/v": {}, "/w": {}, "/x": {}, "/y z": {} },
        }),
    );
    yard.configures(
        "FROM busybox\nHEALTHCHECK CMD [\"a\"]\nHEALTHCHECK NONE\n",
        &json!({ "Healthcheck": { "Test": ["NONE"] } }),
    );
    yard.configures(
        "FROM busybox\nCMD [\"a\"]\nENTRYPOINT [\"e\"]\n",
        &json!({ "Cmd": ["a"], "Entrypoint": ["e"] }),
    );
    yard.configures(
        "FROM busybox AS a\nCMD [\"a\"]\nFROM a\nENTRYPOINT [\"e\"]\n",
        &json!({ "Cmd": null, "Entrypoint": ["e"] }),
    );
    yard.configures(
        "FROM busybox\nSHELL [\"/bin/ash\",\"-c\"]\nCMD echo hi\nENTRYPOINT exec top\n",
        &json!({ "Cmd": ["/bin/ash", "-c", "echo hi"], "Entrypoint": ["/bin/ash", "-c", "exec top"] }),
    );
    // The instructions an image leaves to those that build on it are theirs once.
    let onbuild = "FROM busybox AS base
ONBUILD COPY f /f
ONBUILD RUN cat /f > /g
ONBUILD RUN <<EOT
echo here > /h
EOT
FROM base
RUN cat /g /h > /i
";
    yard.shows(onbuild, &[("f", Given::Text("F\n"))], "cat /i", "F\nhere");
    yard.configures("FROM busybox AS base\nONBUILD RUN true\nFROM base\n", &json!({ "OnBuild": null }));
    yard.configures("FROM busybox\nONBUILD RUN true\n", &json!({ "OnBuild": ["RUN true"] }));
    yard.shows(
        "FROM busybox\nUSER 7\nWORKDIR /own/er\nRUN echo x > f\n",
        &[],
        "stat -c '%u %a' /own/er /own/er/f",
        "7 755\n7 644",
    );
    yard.shows("FROM busybox\nRUN mkdir /v\nVOLUME /v\nRUN echo kept > /v/f\n", &[], "cat /v/f", "kept");
}

#[test]
fn copies_and_additions() {
    let yard = Yard::new();
    let files = || {
        [
            ("f", Given::Text("F\n")),
            ("f1", Given::Text("1")),
            ("g2", Given::Text("2")),
            ("d/a.md", Given::Text("")),
            ("d/b", Given::Text("")),
            ("d/s/t/u", Given::Text("U")),
            ("d/s/v", Given::Text("")),
            ("sp ace", Given::Text("")),
            ("link", Given::Link("f")),
            ("linkdir", Given::Link("d")),
            ("d/lk", Given::Link("b")),
        ]
    };
    let dockerfile = r#"FROM busybox
RUN echo bob:x:1234:1234::/:/bin/sh >> /etc/passwd && echo grp:x:77: >> /etc/group
WORKDIR /w
COPY --chown=bob f n1
COPY --chown=bob:grp f n2
COPY --chown=8 f n3
COPY --chmod=u=rwX,go= f d n4/
COPY --chmod=4755 f n5
COPY d n6
COPY d/ n7/
COPY ../../f n8
COPY /f n9
COPY f? g* n10/
COPY --exclude=*.md --exclude=s/t d n11/
COPY --parents d/s/./t/u n12/
COPY --parents d/**/u n13/
COPY ["f","sp ace","n14/"]
COPY link n15
COPY linkdir n16
COPY nomatch* f n17/
COPY --link f /w/n18/
COPY . /n19/
"#;
    let script = "stat -c '%n %u:%g %a' n1 n2 n3 n4/f n4/b n5 n14/*
for x in n6 n7 n10 n11 n12 n13 n16 n17 n18; do echo $x: $(cd $x; find . -mindepth 1 | sort); done
cat n8 n9; ls -l n15 | cut -c1; ls -l n6/lk | cut -c1; ls /n19 | xargs";
    let whole = "./a.md ./b ./lk ./s ./s/t ./s/t/u ./s/v";
    let wanted = format!(
        "n1 1234:1234 644
n2 1234:77 644
n3 8:8 644
n4/f 0:0 600
n4/b 0:0 600
n5 0:0 4755
n14/f 0:0 644
n14/sp ace 0:0 644
n6: {whole}
n7: {whole}
n10: ./f1 ./g2
n11: ./b ./lk ./s ./s/v
n12: ./t ./t/u
n13: ./d ./d/s ./d/s/t ./d/s/t/u
n16: {whole}
n17: ./f
n18: ./f
F
F
-
l
Dockerfile d f f1 g2 link linkdir sp ace"
    );
    yard.shows(dockerfile, &files(), script, &wanted);
    // What a folder is copied to is open to all, however closed the folder is.
    let (_, tag) = yard.folder(b"FROM busybox\nCOPY . /app\nUSER 9\nRUN ls /app\n", &files()[..1]);
    let closed = yard.host.dir().join(tag.replace("built:", "context-"));
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    yard.host.cli(["build", "-t", &tag, closed.to_str().unwrap()]).ok();
    assert_eq!(yard.host.cli(["run", "--rm", &tag, "stat", "-c", "%u %a", "/app"]).ok(), "0 755");
    let between = "FROM busybox AS one
RUN echo 1 > /one && chown 3:4 /one && ln -s /one /abs && mkdir -p /dir/sub && ln -s sub /dir/l && echo s > /dir/sub/s
FROM one
RUN echo 2 > /two
FROM busybox
COPY --from=one /one /a
COPY --from=1 /two /b
COPY --from=busybox /bin/busybox /c
COPY --from=0 /abs /d
COPY --from=0 /dir/l /e
COPY --from=0 dir/sub/* /f/
COPY --from=0 /dir /g
RUN cmp /bin/busybox /c
";
    yard.shows(between, &[], "cat /a /b /d /e/s /f/s /g/l/s; stat -c %u:%g /a", "1\n2\n1\ns\ns\ns\n3:4");
    // Links in the image lead within the image.
    let links = "FROM busybox
RUN mkdir /real && ln -s /real /lnk && ln -s ../../../../../../etc/far /out
COPY f /lnk/
COPY f /lnk/deep/er/
COPY f /out
RUN cat /real/f /real/deep/er/f /etc/far
";
    yard.shows(links, &files()[..1], "cat /etc/far; test -L /out && echo still", "F\nstill");
    let parts = yard.host.dir().join("parts");
    fs::create_dir_all(parts.join("in")).unwrap();
    fs::write(parts.join("in/one"), "1\n").unwrap();
    fs::write(parts.join("two"), "2\n").unwrap();
    let plain = yard.host.dir().join("plain.tar");
    let pack = std::process::Command::new("tar")
        .args(["--mtime=@1000", "-cf", plain.to_str().unwrap(), "-C", parts.to_str().unwrap(), "in", "two"])
        .status();
    assert!(pack.unwrap().success());
    let packed = |program: &str| {
        let output = std::process::Command::new(program).arg("-c").arg(&plain).output().unwrap();
        assert!(output.status.success(), "{program}");
        Given::Bytes(output.stdout)
    };
    // What is unpacked is known by its content, not by its name.
    let archives = [
        ("a", packed("gzip")),
        ("b.txt", packed("bzip2")),
        ("c", packed("xz")),
        ("d", Given::Bytes(fs::read(&plain).unwrap())),
        ("not.tar.gz", Given::Text("plain")),
    ];
    let dockerfile = "FROM busybox
ADD a /a/
ADD b.txt /b/
ADD c /c
ADD d /d
ADD --unpack=false a /f/
ADD not.tar.gz /g/
COPY a /h/
";
    yard.shows(
        dockerfile,
        &archives,
        "for x in a b c d; do cat /$x/in/one /$x/two; done; ls /f /g /h | xargs; stat -c %Y /a/two",
        &format!("{}/f: a /g: not.tar.gz /h: a\n1000", "1\n2\n".repeat(4)),
    );
}

#[test]
fn what_dockerignore_leaves_out() {
    let yard = Yard::new();
    let rules = "# a comment\n*.log\n!keep.log\n/d/**/x\nsub\n!sub/in\nDockerfile\n";
    let files = |own: &'static str| {
        [
            (".dockerignore", Given::Text(rules)),
            ("a.log", Given::Text("")),
            ("keep.log", Given::Text("")),
            ("d/1/2/x", Given::Text("")),
            ("d/y", Given::Text("")),
            ("sub/in/k", Given::Text("")),
            ("sub/out", Given::Text("")),
            (own, Given::Text("keep.log\n")),
        ]
    };
    let dockerfile = "FROM busybox\nCOPY . /c\n";
    let script = "cd /c; find . -type f | sort | xargs";
    yard.shows(dockerfile, &files("other"), script, "./.dockerignore ./d/y ./keep.log ./other ./sub/in/k");
    // The Dockerfile's own list wins.
    yard.shows(
        dockerfile,
        &files("Dockerfile.dockerignore"),
        script,
        "./.dockerignore ./Dockerfile ./Dockerfile.dockerignore ./a.log ./d/1/2/x ./d/y ./sub/in/k ./sub/out",
    );
    yard.refuses(b"FROM busybox\nCOPY a.log /\n", &files("other"), &[], "a.log");
}

#[test]
fn mounts_networks_and_confinement_of_steps() {
    let yard = Yard::new();
    let secret = yard.host.dir().join("secret");
    fs::write(&secret, "secret!").unwrap();
    let secret = format!("id=sec,src={}", secret.display());
    let dockerfile = r#"FROM busybox AS src
RUN mkdir -p /s/sub && echo s > /s/f && chown 5:6 /s && chmod 750 /s && echo u > /s/sub/u && chown 7 /s/sub/u
FROM busybox
ARG D=/bb
WORKDIR /w
RUN --mount=type=bind,from=src,source=/s,target=rel cat rel/f > /o
RUN --mount=target=$D cat /bb/file >> /o
RUN --mount=type=bind,from=src,src=/s,dst=/m,rw echo new > /m/new && cat /m/new >> /o
RUN --mount=type=bind,from=src,source=/s,target=/m ls /m >> /o; stat -c %u /m/sub/u >> /o
RUN --mount=type=bind,from=src,source=/s,target=/m touch /m/x || echo ro >> /o
RUN --mount=type=cache,id=k,target=/k,uid=3,gid=4,mode=750 stat -c "%u:%g %a" /k >> /o && echo 1 >> /k/n
RUN --mount=type=cache,id=k,target=/k,readonly wc -l < /k/n >> /o
RUN --mount=type=cache,target=/c,from=src,source=/s stat -c "%u:%g %a" /c /c/sub/u >> /o; cat /c/f >> /o; echo more >> /c/f
RUN --mount=type=cache,target=/c,from=src,source=/s,sharing=locked cat /c/f >> /o
RUN --mount=type=cache,target=/c ls /c | wc -l >> /o
RUN --mount=type=tmpfs,target=/t,size=1m sh -c 'dd if=/dev/zero of=/t/x bs=1k count=2000 2>/dev/null || stat -c %s /t/x' >> /o
RUN --mount=type=secret,id=sec,target=/sec,mode=440,uid=5 stat -c "%u %a" /sec >> /o
RUN --mount=type=secret,id=sec,env=SEC echo ${#SEC} >> /o
RUN --mount=type=secret,id=none,target=/none ls /none || echo none >> /o
RUN --network=none ip -o link | wc -l >> /o
RUN grep CapEff /proc/self/status >> /o; hostname >> /o; touch /proc/sys/x 2>/dev/null || echo ro >> /o
RUN ls -d /m /k /t /c /none 2>/dev/null | cat >> /o; ls /run/secrets >> /o 2>/dev/null || true
"#;
    let wanted =
        "s\nctx\nnew\nf\nsub\n7\nro\n3:4 750\n1\n5:6 750\n7:0 644\ns\ns\nmore\n0\n1048576\n5 440\n7\nnone\n1
CapEff:\t00000000a80425fb\nbuildkitsandbox\nro";
    let files = || [("file", Given::Text("ctx\n"))];
    yard.shows_with(dockerfile, &files(), &["--secret", &secret], "cat /o", wanted);
    // The secret is in no layer, and the cache mounts are nobody's but the builder's.
    let listed = yard.host.cli(["builder", "cache", "ls"]).ok();
    assert!(listed.contains("\nk ") && listed.contains("\n/c@"), "{listed}");
    yard.shows_with(
        "FROM busybox\nRUN --security=insecure mkdir /m && mount -t tmpfs t /m && umount /m && echo done > /o; ulimit -n >> /o\n",
        &[],
        &["--allow", "security.insecure", "--ulimit", "nofile=77:88"],
        "cat /o",
        "done\n77",
    );
}
