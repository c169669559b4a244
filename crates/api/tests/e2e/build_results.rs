//! What `brig build` makes besides an image: indexes, attestations, annotations; and the same image twice.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use brigantine_testkit::peers::{self, Registry};
use brigantine_testkit::{Client, Output, must};
use serde_json::{Value, json};

use crate::Host;

/// A folder with these files.
fn context(host: &Host, files: &[(&str, &str)]) -> PathBuf {
    let dir = host.dir().join("ctx");
    for (path, text) in files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

fn build(host: &Host, args: &[&str]) -> Output {
    let dir = host.dir().join("ctx").to_str().unwrap().to_owned();
    host.cli(["build"].iter().chain(args).map(|arg| (*arg).to_owned()).chain([dir])).run()
}

#[track_caller]
fn built(host: &Host, args: &[&str]) -> Output {
    let output = build(host, args);
    assert_eq!(output.code, 0, "{args:?}: {}{}", output.stdout, output.stderr);
    output
}

fn blob(host: &Host, digest: &Value) -> Value {
    let hex = digest.as_str().unwrap().strip_prefix("sha256:").unwrap();
    let path = host.data_root().join("image/blobs/sha256").join(hex);
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The index that a name stands for.
fn index_of(host: &Host, name: &str) -> Value {
    let image = host.engine.get(&format!("/v1.48/images/{name}/json"));
    assert_eq!(image["Descriptor"]["mediaType"], "application/vnd.oci.image.index.v1+json", "{image}");
    blob(host, &image["Descriptor"]["digest"])
}

fn skopeo(args: &[&str]) -> String {
    must(Command::new("skopeo").args(args))
}

#[test]
fn several_platforms_make_an_index_that_is_kept_pushed_and_saved() {
    let host = Host::new(Client::Brig);
    let dockerfile = "FROM --platform=$BUILDPLATFORM busybox AS make\nARG TARGETARCH TARGETPLATFORM\n\
                      RUN echo $TARGETPLATFORM > /arch && echo made-$TARGETARCH\n\
                      FROM --platform=$BUILDPLATFORM busybox AS same\nRUN echo once > /once && echo run-once\n\
                      FROM scratch\nCOPY --from=make /arch /\nCOPY --from=same /once /\nENTRYPOINT [\"/arch\"]\n";
    context(&host, &[("Dockerfile", dockerfile)]);
    let registry = Registry::start(&host.engine);
    let name = format!("{}/multi:1", registry.address());
    let archive = host.dir().join("image.tar").to_str().unwrap().to_owned();
    let output = format!("type=oci,dest={archive}");
    let metadata = host.dir().join("metadata").to_str().unwrap().to_owned();
    let args =
        ["--platform", "linux/amd64,linux/arm64", "-t", &name, "-o", &output, "--metadata-file", &metadata];
    let said = built(&host, &args).stdout;
    assert!(said.contains("[linux/arm64] RUN echo once"), "{said}");
    assert!(said.contains("made-amd64\n") && said.contains("made-arm64\n"), "{said}");
    assert_eq!(said.matches("\nrun-once\n").count(), 1, "what is the same for both is run once: {said}");

    let index = index_of(&host, &name);
    let platforms: Vec<&Value> =
        index["manifests"].as_array().unwrap().iter().map(|one| &one["platform"]["architecture"]).collect();
    assert_eq!(platforms, [&json!("amd64"), &json!("arm64")]);
    let said: Value = serde_json::from_slice(&fs::read(&metadata).unwrap()).unwrap();
    let image = host.engine.get(&format!("/v1.48/images/{name}/json?manifests=1"));
    assert_eq!(said["containerimage.digest"], image["Descriptor"]["digest"]);
    assert_eq!(image["Architecture"], "amd64");
    let kinds: Vec<&Value> = image["Manifests"].as_array().unwrap().iter().map(|one| &one["Kind"]).collect();
    assert_eq!(kinds, ["image", "image"]);

    // Nothing else than the index holds the other platform's image.
    host.cli(["builder", "prune", "-af"]).ok();
    host.cli(["image", "prune", "-f"]).ok();
    host.cli(["push", "-q", &name]).ok();
    let remote = format!("docker://{name}");
    let raw: Value = serde_json::from_str(&peers::skopeo(
        &host.engine,
        &["inspect", "--raw", "--tls-verify=false", &remote],
    ))
    .unwrap();
    assert_eq!(raw, index, "what was pushed is what is here");
    let config = peers::skopeo(
        &host.engine,
        &["--override-arch", "arm64", "inspect", "--config", "--tls-verify=false", &remote],
    );
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["architecture"], "arm64");

    // The archive has both, too.
    let out = host.dir().join("layout").to_str().unwrap().to_owned();
    skopeo(&[
        "copy",
        "--insecure-policy",
        "--all",
        &format!("oci-archive:{archive}"),
        &format!("oci:{out}:x"),
    ]);
    let layout: Value = serde_json::from_slice(&fs::read(format!("{out}/index.json")).unwrap()).unwrap();
    assert_eq!(layout["manifests"][0]["digest"], image["Descriptor"]["digest"]);
    host.cli(["rmi", &name]).ok();
    host.cli(["load", "-i", &archive]).ok();
    assert_eq!(host.cli(["inspect", "-f", "{{.Architecture}}", &name]).ok(), "amd64");

    // A program of a processor that nothing here knows.
    context(&host, &[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\nRUN [\"/x\"]\n")]);
    let refused = build(&host, &["--platform", "linux/sparc64"]);
    assert_ne!(refused.code, 0);
    assert!(refused.stderr.contains("apt-get install qemu-user-static"), "{}", refused.stderr);
}

#[test]
fn an_sbom_tells_of_the_context_and_of_other_stages_when_the_dockerfile_says_so() {
    let host = Host::new(Client::Brig);
    let status = |name: &str| {
        format!("Package: {name}\nStatus: install ok installed\nVersion: 1.0-1\nArchitecture: amd64\n")
    };
    let dockerfile = "ARG BUILDKIT_SBOM_SCAN_CONTEXT=true\nFROM busybox AS tools\nARG BUILDKIT_SBOM_SCAN_STAGE=true\nCOPY tools /var/lib/dpkg/status\nRUN env > /env; ! grep SBOM /env\nFROM busybox AS other\nCOPY other /var/lib/dpkg/status\nRUN echo o > /o\nFROM busybox AS unused\nARG BUILDKIT_SBOM_SCAN_STAGE=true\nRUN false\nFROM busybox\nCOPY --from=tools /env /\nCOPY --from=other /o /\n";
    let files = [
        ("Dockerfile", dockerfile),
        (".dockerignore", "hidden\n"),
        ("hidden/x.dist-info/METADATA", "Metadata-Version: 2.1\nName: hidden\nVersion: 1\n"),
        ("tools", &status("compiler")),
        ("other", &status("linker")),
        ("var/lib/dpkg/status", &status("source")),
    ];
    context(&host, &files);
    // What each document is called and what it lists.
    let listed = |args: &[&str]| -> Vec<(String, Vec<String>)> {
        built(
            &host,
            &[&["-t", "s:1", "--sbom=true", "--build-arg", "SOURCE_DATE_EPOCH=1000000000"], args].concat(),
        );
        let index = index_of(&host, "s:1");
        let manifest = blob(&host, &index["manifests"][1]["digest"]);
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let layers = manifest["layers"].as_array().unwrap();
        let documents = layers.iter().map(|layer| {
            let statement = blob(&host, &layer["digest"]);
            assert_eq!(statement["predicateType"], "https://spdx.dev/Document");
            assert_eq!(statement["subject"][0]["name"], "pkg:docker/s@1?platform=linux%2Famd64");
            let packages = statement["predicate"]["packages"].as_array().unwrap()[1..].to_vec();
            (
                text(&statement["predicate"]["name"]),
                packages.iter().map(|package| text(&package["name"])).collect(),
            )
        });
        documents.collect()
    };
    let document = |name: &str, packages: &[&str]| {
        (name.to_owned(), packages.iter().map(|package| (*package).to_owned()).collect::<Vec<_>>())
    };
    let (result, of_context) = (document("s:1", &[]), document("sbom-context", &["source"]));
    let expected = [result.clone(), of_context.clone(), document("sbom-tools", &["compiler"])];
    assert_eq!(listed(&[]), expected);
    let first = index_of(&host, "s:1");
    assert_eq!(listed(&[]), expected);
    assert_eq!(index_of(&host, "s:1"), first);
    assert_eq!(listed(&["--no-cache"]), expected);
    let named = ["--build-arg", "BUILDKIT_SBOM_SCAN_STAGE=other"];
    assert_eq!(listed(&named), [result, of_context, document("sbom-other", &["linker"])]);

    // As files, and not without being asked.
    let out = host.dir().join("out");
    built(&host, &["--sbom=true", "-o", out.to_str().unwrap()]);
    let mut names: Vec<String> = fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("sbom"))
        .collect();
    names.sort();
    assert_eq!(names, ["sbom-context.spdx.json", "sbom-tools.spdx.json", "sbom.spdx.json"]);
    let wrong = ["--build-arg", "BUILDKIT_SBOM_SCAN_STAGE=nobody"];
    built(&host, &wrong);
    let refused = build(&host, &[&wrong[..], &["--sbom=true"]].concat());
    assert_ne!(refused.code, 0);
    assert!(
        refused.stderr.contains("\"nobody\" is neither true nor false nor a stage's name"),
        "{}",
        refused.stderr
    );
}

#[test]
fn attestations_tell_how_an_image_came_about_and_what_it_holds() {
    let host = Host::new(Client::Brig);
    let status = "Package: hello\nStatus: install ok installed\nVersion: 2.10-3\nArchitecture: amd64\n";
    let dockerfile = "FROM busybox\nARG TOKEN\nCOPY status /var/lib/dpkg/status\nRUN --mount=type=secret,id=s cat /run/secrets/s > /dev/null\n";
    context(&host, &[("Dockerfile", dockerfile), ("status", status)]);
    let secret = host.dir().join("secret");
    fs::write(&secret, "verysecret").unwrap();
    let secret = format!("id=s,src={}", secret.display());
    let attested = |mode: &str| {
        let args = [
            "-t",
            "a:1",
            "--provenance",
            mode,
            "--sbom=true",
            "--secret",
            &secret,
            "--build-arg",
            "TOKEN=given-argument",
        ];
        built(&host, &args);
        let index = index_of(&host, "a:1");
        let entries = index["manifests"].as_array().unwrap().clone();
        assert_eq!(entries.len(), 2, "{index}");
        assert_eq!(entries[1]["platform"], json!({"architecture": "unknown", "os": "unknown"}));
        assert_eq!(entries[1]["annotations"]["vnd.docker.reference.type"], "attestation-manifest");
        assert_eq!(entries[1]["annotations"]["vnd.docker.reference.digest"], entries[0]["digest"]);
        let manifest = blob(&host, &entries[1]["digest"]);
        assert_eq!(manifest["artifactType"], "application/vnd.docker.attestation.manifest.v1+json");
        assert_eq!(manifest["subject"]["digest"], entries[0]["digest"]);
        let layers = manifest["layers"].as_array().unwrap();
        let statements: Vec<Value> = layers.iter().map(|layer| blob(&host, &layer["digest"])).collect();
        for (layer, statement) in layers.iter().zip(&statements) {
            assert_eq!(layer["mediaType"], "application/vnd.in-toto+json");
            assert_eq!(layer["annotations"]["in-toto.io/predicate-type"], statement["predicateType"]);
            assert_eq!(statement["subject"][0]["name"], "pkg:docker/a@1?platform=linux%2Famd64");
            let digest = format!("sha256:{}", statement["subject"][0]["digest"]["sha256"].as_str().unwrap());
            assert_eq!(entries[0]["digest"], digest.as_str());
        }
        statements
    };
    let [sbom, provenance] = <[Value; 2]>::try_from(attested("mode=max")).unwrap();
    assert_eq!(sbom["predicateType"], "https://spdx.dev/Document");
    let packages = sbom["predicate"]["packages"].as_array().unwrap();
    assert_eq!(packages[1]["name"], "hello", "{sbom}");
    assert_eq!(
        packages[1]["externalRefs"][0]["referenceLocator"],
        "pkg:deb/busybox/hello@2.10-3?arch=amd64&distro=busybox"
    );
    assert_eq!(provenance["predicateType"], "https://slsa.dev/provenance/v1");
    let definition = &provenance["predicate"]["buildDefinition"];
    assert_eq!(
        definition["resolvedDependencies"][0]["uri"],
        "pkg:docker/busybox@latest?platform=linux%2Famd64"
    );
    let text = provenance.to_string();
    assert!(text.contains("given-argument") && text.contains("\"exec\""), "{text}");
    assert!(!text.contains("verysecret"), "{text}");
    let min = attested("mode=min").pop().unwrap().to_string();
    assert!(!min.contains("given-argument") && !min.contains("\"exec\""), "{min}");

    // The image is the same with and without; removing it takes everything.
    let with = host.cli(["inspect", "-f", "{{.Id}}", "a:1"]).ok();
    built(&host, &["-t", "plain", "--secret", &secret, "--build-arg", "TOKEN=given-argument"]);
    assert_eq!(host.cli(["inspect", "-f", "{{.Id}}", "plain"]).ok(), with);
    // A registry takes it, with its attestations.
    let registry = Registry::start(&host.engine);
    let name = format!("{}/a:1", registry.address());
    host.cli(["tag", "a:1", &name]).ok();
    host.cli(["push", "-q", &name]).ok();
    assert_eq!(host.cli(["inspect", "-f", "{{.Id}}", &name]).ok(), with);
    for (args, words) in [
        (vec!["--attest", "type=color"], "provenance and sbom are known"),
        (vec!["--attest", "sbom"], "type=provenance or type=sbom"),
        (vec!["--provenance", "mode=most"], "mode=most is not known"),
    ] {
        let refused = build(&host, &args);
        assert!(refused.code != 0 && refused.stderr.contains(words), "{args:?}: {}", refused.stderr);
    }
}

#[test]
fn annotations_stand_where_they_are_wanted() {
    let host = Host::new(Client::Brig);
    context(&host, &[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")]);
    built(&host, &["-t", "one", "--annotation", "a=b", "--annotation", "manifest:c=d"]);
    let image = host.engine.get("/v1.48/images/one/json");
    let manifest = blob(&host, &image["Descriptor"]["digest"]);
    assert_eq!(manifest["annotations"], json!({"a": "b", "c": "d"}));
    let refused = build(&host, &["--annotation", "index:a=b"]);
    assert!(refused.stderr.contains("index annotations need an index"), "{}", refused.stderr);
    let refused = build(&host, &["--annotation", "layer:a=b"]);
    assert!(refused.stderr.contains("none of manifest, index"), "{}", refused.stderr);
    let args = [
        "--annotation",
        "index,manifest-descriptor[linux/arm64]:a=b",
        "--annotation",
        "manifest[linux/amd64]:x=y",
    ];
    built(
        &host,
        &[&["-t", "two", "--platform", "linux/amd64", "--platform", "linux/arm64"][..], &args].concat(),
    );
    let index = index_of(&host, "two");
    assert_eq!(index["annotations"], json!({"a": "b"}));
    let entries = index["manifests"].as_array().unwrap();
    assert_eq!((&entries[0]["annotations"], &entries[1]["annotations"]), (&Value::Null, &json!({"a": "b"})));
    assert_eq!(blob(&host, &entries[0]["digest"])["annotations"], json!({"x": "y"}));
}

#[test]
fn a_build_is_verified_by_doing_it_twice_and_times_are_what_they_are_told_to_be() {
    let host = Host::new(Client::Brig);
    context(
        &host,
        &[("Dockerfile", "FROM busybox\nRUN mkdir /d && echo x > /d/f && echo ran\nCMD [\"true\"]\n")],
    );
    let before = host.cli(["images", "-aq"]).ok().lines().count();
    let verified = built(&host, &["--verify", "-t", "v"]);
    assert_eq!(verified.stdout.matches("\nran\n").count(), 2, "{}", verified.stdout);
    assert_eq!(host.cli(["images", "-aq"]).ok().lines().count(), before + 1);

    let epoch = |args: &[&str]| {
        let dir = host.dir().join("ctx").to_str().unwrap().to_owned();
        let all = ["build"].iter().chain(args).map(|arg| (*arg).to_owned()).chain([dir]);
        host.cli(all).env("SOURCE_DATE_EPOCH", "1000000000").run()
    };
    let output = epoch(&["-t", "e", "-o", "type=image,rewrite-timestamp=true"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert_eq!(host.cli(["inspect", "-f", "{{.Created}}", "e"]).ok(), "2001-09-09T01:46:40Z");
    assert_eq!(
        host.cli(["run", "--rm", "e", "stat", "-c", "%Y", "/d/f", "/d"]).ok(),
        "1000000000\n1000000000"
    );
    // The cached step keeps its own times for who does not ask.
    assert_eq!(epoch(&["-t", "n"]).code, 0);
    assert_ne!(host.cli(["run", "--rm", "n", "stat", "-c", "%Y", "/d/f"]).ok(), "1000000000");
    // Without rewriting the files' times tell the two apart, where time has passed.
    let wrong = build(&host, &["-o", "type=image,rewrite-timestamp=true"]);
    assert!(wrong.stderr.contains("SOURCE_DATE_EPOCH"), "{}", wrong.stderr);

    context(
        &host,
        &[("Dockerfile", "FROM busybox\nRUN echo same > /a\nRUN head -c 9 /dev/urandom > /random\n")],
    );
    let failed = build(&host, &["--verify", "-t", "w"]);
    assert_eq!(failed.code, 1, "{}", failed.stderr);
    assert!(
        failed.stderr.contains("is not reproducible") && failed.stderr.contains("/random differs in content"),
        "{}",
        failed.stderr
    );
    assert!(failed.stderr.contains("head -c 9 /dev/urandom"), "{}", failed.stderr);
}

/// A program for 64-bit ARM that writes `hi-arm64` and ends with 0: an ELF header, one segment, eight instructions.
fn program_for_arm64() -> Vec<u8> {
    let mut program = Vec::new();
    program.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    program.extend([2, 0, 183, 0, 1, 0, 0, 0]);
    for word in [0x40_0078_u64, 64, 0] {
        program.extend(word.to_le_bytes());
    }
    program.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    program.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [0_u64, 0x40_0000, 0x40_0000, 161, 161, 0x1000] {
        program.extend(word.to_le_bytes());
    }
    // write(1, text, 9); exit(0)
    let code: [u32; 8] = [
        0xd280_0020,
        0x1000_00e1,
        0xd280_0122,
        0xd280_0808,
        0xd400_0001,
        0xd280_0000,
        0xd280_0ba8,
        0xd400_0001,
    ];
    for instruction in code {
        program.extend(instruction.to_le_bytes());
    }
    program.extend(b"hi-arm64\n");
    program
}

/// An emulator as the kernel knows it; forgotten when dropped. It is the machine's affair: there is one list for all.
struct Emulator<'h>(&'h Host, &'static str);

impl<'h> Emulator<'h> {
    fn register(host: &'h Host, name: &'static str) -> Self {
        let emulator = Self(host, name);
        emulator.sh(&format!(
            "mountpoint -q /proc/sys/fs/binfmt_misc || mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
             echo ':{name}:M::\\x7fELF\\x02\\x01\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02\\x00\\xb7\\x00:\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\x00\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xfe\\xff\\xff\\xff:/usr/bin/qemu-aarch64-static:F' > /proc/sys/fs/binfmt_misc/register"
        ));
        emulator
    }

    fn sh(&self, script: &str) {
        let output = self.0.engine.sandbox().command("bash").args(["-ec", script]).output().unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Drop for Emulator<'_> {
    fn drop(&mut self) {
        self.sh(&format!("echo -1 > /proc/sys/fs/binfmt_misc/{}", self.1));
    }
}

#[test]
fn a_step_for_another_processor_runs_by_an_emulator() {
    let host = Host::new(Client::Brig);
    let dir = context(
        &host,
        &[("Dockerfile", "FROM scratch\nCOPY --chmod=755 hi /\nRUN [\"/hi\"]\nCMD [\"/hi\"]\n")],
    );
    fs::write(dir.join("hi"), program_for_arm64()).unwrap();
    let _emulator = Emulator::register(&host, "brigantine-test-aarch64");
    let said = built(&host, &["--platform", "linux/arm64", "-t", "arm"]).stdout;
    assert!(said.contains("\nhi-arm64\n"), "{said}");
    assert_eq!(host.cli(["inspect", "-f", "{{.Architecture}}", "arm"]).ok(), "arm64");
    assert!(built(&host, &["--platform", "linux/arm64"]).stdout.contains("Using cache"));
}

#[test]
fn the_packages_of_an_image_are_listed() {
    let host = Host::new(Client::Brig);
    let status = "Package: hello\nStatus: install ok installed\nVersion: 2.10-3\nArchitecture: amd64\n";
    let lock = "[[package]]\nname = \"serde\"\nversion = \"1.0.1\"\n";
    let dockerfile = "FROM busybox\nCOPY status /var/lib/dpkg/status\nCOPY Cargo.lock /src/\n";
    context(&host, &[("Dockerfile", dockerfile), ("status", status), ("Cargo.lock", lock)]);
    built(&host, &["-t", "s:1"]);
    let listed = host.cli(["sbom", "--format", "{{.Type}} {{.Name}} {{.Version}}", "s:1"]).ok();
    assert_eq!(listed, "deb hello 2.10-3\ncargo serde 1.0.1");
    let file = host.dir().join("sbom.json");
    let write = || host.cli(["sbom", "--format", "spdx-json", "-o", file.to_str().unwrap(), "s:1"]).ok();
    write();
    let first = fs::read(&file).unwrap();
    let document: Value = serde_json::from_slice(&first).unwrap();
    assert_eq!((&document["spdxVersion"], &document["name"]), (&json!("SPDX-2.3"), &json!("s:1")));
    write();
    assert_eq!(fs::read(&file).unwrap(), first);
    assert_ne!(host.cli(["sbom", "127.0.0.1:1/none"]).run().code, 0);
}
