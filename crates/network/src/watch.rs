//! Noticing that somebody else changed the firewall: `nft flush ruleset`, a restart of the host's own firewall.
//!
//! Invariant: changes of our own are told apart by the netlink port they came from, so re-asserting never calls for
//! re-asserting again.

use std::time::Duration;

use netlink_sys::Socket as Raw;
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::error::Error;
use crate::wire::{Received, attribute, messages, text};

/// `NFNLGRP_NFTABLES`
const GROUP: u32 = 7;
const DELETIONS: [u16; 5] = [0x0a02, 0x0a05, 0x0a08, 0x0a0b, 0x0a0e];

/// What the kernel tells about its tables.
#[derive(Debug)]
pub struct FirewallEvents {
    /// `None` where nobody tells.
    socket: Option<Raw>,
}

impl FirewallEvents {
    /// Of the calling thread's network namespace.
    pub fn open() -> Result<Self, Error> {
        let open = || -> std::io::Result<Raw> {
            let mut socket: Raw = Raw::new(netlink_sys::protocols::NETLINK_NETFILTER)?;
            socket.bind_auto()?;
            socket.add_membership(GROUP)?;
            socket.set_non_blocking(true)?;
            Ok(socket)
        };
        open().map(|socket| Self { socket: Some(socket) }).map_err(|source| Error::Kernel {
            what: "watch the firewall".to_owned(),
            detail: None,
            source,
        })
    }

    /// For a firewall whose changes nobody tells of.
    pub fn none() -> Self {
        Self { socket: None }
    }

    /// Waits for at most `patience`; whether something was taken out of the table `table`, or may have been.
    pub fn wait(&mut self, table: &str, own: &[u32], patience: Duration) -> bool {
        self.wait_for(own, patience, |message| {
            let name = message.payload.get(4..).and_then(|body| attribute(body, 1));
            DELETIONS.contains(&message.kind) && name.is_some_and(|name| text(name) == table)
        })
    }

    /// The same; whether anything was changed.
    pub fn wait_for_anything(&mut self, own: &[u32], patience: Duration) -> bool {
        self.wait_for(own, patience, |_message| true)
    }

    fn wait_for(
        &mut self,
        own: &[u32],
        patience: Duration,
        concerns: impl Fn(&Received<'_>) -> bool,
    ) -> bool {
        let timeout =
            Timespec { tv_sec: patience.as_secs().cast_signed(), tv_nsec: patience.subsec_nanos().into() };
        let Some(socket) = &self.socket else {
            std::thread::sleep(patience);
            return false;
        };
        let mut fds = [PollFd::new(socket, PollFlags::IN)];
        if !matches!(rustix::event::poll(&mut fds, Some(&timeout)), Ok(1..)) {
            return false;
        }
        let mut touched = false;
        let mut buffer = Vec::with_capacity(64 << 10);
        loop {
            buffer.clear();
            match socket.recv(&mut buffer, 0) {
                Ok(_) => {}
                // More happened than fits: look.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => touched = true,
                Err(_nothing_more) => return touched,
            }
            touched |= messages(&buffer).any(|message| !own.contains(&message.port) && concerns(&message));
        }
    }
}
