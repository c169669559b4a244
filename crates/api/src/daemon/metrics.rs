//! `--metrics-addr`: what the engine and its containers use, in OpenMetrics' text form (its specification, version 1.0).
//!
//! Invariant: a container that ends while it is asked is left out; a scrape never fails for one of many.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use brigantine_engine::Engine;
use brigantine_engine::containers::Usage;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// How long a client may take to ask.
const PATIENCE: Duration = Duration::from_secs(10);
/// Clients at once.
const CLIENTS: usize = 32;
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves `GET /metrics` until `stop`.
pub async fn serve(listener: TcpListener, engine: Engine, mut stop: watch::Receiver<bool>) {
    let began = Instant::now();
    let places = Arc::new(tokio::sync::Semaphore::new(CLIENTS));
    loop {
        let accepted = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accepting a metrics client");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let engine = engine.clone();
        tokio::spawn(async move {
            match tokio::time::timeout(PATIENCE, answer(stream, &engine, began)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a metrics client has left"),
                Err(_elapsed) => tracing::debug!("a metrics client took too long"),
            }
            drop(place);
        });
    }
}

async fn answer(mut stream: TcpStream, engine: &Engine, began: Instant) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut buffer = [0; 1024];
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        let count = stream.read(&mut buffer).await?;
        if count == 0 || head.len() > 16 << 10 {
            return Ok(());
        }
        head.extend_from_slice(&buffer[..count]);
    }
    let line = String::from_utf8_lossy(&head);
    let mut words = line.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.split('?').next().unwrap_or_default();
    let (status, kind, body) = match (method, path) {
        ("GET" | "HEAD", "/metrics") => ("200 OK", CONTENT_TYPE, document(engine, began).await),
        (_, "/metrics") => ("405 Method Not Allowed", "text/plain", "only GET\n".to_owned()),
        _ => ("404 Not Found", "text/plain", "see /metrics\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    if method != "HEAD" {
        stream.write_all(body.as_bytes()).await?;
    }
    stream.shutdown().await
}

/// A family of samples: OpenMetrics wants all samples of one name together.
struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    samples: Vec<(String, f64)>,
}

impl Family {
    fn new(name: &'static str, kind: &'static str, help: &'static str) -> Self {
        Self { name, kind, help, samples: Vec::new() }
    }

    fn write(&self, out: &mut String) {
        if self.samples.is_empty() {
            return;
        }
        let suffix = if self.kind == "counter" { "_total" } else { "" };
        // Writing to a string does not fail.
        write!(out, "# TYPE {0} {1}\n# HELP {0} {2}\n", self.name, self.kind, self.help).unwrap_or_default();
        for (labels, value) in &self.samples {
            writeln!(out, "{}{suffix}{labels} {value}", self.name).unwrap_or_default();
        }
    }
}

/// A label's value, quoted.
fn quoted(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn labels(usage: &Usage) -> String {
    format!(
        "{{id=\"{}\",name=\"{}\",image=\"{}\"}}",
        quoted(&usage.id),
        quoted(&usage.name),
        quoted(&usage.image)
    )
}

fn with(labels: &str, name: &str, value: &str) -> String {
    format!("{},{name}=\"{}\"}}", labels.trim_end_matches('}'), quoted(value))
}

async fn document(engine: &Engine, began: Instant) -> String {
    let mut out = String::new();
    let (running, paused, stopped) = engine.containers().counts();
    let mut states = Family::new("brigantine_containers", "gauge", "Containers by state.");
    for (state, count) in [("running", running), ("paused", paused), ("stopped", stopped)] {
        states.samples.push((format!("{{state=\"{state}\"}}"), count as f64));
    }
    states.write(&mut out);
    let mut info = Family::new("brigantine_engine", "info", "The engine's version.");
    info.samples.push((format!("{{version=\"{}\"}}", env!("CARGO_PKG_VERSION")), 1.0));
    // An info's samples are named NAME_info.
    let mut text = String::new();
    info.write(&mut text);
    out.push_str(&text.replace("\nbrigantine_engine{", "\nbrigantine_engine_info{"));
    let mut up = Family::new("brigantine_engine_uptime_seconds", "gauge", "Since the daemon started.");
    up.samples.push((String::new(), began.elapsed().as_secs_f64()));
    up.write(&mut out);

    let mut cpu = Family::new("brigantine_container_cpu_seconds", "counter", "CPU time used.");
    let mut throttled = Family::new(
        "brigantine_container_cpu_throttled_seconds",
        "counter",
        "Time held back by a CPU quota.",
    );
    let mut memory = Family::new("brigantine_container_memory_bytes", "gauge", "Memory in use.");
    let mut limit = Family::new(
        "brigantine_container_memory_limit_bytes",
        "gauge",
        "Most memory it may use, if there is a limit.",
    );
    let mut oom =
        Family::new("brigantine_container_oom_kills", "counter", "Processes killed for lack of memory.");
    let mut pids = Family::new("brigantine_container_processes", "gauge", "Processes and threads.");
    let mut restarts = Family::new("brigantine_container_restarts", "counter", "Starts by restart policy.");
    let mut started = Family::new(
        "brigantine_container_start_time_seconds",
        "gauge",
        "When it was started, as a unix time.",
    );
    let mut read =
        Family::new("brigantine_container_disk_read_bytes", "counter", "Bytes read from block devices.");
    let mut written =
        Family::new("brigantine_container_disk_written_bytes", "counter", "Bytes written to block devices.");
    let mut received =
        Family::new("brigantine_container_network_received_bytes", "counter", "Bytes received.");
    let mut sent = Family::new("brigantine_container_network_sent_bytes", "counter", "Bytes sent.");
    let mut pressure = Family::new(
        "brigantine_container_pressure_seconds",
        "counter",
        "Time in which some, or all, processes waited for a resource (PSI).",
    );
    let mut health =
        Family::new("brigantine_container_healthy", "gauge", "1 if its health check says so, else 0.");
    for usage in engine.containers().usages().await {
        let own = labels(&usage);
        let put = |family: &mut Family, value: f64| family.samples.push((own.clone(), value));
        put(&mut restarts, usage.restarts as f64);
        if let Some(healthy) = usage.healthy {
            put(&mut health, f64::from(u8::from(healthy)));
        }
        put(&mut started, usage.started_at.as_millisecond() as f64 / 1000.0);
        let stats = &usage.stats;
        put(&mut cpu, stats.cpu.total as f64 / 1e9);
        put(&mut throttled, stats.cpu.throttled_time as f64 / 1e9);
        put(&mut memory, stats.memory.usage as f64);
        // Version 1 of control groups has a huge number for no limit.
        if stats.memory.limit < 1 << 60 {
            put(&mut limit, stats.memory.limit as f64);
        }
        put(&mut oom, stats.memory.oom_kills as f64);
        put(&mut pids, stats.pids.current as f64);
        let bytes = |op: &str| {
            let of = stats.blkio.service_bytes.iter().filter(|entry| entry.op.eq_ignore_ascii_case(op));
            of.map(|entry| entry.value).sum::<u64>() as f64
        };
        put(&mut read, bytes("read"));
        put(&mut written, bytes("write"));
        for interface in &usage.interfaces {
            let of = with(&own, "interface", &interface.name);
            received.samples.push((of.clone(), interface.received as f64));
            sent.samples.push((of, interface.sent as f64));
        }
        let kinds =
            [("cpu", &stats.cpu.pressure), ("memory", &stats.memory.pressure), ("io", &stats.blkio.pressure)];
        for (resource, found) in kinds {
            let Some(found) = found else { continue };
            for (share, micros) in [("some", found.some_total), ("full", found.full_total)] {
                let of = with(&with(&own, "resource", resource), "share", share);
                pressure.samples.push((of, micros as f64 / 1e6));
            }
        }
    }
    for family in [
        cpu, throttled, memory, limit, oom, pids, restarts, started, read, written, received, sent, pressure,
        health,
    ] {
        family.write(&mut out);
    }
    out.push_str("# EOF\n");
    out
}

/// The listening socket of an address.
pub async fn listen(address: &SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_written_together_and_values_are_quoted() {
        let mut family = Family::new("x", "counter", "Things.");
        family.samples.push(("{a=\"b\"}".to_owned(), 2.0));
        let mut out = String::new();
        family.write(&mut out);
        assert_eq!(out, "# TYPE x counter\n# HELP x Things.\nx_total{a=\"b\"} 2\n");
        assert_eq!(quoted("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
        assert_eq!(with("{a=\"b\"}", "c", "d"), "{a=\"b\",c=\"d\"}");
    }
}
