//! The solver and its cache: what is done side by side, what once for all, what again, and what kills and power cuts
//! leave of it.
//!
//! `BRIG_TEST_KILLS=50` or `BRIG_TEST_CUTS=20` repeat the last ones more often.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use brigantine_testkit::disk::{Cut, Format};
use brigantine_testkit::{Client, Engine, Invocation, eventually};

use crate::Host;
use crate::crash::{Chance, number, tell};
use crate::power_cut::Powered;

/// Writes a Dockerfile, and the noise that it may copy, in a folder of its own.
fn folder(engine: &Engine, name: &str, dockerfile: &str) -> PathBuf {
    let dir = engine.dir().join(name);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("Dockerfile"), dockerfile).unwrap();
    dir
}

fn build(engine: &Engine, dir: &Path, args: &[&str]) -> Invocation {
    let dir = dir.to_str().unwrap();
    engine.brig(["build", "--progress", "plain"].iter().chain(args).copied().chain([dir]))
}

/// Whether a line of the output is exactly this.
fn says(output: &str, line: &str) -> bool {
    output.lines().any(|said| said.trim_end() == line)
}

/// A script that comes to its end only while another one is at the same place.
fn meet(me: &str, other: &str) -> String {
    format!(
        "touch /c/{me}; n=0; until test -e /c/{other}; do n=$((n+1)); test $n -lt 600 || exit 9; \
         sleep 0.1; done; echo {me}-met-{other}"
    )
}

#[test]
fn stages_that_do_not_need_each_other_run_side_by_side() {
    let host = Host::new(Client::Brig);
    let mount = "RUN --mount=type=cache,target=/c,id=meeting";
    let dir = folder(
        &host,
        "stages",
        &format!(
            "FROM busybox AS left\n{mount} {}\nRUN echo left > /l\nFROM busybox AS right\n{mount} {}\nRUN echo right > /r\n\
             FROM scratch\nCOPY --from=left /l /\nCOPY --from=right /r /\n",
            meet("a", "b"),
            meet("b", "a"),
        ),
    );
    let output = build(&host, &dir, &["-t", "met"]).run();
    assert_eq!(output.code, 0, "{output}");
    assert!(output.to_string().contains("a-met-b") && output.to_string().contains("b-met-a"), "{output}");
}

/// A build whose output goes to a file.
struct Watched {
    child: std::process::Child,
    output: PathBuf,
}

impl Watched {
    fn start(engine: &Engine, dir: &Path, args: &[&str]) -> Self {
        let output = dir.with_extension("output");
        let file = fs::File::create(&output).unwrap();
        let mut command = build(engine, dir, args).into_command();
        command.stdout(file.try_clone().unwrap()).stderr(file);
        Self { child: command.spawn().unwrap(), output }
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.output).unwrap()
    }

    #[track_caller]
    fn until(&self, line: &str) {
        eventually(line, || says(&self.said(), line).then_some(()));
    }

    #[track_caller]
    fn done(mut self) -> String {
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {}", self.said());
        self.said()
    }

    fn vanish(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// The directory of the only cache mount.
fn cache_mount(engine: &Engine) -> PathBuf {
    let mounts = engine.data_root().join("build/caches");
    eventually("a cache mount", || Some(fs::read_dir(&mounts).ok()?.next()?.unwrap().path().join("data")))
}

#[test]
fn what_several_builds_want_is_made_once_and_told_to_all() {
    let host = Host::new(Client::Brig);
    // The step ends when the test lets it, so that all builds come while it runs.
    let step = "RUN --mount=type=cache,target=/c echo x >> /c/log; echo begun; \
                until test -e /c/go; do sleep 0.05; done; echo only once";
    let start = |name: &str, more: &str| {
        let dir = folder(&host, name, &format!("FROM busybox\n{step}\n{more}\n"));
        Watched::start(&host, &dir, &["-t", name])
    };
    let first = start("first", "RUN echo own-first > /own");
    first.until("begun");
    let others: Vec<Watched> =
        (0..4).map(|number| start(&format!("same-{number}"), &format!("RUN echo own-{number}"))).collect();
    // They are told what was said before they came.
    for build in &others {
        build.until("begun");
    }
    // The one that began it goes away: the others still want it.
    first.vanish();
    fs::write(cache_mount(&host).join("go"), "").unwrap();
    for (number, build) in others.into_iter().enumerate() {
        let output = build.done();
        assert!(says(&output, "only once") && says(&output, &format!("own-{number}")), "{output}");
        assert_eq!(output.matches("begun\n").count(), 1, "{output}");
    }
    assert_eq!(fs::read_to_string(cache_mount(&host).join("log")).unwrap(), "x\n", "it ran more than once");
    let first = start("first", "RUN echo own-first > /own").done();
    assert!(!says(&first, "only once"), "{first}");
}

#[test]
fn what_nobody_waits_for_any_more_is_ended_and_leaves_nothing() {
    let host = Host::new(Client::Brig);
    let dockerfile = "FROM busybox\nRUN echo kept > /kept\n\
                      RUN --mount=type=cache,target=/c touch /c/here; echo begun; sleep 600; touch /c/end";
    let dir = folder(&host, "ended", dockerfile);
    let snapshots = host.data_root().join("build/snapshots");
    let build = Watched::start(&host, &dir, &["-t", "ended"]);
    build.until("begun");
    build.vanish();
    eventually("the step is gone", || {
        let steps = fs::read_dir(host.exec_root().join("b")).map_or(0, Iterator::count);
        let left = fs::read_dir(&snapshots).unwrap().count();
        (steps == 0 && left == 1).then_some(())
    });
    assert!(!cache_mount(&host).join("end").exists());
    fs::write(dir.join("Dockerfile"), dockerfile.replace("sleep 600", "true")).unwrap();
    let again = Watched::start(&host, &dir, &["-t", "ended"]).done();
    assert!(says(&again, "begun") && again.contains("Using cache"), "{again}");
}

/// Builds whose last step waits for its turn at a cache mount, which another build has; the first of them goes away,
/// then the turn comes. What the other one says.
#[track_caller]
fn outlived(host: &Host, first: Watched, start_second: impl FnOnce() -> Watched) -> String {
    let at_the_step = |build: &Watched| {
        eventually("the step", || build.said().contains("RUN --mount=type=cache,target=/turn").then_some(()));
    };
    at_the_step(&first);
    let second = start_second();
    at_the_step(&second);
    // It takes longer than the little that is done between showing a step and waiting for it.
    let between = folder(host, "between", "FROM busybox\nRUN echo between\n");
    Watched::start(host, &between, &["--no-cache"]).done();
    let builds = || host.get("/build/history").as_array().unwrap().len();
    let before = builds();
    first.vanish();
    eventually("the first one is over", || (builds() > before).then_some(()));
    fs::write(cache_mount(host).join("go"), "").unwrap();
    second.done()
}

/// A build that has the cache mount `turn` until the test lets it go on.
fn holds_the_turn(host: &Host) -> Watched {
    let script = "echo begun; until test -e /turn/go; do sleep 0.05; done";
    let mount = "--mount=type=cache,target=/turn,sharing=locked";
    let dir = folder(host, "holder", &format!("FROM busybox\nRUN {mount} {script}\n"));
    let holder = Watched::start(host, &dir, &[]);
    holder.until("begun");
    holder
}

const TURN: &str = "RUN --mount=type=cache,target=/turn,sharing=locked";

#[test]
fn a_shared_step_has_the_files_of_whoever_began_it_to_its_end() {
    let host = Host::new(Client::Brig);
    let holder = holds_the_turn(&host);
    let dockerfile = format!("FROM busybox\n{TURN} --mount=type=bind,target=/m cat /m/f && echo seen\n");
    let start = |name: &str| {
        let dir = folder(&host, name, &dockerfile);
        fs::write(dir.join("f"), "the same\n").unwrap();
        Watched::start(&host, &dir, &[])
    };
    let first = start("first");
    let output = outlived(&host, first, || start("second"));
    assert!(output.contains("the same") && says(&output, "seen"), "{output}");
    holder.done();
    nothing_under_way(&host, "afterwards");
    let contexts = fs::read_dir(host.data_root().join("build/contexts")).unwrap().count();
    assert_eq!(contexts, 2, "one is kept of each folder");
}

#[test]
fn what_a_step_borrows_comes_from_a_client_that_is_there() {
    let host = Host::new(Client::Brig);
    let holder = holds_the_turn(&host);
    let secret = host.dir().join("secret");
    fs::write(&secret, "whispered").unwrap();
    let flag = format!("id=s,src={}", secret.display());
    let dockerfile = format!(
        "FROM busybox\n{TURN} --mount=type=secret,id=s,required wc -c < /run/secrets/s && echo seen\n"
    );
    let start = |name: &str| {
        let dir = folder(&host, name, &dockerfile);
        let output = dir.with_extension("output");
        let file = fs::File::create(&output).unwrap();
        let args = ["build", "--progress", "plain", "--secret", &flag, dir.to_str().unwrap()];
        let mut command = host.buildkit(args).into_command();
        command.stdout(file.try_clone().unwrap()).stderr(file);
        Watched { child: command.spawn().unwrap(), output }
    };
    let first = start("first");
    let output = outlived(&host, first, || start("second"));
    assert!(output.contains("seen"), "{output}");
    holder.done();
}

#[test]
fn a_result_that_came_out_the_same_ends_the_rebuilding() {
    let host = Host::new(Client::Brig);
    let of = |word: &str| {
        format!(
            "FROM busybox AS tool\nRUN echo {word} > /tmp/x && rm /tmp/x && touch -d @0 /tmp && echo always > /tool && touch -d @0 /tool /\n\
             RUN echo above the tool\n\
             FROM busybox\nCOPY --from=tool /tool /tool\nRUN cat /tool && echo after the copy\n"
        )
    };
    let dir = folder(&host, "cut", &of("one"));
    let first = Watched::start(&host, &dir, &["-t", "cut"]).done();
    assert!(says(&first, "after the copy") && says(&first, "above the tool"), "{first}");
    fs::write(dir.join("Dockerfile"), of("two")).unwrap();
    let second = Watched::start(&host, &dir, &["-t", "cut"]).done();
    assert_eq!(second.matches("Using cache").count(), 3, "all but the changed step: {second}");
    assert!(!says(&second, "above the tool"), "its file system is the same: {second}");
    assert!(!says(&second, "after the copy"), "the copied file is the same: {second}");
    // What changes for true is made again.
    fs::write(dir.join("Dockerfile"), of("four").replace("always", "changed")).unwrap();
    let fourth = Watched::start(&host, &dir, &["-t", "cut"]).done();
    assert!(says(&fourth, "after the copy") && says(&fourth, "changed"), "{fourth}");
}

#[test]
fn what_is_lost_of_the_cache_is_made_again() {
    let mut host = Host::new(Client::Brig);
    let dockerfile = "FROM busybox AS made\nRUN echo made-it && echo 1 > /one\nRUN echo made-two && echo 2 > /two\n\
                      FROM busybox\nCOPY --from=made /one /two /\nCMD [\"cat\", \"/one\", \"/two\"]\n";
    let dir = folder(&host, "lost", dockerfile);
    let run = |host: &Host| host.cli(["run", "--rm", "--network", "none", "lost"]).ok();
    Watched::start(&host, &dir, &["-t", "lost"]).done();
    assert_eq!(run(&host), "1\n2");
    host.engine.stop_daemon();
    host.engine.restart_daemon();
    let output = Watched::start(&host, &dir, &["-t", "lost"]).done();
    assert!(!output.contains("made-it\n"), "the cache is there after a restart: {output}");
    let snapshots = host.data_root().join("build/snapshots");
    let lose = || {
        let all: Vec<PathBuf> =
            fs::read_dir(&snapshots).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(!all.is_empty());
        for dir in &all {
            fs::remove_dir_all(dir).unwrap();
        }
    };
    // Under a daemon that believes them to be there.
    lose();
    let again = Watched::start(&host, &dir, &["-t", "lost"]).done();
    assert_eq!(run(&host), "1\n2", "{again}");
    assert_eq!(fs::read_dir(&snapshots).unwrap().count(), 0, "what nobody needs is not made again: {again}");
    // And where their files are wanted.
    fs::write(dir.join("Dockerfile"), dockerfile.replace("/one /two /", "/two /one /")).unwrap();
    let again = Watched::start(&host, &dir, &["-t", "lost"]).done();
    assert!(says(&again, "made-it") && says(&again, "made-two"), "{again}");
    assert_eq!(run(&host), "1\n2");
    // The image itself, with what it took from the cache.
    host.cli(["rmi", "-f", "lost"]).ok();
    host.cli(["system", "check", "--repair"]).run();
    Watched::start(&host, &dir, &["-t", "lost"]).done();
    assert_eq!(run(&host), "1\n2");
}

/// A build in which everything that the cache holds is checked: the noise that a step has made, and files of the context.
struct Checked {
    dir: PathBuf,
    number: u64,
}

impl Checked {
    fn new(engine: &Engine, chance: &mut Chance, number: u64) -> Self {
        let made = "RUN for n in $(seq 100); do head -c 700 /dev/urandom > /made/$n; done; head -c 400000 /dev/urandom > /made/large; \
                    sha256sum /made/* > /made.sums";
        let dockerfile = format!(
            "FROM busybox AS made\nWORKDIR /made\n{made}\nCOPY data /data\nRUN sha256sum /data/* > /data.sums && echo {number}\n\
             FROM made AS checked\nARG AGAIN LINGER=0\n\
             RUN sha256sum -s -c /made.sums && sha256sum -s -c /data.sums && echo $AGAIN whole && sleep $LINGER\n\
             FROM busybox\nCOPY --from=checked /made /made\nCOPY --from=checked /made.sums /\n\
             CMD [\"sha256sum\", \"-s\", \"-c\", \"/made.sums\"]\n"
        );
        let dir = folder(engine, &format!("checked-{number}"), &dockerfile);
        fs::create_dir_all(dir.join("data")).unwrap();
        for file in 0..20 {
            fs::write(dir.join(format!("data/{file}")), chance.bytes(2000)).unwrap();
        }
        fs::write(dir.join("data/large"), chance.bytes(200_000)).unwrap();
        Self { dir, number }
    }

    fn name(&self) -> String {
        format!("checked:{}", self.number)
    }

    fn start(&self, engine: &Engine) -> std::process::Child {
        build(engine, &self.dir, &["-t", &self.name()]).spawn()
    }

    /// Insists that what the cache has of it is whole, and the image as well.
    #[track_caller]
    fn holds(&self, engine: &Engine, about: &str) {
        let again = format!("AGAIN={about}");
        let output = build(engine, &self.dir, &["-t", &self.name(), "--build-arg", &again]).run();
        assert_eq!(output.code, 0, "{about}: {output}");
        self.runs(engine, about);
    }

    #[track_caller]
    fn runs(&self, engine: &Engine, about: &str) {
        let output = engine.brig(["run", "--rm", "--network", "none", &self.name()]).run();
        assert_eq!(output.code, 0, "{about}: {output}");
    }
}

/// Insists that nothing of builds is left but what is on record.
#[track_caller]
fn nothing_under_way(engine: &Engine, about: &str) {
    // From within: the disk may be mounted there only.
    let names = |dir: &str| -> Vec<String> {
        let dir = engine.data_root().join("build").join(dir);
        let listed = engine.sandbox().command("ls").arg("-A").arg(&dir).output().unwrap();
        assert!(listed.status.success(), "{about}: {}", String::from_utf8_lossy(&listed.stderr));
        String::from_utf8(listed.stdout).unwrap().lines().map(str::to_owned).collect()
    };
    assert_eq!(names("tmp"), Vec::<String>::new(), "{about}");
    let usage = engine.get("/system/df?type=build-cache");
    let known: Vec<&str> =
        usage["BuildCache"].as_array().unwrap().iter().map(|entry| entry["ID"].as_str().unwrap()).collect();
    let unknown: Vec<String> =
        names("snapshots").into_iter().filter(|name| !known.contains(&&**name)).collect();
    assert_eq!(unknown, Vec::<String>::new(), "{about}");
}

#[test]
fn a_kill_of_the_daemon_leaves_a_cache_that_is_right() {
    let mut chance = Chance::new("kills and builds");
    let mut engine = Engine::with_busybox();
    let (mut broken_off, mut finished) = (0, Vec::new());
    let began = std::time::Instant::now();
    let first = Checked::new(&engine, &mut chance, 0);
    assert!(first.start(&engine).wait().unwrap().success());
    let usual = began.elapsed();
    for number in 1..=number("BRIG_TEST_KILLS", 6) {
        let about = format!("round-{number}");
        let checked = Checked::new(&engine, &mut chance, number);
        let mut client = checked.start(&engine);
        std::thread::sleep(chance.of(usual * 5 / 4));
        engine.kill_daemon();
        let done = client.wait().unwrap().success();
        broken_off += u32::from(!done);
        engine.restart_daemon();
        eventually("what was under way is swept", || {
            let steps = fs::read_dir(engine.exec_root().join("b")).map_or(0, Iterator::count);
            (steps == 0).then_some(())
        });
        nothing_under_way(&engine, &about);
        if done {
            checked.runs(&engine, &about);
        }
        checked.holds(&engine, &about);
        first.holds(&engine, &about);
        finished.push(checked);
    }
    for checked in &finished {
        checked.holds(&engine, "end");
    }
    tell(&format!("{} kills, {broken_off} of them before the build was acknowledged", finished.len()));
    engine.brig(["image", "prune", "-af"]).ok();
    engine.brig(["builder", "prune", "-af"]).ok();
    assert_eq!(fs::read_dir(engine.data_root().join("build/snapshots")).unwrap().count(), 0);
}

fn survives(format: Format) {
    let mut chance = Chance::new("power cuts and builds");
    let mut powered = Powered::new(format);
    powered.engine.load(&brigantine_testkit::fixtures::busybox());
    let mut all: Vec<Checked> = Vec::new();
    for round in 1..=number("BRIG_TEST_CUTS", 3) {
        let acknowledged = Checked::new(&powered.engine, &mut chance, round * 2);
        assert!(acknowledged.start(&powered.engine).wait().unwrap().success());
        let under_way = Checked::new(&powered.engine, &mut chance, round * 2 + 1);
        let mut client = None;
        if round % 3 == 1 {
            // Steps have ended, nothing is acknowledged, and the database alone happens to be on disk.
            let args = ["-t", &under_way.name(), "--build-arg", "LINGER=600", "--build-arg", "AGAIN=so-far"];
            let watched = Watched::start(&powered.engine, &under_way.dir, &args);
            watched.until("so-far whole");
            watched.vanish();
            eventually("the step is gone", || {
                let steps = fs::read_dir(powered.engine.exec_root().join("b")).map_or(0, Iterator::count);
                (steps == 0).then_some(())
            });
            let log = powered.engine.data_root().join("build/build.db-wal");
            let synced = powered.engine.sandbox().command("sync").arg(log).status().unwrap();
            assert!(synced.success());
        } else {
            client = Some(under_way.start(&powered.engine));
            std::thread::sleep(chance.of(Duration::from_millis(1500)));
        }
        let ended = client.as_mut().and_then(|client| client.try_wait().unwrap());
        let done = ended.is_some_and(|status| status.success());
        let cut = if round % 2 == 0 { Cut::All } else { Cut::Some { seed: chance.below(u64::MAX) } };
        powered.disk().cut(cut);
        powered.boot();
        client.map(|mut client| client.wait().unwrap());
        let about = format!("{format:?}-{round}-{cut:?}-{done}").replace([' ', '{', '}', ':'], "");
        let engine = &powered.engine;
        nothing_under_way(engine, &about);
        acknowledged.runs(engine, &about);
        if done {
            under_way.runs(engine, &about);
        }
        all.extend([acknowledged, under_way]);
        // Of earlier rounds, too: whatever the cache still leads to is whole.
        for checked in &all {
            checked.holds(engine, &about);
        }
        tell(&format!("{about}: {} builds whole", all.len()));
    }
}

#[test]
fn a_power_cut_leaves_a_cache_that_is_right_on_ext4() {
    survives(Format::Ext4);
}

#[test]
fn a_power_cut_leaves_a_cache_that_is_right_on_xfs() {
    survives(Format::Xfs);
}
