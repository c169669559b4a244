//! Log drivers and what reads of them.

use std::io::Read;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use brigantine_testkit::{Client, eventually};

use crate::Host;

both![
    the_local_driver_is_bounded_and_compressed,
    syslog_gets_every_line_and_logs_can_still_be_read,
    fluentd_gets_records,
    graylog_gets_messages_by_udp_and_tcp,
    fluentd_acknowledges_what_it_has
];

fn the_local_driver_is_bounded_and_compressed(client: Client) {
    let host = Host::new(client);
    let flags =
        ["--name", "loud", "--log-driver", "local", "--log-opt", "max-size=50k", "--log-opt", "max-file=3"];
    let script = "i=0; while [ $i -lt 6000 ]; do echo line $i; i=$((i+1)); done";
    host.cli(["run", "-d"].iter().chain(&flags).chain(&["busybox", "sh", "-c", script])).ok();
    host.wait_state("loud", "exited");
    let logs = host.cli(["logs", "loud"]).ok();
    let lines: Vec<&str> = logs.lines().collect();
    assert_eq!(lines.last(), Some(&"line 5999"));
    assert!(lines.len() > 600 && lines.len() < 3000, "{} lines", lines.len());
    // No gap between the files.
    let first: usize = lines[0].trim_start_matches("line ").parse().unwrap();
    assert_eq!(lines.len(), 6000 - first);
    assert_eq!(host.cli(["logs", "--tail", "500", "loud"]).ok().lines().count(), 500);
    let id = host.inspect("loud")["Id"].as_str().unwrap().to_owned();
    let files: Vec<String> = std::fs::read_dir(host.data_root().join("containers").join(&id))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("-json.log"))
        .collect();
    if !host.is_peer() {
        assert_eq!(files.len(), 3, "{files:?}");
        assert_eq!(files.iter().filter(|name| name.contains(".gz")).count(), 2, "{files:?}");
    }
    host.cli(["rm", "loud"]).ok();
    host.assert_nothing_left();
}

/// Reads datagrams until `count` have come.
fn datagrams(receive: impl Fn(&mut [u8]) -> std::io::Result<usize>, count: usize) -> Vec<String> {
    let mut all = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    while all.len() < count {
        let length = receive(&mut buffer).expect("a message in time");
        all.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
    }
    all
}

fn syslog_gets_every_line_and_logs_can_still_be_read(client: Client) {
    let host = Host::new(client);
    let path = host.dir().join("syslog");
    let local = UnixDatagram::bind(&path).unwrap();
    local.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let remote = host.sandbox().within_net(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    remote.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let unix = format!("syslog-address=unixgram://{}", path.display());
    let udp = format!("syslog-address=udp://{}", remote.local_addr().unwrap());

    let script = "echo one; echo two >&2";
    let run = |flags: &[&str]| {
        host.cli(
            ["run", "--name", "talker", "--log-driver", "syslog"]
                .iter()
                .chain(flags)
                .chain(&["busybox", "sh", "-c", script]),
        )
        .ok();
    };
    run(&["--log-opt", &unix, "--log-opt", "tag={{.Name}}", "--log-opt", "syslog-facility=local0"]);
    let mut got = datagrams(|buffer| local.recv(buffer), 2);
    got.sort();
    // local0 is 16: 16 * 8 + 3 (error), 16 * 8 + 6 (informational).
    assert!(
        got[0].starts_with("<131>") && got[0].contains("talker[") && got[0].ends_with("]: two\n"),
        "{got:?}"
    );
    assert!(got[1].starts_with("<134>") && got[1].ends_with("]: one\n"), "{got:?}");
    let logs = host.cli(["logs", "talker"]).exits(0);
    assert_eq!((logs.stdout.trim(), logs.stderr.trim()), ("one", "two"));
    host.cli(["rm", "talker"]).ok();

    run(&["--log-opt", &udp, "--log-opt", "syslog-format=rfc5424", "--log-opt", "cache-disabled=true"]);
    let got = datagrams(|buffer| remote.recv(buffer), 2);
    assert!(
        got.iter().any(|message| message.starts_with("<30>1 20") && message.trim_end().ends_with("- one")),
        "{got:?}"
    );
    host.cli(["logs", "talker"]).exits(1).expect_stderr("does not support reading");
    host.cli(["rm", "talker"]).ok();
    // Docker does not start what it cannot log; a wrong option is refused before.
    host.cli([
        "run",
        "--rm",
        "--log-driver",
        "syslog",
        "--log-opt",
        "syslog-address=tcp://127.0.0.1:1",
        "busybox",
        "true",
    ])
    .exits(125)
    .expect_stderr("failed to initialize logging driver");
    host.cli(["create", "--log-driver", "syslog", "--log-opt", "syslog-facility=nope", "busybox"]).exits(1);
    host.assert_nothing_left();
}

fn fluentd_gets_records(client: Client) {
    let host = Host::new(client);
    let listener = host.sandbox().within_net(|| TcpListener::bind("127.0.0.1:0").unwrap());
    let address = format!("fluentd-address={}", listener.local_addr().unwrap());
    let receiver = std::thread::spawn(move || {
        listener.set_nonblocking(true).unwrap();
        let until = Instant::now() + Duration::from_mins(1);
        let mut all = Vec::new();
        while Instant::now() < until {
            let Ok((mut stream, _)) = listener.accept() else {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            };
            stream.set_nonblocking(false).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut buffer = [0; 4096];
            while let Ok(length) = stream.read(&mut buffer) {
                if length == 0 {
                    break;
                }
                all.extend_from_slice(&buffer[..length]);
                if String::from_utf8_lossy(&all).contains("last line") {
                    return all;
                }
            }
        }
        all
    });
    host.cli([
        "run",
        "--name",
        "talker",
        "--log-driver",
        "fluentd",
        "--log-opt",
        &address,
        "--log-opt",
        "tag=app.{{.Name}}",
        "--log-opt",
        "labels=team",
        "--label",
        "team=blue",
        "busybox",
        "sh",
        "-c",
        "echo first line; echo last line",
    ])
    .ok();
    let bytes = receiver.join().unwrap();
    let text = String::from_utf8_lossy(&bytes);
    for part in [
        "app.talker",
        "container_name",
        "/talker",
        "team",
        "blue",
        "source",
        "stdout",
        "first line",
        "last line",
    ] {
        assert!(text.contains(part), "{part} is not in {text:?}");
    }
    assert_eq!(host.cli(["logs", "talker"]).ok(), "first line\nlast line");
    host.cli(["rm", "talker"]).ok();
    host.cli([
        "run",
        "--rm",
        "--log-driver",
        "fluentd",
        "--log-opt",
        "fluentd-address=127.0.0.1:1",
        "busybox",
        "true",
    ])
    .exits(125)
    .expect_stderr("failed to initialize logging driver");
    host.assert_nothing_left();
}

fn graylog_gets_messages_by_udp_and_tcp(client: Client) {
    let host = Host::new(client);
    let (udp, tcp) = host
        .sandbox()
        .within_net(|| (UdpSocket::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap()));
    udp.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let run = |address: &str, more: &[&str]| {
        let address = format!("gelf-address={address}");
        let flags = ["run", "--name", "talker", "--log-driver", "gelf", "--log-opt", &address];
        let labelled = ["--log-opt", "labels=team", "--label", "team=blue", "--log-opt", "tag=app/{{.Name}}"];
        let script = "echo one; echo two >&2; head -c 5000 /dev/zero | tr '\\0' x";
        host.cli(flags.iter().chain(&labelled).chain(more).chain(&["busybox", "sh", "-c", script])).ok();
        assert!(host.cli(["logs", "talker"]).exits(0).stdout.starts_with("one\n"));
        host.cli(["rm", "talker"]).ok();
    };
    let check = |messages: &[serde_json::Value]| {
        let of = |text: &str| {
            messages
                .iter()
                .find(|m| m["short_message"] == text)
                .unwrap_or_else(|| panic!("no {text}: {messages:?}"))
        };
        let (one, two) = (of("one"), of("two"));
        assert_eq!((&one["level"], &two["level"]), (&6.into(), &3.into()));
        for (field, value) in [
            ("version", "1.1"),
            ("_container_name", "talker"),
            ("_team", "blue"),
            ("_tag", "app/talker"),
            ("_image_name", "busybox"),
        ] {
            assert_eq!(one[field], value, "{field}");
        }
        let long = "x".repeat(5000);
        assert!(messages.iter().any(|m| m["short_message"] == long.as_str()), "the long line is whole");
    };
    let address = format!("udp://{}", udp.local_addr().unwrap());

    // Compressed, each in one datagram.
    run(&address, &["--log-opt", "gelf-compression-type=zlib", "--log-opt", "gelf-compression-level=9"]);
    let mut buffer = vec![0; 64 << 10];
    let mut receive = || {
        let length = udp.recv(&mut buffer).expect("a message in time");
        buffer[..length].to_vec()
    };
    let messages: Vec<_> = (0..3)
        .map(|_| serde_json::from_reader(flate2::read::ZlibDecoder::new(&receive()[..])).unwrap())
        .collect();
    check(&messages);
    // Plain: the long line comes in chunks.
    run(&address, &["--log-opt", "gelf-compression-type=none"]);
    let (mut messages, mut chunks) = (Vec::new(), Vec::new());
    while messages.len() < 3 {
        let datagram = receive();
        if datagram.starts_with(&[0x1e, 0x0f]) {
            let (id, count) = (datagram[2..10].to_vec(), usize::from(datagram[11]));
            chunks.push((id, datagram[10], datagram[12..].to_vec()));
            if chunks.len() == count {
                chunks.sort();
                assert!(chunks.windows(2).all(|pair| pair[0].0 == pair[1].0 && pair[0].1 + 1 == pair[1].1));
                let whole: Vec<u8> = chunks.drain(..).flat_map(|(_, _, part)| part).collect();
                messages.push(serde_json::from_slice(&whole).unwrap());
            }
        } else {
            messages.push(serde_json::from_slice(&datagram).unwrap());
        }
    }
    check(&messages);
    // By TCP with a zero byte behind each.
    let address = format!("tcp://{}", tcp.local_addr().unwrap());
    let receiver = std::thread::spawn(move || {
        let mut messages = Vec::new();
        while messages.len() < 3 {
            // The first connection only looks whether somebody is there.
            let (mut stream, _) = tcp.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            let parts = all.split(|byte| *byte == 0).filter(|part| !part.is_empty());
            messages.extend(parts.map(|part| serde_json::from_slice::<serde_json::Value>(part).unwrap()));
        }
        messages
    });
    run(&address, &[]);
    check(&receiver.join().unwrap());
    host.cli(["create", "--log-driver", "gelf", "busybox"])
        .exits(1)
        .expect_stderr("gelf-address is a required parameter");
    host.assert_nothing_left();
}

fn fluentd_acknowledges_what_it_has(client: Client) {
    let host = Host::new(client);
    let listener = host.sandbox().within_net(|| TcpListener::bind("127.0.0.1:0").unwrap());
    let address = format!("fluentd-address={}", listener.local_addr().unwrap());
    // It loses the first record: says nothing of it and hangs up. The record must come again.
    let receiver = std::thread::spawn(move || {
        let mut seen = Vec::new();
        let mut lost = false;
        loop {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                let record = &buffer[..length];
                assert_eq!(record[0], 0x94, "with options");
                seen.push(String::from_utf8_lossy(record).into_owned());
                if !std::mem::replace(&mut lost, true) {
                    break;
                }
                let mut answer = b"\x81\xa3ack\xb8".to_vec();
                answer.extend_from_slice(&record[length - 24..]);
                std::io::Write::write_all(&mut stream, &answer).unwrap();
                if seen.last().is_some_and(|record| record.contains("second line")) {
                    return seen;
                }
            }
        }
    });
    let flags = ["run", "--name", "talker", "--log-driver", "fluentd", "--log-opt", &address];
    let script = "echo first line; echo second line";
    host.cli(flags.iter().chain(&["--log-opt", "fluentd-request-ack=true", "busybox", "sh", "-c", script]))
        .ok();
    let seen = receiver.join().unwrap();
    let of = |line: &str| seen.iter().filter(|record| record.contains(line)).count();
    assert_eq!((of("first line"), of("second line")), (2, 1), "{seen:?}");
    host.cli(["rm", "talker"]).ok();
    host.assert_nothing_left();
}

/// A collector that takes nothing holds back a container that writes on and on, but not stop, exec or logs.
#[test]
fn a_stuck_collector_holds_back_the_output_and_nothing_else() {
    let host = Host::new(Client::Docker);
    let listener = host.sandbox().within_net(|| TcpListener::bind("127.0.0.1:0").unwrap());
    let address = format!("syslog-address=tcp://{}", listener.local_addr().unwrap());
    let script =
        "while true; do echo 0123456789012345678901234567890123456789012345678901234567890123456789; done";
    let run = |name: &str, more: &[&str]| {
        host.cli(
            ["run", "-d", "--name", name, "--log-driver", "syslog", "--log-opt", &address]
                .iter()
                .chain(more)
                .chain(&["busybox", "sh", "-c", script]),
        )
        .ok();
    };
    run("blocked", &[]);
    let size = || {
        let id = host.inspect("blocked")["Id"].as_str().unwrap().to_owned();
        let path = host.data_root().join("containers").join(&id).join(format!("{id}-json.log"));
        std::fs::metadata(path).map_or(0, |metadata| metadata.len())
    };
    let mut before = 0;
    eventually("the output to stop", || {
        let now = size();
        std::thread::sleep(Duration::from_millis(700));
        let still = now > 0 && now == before;
        before = now;
        still.then_some(())
    });
    host.cli(["exec", "blocked", "true"]).ok();
    assert!(host.cli(["logs", "--tail", "1", "blocked"]).ok().starts_with("0123"));
    let began = Instant::now();
    host.cli(["rm", "-f", "blocked"]).ok();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    run("free", &["--log-opt", "mode=non-blocking", "--log-opt", "max-buffer-size=64k"]);
    eventually("more output than any buffer holds", || {
        let id = host.inspect("free")["Id"].as_str().unwrap().to_owned();
        let path = host.data_root().join("containers").join(&id).join(format!("{id}-json.log"));
        std::fs::metadata(path).is_ok_and(|metadata| metadata.len() > 12 << 20).then_some(())
    });
    host.cli(["rm", "-f", "free"]).ok();
}
