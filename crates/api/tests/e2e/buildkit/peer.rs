//! The client's end of a session, made by hand: HTTP/2 with the roles reversed, gRPC's frames, and fsutil's packets byte
//! by byte, so that it can send what no library would.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use brigantine_testkit::Engine;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http_body_util::{BodyExt as _, BodyStream, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc};

/// Go's mode bits.
pub const DIR: u32 = 1 << 31 | 0o755;
pub const SYMLINK: u32 = 1 << 27 | 0o777;

const STAT: u64 = 0;
const DATA: u64 = 2;
const FIN: u64 = 3;

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value > 127 {
        out.push((value & 127) as u8 | 128);
        value >>= 7;
    }
    out.push(value as u8);
}

fn number(out: &mut Vec<u8>, field: u64, value: u64) {
    varint(out, field << 3);
    varint(out, value);
}

pub fn text(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    varint(out, field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

/// The numbers of a message's fields, as far as they are numbers, and its texts.
pub fn fields(mut raw: &[u8]) -> (HashMap<u64, u64>, HashMap<u64, Vec<u8>>) {
    fn read(raw: &mut &[u8]) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (first, rest) = raw.split_first()?;
            *raw = rest;
            value |= u64::from(first & 127) << shift;
            if first & 128 == 0 {
                return Some(value);
            }
        }
        None
    }
    let (mut numbers, mut texts) = (HashMap::new(), HashMap::new());
    while let Some(tag) = read(&mut raw) {
        let value = read(&mut raw).unwrap();
        if tag & 7 == 2 {
            let (text, rest) = raw.split_at(usize::try_from(value).unwrap());
            texts.insert(tag >> 3, text.to_vec());
            raw = rest;
        } else {
            numbers.insert(tag >> 3, value);
        }
    }
    (numbers, texts)
}

/// One thing that a scripted client does.
#[derive(Clone)]
pub enum Sends {
    Packet(Vec<u8>),
    /// Waits until this file was asked for.
    Wait(u32),
    /// The same packet for ever.
    Endless(Vec<u8>),
    /// Names for ever, each as long as can be.
    Names,
    /// Nothing more, but the connection stays.
    Hang,
    /// Closes the connection.
    Vanish,
    /// Waits for the engine to have everything, and says so, too.
    Finish,
}

impl Sends {
    pub fn bytes(self) -> Vec<u8> {
        match self {
            Self::Packet(packet) => packet,
            _ => Vec::new(),
        }
    }

    pub fn shown(&self) -> String {
        match self {
            Self::Packet(packet) => String::from_utf8_lossy(&packet[..packet.len().min(40)]).into_owned(),
            Self::Wait(id) => format!("wait for {id}"),
            Self::Endless(_) => "for ever".to_owned(),
            Self::Names => "names".to_owned(),
            Self::Hang => "hang".to_owned(),
            Self::Vanish => "vanish".to_owned(),
            Self::Finish => "finish".to_owned(),
        }
    }
}

fn listed(path: &str, mode: u32, size: i64, target: &str) -> Sends {
    let mut stat = Vec::new();
    text(&mut stat, 1, path.as_bytes());
    number(&mut stat, 2, u64::from(mode));
    number(&mut stat, 5, size.cast_unsigned());
    number(&mut stat, 6, 1_700_000_000_000_000_000);
    text(&mut stat, 7, target.as_bytes());
    let mut packet = Vec::new();
    number(&mut packet, 1, STAT);
    text(&mut packet, 2, &stat);
    Sends::Packet(packet)
}

pub fn entry(path: &str, mode: u32, size: i64) -> Sends {
    listed(path, mode, size, "")
}

pub fn link(path: &str, mode: u32, target: &str) -> Sends {
    listed(path, mode, 0, target)
}

/// The end of the list.
pub fn end() -> Sends {
    Sends::Packet(Vec::new())
}

pub fn data(id: u32, bytes: &[u8]) -> Sends {
    let mut packet = Vec::new();
    number(&mut packet, 1, DATA);
    number(&mut packet, 3, u64::from(id));
    text(&mut packet, 4, bytes);
    Sends::Packet(packet)
}

pub fn fin() -> Sends {
    let mut packet = Vec::new();
    number(&mut packet, 1, FIN);
    Sends::Packet(packet)
}

/// How the client answers when it is asked for a folder.
#[derive(Clone)]
pub struct Answers {
    script: Vec<Sends>,
    /// Files that are sent when they are asked for, by number.
    files: HashMap<u32, Vec<u8>>,
    asked: Arc<Mutex<Vec<u32>>>,
}

impl Answers {
    /// Just these.
    pub fn script(script: Vec<Sends>) -> Self {
        Self { script, files: HashMap::new(), asked: Arc::default() }
    }

    /// As it should be: path, mode, and what is in it or where it leads to.
    pub fn files(files: &[(&str, u32, &str)]) -> Self {
        let mut all = Self::script(Vec::new());
        for (number, (path, mode, content)) in files.iter().enumerate() {
            if *mode & (1 << 31) != 0 {
                all.script.push(entry(path, *mode, 0));
            } else if *mode & (1 << 27) != 0 {
                all.script.push(link(path, *mode, content));
            } else {
                all.script.push(entry(path, *mode, i64::try_from(content.len()).unwrap()));
                all.files.insert(u32::try_from(number).unwrap(), content.as_bytes().to_vec());
            }
        }
        all.script.extend([end(), Sends::Finish]);
        all
    }

    /// With the numbers of the files that were asked for.
    pub fn counted(self) -> (Arc<Mutex<Vec<u32>>>, Self) {
        (Arc::clone(&self.asked), self)
    }
}

/// A method that is answered with one message, or with a status of gRPC.
pub type Method = Box<dyn Fn(&[u8]) -> Result<Vec<u8>, u32> + Send + Sync>;

struct Shared {
    dockerfile: Answers,
    context: Answers,
    methods: HashMap<String, Method>,
    asked: AtomicBool,
    over: Notify,
}

/// An open session.
pub struct Peer {
    session: String,
    shared: Arc<Shared>,
    _runtime: tokio::runtime::Runtime,
}

impl Peer {
    /// Opens a session with this key, that has a Dockerfile and a context.
    pub fn open(engine: &Engine, key: &str, dockerfile: &str, context: Answers) -> Self {
        Self::with(engine, key, dockerfile, context, HashMap::new())
    }

    /// The same with further methods.
    pub fn with(
        engine: &Engine,
        key: &str,
        dockerfile: &str,
        context: Answers,
        methods: HashMap<String, Method>,
    ) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let session = format!("peer-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut head = format!(
            "POST /session HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\
             X-Docker-Expose-Session-Uuid: {session}\r\nX-Docker-Expose-Session-Sharedkey: {key}\r\n"
        );
        let own = ["/moby.filesync.v1.FileSync/DiffCopy"];
        for method in own.into_iter().chain(methods.keys().map(String::as_str)) {
            head.extend(["X-Docker-Expose-Session-Grpc-Method: ", method, "\r\n"]);
        }
        head.push_str("\r\n");
        let dockerfile = Answers::files(&[("Dockerfile", 0o644, dockerfile)]);
        let shared = Arc::new(Shared {
            dockerfile,
            context,
            methods,
            asked: AtomicBool::new(false),
            over: Notify::new(),
        });
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let stream = runtime.block_on(async {
            let mut stream = UnixStream::connect(engine.socket_path()).await.unwrap();
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            while !answer.ends_with(b"\r\n\r\n") {
                answer.push(stream.read_u8().await.unwrap());
            }
            assert!(answer.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&answer));
            stream
        });
        let served = Arc::clone(&shared);
        runtime.spawn(async move {
            let ended = Arc::clone(&served);
            let service = service_fn(move |request| {
                let shared = Arc::clone(&served);
                async move { Ok::<_, Infallible>(answer(request, shared).await) }
            });
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                // The engine closes it when it wants no more.
                _ = connection => {}
                () = ended.over.notified() => {}
            }
        });
        Self { session, shared, _runtime: runtime }
    }

    pub fn session(&self) -> &str {
        &self.session
    }

    /// Whether a file of the context was asked for.
    pub fn was_asked(&self) -> bool {
        self.shared.asked.load(Ordering::Relaxed)
    }

    /// Closes the connection.
    pub fn leave(&self) {
        self.shared.over.notify_one();
    }
}

type Body = StreamBody<stream::BoxStream<'static, Result<Frame<Bytes>, Infallible>>>;

/// The end of an answer.
fn status(code: u32) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", code.to_string().parse().unwrap());
    Frame::trailers(trailers)
}

fn reply(frames: stream::BoxStream<'static, Result<Frame<Bytes>, Infallible>>) -> Response<Body> {
    Response::builder().header("content-type", "application/grpc").body(StreamBody::new(frames)).unwrap()
}

fn frame(message: &[u8]) -> Frame<Bytes> {
    let mut all = vec![0];
    all.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    all.extend_from_slice(message);
    Frame::data(all.into())
}

async fn answer(request: Request<Incoming>, shared: Arc<Shared>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    if path.ends_with("FileSync/DiffCopy") {
        let header = |name: &str| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        let follows = header("followpaths").unwrap_or_default();
        let answers = match header("dir-name").as_deref() {
            Some("dockerfile") => shared.dockerfile.clone(),
            Some("context") if follows == ".dockerignore" => Answers::files(&[]),
            _ => shared.context.clone(),
        };
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(transfer(request.into_body(), answers, sender, shared));
        let frames =
            stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) });
        return reply(frames.map(Ok).boxed());
    }
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let done = match shared.methods.get(&path) {
        Some(method) => method(&body[5..]),
        None => Err(12),
    };
    let frames = match done {
        Ok(message) => vec![frame(&message), status(0)],
        Err(code) => vec![status(code)],
    };
    reply(stream::iter(frames).map(Ok).boxed())
}

/// Hears what is asked for, and tells it on.
async fn hear(body: Incoming, requests: mpsc::UnboundedSender<(u64, u32)>, shared: Arc<Shared>) {
    let mut frames = BodyStream::new(body);
    let mut raw = Vec::new();
    while let Some(Ok(frame)) = frames.next().await {
        raw.extend_from_slice(&frame.into_data().unwrap_or_default());
        while raw.len() >= 5 {
            let length = u32::from_be_bytes(raw[1..5].try_into().unwrap()) as usize;
            if raw.len() < 5 + length {
                break;
            }
            let (numbers, _) = fields(&raw[5..5 + length]);
            raw.drain(..5 + length);
            let of = |field| numbers.get(&field).copied().unwrap_or_default();
            shared.asked.store(true, Ordering::Relaxed);
            if requests.send((of(1), u32::try_from(of(3)).unwrap())).is_err() {
                return;
            }
        }
    }
}

async fn transfer(body: Incoming, answers: Answers, sender: mpsc::Sender<Frame<Bytes>>, shared: Arc<Shared>) {
    let (requests, mut heard) = mpsc::unbounded_channel();
    tokio::spawn(hear(body, requests, Arc::clone(&shared)));
    let send = async |packet: &[u8]| sender.send(frame(packet)).await.is_ok();
    for step in &answers.script {
        match step {
            Sends::Packet(packet) => {
                send(packet).await;
            }
            Sends::Wait(wanted) => {
                while let Some((_, id)) = heard.recv().await {
                    if id == *wanted {
                        break;
                    }
                }
            }
            Sends::Endless(packet) => while send(packet).await {},
            Sends::Names => {
                let mut number = 0;
                loop {
                    let name = format!("{number:08}{}", "n".repeat(4000));
                    number += 1;
                    if !send(&entry(&name, 0o644, 1).bytes()).await {
                        break;
                    }
                }
            }
            Sends::Hang => std::future::pending::<()>().await,
            Sends::Vanish => return shared.over.notify_one(),
            Sends::Finish => {
                while let Some((kind, id)) = heard.recv().await {
                    if kind == FIN {
                        send(&fin().bytes()).await;
                        sender.send(status(0)).await.ok();
                        return;
                    }
                    answers.asked.lock().unwrap().push(id);
                    let content = answers.files.get(&id).cloned().unwrap_or_default();
                    send(&data(id, &content).bytes()).await;
                    send(&data(id, b"").bytes()).await;
                }
            }
        }
    }
    // Whatever comes, the engine has to end it.
    std::future::pending::<()>().await;
}
