//! kill -9 of the daemon at any moment of a pull, push, load, commit, import or prune: what was acknowledged is there
//! and whole, what was not is there whole or not at all, a pull goes on where it was, and no file is left lying about.
//!
//! `BRIG_TEST_KILLS=200 cargo nextest run -p brigantine-api --test e2e crash:: --no-capture` does it 200 times instead
//! of a few; `BRIG_TEST_SEED=N` repeats the moments of an earlier run.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use brigantine_testkit::fixtures::{self, Archive, Layer};
use brigantine_testkit::peers::Registry;
use brigantine_testkit::{Client, Engine, Link, eventually};
use serde_json::Value;

/// A number from the environment.
pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// What a run by hand wants to know.
pub fn tell(line: &str) {
    // Whom it is for may have gone.
    std::io::Write::write_all(&mut std::io::stderr(), format!("{line}\n").as_bytes()).ok();
}

/// Numbers that can be had again from the seed.
pub struct Chance(u64);

impl Chance {
    /// From the environment, or a new seed, which is told.
    pub fn new(of: &str) -> Self {
        let nanos =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos();
        let seed = number("BRIG_TEST_SEED", u64::from(nanos));
        tell(&format!("{of}: BRIG_TEST_SEED={seed}"));
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit.max(1)
    }

    /// A part of a duration.
    pub fn of(&mut self, whole: Duration) -> Duration {
        Duration::from_micros(self.below(whole.as_micros() as u64))
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend(self.below(u64::MAX).to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}

/// An image whose containers can tell whether its files are whole: busybox and `layers` layers of noise with a list of
/// their digests.
pub fn sample(name: &str, layers: usize, bytes: usize, chance: &mut Chance) -> Archive {
    let mut image = Archive::new(name).layer(fixtures::busybox_layer().unwrap());
    for number in 0..layers {
        let mut layer = Layer::default();
        let mut sums = String::new();
        layer.dir("data", 0o755).dir(&format!("data/{number}"), 0o755);
        // One large file and many small ones.
        for (file, size) in std::iter::once(bytes).chain([700; 24]).enumerate() {
            let path = format!("data/{number}/{file}");
            let noise = chance.bytes(size);
            writeln!(sums, "{}  /{path}", fixtures::digest(&noise)).unwrap();
            layer.file(&path, 0o644, &noise);
        }
        layer.file(&format!("data/{number}.sums"), 0o644, sums.as_bytes());
        image = image.layer(layer.finish());
    }
    image.cmd(&["sh", "-c", "sha256sum -s -c /data/*.sums && ls /data | wc -l"])
}

/// What the engine has said it did.
#[derive(Default)]
pub struct Acknowledged {
    /// Image ids by name, and how many entries `/data` of theirs has.
    pub images: BTreeMap<String, (String, usize)>,
}

impl Acknowledged {
    /// Insists that every image there is is whole, and that those acknowledged are there. Of `tolerable` problems there
    /// may be some.
    #[track_caller]
    pub fn check(&self, engine: &Engine, tolerable: &[&str], about: &str) {
        let checked = engine.request("POST", "/system/check").expect(200).json();
        let wrong: Vec<&Value> = checked["Problems"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|problem| !tolerable.contains(&problem["Kind"].as_str().unwrap()))
            .collect();
        assert!(wrong.is_empty(), "{about}: {wrong:?}");
        for (name, (id, _)) in &self.images {
            let found = engine.request("GET", &format!("/images/{name}/json"));
            assert_eq!(found.status, 200, "{about}: {name} was acknowledged: {}", found.text());
            assert_eq!(found.json()["Id"], **id, "{about}: {name}");
        }
    }
}

/// Insists that a container of the image finds its files whole.
#[track_caller]
pub fn runs_whole(engine: &Engine, image: &str, entries: usize, about: &str) {
    let output = engine.brig(["run", "--rm", "--network", "none", image]).run();
    assert_eq!((output.code, output.stdout.trim()), (0, &*entries.to_string()), "{about}: {output}");
}

/// Names in the store's directory for what is under way, but for partial downloads.
#[track_caller]
pub fn no_leftovers(store: &Path, about: &str) {
    let names = |dir: &str| -> Vec<String> {
        let entries = fs::read_dir(store.join(dir)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    let left: Vec<String> = names("tmp")
        .into_iter()
        .filter(|name| !name.starts_with("partial-"))
        .chain(names("leases"))
        .collect();
    assert!(left.is_empty(), "{about}: {left:?}");
}

/// What an operation that was broken off had brought: it waits for the next one, or for the next collection.
pub const ORPHANS: [&str; 2] = ["orphan-blob", "orphan-layer"];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    Pull,
    Push,
    Load,
    Commit,
    Import,
    Prune,
}

const OPERATIONS: [Operation; 6] = [
    Operation::Pull,
    Operation::Push,
    Operation::Load,
    Operation::Commit,
    Operation::Import,
    Operation::Prune,
];

/// Everything that the rounds need.
struct Rounds {
    engine: Engine,
    registry: Registry,
    link: Link,
    chance: Chance,
    acknowledged: Acknowledged,
    /// The image in the registry, its id and the bytes a whole pull fetches.
    remote: (String, String),
    whole: u64,
    /// What an operation took when nobody disturbed it.
    usual: BTreeMap<Operation, Duration>,
}

/// Entries of `/data`: a directory and a list for each layer.
const REMOTE_ENTRIES: usize = 6;
const LOCAL_ENTRIES: usize = 2;

impl Rounds {
    fn new() -> Self {
        let mut chance = Chance::new("kills");
        let engine = Engine::with_busybox();
        let registry = Registry::start_ours(&engine);
        let link = Link::to(&engine, registry.port());
        let remote = sample("remote:1", 3, 3 << 20, &mut chance);
        registry.fill(&engine, &remote.write(engine.dir(), "remote.tar"), "remote:1");
        let busybox = engine.get("/images/busybox/json")["Id"].as_str().unwrap().to_owned();
        let mut acknowledged = Acknowledged::default();
        acknowledged.images.insert("busybox".to_owned(), (busybox, 0));
        // What is committed: a container with changes.
        sample("local:1", 1, 2 << 20, &mut chance).write(engine.dir(), "local.tar");
        fs::write(engine.dir().join("root.tar"), fixtures::busybox_layer().unwrap()).unwrap();
        engine.brig(["run", "--name", "box", "busybox", "sh", "-c", CHANGE]).ok();
        let remote = (format!("{}/remote:1", link.address()), remote.id());
        let mut rounds =
            Self { engine, registry, link, chance, acknowledged, remote, whole: 0, usual: BTreeMap::new() };
        for operation in OPERATIONS {
            rounds.prepare(operation, 0);
            let before = rounds.link.received();
            let began = Instant::now();
            let done = rounds.begin(operation, 0).wait_with_output().unwrap();
            assert!(done.status.success(), "{operation:?}: {}", String::from_utf8_lossy(&done.stderr));
            rounds.usual.insert(operation, began.elapsed());
            if operation == Operation::Pull {
                rounds.whole = rounds.link.received() - before;
            }
        }
        rounds
    }

    /// Sees to it that the operation has something to do.
    fn prepare(&mut self, operation: Operation, round: u64) {
        let brig = |args: &[&str]| self.engine.brig(args.iter().copied());
        match operation {
            Operation::Pull => {
                // Also what an earlier round's kill left of it.
                brig(&["rmi", "-f", &self.remote.0]).run();
                self.engine.request("POST", "/system/check?repair=1").expect(200);
                for entry in fs::read_dir(self.engine.data_root().join("image/tmp")).unwrap() {
                    fs::remove_file(entry.unwrap().path()).unwrap();
                }
                self.link.limit(24 << 20);
            }
            Operation::Load => drop(brig(&["rmi", "-f", "local:1"]).run()),
            Operation::Push => {
                // Something that the registry has not yet.
                let fresh =
                    sample("fresh:1", 1, 2 << 20, &mut self.chance).write(self.engine.dir(), "fresh.tar");
                brig(&["load", "-i", fresh.to_str().unwrap()]).ok();
                brig(&["tag", "fresh:1", &self.pushed(round)]).ok();
            }
            Operation::Prune => {
                brig(&["load", "-i", self.engine.dir().join("local.tar").to_str().unwrap()]).ok();
                brig(&["commit", "box", "spare:1"]).ok();
                brig(&["commit", "-m", "another", "box", "spare:1"]).ok();
            }
            Operation::Commit | Operation::Import => {}
        }
    }

    fn pushed(&self, round: u64) -> String {
        format!("{}/pushed:{round}", self.registry.address())
    }

    fn begin(&self, operation: Operation, round: u64) -> Child {
        let file = |name: &str| self.engine.dir().join(name).display().to_string();
        let args: Vec<String> = match operation {
            Operation::Pull => vec!["pull".into(), self.remote.0.clone()],
            Operation::Push => vec!["push".into(), self.pushed(round)],
            Operation::Load => vec!["load".into(), "-i".into(), file("local.tar")],
            Operation::Commit => vec!["commit".into(), "box".into(), format!("committed:{round}")],
            Operation::Import => vec!["import".into(), file("root.tar"), format!("imported:{round}")],
            Operation::Prune => vec!["image".into(), "prune".into(), "-af".into()],
        };
        self.engine.brig(args).spawn()
    }

    /// One kill and everything that has to be so afterwards. Tells whether the operation had been acknowledged.
    fn round(&mut self, round: u64) -> (Operation, bool) {
        let operation = OPERATIONS[round as usize % OPERATIONS.len()];
        self.prepare(operation, round);
        let received = self.link.received();
        // Sometimes a little late: that what was just acknowledged is there.
        let moment = self.chance.of(self.usual[&operation] * 3 / 2);
        let about = format!("round {round}: {operation:?}, killed after {moment:?}");
        let client = self.begin(operation, round);
        std::thread::sleep(moment);
        self.engine.kill_daemon();
        let done = client.wait_with_output().unwrap().status.success();
        let received = self.link.received() - received;
        self.engine.restart_daemon();
        no_leftovers(&self.engine.data_root().join("image"), &about);
        if operation == Operation::Prune {
            self.forget_pruned();
        }
        self.acknowledged.check(&self.engine, &ORPHANS, &about);
        match operation {
            Operation::Pull => self.after_pull(done, received, &about),
            Operation::Push => self.after_push(round, done, &about),
            Operation::Load => self.after("local:1", Some(LOCAL_ENTRIES), done, &about),
            Operation::Commit => self.after(&format!("committed:{round}"), None, done, &about),
            Operation::Import => self.after(&format!("imported:{round}"), None, done, &about),
            Operation::Prune => {
                self.after("local:1", Some(LOCAL_ENTRIES), false, &about);
                self.after("spare:1", None, false, &about);
            }
        }
        (operation, done)
    }

    /// What `prune` has taken may be gone, whether it was acknowledged or not.
    fn forget_pruned(&mut self) {
        self.acknowledged.images.retain(|name, _| name == "busybox");
    }

    fn visible(&self, name: &str) -> Option<String> {
        let found = self.engine.request("GET", &format!("/images/{name}/json"));
        (found.status == 200).then(|| found.json()["Id"].as_str().unwrap().to_owned())
    }

    /// An image is there, and then whole, or not there, and then nobody was told it was.
    fn after(&mut self, name: &str, entries: Option<usize>, done: bool, about: &str) {
        let Some(id) = self.visible(name) else {
            assert!(!done, "{about}: {name} was acknowledged and is not there");
            return;
        };
        match entries {
            Some(entries) => runs_whole(&self.engine, name, entries, about),
            None if name.starts_with("imported") => {
                self.engine.brig(["run", "--rm", "--network", "none", name, "/bin/busybox", "true"]).ok();
            }
            None => {
                let count = self.engine.brig(["run", "--rm", "--network", "none", name, "sh", "-c", COUNT]);
                assert_eq!(count.ok(), "300", "{about}");
            }
        }
        if done {
            self.acknowledged.images.insert(name.to_owned(), (id, entries.unwrap_or_default()));
        }
    }

    fn after_pull(&mut self, done: bool, received: u64, about: &str) {
        let (name, id) = self.remote.clone();
        let before = self.link.received();
        self.link.limit(0);
        self.engine.brig(["pull", &name]).ok();
        let again = self.link.received() - before;
        assert!(!done || again < 64 << 10, "{about}: {again} bytes of a finished pull were fetched again");
        // What was on its way through buffers when the daemon died is lost.
        if received > 3 << 20 {
            let most = self.whole - received / 2;
            assert!(again < most, "{about}: {received} of {} bytes came, then {again} again", self.whole);
        }
        assert_eq!(self.visible(&name), Some(id), "{about}");
        runs_whole(&self.engine, &name, REMOTE_ENTRIES, about);
    }

    fn after_push(&mut self, round: u64, done: bool, about: &str) {
        let name = self.pushed(round);
        let id = self.visible(&name).expect("what was to be pushed");
        self.engine.brig(["rmi", &name]).ok();
        let pulled = self.engine.brig(["pull", &name]).run();
        assert!(!done || pulled.code == 0, "{about}: acknowledged, and not in the registry: {pulled}");
        if pulled.code != 0 {
            assert!(pulled.stderr.contains("not found"), "{about}: {pulled}");
            self.engine.brig(["tag", "fresh:1", &name]).ok();
            self.engine.brig(["push", &name]).ok();
            self.engine.brig(["rmi", &name]).ok();
            self.engine.brig(["pull", &name]).ok();
        }
        assert_eq!(self.visible(&name), Some(id), "{about}");
        self.engine.brig(["rmi", &name]).ok();
    }
}

const CHANGE: &str = "mkdir /new; for n in $(seq 300); do echo $n > /new/$n; done; \
                      dd if=/dev/urandom of=/large bs=64k count=24 2>/dev/null; rm /etc/os-release";
const COUNT: &str = "test ! -e /etc/os-release && test $(stat -c %s /large) = 1572864 && ls /new | wc -l";

#[test]
fn a_kill_at_any_moment_costs_nothing_that_was_acknowledged() {
    let mut rounds = Rounds::new();
    let mut told: BTreeMap<Operation, (u32, u32)> = BTreeMap::new();
    for round in 0..number("BRIG_TEST_KILLS", 12) {
        let (operation, done) = rounds.round(round);
        let (kills, acknowledged) = told.entry(operation).or_default();
        *kills += 1;
        *acknowledged += u32::from(done);
    }
    tell(&format!("kills, and how many of the operations had been acknowledged by then: {told:?}"));

    // Everything that was brought is given back.
    let engine = &rounds.engine;
    engine.brig(["rm", "-f", "box"]).ok();
    engine.brig(["image", "prune", "-af"]).ok();
    engine.client(Client::Brig, ["system", "check", "--repair"]).ok();
    eventually("an empty store", || {
        let dir = |name: &str| engine.data_root().join("image").join(name);
        let blobs = fs::read_dir(dir("blobs/sha256")).unwrap().count();
        let layers =
            fs::read_dir(dir("layers")).unwrap().filter(|e| e.as_ref().unwrap().file_name() != ".empty");
        (blobs == 0 && layers.count() == 0).then_some(())
    });
    no_leftovers(&engine.data_root().join("image"), "at the end");
}
