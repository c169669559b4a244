//! A blocking netlink socket: several requests in one datagram, one acknowledgement; dumps.
//!
//! Invariant: answers are told apart by sequence number, so whatever a failed call left unread never reaches
//! the next one; a dump during which the kernel's state changed is never taken for a whole one.

use std::io;

use netlink_sys::{Socket as Raw, SocketAddr};

use crate::error::Error;
use crate::wire::{HEADER, Messages, NLM_F_DUMP, Received, attribute, messages, text, u32_at};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// The kernel fits what it dumps into the buffer it is offered, up to 32 KiB.
const RECEIVE: usize = 32 * 1024;
/// What the kernel's default for the send buffer takes for sure.
const SEND_DEFAULT: usize = 128 * 1024;
const DUMP_ATTEMPTS: usize = 8;

/// What carries datagrams to the kernel and back.
pub(crate) trait Wire {
    fn send(&self, bytes: &[u8]) -> io::Result<()>;
    /// Replaces what is in `buffer` by the next datagram.
    fn receive(&self, buffer: &mut Vec<u8>) -> io::Result<()>;
}

impl Wire for Raw {
    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() > SEND_DEFAULT {
            // The kernel doubles the value; a message must fit into the buffer whole.
            rustix::net::sockopt::set_socket_send_buffer_size_force(self, bytes.len())?;
        }
        loop {
            match Raw::send(self, bytes, 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(_) => return Ok(()),
            }
        }
    }

    fn receive(&self, buffer: &mut Vec<u8>) -> io::Result<()> {
        loop {
            buffer.clear();
            buffer.reserve(RECEIVE);
            match self.recv(buffer, 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(_) => return Ok(()),
            }
        }
    }
}

/// A socket of one netlink protocol in the network namespace it was opened in.
#[derive(Debug)]
pub(crate) struct Socket<W = Raw> {
    raw: W,
    port: u32,
    sequence: u32,
    buffer: Vec<u8>,
}

/// Which message of a batch tells that all of it was done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Closing {
    /// The last one: messages are independent.
    Last,
    /// The one before the last, which is the end of a transaction. A refusal of the first one is final.
    Transaction,
}

impl Socket {
    pub fn route() -> Result<Self, Error> {
        Self::open(netlink_sys::protocols::NETLINK_ROUTE)
    }

    pub fn netfilter() -> Result<Self, Error> {
        Self::open(netlink_sys::protocols::NETLINK_NETFILTER)
    }

    fn open(protocol: isize) -> Result<Self, Error> {
        let open = || -> io::Result<(Raw, u32)> {
            let mut raw = Raw::new(protocol)?;
            let port = raw.bind_auto()?.port_number();
            raw.connect(&SocketAddr::new(0, 0))?;
            raw.set_cap_ack(true)?;
            raw.set_ext_ack(true)?;
            Ok((raw, port))
        };
        match open() {
            Ok((raw, port)) => Ok(Self { raw, port, sequence: 1, buffer: Vec::new() }),
            Err(source) => {
                Err(Error::Kernel { what: "open a netlink socket".to_owned(), detail: None, source })
            }
        }
    }
}

impl<W: Wire> Socket<W> {
    /// By which the kernel tells this socket's doings from those of others.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Sends the messages at once. All are attempted; the error is that of the first one refused.
    pub fn execute(&mut self, batch: Messages) -> Result<(), Error> {
        self.run(batch, Closing::Last)
    }

    /// Sends a transaction: the first and the last message are its begin and end; all or nothing is done.
    pub fn commit(&mut self, batch: Messages) -> Result<(), Error> {
        self.run(batch, Closing::Transaction)
    }

    fn run(&mut self, mut batch: Messages, closing: Closing) -> Result<(), Error> {
        let count = batch.index.len();
        let acked = match closing {
            Closing::Last if count > 0 => count - 1,
            Closing::Transaction if count > 2 => count - 2,
            Closing::Last | Closing::Transaction => return Ok(()),
        };
        let first = self.take_sequence(count);
        batch.seal(first, acked);
        self.send(&batch.bytes).map_err(|source| failure(&batch, acked, None, source))?;
        let mut refused = None;
        loop {
            self.receive().map_err(|source| failure(&batch, acked, None, source))?;
            for message in messages(&self.buffer) {
                let number = message.sequence.wrapping_sub(first) as usize;
                if message.kind != NLMSG_ERROR || number >= count {
                    continue;
                }
                let (code, detail) = verdict(&message);
                if code != 0 && refused.is_none() {
                    refused = Some(failure(&batch, number, detail, io::Error::from_raw_os_error(code)));
                }
                let is_final =
                    number == acked || (closing == Closing::Transaction && number == 0 && code != 0);
                if is_final {
                    return refused.map_or(Ok(()), Err);
                }
            }
        }
    }

    /// Sends one message and gives each answer to `each`; returns when the kernel has acknowledged it.
    pub fn query(&mut self, batch: Messages, mut each: impl FnMut(&Received<'_>)) -> Result<(), Error> {
        let mut batch = batch;
        let sequence = self.take_sequence(1);
        batch.seal(sequence, 0);
        self.send(&batch.bytes).map_err(|source| failure(&batch, 0, None, source))?;
        loop {
            self.receive().map_err(|source| failure(&batch, 0, None, source))?;
            for message in messages(&self.buffer).filter(|message| message.sequence == sequence) {
                if message.kind == NLMSG_ERROR {
                    return match verdict(&message) {
                        (0, _) => Ok(()),
                        (code, detail) => Err(failure(&batch, 0, detail, io::Error::from_raw_os_error(code))),
                    };
                }
                each(&message);
            }
        }
    }

    /// Asks for all objects and returns what `each` makes of them, again from the start if they changed
    /// meanwhile.
    pub fn dump<T>(
        &mut self,
        what: &'static str,
        kind: u16,
        header: &[u8],
        mut each: impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut batch = Messages::new();
            batch.push(what, kind, NLM_F_DUMP, header, |_| {});
            let sequence = self.take_sequence(1);
            batch.seal(sequence, usize::MAX);
            self.send(&batch.bytes).map_err(|source| failure(&batch, 0, None, source))?;
            let mut found = Vec::new();
            if !self.read_dump(&batch, sequence, |payload| found.extend(each(payload)))? {
                return Ok(found);
            }
        }
        let source = io::Error::new(io::ErrorKind::Interrupted, "the state kept changing while it was read");
        Err(Error::Kernel { what: what.to_owned(), detail: None, source })
    }

    /// Whether the dump was interrupted.
    fn read_dump(
        &mut self,
        batch: &Messages,
        sequence: u32,
        mut each: impl FnMut(&[u8]),
    ) -> Result<bool, Error> {
        let mut interrupted = false;
        loop {
            self.receive().map_err(|source| failure(batch, 0, None, source))?;
            for message in messages(&self.buffer).filter(|message| message.sequence == sequence) {
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                let code = match message.kind {
                    NLMSG_DONE => u32_at(message.payload, 0).map_or(0, |code| (code as i32).wrapping_neg()),
                    NLMSG_ERROR => verdict(&message).0,
                    _ => {
                        each(message.payload);
                        continue;
                    }
                };
                return match code {
                    0 => Ok(interrupted),
                    libc::EINTR | libc::EAGAIN => Ok(true),
                    code => Err(failure(batch, 0, None, io::Error::from_raw_os_error(code))),
                };
            }
        }
    }

    fn take_sequence(&mut self, count: usize) -> u32 {
        let first = self.sequence;
        self.sequence = self.sequence.wrapping_add(count as u32);
        first
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.raw.send(bytes)
    }

    fn receive(&mut self) -> io::Result<()> {
        self.raw.receive(&mut self.buffer)
    }
}

/// Errno (0 for an acknowledgement) and the kernel's own words.
fn verdict(message: &Received<'_>) -> (i32, Option<String>) {
    let code = u32_at(message.payload, 0).map_or(libc::EPROTO, |code| (code as i32).wrapping_neg());
    let detail = (message.flags & NLM_F_ACK_TLVS != 0)
        .then(|| {
            let echoed =
                if message.flags & NLM_F_CAPPED == 0 { u32_at(message.payload, 4)? as usize } else { HEADER };
            let attributes = message.payload.get(4 + echoed.next_multiple_of(4)..)?;
            attribute(attributes, NLMSGERR_ATTR_MSG).map(text)
        })
        .flatten();
    (code, detail)
}

fn failure(batch: &Messages, number: usize, detail: Option<String>, source: io::Error) -> Error {
    let what =
        batch.index.get(number).map_or_else(|| "netlink request".to_owned(), |(_, what)| what.to_string());
    Error::Kernel { what, detail, source }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;

    use super::*;

    /// Messages: kind, flags and payload each.
    type Datagram = Vec<(u16, u16, Vec<u8>)>;

    /// A kernel that answers each request with prepared datagrams; the sequence number is filled in.
    #[derive(Default)]
    struct Script {
        dumps: RefCell<VecDeque<Vec<Datagram>>>,
        asked: RefCell<Vec<u32>>,
        waiting: RefCell<VecDeque<Vec<u8>>>,
    }

    impl Wire for Script {
        fn send(&self, bytes: &[u8]) -> io::Result<()> {
            let sequence = u32_at(bytes, 8).unwrap();
            self.asked.borrow_mut().push(sequence);
            for datagram in self.dumps.borrow_mut().pop_front().unwrap_or_default() {
                let mut all = Vec::new();
                for (kind, flags, payload) in datagram {
                    let length = (HEADER + payload.len()) as u32;
                    all.extend(length.to_ne_bytes());
                    all.extend(kind.to_ne_bytes());
                    all.extend(flags.to_ne_bytes());
                    all.extend(sequence.to_ne_bytes());
                    all.extend([0; 4]);
                    all.extend(payload);
                }
                self.waiting.borrow_mut().push_back(all);
            }
            Ok(())
        }

        fn receive(&self, buffer: &mut Vec<u8>) -> io::Result<()> {
            *buffer = self.waiting.borrow_mut().pop_front().ok_or(io::ErrorKind::UnexpectedEof)?;
            Ok(())
        }
    }

    const OBJECT: u16 = 16;

    fn object(number: u32) -> (u16, u16, Vec<u8>) {
        (OBJECT, 2, number.to_ne_bytes().to_vec())
    }

    fn done(code: i32) -> (u16, u16, Vec<u8>) {
        (NLMSG_DONE, 2, code.to_ne_bytes().to_vec())
    }

    fn dump(script: Script) -> (Result<Vec<u32>, Error>, usize) {
        let mut socket = Socket { raw: script, port: 1, sequence: 7, buffer: Vec::new() };
        let found = socket.dump("list things", 18, &[0; 4], |payload| u32_at(payload, 0));
        let asked = socket.raw.asked.borrow().len();
        (found, asked)
    }

    fn script(dumps: Vec<Vec<Datagram>>) -> Script {
        Script { dumps: RefCell::new(dumps.into()), ..Script::default() }
    }

    #[test]
    fn a_dump_that_was_interrupted_is_asked_for_again() {
        let torn = |(kind, flags, payload): (u16, u16, Vec<u8>)| (kind, flags | NLM_F_DUMP_INTR, payload);
        // By a mark on an object, by one on the end, and by the end's own code.
        for interrupted in [
            vec![vec![torn(object(1)), object(2)], vec![done(0)]],
            vec![vec![object(1)], vec![torn(done(0))]],
            vec![vec![object(1)], vec![done(-libc::EINTR)]],
            vec![vec![object(1), (NLMSG_ERROR, 0, (-libc::EAGAIN).to_ne_bytes().to_vec())]],
        ] {
            let whole = vec![vec![object(3), object(4)], vec![object(5), done(0)]];
            let (found, asked) = dump(script(vec![interrupted, whole]));
            assert_eq!(found.unwrap(), [3, 4, 5], "nothing of the first one is kept");
            assert_eq!(asked, 2);
        }
    }

    #[test]
    fn a_state_that_never_rests_is_an_error_in_the_end() {
        let restless = (0..100).map(|_| vec![vec![object(1), done(-libc::EINTR)]]).collect();
        let (found, asked) = dump(script(restless));
        assert!(found.unwrap_err().to_string().contains("list things"));
        assert_eq!(asked, DUMP_ATTEMPTS);
    }

    #[test]
    fn what_an_earlier_call_left_is_not_taken_for_an_answer() {
        let mut socket = Socket { raw: script(Vec::new()), port: 1, sequence: 7, buffer: Vec::new() };
        socket.raw.dumps.borrow_mut().push_back(vec![vec![object(1)]]);
        assert!(socket.dump("list things", 18, &[0; 4], |payload| u32_at(payload, 0)).is_err(), "no end");
        // Late messages of that call lie before those of the next.
        socket.raw.dumps.borrow_mut().extend([vec![vec![object(2)]], vec![vec![object(3), done(0)]]]);
        let late = [HEADER as u32 + 4, u32::from(OBJECT), 7, 0, 9];
        socket.raw.waiting.borrow_mut().push_back(late.iter().flat_map(|word| word.to_ne_bytes()).collect());
        socket.raw.dumps.borrow_mut().pop_front();
        assert_eq!(socket.dump("list things", 18, &[0; 4], |payload| u32_at(payload, 0)).unwrap(), [3]);
    }
}
