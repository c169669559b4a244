//! Every verb of `docker container`, `docker volume` and `docker system`, one after the other on one engine: a table of
//! commands, their statuses and what they print. The table is held against the command's own help, so that no verb is
//! left out; what it expects was seen with Docker's daemon first.

use std::collections::BTreeSet;
use std::fs;

use brigantine_testkit::{Client, Engine, client, eventually};

use crate::Host;

/// A command line (words; quotes as in a shell), its status, and patterns of what it prints: `*` is anything, `<id>` a
/// whole id, `<n>` a number, `DIR` the test's directory.
type Row = (&'static str, i32, &'static str, &'static str);

const LIFE: &[Row] = &[
    (
        "container create --name one --label a=b -e X=y busybox sh -c 'echo out; echo err >&2; exit 3'",
        0,
        "<id>",
        "",
    ),
    (
        "container create --name one busybox",
        1,
        "",
        "*The container name \"/one\" is already in use by container \"<id>\"*",
    ),
    ("container create busybox:nothere", 1, "", "*"),
    (
        "container ls -a --format '{{.Names}} {{.State}} {{.Image}} {{.Labels}}'",
        0,
        "one created busybox a=b",
        "",
    ),
    ("container ls -q", 0, "", ""),
    ("container start -a one", 3, "out", "err"),
    ("container wait one", 0, "3", ""),
    ("container logs one", 0, "out", "err"),
    ("container logs --timestamps --tail 1 --since 1h one", 0, "*", "*"),
    ("container logs --until 1h one", 0, "", ""),
    ("container attach --no-stdin one", 1, "", "*annot attach to a stopped container, start it first"),
    (
        "container inspect -f '{{.State.Status}} {{.State.ExitCode}} {{.Config.Labels.a}}' one",
        0,
        "exited 3 b",
        "",
    ),
    ("container inspect one nobody", 1, "*\"Name\": \"/one\"*", "*o such container: nobody"),
    (
        "container run -d --name two --hostname here --memory 96m busybox sh -c 'trap \"exit 0\" TERM; echo up; while :; do sleep 0.1; done'",
        0,
        "<id>",
        "",
    ),
    ("container exec two sh -c 'hostname; exit 4'", 4, "here", ""),
    ("container exec -w /tmp -u guest -e K=v two sh -c 'pwd; id -un; echo $K'", 0, "/tmp\nguest\nv", ""),
    ("container exec -d two touch /behind", 0, "", ""),
    ("container exec -t two sh -c 'test -t 0 && echo terminal'", 0, "terminal*", ""),
    ("container cp DIR/file two:/copied", 0, "", "*"),
    ("container exec two cat /copied", 0, "from the host", ""),
    ("container cp two:/etc/passwd -", 0, "*root:x:0:0:*", "*"),
    ("container cp -a two:/copied DIR/back", 0, "", "*"),
    ("container cp two:/nothere DIR/back", 1, "", "*ould not find the file /nothere in container two"),
    ("container diff two", 0, "*A /copied*", ""),
    ("container export -o DIR/two.tar two", 0, "", ""),
    ("container commit -a me -m why -c 'ENV MADE=yes' two made:1", 0, "sha256:<id>", ""),
    ("container run --rm made:1 sh -c 'cat /copied; echo; echo $MADE'", 0, "from the host\nyes", ""),
    ("container top two", 0, "UID*PID*CMD*sh -c trap*", ""),
    ("container top two -o pid,comm", 0, "PID*COMMAND*", ""),
    (
        "container stats --no-stream --format '{{.Name}} {{.PIDs}} {{.MemUsage}}' two",
        0,
        "two <n> */ 96MiB",
        "",
    ),
    ("container stats --no-stream --all --format '{{.Name}}' one", 0, "one", ""),
    ("container pause two", 0, "two", ""),
    ("container ls --filter status=paused --format '{{.Names}} {{.Status}}'", 0, "two Up * (Paused)", ""),
    ("container exec two true", 1, "", "*two is paused, unpause the container before exec"),
    ("container unpause two", 0, "two", ""),
    ("container unpause two", 1, "", "*is not paused"),
    ("container kill --signal USR2 two", 0, "two", ""),
    ("container rename two deux", 0, "", ""),
    ("container rename deux one", 1, "", "*already in use*"),
    (
        "container update --memory 64m --memory-swap 64m --restart on-failure:2 --pids-limit 50 deux",
        0,
        "deux",
        "",
    ),
    (
        "container inspect -f '{{.HostConfig.Memory}} {{.HostConfig.RestartPolicy.Name}}:{{.HostConfig.RestartPolicy.MaximumRetryCount}}' deux",
        0,
        "67108864 on-failure:2",
        "",
    ),
    ("container update --memory 1k deux", 1, "", "*inimum memory limit allowed is 6MB"),
    ("container restart -t 5 deux", 0, "deux", ""),
    ("container rm deux", 1, "", "*annot remove *"),
    ("container stop -t 5 deux", 0, "deux", ""),
    (
        "container inspect -f '{{.State.Status}} {{.State.ExitCode}} {{.RestartCount}}' deux",
        0,
        "exited 0 0",
        "",
    ),
    ("container kill deux", 1, "", "*is not running"),
    ("container pause deux", 1, "", "*is not running"),
    ("container start deux one", 0, "deux\none", ""),
    ("container run -d --name web -p 127.0.0.1::80 -p 127.0.0.1::53/udp busybox sleep 1000", 0, "<id>", ""),
    ("container port web", 0, "*80/tcp -> 127.0.0.1:<n>*", ""),
    ("container port web 53/udp", 0, "127.0.0.1:<n>", ""),
    ("container port web 81/tcp", 1, "", "*o public port '81*' published for web"),
    ("container run --rm --cidfile DIR/cid busybox true", 0, "", ""),
    ("container run --rm --cidfile DIR/cid busybox true", 125, "", "*DIR/cid*"),
    ("container run --rm --entrypoint echo busybox hi", 0, "hi", ""),
    ("container run --rm --network none busybox ls /sys/class/net", 0, "lo", ""),
    (
        "container run --rm --env-file DIR/env --read-only --tmpfs /t busybox sh -c 'echo $FROM; touch /x 2>/dev/null || touch /t/x && echo t'",
        0,
        "a file\nt",
        "",
    ),
    ("container run --rm -i busybox true", 0, "", ""),
    ("container run --name quiet --log-driver none busybox echo unheard", 0, "unheard", ""),
    ("container logs quiet", 1, "", "*configured logging driver does not support reading"),
    ("container run --name close --log-driver local busybox echo heard", 0, "heard", ""),
    ("container logs close", 0, "heard", ""),
    ("container rm -f deux web", 0, "deux\nweb", ""),
    ("container rm nobody", 1, "", "*o such container: nobody"),
    ("container prune -f --filter label=a=b", 0, "Deleted Containers:\n<id>\n\nTotal reclaimed space: *", ""),
    ("container prune -f", 0, "Deleted Containers:\n<id>\n<id>\n\nTotal reclaimed space: *", ""),
    ("container ls -aq", 0, "", ""),
];

const VOLUMES: &[Row] = &[
    ("volume create --label k=v --opt type=tmpfs --opt device=tmpfs --opt o=size=1m small", 0, "small", ""),
    ("volume create", 0, "<id>", ""),
    ("volume create named", 0, "named", ""),
    ("volume create --driver nosuch other", 1, "", "*nosuch*not found"),
    ("volume create --opt colour=red other", 1, "", "*invalid option*colour*"),
    (
        "volume inspect -f '{{.Labels.k}} {{.Driver}} {{.Options.o}} {{.Scope}}' small",
        0,
        "v local size=1m local",
        "",
    ),
    ("volume inspect nothing", 1, "[]", "*o such volume"),
    ("volume ls --filter label=k=v --format '{{.Name}} {{.Driver}}'", 0, "small local", ""),
    ("volume ls -q --filter dangling=true --filter name=named", 0, "named", ""),
    ("container run --rm -v small:/s busybox sh -c 'df /s | grep -c tmpfs'", 0, "1", ""),
    ("container create --name user -v named:/n busybox", 0, "<id>", ""),
    ("volume rm named", 1, "", "*volume is in use - [<id>]"),
    ("container rm user", 0, "user", ""),
    ("volume rm small named", 0, "small\nnamed", ""),
    ("volume rm nothing", 1, "", "*o such volume"),
    ("volume rm -f nothing", 0, "nothing", ""),
    ("volume prune -f", 0, "Deleted Volumes:\n<id>\n\nTotal reclaimed space: *", ""),
    ("volume ls -q", 0, "", ""),
];

const SYSTEM: &[Row] = &[
    ("container run --name seen busybox sh -c 'exit 9'", 9, "", ""),
    ("system df", 0, "TYPE*TOTAL*Images*Containers*Local Volumes*Build Cache*", ""),
    ("system df -v", 0, "Images space usage:*Containers space usage:*seen*", ""),
    ("system df --format '{{.Type}}: {{.TotalCount}}'", 0, "Images: *Containers: 1\n*", ""),
    ("system info --format '{{.Driver}} {{.Containers}} {{.OSType}}'", 0, "overlay2 1 linux", ""),
    (
        "system events --since 1h --until=-1s --filter event=die --filter container=one --format '{{.Actor.Attributes.exitCode}}'",
        0,
        "3\n3",
        "",
    ),
    (
        "system events --since 1h --until=-1s --filter type=volume --filter event=destroy --filter volume=small --format '{{.Type}} {{.Actor.ID}}'",
        0,
        "volume small",
        "",
    ),
    ("version --format '{{.Server.Os}}'", 0, "linux", ""),
    ("system prune -f --filter label=nothing", 0, "*Total reclaimed space: *", ""),
    ("container ls -aq", 0, "*", ""),
    (
        "system prune -af --volumes",
        0,
        "Deleted Containers:\n<id>*Deleted Images:*Total reclaimed space: *",
        "",
    ),
    ("system df --format '{{.TotalCount}}'", 0, "0\n0\n0\n<n>", ""),
];

#[test]
fn every_verb_does_and_says_what_dockers_does() {
    let host = Host { engine: Engine::with_busybox(), client: Client::Docker };
    let dir = host.dir().join("verbs");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), "from the host").unwrap();
    fs::write(dir.join("env"), "FROM=a file\n").unwrap();
    let dir = dir.to_str().unwrap();
    let mut wrong = Vec::new();
    for (line, code, stdout, stderr) in LIFE.iter().chain(VOLUMES).chain(SYSTEM) {
        let args: Vec<String> = words(&line.replace("DIR", dir));
        let done = host.cli(&args).run();
        let errors = done.stderr.split("\nRun 'docker").next().unwrap_or_default().trim_end().to_owned();
        let fine = done.code == *code
            && fits(&stdout.replace("DIR", dir), done.stdout.trim_end())
            && fits(&stderr.replace("DIR", dir), errors.trim_end());
        if !fine {
            wrong.push(format!("expected {code}, {stdout:?}, {stderr:?} of {done}"));
        }
    }
    assert!(wrong.is_empty(), "{} rows:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(fs::read_to_string(format!("{dir}/back")).unwrap(), "from the host");
    assert!(fs::metadata(format!("{dir}/two.tar")).unwrap().len() > 100_000);
    // Attaching is on a terminal, below.
    let mut named: BTreeSet<String> =
        LIFE.iter().chain(VOLUMES).chain(SYSTEM).map(|row| verb(row.0)).collect();
    // Volumes of a swarm's are all that it changes.
    named.insert("volume update".to_owned());
    let missing: Vec<String> = ["container", "volume", "system"]
        .iter()
        .flat_map(|group| verbs_of(group))
        .filter(|verb| !named.contains(verb))
        .collect();
    assert!(missing.is_empty(), "no row for {missing:?}");
}

/// Attach, its keys, and the client's size and signals, on a terminal.
#[test]
fn attach_detaches_by_its_keys_and_passes_signals_on() {
    let host = Host { engine: Engine::with_busybox(), client: Client::Docker };
    let script = "echo ready; while read line; do echo \"heard $line\"; done; exit 5";
    let flags = ["run", "-it", "--name", "talk", "--detach-keys", "ctrl-x,q", "busybox", "sh", "-c", script];
    let mut terminal = host.terminal(flags);
    terminal.expect("ready");
    terminal.send("one\n");
    terminal.expect("heard one");
    terminal.send("\x18q");
    assert!(terminal.wait().success(), "{}", terminal.shown());
    assert_eq!(host.inspect("talk")["State"]["Status"], "running");
    // docker's own keys, and others for this attach alone.
    let mut terminal = host.terminal(["attach", "talk"]);
    terminal.send("two\n");
    terminal.expect("heard two");
    terminal.send("\x10\x11");
    terminal.wait();
    terminal = host.terminal(["attach", "--detach-keys", "a", "talk"]);
    terminal.send("three\n");
    terminal.expect("heard three");
    terminal.send("a");
    terminal.wait();
    assert_eq!(host.inspect("talk")["State"]["Status"], "running");
    // The last one sees the end, with its status.
    let mut terminal = host.terminal(["attach", "talk"]);
    terminal.send("four\n");
    terminal.expect("heard four");
    terminal.send("\x04");
    assert_eq!(terminal.wait().code(), Some(5), "{}", terminal.shown());
    // A signal to an attached client is the container's, unless that is asked against.
    let script = "trap 'echo got TERM; exit 6' TERM; echo up; while :; do sleep 0.1; done";
    let child = host.cli(["run", "--name", "proxied", "busybox", "sh", "-c", script]).spawn();
    host.wait_log("proxied", "up");
    let status = std::process::Command::new("kill").args(["-s", "TERM", &child.id().to_string()]).status();
    assert!(status.unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stdout.ends_with(b"got TERM\n")), (Some(6), true), "{output:?}");
    eventually("its end", || (host.inspect("proxied")["State"]["ExitCode"] == 6).then_some(()));
}

/// The verb of a command line, with its group.
fn verb(line: &str) -> String {
    line.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// What the docker command says that a group has.
fn verbs_of(group: &str) -> Vec<String> {
    let output =
        std::process::Command::new(client::docker_command()).args([group, "--help"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let commands =
        text.split("Commands:\n").nth(1).unwrap_or_default().split("\n\n").next().unwrap_or_default();
    let verbs: Vec<String> = commands
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(|verb| format!("{group} {}", verb.trim_end_matches('*')))
        .collect();
    assert!(verbs.len() >= 4, "docker {group} --help: {text}");
    verbs
}

/// A command line's words; `'` and `"` quote, one inside the other.
pub(crate) fn words(line: &str) -> Vec<String> {
    let mut all = Vec::new();
    let (mut word, mut quoted) = (String::new(), false);
    for letter in line.chars() {
        match letter {
            '\'' => quoted = !quoted,
            ' ' if !quoted => all.push(std::mem::take(&mut word)),
            other => word.push(other),
        }
    }
    all.push(word);
    all
}

/// Whether a text is what the pattern says.
fn fits(pattern: &str, text: &str) -> bool {
    let mut regex = String::from("(?s)^");
    let mut rest = pattern;
    while let Some(first) = rest.chars().next() {
        let (means, length) = match rest {
            _ if rest.starts_with("<id>") => ("[0-9a-f]{64}".to_owned(), 4),
            _ if rest.starts_with("<n>") => ("[0-9]+".to_owned(), 3),
            _ if first == '*' => (".*".to_owned(), 1),
            _ => (regex::escape(&first.to_string()), first.len_utf8()),
        };
        regex.push_str(&means);
        rest = &rest[length..];
    }
    regex.push('$');
    regex::Regex::new(&regex).unwrap().is_match(text)
}

#[test]
fn patterns_bite() {
    assert!(fits("a*c <n>", "abbc 12") && fits("<id>", &"0f".repeat(32)) && fits("", ""));
    assert!(!fits("a*c", "abd") && !fits("<id>", "0f") && !fits("", "x") && !fits("<n>", "1x"));
    assert_eq!(words("a 'b \"c d\"' e"), ["a", "b \"c d\"", "e"]);
}
