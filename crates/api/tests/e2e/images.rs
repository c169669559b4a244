//! Images: tag, rmi, list, history, commit, pull from a registry, disk usage.

use std::fs;

use brigantine_testkit::{
    Client, Engine, Link,
    fixtures::{self, Archive, Layer},
    peers::Registry,
};

use crate::Host;

both![
    tags_come_and_go,
    an_image_in_use_is_kept,
    images_are_listed_and_filtered,
    a_registrys_image_is_pulled,
    our_registry_takes_and_gives,
    an_unknown_image_is_named,
    layers_hide_what_they_delete,
    history_and_inspect_tell_where_it_came_from,
    filters_choose_what_is_listed_and_pruned,
    ids_and_names_are_removed_by_the_rules,
    a_commit_takes_what_it_is_told,
    disk_usage_is_told_in_short_and_at_length,
];

fn tags_come_and_go(client: Client) {
    let host = Host::new(client);
    let id = host.cli(["images", "-q", "--no-trunc"]).ok();
    host.cli(["tag", "busybox", "a:1"]).ok();
    host.cli(["tag", &id[7..19], "registry.example:5000/b/c:2"]).ok();
    assert_eq!(host.cli(["rmi", "a:1"]).ok(), "Untagged: a:1");
    host.cli(["rmi", &id]).exits(1).expect_stderr("must be forced");
    host.cli(["rmi", "registry.example:5000/b/c:2"]).ok();
    let gone = host.cli(["rmi", "busybox"]).ok();
    assert!(
        gone.starts_with("Untagged: busybox:latest\n") && gone.contains(&format!("Deleted: {id}")),
        "{gone}"
    );
    host.cli(["tag", "busybox", "x"]).exits(1).expect_stderr("No such image: busybox:latest");
    host.load(&fixtures::busybox());
    host.cli(["tag", "busybox", "UPPER"]).exits(1);
}

fn an_image_in_use_is_kept(client: Client) {
    let host = Host::new(client);
    let id = host.cli(["create", "busybox"]).ok();
    host.cli(["rmi", "busybox"]).exits(1).expect_stderr(&id[..12]);
    host.cli(["rm", &id]).ok();
    host.cli(["rmi", "busybox"]).ok();
}

fn images_are_listed_and_filtered(client: Client) {
    let host = Host::new(client);
    let table = host.cli(["images"]).ok();
    let mut lines = table.lines();
    assert!(lines.next().unwrap().starts_with("REPOSITORY   TAG       IMAGE ID"), "{table}");
    assert!(lines.next().unwrap().starts_with("busybox      latest"), "{table}");
    assert_eq!(host.cli(["images", "--format", "{{.Repository}}:{{.Tag}}"]).ok(), "busybox:latest");
    assert_eq!(host.cli(["images", "-q", "--filter", "dangling=true"]).ok(), "");
    assert_eq!(host.cli(["images", "-q", "--filter", "reference=busy*"]).ok().len(), 12);
    assert_eq!(host.cli(["images", "-q", "nothing"]).ok(), "");
    let list = host.get("/images/json");
    assert!(list[0]["Created"].is_i64());
    assert_eq!(list[0]["RepoTags"][0], "busybox:latest");
}

fn a_registrys_image_is_pulled(client: Client) {
    let host = Host { engine: Engine::start(), client };
    let registry = Registry::start(&host.engine);
    registry.fill(&host.engine, &fixtures::busybox(), "team/box:v2");
    let name = format!("{}/team/box:v2", registry.address());
    let said = host.cli(["pull", &name]).ok();
    assert!(said.contains("Pulling from team/box"), "{said}");
    assert!(said.contains(&format!("Status: Downloaded newer image for {name}")), "{said}");
    let digest = said.lines().find_map(|l| l.strip_prefix("Digest: ")).unwrap().to_owned();
    let said = host.cli(["pull", &name]).ok();
    assert!(said.contains(&format!("Status: Image is up to date for {name}")), "{said}");
    assert_eq!(host.cli(["run", "--rm", &name, "echo", "pulled"]).ok(), "pulled");
    let by_digest = format!("{}/team/box@{digest}", registry.address());
    assert_eq!(host.cli(["run", "--rm", &by_digest, "echo", "same"]).ok(), "same");
    let listed = host.cli(["images", "--digests", "--format", "{{.Digest}}"]).ok();
    assert_eq!(listed, digest);
    // `run` pulls by itself what is not there.
    host.cli(["rmi", "-f", &name]).ok();
    let output = host.cli(["run", "--rm", &name, "echo", "again"]).exits(0);
    assert_eq!(output.stdout, "again\n");
    assert!(output.stderr.contains("Unable to find image"), "{output}");
    host.cli(["pull", &format!("{}/team/none:v1", registry.address())]).exits(1);
    host.cli(["pull", &format!("{}/team/box:v9", registry.address())]).exits(1).expect_stderr("not found");
    drop(registry);
    host.assert_nothing_left();
}

fn disk_usage_is_told_in_short_and_at_length(client: Client) {
    let host = Host::new(client);
    host.cli([
        "run",
        "--name",
        "box",
        "-v",
        "kept:/kept",
        "busybox",
        "sh",
        "-c",
        "head -c 300000 /dev/zero > /kept/f",
    ])
    .ok();
    let short = host.cli(["system", "df"]).ok();
    for kind in ["Images", "Containers", "Local Volumes", "Build Cache"] {
        assert!(short.lines().any(|line| line.starts_with(kind)), "{kind}: {short}");
    }
    let long = host.cli(["system", "df", "-v"]).ok();
    assert!(long.contains("SHARED SIZE") && long.contains("UNIQUE SIZE"), "{long}");
    let line = |word: &str| long.lines().find(|line| line.contains(word)).unwrap_or_default();
    assert!(line("busybox ").contains("latest"), "{long}");
    assert!(line("Exited").trim_end().ends_with("box"), "{long}");
    assert!(line("kept").contains("kB"), "{long}");
}

/// `system df -v` with a format executes it once over all objects; both commands print the same.
#[test]
fn disk_usage_at_length_takes_formats() {
    let host = Host::new(Client::Brig);
    host.cli(["tag", "busybox", "other:1"]).ok();
    let script = "head -c 300000 /dev/zero > /kept/f; head -c 5000 /dev/zero > /own";
    host.cli(["run", "--name", "box", "-l", "a=b", "-v", "kept:/kept", "busybox", "sh", "-c", script]).ok();
    fs::write(host.dir().join("Dockerfile"), "FROM busybox\nRUN echo one > /one\n").unwrap();
    host.cli(["build", "-q", "-t", "built", host.dir().to_str().unwrap()]).ok();
    let by = |client: Client, format: &str| {
        host.engine.client(client, ["system", "df", "-v", "--format", format]).run()
    };
    for format in [
        r"{{range .Images}}{{.Repository}}\t{{.Tag}} {{.ID}} {{.Size}} {{.SharedSize}} {{.UniqueSize}} {{.Containers}};{{end}}",
        "{{range .Containers}}{{.ID}} {{.Names}} {{.Image}} {{.Command}} {{.LocalVolumes}} {{.Size}} {{.Labels}}\n{{end}}",
        "{{range .Volumes}}{{.Name}} {{.Links}} {{.Size}} {{.Driver}} {{.Scope}}{{end}}",
        "{{range .BuildCache}}{{.ID}} {{.CacheType}} {{.Size}} {{.InUse}} {{.Shared}} {{.UsageCount}} {{.Parent}};{{end}}",
        "{{len .Images}} {{len .Containers}} {{json .Volumes}}",
        "table {{range .Images}}{{.ID}}\t{{.Tag}};{{end}}",
    ] {
        let (ours, dockers) = (by(Client::Brig, format), by(Client::Docker, format));
        assert_eq!((ours.code, dockers.code), (0, 0), "{format}: {ours} {dockers}");
        let spaced = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(spaced(&ours.stdout), spaced(&dockers.stdout), "{format}");
    }
    // What changes from one call to the next is left out.
    let sum = |client: Client| {
        let short = host.engine.client(client, ["system", "df"]).ok();
        let long = by(client, "table").stdout;
        let usage =
            long.lines().find(|line| line.starts_with("Build cache usage")).unwrap_or_default().to_owned();
        (short, usage)
    };
    assert_eq!(sum(Client::Brig), sum(Client::Docker));
    let document = |client: Client| {
        let said = by(client, "json").stdout;
        let mut all: serde_json::Value =
            serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"));
        for list in ["Images", "Containers", "BuildCache"] {
            for object in all[list].as_array_mut().unwrap() {
                object
                    .as_object_mut()
                    .unwrap()
                    .retain(|key, _| !key.ends_with("Since") && !matches!(&key[..], "RunningFor" | "Status"));
            }
        }
        all
    };
    assert_eq!(document(Client::Brig), document(Client::Docker));
    for (wrong, text) in
        [("{{.Foo}}", "Foo"), ("{{range .Images}}{{.Foo}}{{end}}", "Foo"), ("{{.Images", "unclosed")]
    {
        let refused = by(Client::Brig, wrong);
        assert!(refused.code != 0 && refused.stderr.contains(text), "{wrong}: {refused}");
    }
}

/// On a terminal `brig` shows a bar for each layer, with how much of it came and how fast; elsewhere lines.
#[test]
fn a_pull_on_a_terminal_shows_rates() {
    let host = Host { engine: Engine::start(), client: Client::Brig };
    let registry = Registry::start_ours(&host.engine);
    let image = super::crash::sample("slow:1", 1, 3 << 20, &mut super::crash::Chance::new("bars"));
    registry.fill(&host.engine, &image.write(host.engine.dir(), "slow.tar"), "slow:1");
    let link = Link::to(&host.engine, registry.port());
    link.limit(2 << 20);
    let name = format!("{}/slow:1", link.address());
    let mut terminal = host.terminal(["pull", &name]);
    terminal.expect("B/s");
    terminal.expect("Status: Downloaded newer image");
    assert!(terminal.wait().success());
    let shown = terminal.shown();
    assert!(shown.contains("Downloading") && shown.contains("Pull complete"), "{shown}");
    host.cli(["rmi", &name]).ok();
    let lines = host.cli(["pull", &name]).ok();
    assert!(!lines.contains('\x1b') && !lines.contains("B/s") && lines.contains("Pull complete"), "{lines}");
    drop(registry);
}

/// docker's daemon as well, when the suite is run on it.
fn our_registry_takes_and_gives(client: Client) {
    let host = Host::new(client);
    let registry = Registry::start_ours(&host.engine);
    let id = host.cli(["images", "-q", "--no-trunc", "busybox"]).ok();
    let name = |tag: &str| format!("{}/team/box:{tag}", registry.address());
    host.cli(["tag", "busybox", &name("v1")]).ok();
    host.cli(["tag", "busybox", &name("v2")]).ok();
    let said = host.cli(["push", &name("v1")]).ok();
    assert!(said.contains(": Pushed") && said.contains("v1: digest: sha256:"), "{said}");
    let said = host.cli(["push", &name("v2")]).ok();
    assert!(said.contains(": Layer already exists"), "{said}");
    let sister = format!("{}/other/box:v1", registry.address());
    host.cli(["tag", "busybox", &sister]).ok();
    let said = host.cli(["push", &sister]).ok();
    assert!(said.contains(": Mounted from team/box"), "{said}");
    host.cli(["rmi", &name("v1"), &name("v2"), &sister]).ok();
    let said = host.cli(["pull", &name("v1")]).ok();
    assert!(said.contains("Status: Downloaded newer image"), "{said}");
    assert_eq!(host.cli(["inspect", "-f", "{{.Id}}", &name("v1")]).ok(), id);
    assert_eq!(host.cli(["run", "--rm", &name("v1"), "echo", "pulled"]).ok(), "pulled");
    let all = host.cli(["pull", "-a", &format!("{}/team/box", registry.address())]).ok();
    assert!(all.contains("Digest: "), "{all}");
    assert_eq!(host.cli(["inspect", "-f", "{{.Id}}", &name("v2")]).ok(), id);
    if !host.is_peer() {
        // Docker's daemon asks for docker's own search, which no registry has.
        let found =
            host.cli(["search", "--format", "{{.Name}}", &format!("{}/team", registry.address())]).ok();
        assert_eq!(found, format!("{}/team/box", registry.address()));
    }
    host.cli(["push", &format!("{}/team/none:v1", registry.address())]).exits(1);
    drop(registry);
}

fn an_unknown_image_is_named(client: Client) {
    let host = Host { engine: Engine::start(), client };
    host.cli(["run", "--rm", "--pull", "never", "nothing/here", "true"])
        .exits(125)
        .expect_stderr("No such image: nothing/here:latest");
    host.cli(["inspect", "--type", "image", "nothing/here"])
        .exits(1)
        .expect_stderr("No such image: nothing/here");
    host.cli(["rmi", "nothing/here"]).exits(1).expect_stderr("No such image: nothing/here");
    host.cli(["run", "--rm", "Bad//Name", "true"]).exits(125).expect_stderr("invalid reference format");
}

fn layers_hide_what_they_delete(client: Client) {
    let host = Host { engine: Engine::start(), client };
    let mut lower = Layer::default();
    lower.dir("keep", 0o755).file("keep/a", 0o644, b"a").file("keep/b", 0o600, b"b");
    lower.dir("opaque", 0o755).file("opaque/old", 0o644, b"old").hardlink("keep/hard", "keep/a");
    let mut upper = Layer::default();
    upper.file("keep/.wh.b", 0o644, b"").dir("opaque", 0o700).file("opaque/.wh..wh..opq", 0o644, b"");
    upper.file("opaque/new", 0o4755, b"new").symlink("link", "keep/a");
    let image = Archive::new("layered:1")
        .layer(fixtures::busybox_layer().unwrap())
        .layer(lower.finish())
        .layer(upper.finish());
    let file = image.cmd(&["sh"]).write(host.dir(), "layered.tar");
    host.cli(["load", "-i", file.to_str().unwrap()]).ok();
    let script = "ls -a keep opaque; cat link keep/hard; stat -c '%a %h' opaque opaque/new keep/a";
    let seen = host.cli(["run", "--rm", "layered:1", "sh", "-c", script]).ok();
    let expected = "keep:\n.\n..\na\nhard\n\nopaque:\n.\n..\nnew\naa700 2\n4755 1\n644 2";
    // Overlay counts a merged directory's links as one.
    assert_eq!(seen.replace("700 1", "700 2"), expected);
}

fn history_and_inspect_tell_where_it_came_from(client: Client) {
    let host = Host::new(client);
    let info = host.get("/images/busybox/json");
    assert_eq!(info["Architecture"], if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" });
    assert_eq!(info["Os"], "linux");
    assert_eq!(info["RepoTags"][0], "busybox:latest");
    assert_eq!(info["Config"]["Cmd"][0], "sh");
    assert_eq!(info["RootFS"]["Layers"].as_array().unwrap().len(), 1);
    assert!(info["Size"].as_i64().unwrap() > 100_000);
    assert_eq!(info["Created"], "2024-01-02T03:04:05Z");
    assert!(host.cli(["history", "busybox"]).ok().contains("testkit"));
}

fn filters_choose_what_is_listed_and_pruned(client: Client) {
    let host = Host::new(client);
    let root = host.dir().join("root.tar");
    fs::write(&root, fixtures::busybox_layer().unwrap()).unwrap();
    let import = |args: &[&str]| {
        let all = ["import"].iter().chain(args).copied();
        host.cli(all.collect::<Vec<_>>()).ok()
    };
    let root = root.to_str().unwrap();
    import(&["-c", "LABEL kind=old", root, "first:1"]);
    import(&["-c", "LABEL kind=new", "-c", "LABEL keep=yes", root, "second:1"]);
    let nameless = import(&["-c", "LABEL kind=none", root]);
    let listed = |filters: &[&str]| {
        let mut args = vec!["images", "--format", "{{.Repository}}"];
        args.extend(filters.iter().flat_map(|filter| ["--filter", filter]));
        let mut names: Vec<String> = host.cli(args).ok().lines().map(str::to_owned).collect();
        names.sort();
        names.join(" ")
    };
    assert_eq!(listed(&["label=kind"]), "<none> first second");
    assert_eq!(listed(&["label=kind=new"]), "second");
    assert_eq!(listed(&["label=kind", "label=keep=yes"]), "second");
    assert_eq!(listed(&["since=busybox"]), "<none> first second");
    assert_eq!(listed(&["since=first:1", "dangling=false"]), "second");
    assert_eq!(listed(&["before=second:1", "since=busybox"]), "first");
    assert_eq!(listed(&["dangling=true"]), "<none>");
    assert_eq!(listed(&["reference=*:1", "label=kind=old"]), "first");
    assert_eq!(listed(&["reference=f*", "reference=sec*"]), "first second");
    let nothing = host.cli(["images", "--filter", "nonsense=1"]).run();
    assert!(nothing.code == 1 && nothing.stderr.contains("invalid filter"), "{nothing}");

    let prune = |args: &[&str]| host.cli(["image", "prune", "-f"].iter().chain(args)).ok();
    assert!(!prune(&["--filter", "until=1h"]).contains("eleted:"));
    let said = prune(&[]);
    assert!(said.contains(&nameless) && said.contains("Total reclaimed space:"), "{said}");
    assert_eq!(listed(&["label=kind"]), "first second");
    prune(&["-a", "--filter", "label!=keep", "--filter", "label=kind"]);
    assert_eq!(listed(&["label=kind"]), "second");
    host.cli(["create", "--name", "user", "second:1", "true"]).ok();
    prune(&["-a"]);
    assert_eq!(listed(&[]), "second", "a container has it");
    host.cli(["rm", "user"]).ok();
}

fn ids_and_names_are_removed_by_the_rules(client: Client) {
    let host = Host::new(client);
    let id = host.cli(["images", "-q", "--no-trunc", "busybox"]).ok();
    let short = &id[7..19];
    host.cli(["tag", "busybox", "one:1"]).ok();
    host.cli(["tag", "busybox", "one:2"]).ok();
    let refused = host.cli(["rmi", short]).exits(1);
    assert!(
        refused.stderr.contains(&format!(
            "unable to delete {short} (must be forced) - image is referenced in multiple repositories"
        )),
        "{refused}"
    );
    host.cli(["rmi", "busybox", "one:2"]).ok();
    host.cli(["create", "--name", "user", "one:1", "true"]).ok();
    let used = host.cli(["rmi", "one:1"]).exits(1);
    assert!(used.stderr.contains("unable to remove repository reference \"one:1\" (must force)"), "{used}");
    let used = host.cli(["rmi", short]).exits(1);
    assert!(used.stderr.contains("image is being used by stopped container"), "{used}");
    host.cli(["start", "user"]).ok();
    host.wait_state("user", "exited");
    host.cli(["rm", "user"]).ok();
    let running = host.cli(["run", "-d", "--name", "runs", "one:1", "sleep", "1000"]).ok();
    let used = host.cli(["rmi", "-f", short]).exits(1);
    assert!(
        used.stderr.contains("(cannot be forced) - image is being used by running container")
            && used.stderr.contains(&running[..12]),
        "{used}"
    );
    host.cli(["rm", "-f", "runs"]).ok();
    host.cli(["tag", "one:1", "two:1"]).ok();
    let gone = host.cli(["rmi", "-f", &id]).ok();
    assert!(gone.contains("Untagged: one:1") && gone.contains("Untagged: two:1"), "{gone}");
    assert!(gone.contains(&format!("Deleted: {id}")), "{gone}");
    assert_eq!(host.cli(["images", "-aq"]).ok(), "");
}

fn a_commit_takes_what_it_is_told(client: Client) {
    let host = Host::new(client);
    host.cli(["run", "--name", "box", "-e", "OWN=1", "busybox", "sh", "-c", "echo x > /x"]).ok();
    let made = host
        .cli([
            "commit",
            "-a",
            "Me <me@example.org>",
            "-m",
            "why",
            "-c",
            "ENV MORE=2",
            "-c",
            "EXPOSE 80/udp",
            "-c",
            "CMD [\"cat\", \"/x\"]",
            "-c",
            "LABEL a=b",
            "box",
            "made:1",
        ])
        .ok();
    let info = host.get("/images/made:1/json");
    assert_eq!(info["Id"], made);
    assert_eq!(
        (info["Author"].as_str(), info["Comment"].as_str()),
        (Some("Me <me@example.org>"), Some("why"))
    );
    let environment = info["Config"]["Env"].to_string();
    assert!(environment.contains("OWN=1") && environment.contains("MORE=2"), "{environment}");
    assert!(info["Config"]["ExposedPorts"]["80/udp"].is_object());
    assert_eq!(info["Config"]["Labels"]["a"], "b");
    assert_eq!(info["RootFS"]["Layers"].as_array().unwrap().len(), 2);
    assert_eq!(host.cli(["run", "--rm", "made:1"]).ok(), "x");
    let history =
        host.cli(["history", "--no-trunc", "--format", "{{.CreatedBy}}|{{.Comment}}", "made:1"]).ok();
    assert!(history.starts_with("sh -c echo x > /x|why\n"), "{history}");
    // A running one is held while it is read, and goes on.
    host.cli(["run", "-d", "--name", "runs", "busybox", "sh", "-c", "while :; do date > /now; done"]).ok();
    host.cli(["commit", "runs", "while:1"]).ok();
    host.cli(["commit", "--pause=false", "runs", "while:2"]).ok();
    assert_eq!(host.inspect("runs")["State"]["Status"], "running");
    host.cli(["commit", "nobody", "none:1"]).exits(1).expect_stderr("No such container: nobody");
    host.cli(["commit", "-c", "RUN x", "box", "none:1"])
        .exits(1)
        .expect_stderr("RUN is not a valid change command");
    assert_eq!(host.cli(["images", "-q", "none"]).ok(), "");
    host.cli(["rm", "-f", "runs"]).ok();
}
