//! The registry server: the distribution specification 1.1 over a content store.
//!
//! Start at [`Server`]. A request passes [`service`] (who asks, what for) into one of the modules of its kind;
//! [`storage`] keeps what was pushed, [`uploads`] what is being pushed, [`cache`] fills the storage from another
//! registry, [`engine`] reads an engine's store instead, and [`gc`] collects what nothing names.
//!
//! Invariants: memory is bounded by connections, not by content; whatever was acknowledged survives a crash.

mod auth;
mod blobs;
mod cache;
mod control;
mod engine;
mod gc;
mod library;
mod lists;
mod manifests;
mod metrics;
mod options;
mod pushes;
mod refusal;
mod reply;
mod route;
mod service;
mod storage;
mod tls;
mod uploads;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::{Response, StatusCode};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;

pub use gc::Collected;
pub use options::{Access, Collection, Limits, Options, Quotas, Source, Tls, Upstream};

use crate::Error;
use auth::{Guard, Htpasswd, Tokens};
use cache::Cache;
use control::Control;
use engine::EngineStore;
use gc::{Collector, Plan};
use library::Library;
use service::{Shared, Writable};
use storage::Storage;
use uploads::Uploads;

/// The longest a client may take to send a request's head or to shake hands.
const HEAD_PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of a request's head, and of a body's piece.
const BUFFER: usize = 128 << 10;

/// A registry that listens.
pub struct Server {
    shared: Arc<Shared>,
    listeners: Vec<TcpListener>,
    metrics: Option<TcpListener>,
    control: Option<Control>,
    tls: Option<TlsAcceptor>,
    connections: Arc<Semaphore>,
    collection: Option<(Duration, Arc<Housekeeping>)>,
}

/// What a collection needs.
pub(crate) struct Housekeeping {
    writable: Writable,
    collector: Collector,
    plan: Plan,
}

impl Server {
    /// Opens the storage and binds the addresses.
    pub async fn bind(options: Options) -> Result<Self, Error> {
        if options.listen.is_empty() {
            return Err(Error::Invalid("a registry needs an address to listen on".to_owned()));
        }
        let mut keep = None;
        let mut cache = None;
        let (library, writable): (Arc<dyn Library>, Option<Writable>) = match options.source {
            options::Source::Storage(root) => {
                let writable = open(&root)?;
                (Arc::clone(&writable.storage) as Arc<dyn Library>, Some(writable))
            }
            options::Source::Cache { root, upstream } => {
                let writable = open(&root)?;
                keep = upstream.keep;
                cache = Some(Arc::new(Cache::new(Arc::clone(&writable.storage), *upstream)?));
                (Arc::clone(&writable.storage) as Arc<dyn Library>, Some(writable))
            }
            options::Source::Engine(root) => (Arc::new(EngineStore::open(&root)?), None),
        };
        let guard = match options.access {
            options::Access::Open => Guard::Open,
            options::Access::Htpasswd { file, realm, anonymous_read } => {
                Guard::Htpasswd { users: Htpasswd::open(&file)?, realm, anonymous_read }
            }
            options::Access::Token { realm, service, issuer, keys } => {
                Guard::Tokens(Tokens { realm, service, issuer, keys: auth::load_keys(&keys)? })
            }
        };
        let tls = options.tls.as_ref().map(tls::config).transpose()?;
        let mut listeners = Vec::new();
        for address in &options.listen {
            listeners.push(listen(address).await?);
        }
        let metrics = match options.metrics {
            Some(address) => Some(listen(&address.to_string()).await?),
            None => None,
        };
        let collection = options.collection;
        let housekeeping = writable.clone().map(|writable| {
            let plan = Plan {
                grace: collection.grace,
                untagged: collection.untagged,
                uploads: collection.uploads,
                keep,
            };
            Arc::new(Housekeeping { writable, collector: Collector::default(), plan })
        });
        let shared = Arc::new(Shared {
            library,
            writable,
            cache,
            guard,
            read_only: options.read_only,
            sparse: options.sparse,
            quotas: options.quotas,
            limits: options.limits.clone(),
            metrics: metrics::Metrics::new(),
            metrics_here: metrics.is_none(),
        });
        let control = match &housekeeping {
            Some(housekeeping) => Control::bind(Arc::clone(housekeeping), Arc::clone(&shared)),
            None => None,
        };
        Ok(Self {
            shared,
            listeners,
            metrics,
            control,
            tls: tls.map(|config| TlsAcceptor::from(Arc::new(config))),
            connections: Arc::new(Semaphore::new(options.limits.connections.max(1))),
            collection: housekeeping.and_then(|housekeeping| {
                let interval =
                    collection.interval.filter(|interval| !interval.is_zero() && !options.read_only)?;
                Some((interval, housekeeping))
            }),
        })
    }

    /// The addresses it listens on.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.listeners.iter().map(TcpListener::local_addr).collect()
    }

    /// Where metrics are served, if not beside the registry.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Serves until `stop` is ready, then lets the requests that are going on end.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let graceful = Arc::new(GracefulShutdown::new());
        let mut tasks = JoinSet::new();
        let connections = Arc::new(tokio::sync::Mutex::new(JoinSet::new()));
        for listener in self.listeners {
            let accept = Accept {
                shared: Arc::clone(&self.shared),
                tls: self.tls.clone(),
                permits: Arc::clone(&self.connections),
                graceful: Arc::clone(&graceful),
            };
            tasks.spawn(accept.run(listener, Arc::clone(&connections)));
        }
        if let Some(listener) = self.metrics {
            tasks.spawn(serve_metrics(listener, Arc::clone(&self.shared)));
        }
        if let Some(control) = self.control {
            tasks.spawn(control.run());
        }
        if let Some((interval, housekeeping)) = self.collection {
            tasks.spawn(collect_forever(interval, housekeeping, Arc::clone(&self.shared)));
        }
        stop.await;
        tasks.shutdown().await;
        tracing::info!("the registry is stopping: requests that are going on may end");
        let farewell = self.shared.limits.farewell;
        if let Ok(graceful) = Arc::try_unwrap(graceful)
            && tokio::time::timeout(farewell, graceful.shutdown()).await.is_err()
        {
            tracing::warn!("requests that did not end in {} seconds are cut off", farewell.as_secs());
        }
        connections.lock().await.shutdown().await;
    }
}

/// Collects the garbage of the registry at `root`: in the process that runs it, if one does.
pub async fn collect(root: &Path, collection: &Collection) -> Result<Collected, Error> {
    let plan = Plan {
        grace: collection.grace,
        untagged: collection.untagged,
        uploads: collection.uploads,
        keep: None,
    };
    if let Some(collected) = control::ask(root, &plan).await? {
        return Ok(collected);
    }
    if !root.join("repositories").is_dir() {
        return Err(Error::Invalid(format!("{} holds no registry", root.display())));
    }
    let writable = open(root)?;
    let failed = |source| Error::Io { what: format!("collect the garbage of {}", root.display()), source };
    let housekeeping = Arc::new(Housekeeping { writable, collector: Collector::default(), plan });
    tokio::task::spawn_blocking(move || housekeeping.collect(&plan))
        .await
        .map_err(|error| failed(io::Error::other(error)))?
        .map_err(failed)
}

impl Housekeeping {
    fn collect(&self, plan: &Plan) -> io::Result<Collected> {
        self.collector.collect(&self.writable.storage, &self.writable.uploads, plan)
    }

    /// Collects, logs and counts.
    async fn collect_for(self: &Arc<Self>, shared: &Shared, plan: Plan) -> io::Result<Collected> {
        let began = std::time::Instant::now();
        let housekeeping = Arc::clone(self);
        let collected = tokio::task::spawn_blocking(move || housekeeping.collect(&plan))
            .await
            .map_err(io::Error::other)??;
        shared.metrics.collections.inc();
        shared.metrics.freed.inc_by(collected.bytes);
        shared.metrics.collection_seconds.set(began.elapsed().as_secs_f64());
        tracing::info!(
            manifests = collected.manifests,
            blobs = collected.blobs,
            bytes = collected.bytes,
            seconds = began.elapsed().as_secs_f64(),
            "garbage collected"
        );
        Ok(collected)
    }
}

fn open(root: &Path) -> Result<Writable, Error> {
    let storage = Arc::new(Storage::open(root)?);
    let uploads = Arc::new(Uploads::new(storage.uploads()));
    Ok(Writable { storage, uploads })
}

async fn listen(address: &str) -> Result<TcpListener, Error> {
    TcpListener::bind(address)
        .await
        .map_err(|source| Error::Io { what: format!("listen on {address}"), source })
}

async fn collect_forever(interval: Duration, housekeeping: Arc<Housekeeping>, shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(interval).await;
        let plan = housekeeping.plan;
        if let Err(error) = housekeeping.collect_for(&shared, plan).await {
            tracing::error!(error = %error, "the garbage collection failed");
        }
    }
}

struct Accept {
    shared: Arc<Shared>,
    tls: Option<TlsAcceptor>,
    permits: Arc<Semaphore>,
    graceful: Arc<GracefulShutdown>,
}

impl Accept {
    async fn run(self, listener: TcpListener, connections: Arc<tokio::sync::Mutex<JoinSet<()>>>) {
        loop {
            let Ok(permit) = Arc::clone(&self.permits).acquire_owned().await else { return };
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, mostly: others have to end first.
                    tracing::warn!(error = %error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(error = %error, "TCP_NODELAY");
            }
            let (shared, tls) = (Arc::clone(&self.shared), self.tls.clone());
            let watcher = self.graceful.watcher();
            let mut connections = connections.lock().await;
            while connections.try_join_next().is_some() {}
            connections.spawn(async move {
                let _permit = permit;
                let served = match tls {
                    None => serve_connection(shared, stream, peer, watcher).await,
                    Some(acceptor) => match shake(acceptor, stream).await {
                        Ok(stream) => serve_connection(shared, stream, peer, watcher).await,
                        Err(error) => Err(error.into()),
                    },
                };
                if let Err(error) = served {
                    tracing::debug!(%peer, error = %error, "a connection ended early");
                }
            });
        }
    }
}

async fn shake(
    acceptor: TlsAcceptor,
    stream: TcpStream,
) -> io::Result<tokio_rustls::server::TlsStream<TcpStream>> {
    tokio::time::timeout(HEAD_PATIENCE, acceptor.accept(stream))
        .await
        .map_err(|_elapsed| io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long"))?
}

async fn serve_connection<S>(
    shared: Arc<Shared>,
    stream: S,
    peer: SocketAddr,
    watcher: hyper_util::server::graceful::Watcher,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let mut stream = TimeoutStream::new(stream);
    // Only writing: a client may be silent for as long as an answer is under way.
    stream.set_write_timeout(Some(shared.limits.patience));
    let io = TokioIo::new(Box::pin(stream));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .max_buf_size(BUFFER)
        .half_close(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(64)
        .max_header_list_size(64 << 10)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .keep_alive_interval(Some(Duration::from_secs(30)))
        .keep_alive_timeout(Duration::from_secs(20));
    let service = service_fn(move |request| service::serve(Arc::clone(&shared), Some(peer), request));
    let connection = builder.serve_connection(io, service).into_owned();
    watcher.watch(connection).await
}

/// Metrics on a listener of their own: nothing else is served there.
async fn serve_metrics(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
                let shared = Arc::clone(&shared);
                async move {
                    let answer: Response<_> = if request.uri().path() == "/metrics" {
                        service::metrics(&shared)
                    } else {
                        reply::empty(StatusCode::NOT_FOUND)
                    };
                    Ok::<_, std::convert::Infallible>(answer)
                }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_PATIENCE)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(error = %error, "a connection for metrics ended early");
            }
        });
    }
}
