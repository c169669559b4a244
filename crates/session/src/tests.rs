//! Whole sessions against clients that follow a script, most of them a wrong one.

use std::collections::HashMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tonic::body::Body;
use tonic::server::Grpc;
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::messages::{Packet, PacketKind, SecretRequest, SecretResponse, Stat};
use crate::{Entry, Error, Introduction, Kind, News, Session, Sessions, Wanted};

const FILES: &str = "/moby.filesync.v1.FileSync/DiffCopy";
const SEND: &str = "/moby.filesync.v1.FileSend/DiffCopy";
const SECRET: &str = "/moby.buildkit.secrets.v1.Secrets/GetSecret";

type Answer<T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send>>;
type Packets = Pin<Box<dyn Stream<Item = Result<Packet, Status>> + Send>>;

/// Sends these packets whatever it is asked, then waits for the other side to end.
#[derive(Clone)]
struct Script(Vec<Packet>, Arc<Mutex<Vec<Packet>>>);

impl tower_service::Service<Request<Streaming<Packet>>> for Script {
    type Response = Response<Packets>;
    type Error = Status;
    type Future = Answer<Packets>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Streaming<Packet>>) -> Self::Future {
        let (script, heard) = (self.0.clone(), Arc::clone(&self.1));
        Box::pin(async move {
            let mut incoming = request.into_inner();
            let rest = futures_util::stream::once(async move {
                while let Some(Ok(packet)) = incoming.next().await {
                    heard.lock().unwrap().push(packet);
                }
                Err(Status::cancelled("over"))
            });
            let packets: Packets =
                Box::pin(futures_util::stream::iter(script.into_iter().map(Ok)).chain(rest));
            Ok(Response::new(packets))
        })
    }
}

struct Secrets(HashMap<&'static str, Vec<u8>>);

impl tower_service::Service<Request<SecretRequest>> for Secrets {
    type Response = Response<SecretResponse>;
    type Error = Status;
    type Future = Answer<SecretResponse>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<SecretRequest>) -> Self::Future {
        let found = self.0.get(request.into_inner().id.as_str()).cloned();
        Box::pin(async move {
            let data = found.ok_or_else(|| Status::not_found("no such secret"))?;
            Ok(Response::new(SecretResponse { data: data.into() }))
        })
    }
}

async fn answer(
    request: http::Request<Incoming>,
    script: Vec<Packet>,
    heard: Arc<Mutex<Vec<Packet>>>,
) -> http::Response<Body> {
    match request.uri().path() {
        FILES | SEND => {
            let mut grpc = Grpc::new(ProstCodec::<Packet, Packet>::default());
            grpc = grpc.max_encoding_message_size(64 << 20);
            grpc.streaming(Script(script, heard), request).await
        }
        SECRET => {
            let known = HashMap::from([("small", b"s3cret".to_vec()), ("large", vec![0; 1 << 20])]);
            Grpc::new(ProstCodec::<SecretResponse, SecretRequest>::default())
                .unary(Secrets(known), request)
                .await
        }
        path => Status::unimplemented(path.to_owned()).into_http(),
    }
}

/// A session with a client that follows the script, and what the client has heard.
async fn session(script: Vec<Packet>) -> (Arc<Session>, Arc<Mutex<Vec<Packet>>>, tokio::task::AbortHandle) {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let heard = Arc::<Mutex<Vec<Packet>>>::default();
    let ears = Arc::clone(&heard);
    let service = service_fn(move |request| {
        let (script, ears) = (script.clone(), Arc::clone(&ears));
        async move { Ok::<_, Infallible>(answer(request, script, ears).await) }
    });
    let client = tokio::spawn(async move {
        let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        builder.serve_connection(TokioIo::new(theirs), service).await.ok();
    });
    let sessions = Sessions::default();
    let methods = [FILES, SEND, SECRET].map(str::to_owned).to_vec();
    let seat = sessions.admit(Introduction { id: "one".into(), shared_key: "key".into(), methods }).unwrap();
    tokio::spawn(seat.run(ours));
    (sessions.get("one").await.unwrap(), heard, client.abort_handle())
}

fn stat(path: &str, mode: u32, size: i64) -> Packet {
    let stat = Stat { path: path.into(), mode, size, ..Stat::default() };
    Packet { kind: PacketKind::Stat as i32, stat: Some(stat), ..Packet::default() }
}

fn link(path: &str, mode: u32, to: &str) -> Packet {
    let mut packet = stat(path, mode, 0);
    if let Some(stat) = &mut packet.stat {
        stat.linkname = to.into();
    }
    packet
}

fn plain(path: &str, kind: Kind, mode: u32) -> Entry {
    Entry { path: path.into(), kind, mode, uid: 0, gid: 0, mtime: 0, state: 0 }
}

fn data(id: u32, data: Vec<u8>) -> Packet {
    Packet::of(PacketKind::Data, id, data.into())
}

/// Receives everything that is listed.
async fn received(script: Vec<Packet>) -> Result<Vec<(Vec<u8>, Vec<u8>)>, Error> {
    let (session, _, _) = session(script).await;
    tokio::task::spawn_blocking(move || {
        let mut receiver = session.files(&Wanted { folder: "context", ..Wanted::default() })?;
        let mut files: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        let mut numbers = HashMap::new();
        while let Some(news) = receiver.news()? {
            match news {
                News::Listed(number, Entry { path, kind: Kind::File { .. }, .. }) => {
                    numbers.insert(number, files.len());
                    files.push((path, Vec::new()));
                    receiver.ask(number)?;
                }
                News::Data(number, data) => files[numbers[&number]].1.extend_from_slice(&data),
                _ => {}
            }
        }
        receiver.finish()?;
        Ok(files)
    })
    .await
    .unwrap()
}

const DIR: u32 = 1 << 31 | 0o755;
const SYMLINK: u32 = 1 << 27 | 0o777;

#[tokio::test(flavor = "multi_thread")]
async fn files_come_in_pieces() {
    let end = Packet::default();
    let script = vec![
        stat("d", DIR, 0),
        stat("d/f", 0o644, 3),
        link("d/l", SYMLINK, "../../../etc"),
        stat("e", 0o644, 0),
        end,
        data(1, b"ab".to_vec()),
        data(3, Vec::new()),
        data(1, b"c".to_vec()),
        data(1, Vec::new()),
        Packet::of(PacketKind::Fin, 0, Bytes::new()),
    ];
    let files = received(script).await.unwrap();
    assert_eq!(files, [(b"d/f".to_vec(), b"abc".to_vec()), (b"e".to_vec(), Vec::new())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_does_not_keep_to_the_rules_is_told_so() {
    let f = || stat("f", 0o644, 1);
    for (script, words) in [
        (vec![stat("../f", 0o644, 1)], "not a plain path"),
        (vec![stat("/etc/passwd", 0o644, 1)], "not a plain path"),
        (vec![stat("d", DIR, 0), stat("d/../../f", 0o644, 1)], "not a plain path"),
        (vec![link("l", SYMLINK, "/etc"), stat("l/f", 0o644, 1)], "in no directory that was listed"),
        (vec![f(), stat("f", DIR, 0)], "out of order"),
        (vec![f(), stat("a", 0o644, 1)], "out of order"),
        (vec![f(), data(0, vec![1]), data(7, vec![1])], "was not asked for"),
        (vec![stat("d", DIR, 0), data(0, vec![1])], "was not asked for"),
        (vec![f(), Packet::of(PacketKind::Fin, 0, Bytes::new())], "finished before it was complete"),
        (vec![Packet::of(PacketKind::Error, 0, Bytes::from("disk on fire"))], "disk on fire"),
        (vec![Packet { kind: 99, ..Packet::default() }], "kind 99"),
        (vec![f(), data(0, vec![1; 8 << 20])], "message"),
    ] {
        let error = received(script).await.unwrap_err();
        assert!(error.to_string().contains(words), "{words}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_ends_every_wait() {
    let (session, _, client) = session(vec![stat("f", 0o644, 1)]).await;
    let waiting = Arc::clone(&session);
    let waiting = tokio::task::spawn_blocking(move || {
        let mut receiver = waiting.files(&Wanted { folder: "context", ..Wanted::default() }).unwrap();
        loop {
            match receiver.news() {
                Ok(Some(News::Listed(number, _))) => receiver.ask(number).unwrap(),
                Ok(_) => {}
                Err(error) => return error,
            }
        }
    });
    client.abort();
    let error = waiting.await.unwrap();
    assert_eq!(error, Error::Ended);
    session.ended().await;
    assert_eq!(session.secret("small").await, Err(Error::Ended));
}

/// A client whose stream breaks off without a status, and whose connection ends `after` that.
async fn broken(after: Duration) -> Arc<Session> {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let leave = Arc::new(tokio::sync::Notify::new());
    let left = Arc::clone(&leave);
    let service = service_fn(move |_request| {
        left.notify_one();
        let answer = http::Response::builder().header("content-type", "application/grpc").body(Body::empty());
        async move { Ok::<_, Infallible>(answer.unwrap()) }
    });
    tokio::spawn(async move {
        let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        tokio::select! {
            _ = builder.serve_connection(TokioIo::new(theirs), service) => {}
            () = async { leave.notified().await; tokio::time::sleep(after).await } => {}
        }
    });
    let sessions = Sessions::default();
    let introduction = Introduction { id: "one".into(), methods: vec![FILES.into()], ..Default::default() };
    tokio::spawn(sessions.admit(introduction).unwrap().run(ours));
    sessions.get("one").await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_with_its_connection_is_not_the_clients_answer() {
    let read = async |session: &Arc<Session>| {
        let mut receiver = session.files(&Wanted { folder: "context", ..Wanted::default() }).unwrap();
        tokio::task::spawn_blocking(move || receiver.news().unwrap_err()).await.unwrap()
    };
    let session = broken(Duration::from_millis(50)).await;
    assert_eq!(read(&session).await, Error::Ended);
    // Where the connection stays it was the client that broke it off.
    let session = broken(Duration::from_mins(1)).await;
    let error = read(&session).await;
    assert!(matches!(error, Error::Refused { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_falls_silent_is_given_up() {
    let (session, _, _client) = session(vec![stat("f", 0o644, 1)]).await;
    let (sender, given_up) = tokio::sync::oneshot::channel();
    let mut receiver = session.files(&Wanted { folder: "context", ..Wanted::default() }).unwrap();
    // A thread of its own: time goes on only while nothing else does.
    std::thread::spawn(move || {
        loop {
            match receiver.news() {
                Ok(Some(News::Listed(number, _))) => receiver.ask(number).unwrap(),
                Ok(_) => {}
                Err(error) => return sender.send(error).unwrap(),
            }
        }
    });
    let error = given_up.await.unwrap();
    assert!(matches!(error, Error::Silent { seconds: 120, .. }), "{error}");
}

/// What a client does, but for the time in which it is stopped.
struct Stoppable<F> {
    inner: Pin<Box<F>>,
    stopped: tokio::sync::watch::Receiver<bool>,
}

impl<F: Future> Stoppable<F> {
    async fn run(mut self) {
        loop {
            tokio::select! {
                biased;
                () = async { drop(self.stopped.wait_for(|stopped| *stopped).await) } => {}
                _ = &mut self.inner => return,
            }
            if self.stopped.wait_for(|stopped| !stopped).await.is_err() {
                return;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_may_be_stopped_for_a_while() {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let service = service_fn(move |request| async move {
        Ok::<_, Infallible>(answer(request, Vec::new(), Arc::default()).await)
    });
    let (signal, stopped) = tokio::sync::watch::channel(false);
    let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    let inner = Box::pin(builder.serve_connection(TokioIo::new(theirs), service));
    tokio::spawn(Stoppable { inner, stopped }.run());
    let sessions = Sessions::default();
    let introduction = Introduction { id: "one".into(), methods: vec![SECRET.into()], ..Default::default() };
    tokio::spawn(sessions.admit(introduction).unwrap().run(ours));
    let session = sessions.get("one").await.unwrap();
    let stop = async |seconds| {
        signal.send_replace(true);
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        signal.send_replace(false);
        session.secret("small").await
    };
    // Idle, and while it is asked something.
    for _ in 0..3 {
        assert_eq!(stop(100).await.unwrap().unwrap(), b"s3cret");
    }
    signal.send_replace(true);
    let (asked, ()) = tokio::join!(session.secret("small"), async {
        tokio::time::sleep(Duration::from_secs(100)).await;
        signal.send_replace(false);
    });
    assert_eq!(asked.unwrap().unwrap(), b"s3cret");
    assert_eq!(stop(300).await, Err(Error::Ended));
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_found_or_not_and_are_not_large() {
    let (session, _, _) = session(Vec::new()).await;
    session.answers().await.unwrap();
    assert_eq!(session.secret("small").await.unwrap().unwrap(), b"s3cret");
    assert_eq!(session.secret("none").await.unwrap(), None);
    assert!(session.secret("large").await.unwrap_err().to_string().contains("at most"));
    assert!(!session.has_agent("default").await.unwrap());
    assert_eq!(session.credentials("docker.io").await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_gets_each_file_once_and_only_what_is_on_offer() {
    let entry = |path: &str, kind| plain(path, kind, 0o644);
    let entries = || vec![entry("d", Kind::Directory), entry("f", Kind::File { size: 0 })];
    let ask = |id| Packet::of(PacketKind::Request, id, Bytes::new());
    for (script, ok) in [
        (vec![ask(1), Packet::of(PacketKind::Fin, 0, Bytes::new())], true),
        (vec![ask(0)], false),
        (vec![ask(2)], false),
        (vec![ask(1), ask(1)], false),
        (vec![Packet::of(PacketKind::Error, 0, Bytes::from("full"))], false),
    ] {
        let (session, heard, _) = session(script).await;
        let (runtime, entries) = (tokio::runtime::Handle::current(), entries());
        let sent = tokio::task::spawn_blocking(move || {
            session.send_files(&runtime, entries, |_| std::fs::File::open("/dev/null"))
        });
        let sent = tokio::time::timeout(Duration::from_mins(1), sent).await.unwrap().unwrap();
        if ok {
            let heard = heard.lock().unwrap();
            assert!(heard.iter().any(|packet| packet.kind == PacketKind::Fin as i32), "{heard:?}");
        } else {
            assert!(sent.is_err());
        }
    }
}

#[tokio::test]
async fn places_are_given_once_and_given_back() {
    let sessions = Sessions::default();
    let named = |id: &str| Introduction { id: id.to_owned(), ..Introduction::default() };
    assert!(matches!(sessions.admit(named("")), Err(Error::Introduction(_))));
    assert!(matches!(sessions.admit(named(&"x".repeat(257))), Err(Error::Introduction(_))));
    let seat = sessions.admit(named("a")).unwrap();
    assert!(matches!(sessions.admit(named("a")), Err(Error::Taken(_))));
    drop(seat);
    assert!(sessions.is_empty());
    let seats: Vec<_> = (0..1000).map(|n| sessions.admit(named(&n.to_string())).unwrap()).collect();
    assert!(matches!(sessions.admit(named("more")), Err(Error::TooMany(1000))));
    drop(seats);
    tokio::time::pause();
    assert!(matches!(sessions.get("nobody").await, Err(Error::Unknown(_))));
}
