//! As much of D-Bus as asking systemd for units needs: one connection, calls, their answers, one
//! signal. Little-endian; nothing larger than a mebibyte is read, nothing is waited for endlessly.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::error::{Error, Kind};

const PATIENCE: Duration = Duration::from_secs(30);
const LARGEST: usize = 1 << 20;

/// A value of a unit's property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Bool(bool),
    I32(i32),
    I64(i64),
    U32(u32),
    U64(u64),
    Text(String),
    Numbers(Vec<u32>),
    Bytes(Vec<u8>),
}

impl Value {
    fn signature(&self) -> &'static str {
        match self {
            Self::Bool(_) => "b",
            Self::I32(_) => "i",
            Self::I64(_) => "x",
            Self::U32(_) => "u",
            Self::U64(_) => "t",
            Self::Text(_) => "s",
            Self::Numbers(_) => "au",
            Self::Bytes(_) => "ay",
        }
    }
}

/// A message's body in the making.
#[derive(Debug, Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    pub fn u32(&mut self, n: u32) -> &mut Self {
        self.align(4);
        self.0.extend(n.to_le_bytes());
        self
    }

    pub fn text(&mut self, text: &str) -> &mut Self {
        self.u32(text.len() as u32);
        self.0.extend(text.as_bytes());
        self.0.push(0);
        self
    }

    fn signature(&mut self, text: &str) {
        self.0.push(text.len() as u8);
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    /// An array whose elements are aligned to `to`.
    fn array(&mut self, to: usize, fill: impl FnOnce(&mut Self)) {
        self.u32(0);
        let length_at = self.0.len() - 4;
        self.align(to);
        let start = self.0.len();
        fill(self);
        let length = (self.0.len() - start) as u32;
        self.0[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
    }

    pub fn bool(&mut self, yes: bool) -> &mut Self {
        self.u32(yes.into())
    }

    pub fn numbers(&mut self, list: &[u32]) -> &mut Self {
        self.array(4, |w| {
            for n in list {
                w.u32(*n);
            }
        });
        self
    }

    fn variant(&mut self, value: &Value) {
        self.signature(value.signature());
        match value {
            Value::Bool(yes) => drop(self.bool(*yes)),
            Value::I32(n) => drop(self.u32(*n as u32)),
            Value::U32(n) => drop(self.u32(*n)),
            Value::I64(n) => {
                self.align(8);
                self.0.extend(n.to_le_bytes());
            }
            Value::U64(n) => {
                self.align(8);
                self.0.extend(n.to_le_bytes());
            }
            Value::Text(text) => drop(self.text(text)),
            Value::Numbers(list) => drop(self.numbers(list)),
            Value::Bytes(bytes) => self.array(1, |w| w.0.extend(bytes)),
        }
    }

    /// `a(sv)`.
    pub fn properties(&mut self, list: &[(String, Value)]) -> &mut Self {
        self.array(8, |w| {
            for (name, value) in list {
                w.align(8);
                w.text(name);
                w.variant(value);
            }
        });
        self
    }

    /// An array of structures that has none.
    pub fn no_structures(&mut self) -> &mut Self {
        self.array(8, |_| {});
        self
    }
}

/// A message's bytes, read from the front.
#[derive(Debug, Clone)]
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(length)?)?;
        self.at += length;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|b| b[0])
    }

    fn u32(&mut self) -> Option<u32> {
        self.align(4);
        self.take(4)?.try_into().ok().map(u32::from_le_bytes)
    }

    fn text(&mut self) -> Option<&'a str> {
        let length = self.u32()? as usize;
        let text = self.take(length.checked_add(1)?)?;
        std::str::from_utf8(&text[..length]).ok()
    }

    fn signature(&mut self) -> Option<&'a str> {
        let length = usize::from(self.u8()?);
        let text = self.take(length + 1)?;
        std::str::from_utf8(&text[..length]).ok()
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Message {
    kind: u8,
    answers: u32,
    member: String,
    error: String,
    signature: String,
    body: Vec<u8>,
}

impl Message {
    fn reader(&self) -> Reader<'_> {
        Reader { bytes: &self.body, at: 0 }
    }

    /// From a whole message; `None` if it is not one.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut message = Self { kind: *bytes.get(1)?, ..Self::default() };
        let mut r = Reader { bytes, at: 12 };
        let end = r.u32()? as usize + 16;
        let mut fields = Reader { bytes: bytes.get(..end)?, at: 16 };
        while fields.at < end {
            fields.align(8);
            let code = fields.u8()?;
            match (code, fields.signature()?) {
                (5, "u") => message.answers = fields.u32()?,
                (8, "g") => fields.signature()?.clone_into(&mut message.signature),
                (code, "s" | "o") => {
                    let text = fields.text()?;
                    match code {
                        3 => text.clone_into(&mut message.member),
                        4 => text.clone_into(&mut message.error),
                        _ => {}
                    }
                }
                (_, "u") => drop(fields.u32()?),
                _ => return None,
            }
        }
        bytes.get(end.next_multiple_of(8)..)?.clone_into(&mut message.body);
        Some(message)
    }
}

const CALL: u8 = 1;
const RETURN: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

/// A connection to a message bus.
#[derive(Debug)]
pub(super) struct Bus {
    stream: UnixStream,
    serial: u32,
    /// Ended jobs that were heard of before they were waited for: (job, result).
    ended: Vec<(String, String)>,
}

/// An answer that is an error: its name and what it says.
#[derive(Debug)]
pub(super) struct Refusal {
    pub name: String,
    pub text: String,
}

impl Bus {
    /// `address`: as in `DBUS_SYSTEM_BUS_ADDRESS`, or a path.
    pub fn connect(address: &str) -> Result<Self, Error> {
        let what = || format!("connecting to the message bus {address:?}");
        let path = address.split(';').next().unwrap_or_default();
        let path = match path.split_once(':') {
            Some(("unix", keys)) => keys.split(',').find_map(|k| k.strip_prefix("path=")),
            Some(_) => None,
            None => Some(path),
        };
        let path =
            path.ok_or_else(|| Error::unsupported(format!("{}: only unix:path=… is known", what())))?;
        let failed = |e| Error::os(what(), e);
        let mut stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
        let uid = rustix::process::geteuid().as_raw().to_string();
        // In hexadecimal digits of its text, and a decimal digit's are 3 and itself.
        let hex: String = uid.chars().flat_map(|digit| ['3', digit]).collect();
        stream.write_all(format!("\0AUTH EXTERNAL {hex}\r\n").as_bytes()).map_err(failed)?;
        let answer = line(&mut stream).map_err(failed)?;
        if !answer.starts_with("OK ") {
            return Err(Error::new(Kind::PermissionDenied, format!("{}: {}", what(), answer.trim())));
        }
        stream.write_all(b"BEGIN\r\n").map_err(failed)?;
        let mut bus = Self { stream, serial: 0, ended: Vec::new() };
        let own = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus");
        bus.call(own, "Hello", "", &Writer::default())?.map_err(|r| r.into_error(what()))?;
        Ok(bus)
    }

    /// One call and its answer's body (if it is a text: that).
    pub fn call(
        &mut self,
        (destination, path, interface): (&str, &str, &str),
        member: &str,
        signature: &str,
        body: &Writer,
    ) -> Result<Result<String, Refusal>, Error> {
        let failed = |e: io::Error| Error::os(format!("calling {interface}.{member}"), e);
        self.serial += 1;
        let serial = self.serial;
        let mut w = Writer(vec![b'l', CALL, 0, 1]);
        w.u32(body.0.len() as u32).u32(serial);
        let fields = [(1, "o", path), (2, "s", interface), (3, "s", member), (6, "s", destination)];
        w.array(8, |w| {
            for (code, kind, text) in fields {
                w.align(8);
                w.0.push(code);
                w.signature(kind);
                w.text(text);
            }
            if !signature.is_empty() {
                w.align(8);
                w.0.push(8);
                w.signature("g");
                w.signature(signature);
            }
        });
        w.align(8);
        w.0.extend(&body.0);
        self.stream.write_all(&w.0).map_err(failed)?;
        let until = Instant::now() + PATIENCE;
        loop {
            let message = self.read(until).map_err(failed)?;
            let text = || message.reader().text().unwrap_or_default().to_owned();
            match message.kind {
                RETURN if message.answers == serial => {
                    let texts = message.signature.starts_with(['s', 'o']);
                    return Ok(Ok(if texts { text() } else { String::new() }));
                }
                ERROR if message.answers == serial => {
                    return Ok(Err(Refusal { name: message.error.clone(), text: text() }));
                }
                _ => self.note(&message),
            }
        }
    }

    /// Waits until the job `path` has ended; its result (`done`, `failed`, …).
    pub fn job(&mut self, path: &str) -> Result<String, Error> {
        let failed = |e: io::Error| Error::os("waiting for systemd", e);
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(place) = self.ended.iter().position(|(job, _)| job == path) {
                return Ok(self.ended.swap_remove(place).1);
            }
            let message = self.read(until).map_err(failed)?;
            self.note(&message);
        }
    }

    fn note(&mut self, message: &Message) {
        if message.kind != SIGNAL || message.member != "JobRemoved" || message.signature != "uoss" {
            return;
        }
        let mut r = message.reader();
        let ended = (|| {
            r.u32()?;
            let job = r.text()?.to_owned();
            r.text()?;
            Some((job, r.text()?.to_owned()))
        })();
        self.ended.extend(ended);
    }

    fn read(&mut self, until: Instant) -> io::Result<Message> {
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "not a message of this protocol");
        if Instant::now() > until {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut bytes = vec![0; 16];
        self.stream.read_exact(&mut bytes)?;
        let number = |at: usize| {
            let n = bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
            n.unwrap_or_default() as usize
        };
        let (body, fields) = (number(4), number(12));
        if bytes[0] != b'l' || body > LARGEST || fields > LARGEST {
            return Err(wrong());
        }
        bytes.resize((16 + fields).next_multiple_of(8) + body, 0);
        self.stream.read_exact(&mut bytes[16..])?;
        Message::parse(&bytes).ok_or_else(wrong)
    }
}

impl Refusal {
    pub fn into_error(self, step: impl std::fmt::Display) -> Error {
        Error::new(Kind::Os, format!("{step}: {} ({})", self.text, self.name))
    }
}

/// One line of the authentication.
fn line(stream: &mut UnixStream) -> io::Result<String> {
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(b"\r\n") && text.len() < 512 {
        stream.read_exact(&mut byte)?;
        text.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn properties_are_laid_out_as_the_protocol_says() {
        let mut w = Writer::default();
        w.text("ab").properties(&[("X".to_owned(), Value::U64(7)), ("Y".to_owned(), Value::Bool(true))]);
        let wanted = [
            &[2, 0, 0, 0, b'a', b'b', 0, 0][..],
            // Length 36 of the array, then its first structure at a multiple of eight.
            &[36, 0, 0, 0, 0, 0, 0, 0],
            &[1, 0, 0, 0, b'X', 0, 1, b't', 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0],
            &[1, 0, 0, 0, b'Y', 0, 1, b'b', 0, 0, 0, 0, 1, 0, 0, 0],
        ]
        .concat();
        let mut wanted = wanted;
        wanted[8] = (wanted.len() - 16) as u8;
        assert_eq!(w.0, wanted);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            drop(Message::parse(&bytes));
        }
    }
}
