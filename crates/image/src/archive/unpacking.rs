//! Layers of an archive are unpacked while the archive still comes, behind the files that its members become.
//!
//! Nobody knows yet which members are layers, and of which image: what looks like one is unpacked out of sight. What
//! the manifest does not want, and what proves to be none, goes again without a word; what could not be unpacked is
//! tried once more by whoever wants it, and fails there with its reason.
//!
//! Invariant: there are no more threads than processors, and none outlives the [`Running`] that was handed out.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Scope;

use crate::digest::{Algorithm, Digest};
use crate::error::{IoContext as _, Result};
use crate::follow::{Follow, Follower};
use crate::layer::DiffId;
use crate::layers::{Layers, Prepared, Unindexed};

/// Archives that may wait for their index, each with all its entries in memory.
const UNINDEXED_MAX: usize = 2;

/// The members that are being unpacked.
pub(super) struct Unpacking<'s> {
    layers: &'s Layers,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    all: Vec<Arc<Job>>,
    waiting: VecDeque<Task>,
    threads: usize,
    at_work: usize,
    closed: bool,
    done: Done,
}

/// What came of the members.
#[derive(Default)]
pub(super) struct Done {
    /// The layers, by diff id.
    pub prepared: HashMap<Digest, Prepared>,
    /// The diff ids that members were found to have, by their own digests.
    pub diff_ids: HashMap<Digest, Digest>,
}

impl Done {
    fn add(&mut self, member: Digest, prepared: Prepared) {
        self.diff_ids.insert(member, prepared.diff_id().clone());
        self.prepared.insert(prepared.diff_id().clone(), prepared);
    }
}

enum Task {
    Follow(Arc<Job>),
    Index(Unindexed),
}

impl Task {
    /// The member's digest, as soon as it is known.
    fn member(&self) -> Option<&Digest> {
        match self {
            Self::Follow(job) => job.digest.get(),
            Self::Index(unindexed) => Some(unindexed.diff_id()),
        }
    }
}

/// A member that comes, or has come, into a file.
#[derive(Debug)]
struct Job {
    path: PathBuf,
    compressed: bool,
    follow: Arc<Follow>,
    /// Of the file: known when all of it has come.
    digest: OnceLock<Digest>,
}

impl<'s> Unpacking<'s> {
    pub fn new(layers: &'s Layers) -> Self {
        Self { layers, state: Mutex::default(), changed: Condvar::new() }
    }

    pub fn layers(&self) -> &'s Layers {
        self.layers
    }

    /// Starts the threads. They end when what is returned is dropped.
    pub fn start<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) -> Running<'scope> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..threads {
            let thread = std::thread::Builder::new().name("unpack".to_owned());
            if thread.spawn_scoped(scope, || self.work()).is_err() {
                // What nobody unpacks now is unpacked when the archive is there.
                break;
            }
            self.state().threads += 1;
        }
        Running { unpacking: self }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a member that is kept already indexed while the next one comes.
    pub fn index(&self, unindexed: Unindexed) {
        {
            let mut state = self.state();
            let queued = state.waiting.iter().filter(|task| matches!(task, Task::Index(_))).count();
            if state.threads > 0 && queued < UNINDEXED_MAX {
                state.waiting.push_back(Task::Index(unindexed));
                self.changed.notify_all();
                return;
            }
            state.at_work += 1;
        }
        self.carry_out(Task::Index(unindexed));
    }

    /// Unpacks behind the file at `path`, which is there and empty.
    pub fn follow(&self, path: &Path, compressed: bool) -> Coming {
        let job = Arc::new(Job {
            path: path.to_owned(),
            compressed,
            follow: Arc::default(),
            digest: OnceLock::new(),
        });
        let mut state = self.state();
        state.all.push(Arc::clone(&job));
        state.waiting.push_back(Task::Follow(Arc::clone(&job)));
        self.changed.notify_all();
        Coming { job, whole: false }
    }

    /// Gives up members with other digests than these, waits for the rest and returns what came of them.
    pub fn finish(&self, wanted: &HashSet<Digest>) -> Done {
        let mut state = self.state();
        state.waiting.retain(|task| task.member().is_some_and(|member| wanted.contains(member)));
        for job in &state.all {
            if !job.digest.get().is_some_and(|digest| wanted.contains(digest)) {
                job.follow.fail();
            }
        }
        while (state.threads > 0 && !state.waiting.is_empty()) || state.at_work > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut state.done)
    }

    fn work(&self) {
        loop {
            let task = {
                let mut state = self.state();
                loop {
                    if state.closed {
                        return;
                    }
                    if let Some(task) = state.waiting.pop_front() {
                        state.at_work += 1;
                        break task;
                    }
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            };
            self.carry_out(task);
        }
    }

    /// Does what is counted as being at work already.
    fn carry_out(&self, task: Task) {
        let done = match task {
            Task::Follow(job) => match self.unpack(&job) {
                Ok(prepared) => job.digest.get().map(|digest| (digest.clone(), prepared)),
                Err(_) => None,
            },
            Task::Index(unindexed) => {
                let member = unindexed.diff_id().clone();
                unindexed.index().ok().flatten().map(|prepared| (member, prepared))
            }
        };
        let mut state = self.state();
        state.at_work -= 1;
        if let Some((member, prepared)) = done {
            state.done.add(member, prepared);
        }
        self.changed.notify_all();
    }

    fn unpack(&self, job: &Job) -> Result<Prepared> {
        let file = File::open(&job.path).at("open", &job.path)?;
        let diff_id =
            if job.compressed { DiffId::Hashed(Algorithm::Sha256) } else { DiffId::Told(&job.digest) };
        self.layers.prepare(Follower::new(file, Arc::clone(&job.follow)), diff_id, "of the archive")
    }
}

/// Keeps the threads going.
pub(super) struct Running<'a> {
    unpacking: &'a Unpacking<'a>,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.unpacking.state();
        state.closed = true;
        for job in &state.all {
            job.follow.fail();
        }
        self.unpacking.changed.notify_all();
    }
}

/// A member that is coming. One that is dropped before its end has broken off.
pub(super) struct Coming {
    job: Arc<Job>,
    whole: bool,
}

impl Coming {
    pub fn reached(&self, length: u64) {
        self.job.follow.advance(length);
    }

    /// All of it is there, and this is its digest.
    pub fn end(mut self, digest: &Digest) {
        self.whole = true;
        // Once: there is one end.
        self.job.digest.get_or_init(|| digest.clone());
        self.job.follow.finish();
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        if !self.whole {
            self.job.follow.fail();
        }
    }
}
