//! A slow cable to a registry: bytes are counted and come at a rate, so that a test can break a pull in the middle.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{Engine, sandbox};

/// A relay on loopback in the engine's own network, in front of one of its ports.
#[derive(Debug)]
pub struct Link {
    at: SocketAddr,
    netns: OwnedFd,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Bytes that the engine was sent.
    received: AtomicU64,
    /// Bytes a millisecond; 0 is no limit.
    rate: AtomicU64,
    closed: AtomicBool,
}

impl Link {
    /// Relays to `port` of the engine's loopback.
    #[track_caller]
    pub fn to(engine: &Engine, port: u16) -> Self {
        let netns = engine.sandbox().netns();
        let listener = sandbox::within(&netns, || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
        let listener = listener.expect("a free port");
        let at = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared::default());
        let target = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let (inside, theirs) = (engine.sandbox().netns(), Arc::clone(&shared));
        std::thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                if theirs.closed.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(far) = sandbox::within(&inside, || TcpStream::connect(target)) else { continue };
                relay(near, far, &theirs);
            }
        });
        Self { at, netns, shared }
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        self.at.to_string()
    }

    /// From now on at most so many bytes a second (0: as many as there are).
    pub fn limit(&self, bytes_per_second: u64) {
        self.shared.rate.store(bytes_per_second / 1000, Ordering::Relaxed);
    }

    /// Bytes that the engine was sent so far.
    pub fn received(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts; if that is gone already there is nothing to wake.
        sandbox::within(&self.netns, || drop(TcpStream::connect(self.at)));
    }
}

/// Copies both ways until one side has had enough.
fn relay(near: TcpStream, far: TcpStream, shared: &Arc<Shared>) {
    let (Ok(near_in), Ok(far_out)) = (near.try_clone(), far.try_clone()) else { return };
    std::thread::spawn(move || copy(near_in, far_out, None));
    let shared = Arc::clone(shared);
    std::thread::spawn(move || copy(far, near, Some(&shared)));
}

fn copy(mut from: TcpStream, mut to: TcpStream, counted: Option<&Shared>) {
    let mut buffer = vec![0; 32 << 10];
    while let Ok(n) = from.read(&mut buffer) {
        if n == 0 || to.write_all(&buffer[..n]).is_err() {
            break;
        }
        if let Some(shared) = counted {
            shared.received.fetch_add(n as u64, Ordering::Relaxed);
            // No rate is no limit.
            if let Some(pause) = (n as u64 * 1000).checked_div(shared.rate.load(Ordering::Relaxed)) {
                std::thread::sleep(Duration::from_micros(pause));
            }
        }
    }
    // A side that is gone already has nothing to be told.
    from.shutdown(Shutdown::Both).ok();
    to.shutdown(Shutdown::Both).ok();
}
