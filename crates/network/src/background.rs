//! What is done off the path of a container's start: network namespaces made ahead, and a look after
//! interfaces that should have gone with their namespace.
//!
//! Invariant: at most `capacity` namespaces wait; all of them end with the [`Background`].

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use brigantine_sys::netns;

use crate::error::Error;
use crate::fabric::{NameSockets, Owner, enter};
use crate::link;
use crate::socket::Socket;
use crate::sysctl;
use crate::wire::Messages;

/// How long the kernel may take for a namespace whose last process ended.
const GRACE: Duration = Duration::from_secs(3);

/// A network namespace with its loopback up, and a route socket inside it.
#[derive(Debug)]
pub(crate) struct Ready {
    pub netns: OwnedFd,
    pub socket: Socket,
    /// Sockets by which names are asked for, if they were made along with it.
    pub names: Option<NameSockets>,
    /// Whether interfaces in it will be safe from each other; a container with interfaces needs that.
    pub guarded: Result<(), Error>,
    /// Whether IPv6 has to be turned on for interfaces that are to have it.
    pub has_ipv6_off: bool,
}

impl Ready {
    /// With an owner, the namespace belongs to a new user namespace with its maps.
    pub fn make(owner: Option<&Owner>, is_named: bool) -> Result<Self, Error> {
        let inside = || {
            let mut socket = Socket::route()?;
            let mut batch = Messages::new();
            link::set_up(&mut batch, link::LOOPBACK, "lo");
            socket.execute(batch)?;
            let names = is_named.then(NameSockets::make).transpose()?;
            Ok((socket, names, guard(), sysctl::has_ipv6_off()))
        };
        let made = match owner {
            None => netns::create_with(inside),
            Some(Owner { uid_map, gid_map }) => {
                netns::create_owned(uid_map, gid_map).and_then(|(_, netns)| {
                    let socket = netns::within(netns.as_fd(), inside)?;
                    Ok((netns, socket))
                })
            }
        };
        let (netns, inside) = made.map_err(|source| Error::Kernel {
            what: "create a network namespace".to_owned(),
            detail: None,
            source: source.into(),
        })?;
        let (socket, names, guarded, has_ipv6_off) = inside?;
        Ok(Self { netns, socket, names, guarded, has_ipv6_off })
    }
}

/// In the calling thread's namespace: containers of a network must not configure each other by router advertisements,
/// and as the engine hands addresses out there are no duplicates to detect.
fn guard() -> Result<(), Error> {
    if sysctl::has_ipv6() {
        sysctl::ensure("ipv6/conf/default/accept_ra", "0")?;
        sysctl::ensure("ipv6/conf/default/accept_dad", "0")?;
    }
    Ok(())
}

#[derive(Debug, Default)]
struct State {
    plain: Vec<Ready>,
    /// Those with sockets for names. Half of all are such once one was asked for.
    named: Vec<Ready>,
    wants_named: bool,
    leaving: VecDeque<(Instant, String)>,
    closing: bool,
}

impl State {
    /// Whether one more is to be made, and whether with sockets for names.
    fn lacks(&self, capacity: usize) -> Option<bool> {
        let for_names = if self.wants_named { capacity / 2 } else { 0 };
        let has_room = self.plain.len() + self.named.len() < capacity;
        has_room.then_some(self.named.len() < for_names)
    }
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread and what it shares.
#[derive(Debug)]
pub(crate) struct Background {
    shared: Arc<Shared>,
    owner: Option<Owner>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    pub fn start(capacity: usize, owner: Option<Owner>) -> Self {
        let shared = Arc::new(Shared::default());
        let (theirs, whose) = (Arc::clone(&shared), owner.clone());
        let thread = std::thread::Builder::new()
            .name("network".to_owned())
            .spawn(move || run(&theirs, capacity, whose.as_ref()));
        let thread = match thread {
            Ok(thread) => Some(thread),
            Err(error) => {
                tracing::warn!(%error, "no thread for network namespaces made ahead; they are made on demand");
                None
            }
        };
        Self { shared, owner, thread }
    }

    /// One that waits, or a new one; `owned` by the configured owner, if there is one, or by the host's users. One that is
    /// `named` has sockets for names, which take longer than all the rest.
    pub fn take(&self, owned: bool, is_named: bool) -> Result<Ready, Error> {
        if self.owner.is_some() && !owned {
            return Ready::make(None, is_named);
        }
        let (named, plain) = {
            let mut state = self.shared.lock();
            state.wants_named |= is_named;
            let named = if is_named { state.named.pop() } else { None };
            let plain = if named.is_none() { state.plain.pop() } else { None };
            (named, plain)
        };
        self.shared.changed.notify_one();
        match (named, plain) {
            (Some(ready), _) => Ok(ready),
            (None, Some(mut ready)) if is_named => {
                ready.names = Some(enter(ready.netns.as_fd(), NameSockets::make)??);
                Ok(ready)
            }
            (None, Some(ready)) => Ok(ready),
            (None, None) => Ready::make(self.owner.as_ref(), is_named),
        }
    }

    /// Interfaces that go with a namespace that is about to end; they are removed if it does not.
    pub fn expect_gone(&self, names: impl Iterator<Item = String>) {
        let due = Instant::now() + GRACE;
        self.shared.lock().leaving.extend(names.map(|name| (due, name)));
        self.shared.changed.notify_one();
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the network thread panicked");
        }
    }
}

fn run(shared: &Shared, capacity: usize, owner: Option<&Owner>) {
    let mut state = shared.lock();
    let mut socket = None;
    let mut making_failed = false;
    while !state.closing {
        let due = state.leaving.front().map(|(due, _)| due.saturating_duration_since(Instant::now()));
        if let Some(is_named) = state.lacks(capacity).filter(|_| !making_failed) {
            drop(state);
            match Ready::make(owner, is_named) {
                Ok(ready) => {
                    state = shared.lock();
                    if is_named { state.named.push(ready) } else { state.plain.push(ready) }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot make network namespaces ahead; they are made on demand");
                    making_failed = true;
                    state = shared.lock();
                }
            }
        } else if due == Some(Duration::ZERO) {
            let name = state.leaving.pop_front().map(|(_, name)| name);
            drop(state);
            if let Some(name) = name
                && let Err(error) = remove_if_there(&mut socket, &name)
            {
                tracing::warn!(interface = name, %error, "cannot remove the interface of a container that is gone");
            }
            state = shared.lock();
        } else {
            state = match due {
                Some(due) => {
                    shared.changed.wait_timeout(state, due).unwrap_or_else(PoisonError::into_inner).0
                }
                None => shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

fn remove_if_there(socket: &mut Option<Socket>, name: &str) -> Result<(), Error> {
    let mut own = match socket.take() {
        Some(socket) => socket,
        None => Socket::route()?,
    };
    if link::find(&mut own, name)?.is_some() {
        let mut batch = Messages::new();
        link::delete_by_name(&mut batch, name);
        own.execute(batch)?;
    }
    *socket = Some(own);
    Ok(())
}
