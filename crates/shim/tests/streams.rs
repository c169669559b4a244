//! Standard streams: order, completeness, half-close, terminals, several clients, logs.

#![expect(clippy::format_collect, reason = "expected output, built once")]

mod common;

use std::fs;
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use brigantine_shim::log::Source;
use brigantine_shim::{AttachOptions, ConsoleSize, LogConfig};
use common::{Fixture, eventually, read_log, read_output, read_until, write_all};

#[test]
fn output_reaches_the_client_and_the_log() {
    let fixture = Fixture::shell("echo one; echo two >&2; printf three; exit 3");
    let mut running = fixture.start_attached();
    let output = running.output();
    assert_eq!((output.text().as_str(), &output.stderr[..]), ("one\nthree", &b"two\n"[..]));
    let exit = running.exited();
    assert_eq!((exit.exit_code, exit.signal, exit.oom_killed), (3, None, false));
    let mut log = fixture.log();
    log.sort_by_key(|(source, _)| *source == Source::Stderr);
    assert_eq!(
        log,
        [
            (Source::Stdout, b"one\n".to_vec()),
            (Source::Stdout, b"three".to_vec()),
            (Source::Stderr, b"two\n".to_vec())
        ]
    );
    running.client.release().unwrap();
    fixture.assert_nothing_left();
}

#[test]
fn the_log_is_complete_before_the_end_is_told() {
    let fixture = Fixture::shell("seq 1 50000");
    let mut running = fixture.start();
    running.exited();
    let log: Vec<u8> = fixture.log().into_iter().flat_map(|(_, bytes)| bytes).collect();
    let expected: String = (1..=50_000).map(|n| format!("{n}\n")).collect();
    assert!(log == expected.as_bytes(), "{} of {} bytes", log.len(), expected.len());
}

#[test]
fn a_hundred_megabytes_arrive_byte_exact() {
    let fixture = Fixture::new(&[
        "/bin/sh",
        "-c",
        "yes 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde | head -c 104857600",
    ])
    .with(|c| c.log = LogConfig::None);
    let mut running = fixture.start_attached();
    let output = running.output();
    assert_eq!(output.stdout.len(), 100 << 20);
    let line = b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n";
    assert!(output.stdout.chunks(line.len()).all(|chunk| chunk == line));
    assert_eq!(running.exited().exit_code, 0);
}

#[test]
fn input_flows_through_both_ways_at_once_without_deadlock() {
    let fixture = Fixture::new(&["/bin/cat"])
        .with(|c| (c.open_stdin, c.stdin_once, c.log) = (true, true, LogConfig::None));
    let mut running = fixture.start_attached();
    let bytes: Vec<u8> = (0..20_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut stdin = running.stdin();
    let sent = bytes.clone();
    let writer = thread::spawn(move || {
        write_all(&mut stdin, &sent);
        stdin.shutdown(Shutdown::Write).unwrap();
    });
    let output = running.output();
    writer.join().unwrap();
    assert!(output.stdout == bytes, "{} bytes", output.stdout.len());
    assert_eq!(running.exited().exit_code, 0);
}

#[test]
fn a_half_close_ends_the_input_and_output_goes_on() {
    let fixture =
        Fixture::shell("cat >/dev/null; echo after").with(|c| (c.open_stdin, c.stdin_once) = (true, true));
    let mut running = fixture.start_attached();
    write_all(&mut running.stdin(), b"some");
    running.stdin().shutdown(Shutdown::Write).unwrap();
    assert_eq!(running.output().text(), "after\n");
}

#[test]
fn input_without_once_survives_a_half_close() {
    let fixture = Fixture::new(&["/bin/cat"]).with(|c| c.open_stdin = true);
    let mut running = fixture.start_attached();
    running.stdin().shutdown(Shutdown::Write).unwrap();
    let mut second =
        running.client.attach(&AttachOptions { stdin: true, ..AttachOptions::default() }).unwrap();
    write_all(&mut second, b"second\n");
    assert_eq!(read_until(&mut second, "\n"), "second\n");
    running.client.close_stdin().unwrap();
    assert_eq!(running.output().text(), "second\n");
    assert_eq!(running.exited().exit_code, 0);
}

#[test]
fn a_client_that_vanishes_ends_once_only_input_and_nothing_else() {
    let fixture = Fixture::shell("cat; echo done").with(|c| (c.open_stdin, c.stdin_once) = (true, true));
    let mut running = fixture.start_attached();
    write_all(&mut running.stdin(), b"last words\n");
    drop(running.attach.take());
    assert_eq!(running.exited().exit_code, 0);
    let log: Vec<u8> = fixture.log().into_iter().flat_map(|(_, bytes)| bytes).collect();
    assert_eq!(log, b"last words\ndone\n");
}

#[test]
fn detaching_leaves_the_input_open() {
    let fixture = Fixture::shell("cat; echo done").with(|c| (c.open_stdin, c.stdin_once) = (true, true));
    let mut running = fixture.start_attached();
    running.client.detach("first").unwrap();
    assert!(running.output().stdout.is_empty());
    let mut second =
        running.client.attach(&AttachOptions { stdin: true, ..AttachOptions::default() }).unwrap();
    write_all(&mut second, b"here\n");
    second.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_output(&mut second).text(), "here\ndone\n");
}

#[test]
fn a_terminal_has_its_size_is_resized_and_takes_input() {
    let fixture = Fixture::shell(
        "stty size; read x; stty size; echo got $x; tty=$(readlink /proc/self/fd/0); echo $tty",
    )
    .with(|c| {
        (c.terminal, c.open_stdin, c.stdin_once) = (true, true, true);
        c.console_size = Some(ConsoleSize { height: 33, width: 101 });
    });
    let mut running = fixture.start_attached();
    let mut attach = running.attach.take().unwrap();
    read_until(&mut attach, "33 101");
    running.client.resize(ConsoleSize { height: 44, width: 55 }).unwrap();
    write_all(&mut attach, b"hello\n");
    let rest = read_output(&mut attach).text();
    assert!(rest.contains("44 55\r\ngot hello\r\n"), "{rest:?}");
    assert!(rest.contains("/dev/pts/0") || rest.contains("/dev/console"), "{rest:?}");
    assert_eq!(running.exited().exit_code, 0);
}

#[test]
fn a_half_close_on_a_terminal_is_an_end_of_file() {
    let fixture = Fixture::shell("cat; echo over")
        .with(|c| (c.terminal, c.open_stdin, c.stdin_once) = (true, true, true));
    let mut running = fixture.start_attached();
    write_all(&mut running.stdin(), b"line\n");
    running.stdin().shutdown(Shutdown::Write).unwrap();
    assert!(running.output().text().ends_with("over\r\n"));
}

#[test]
fn several_clients_see_the_same() {
    let fixture = Fixture::shell("read x; seq 1 20000; echo err >&2").with(|c| c.open_stdin = true);
    let mut running = fixture.start_attached();
    let others: Vec<_> = (0..3).map(|_| running.client.attach(&AttachOptions::default()).unwrap()).collect();
    let mut only_err =
        running.client.attach(&AttachOptions { stdout: false, ..AttachOptions::default() }).unwrap();
    write_all(&mut running.stdin(), b"go\n");
    let others: Vec<_> = others.into_iter().map(|mut s| thread::spawn(move || read_output(&mut s))).collect();
    let first = running.output();
    assert!(first.text().ends_with("\n20000\n"));
    for other in others {
        assert_eq!(other.join().unwrap().stdout, first.stdout);
    }
    let only_err = read_output(&mut only_err);
    assert_eq!((only_err.stdout.len(), &only_err.stderr[..]), (0, &b"err\n"[..]));
}

#[test]
fn an_onlooker_that_does_not_read_is_dropped_and_told() {
    let fixture = Fixture::shell("read x; seq 1 500000; echo end").with(|c| c.open_stdin = true);
    let mut running = fixture.start_attached();
    let patience = Some(Duration::from_millis(300));
    let mut onlooker =
        running.client.attach(&AttachOptions { patience, ..AttachOptions::default() }).unwrap();
    write_all(&mut running.stdin(), b"go\n");
    let output = running.output();
    assert!(output.text().ends_with("\n500000\nend\n"));
    let seen = read_output(&mut onlooker);
    // How much there was when its patience ended is the machine's.
    assert!(seen.lagged && !seen.stdout.is_empty() && seen.stdout.len() < output.stdout.len());
    assert!(output.stdout.starts_with(&seen.stdout));
}

#[test]
fn a_patient_client_that_does_not_read_for_a_while_loses_nothing() {
    let fixture = Fixture::shell("seq 1 500000");
    let mut running = fixture.start_attached();
    thread::sleep(Duration::from_millis(700));
    let expected: String = (1..=500_000).map(|n| format!("{n}\n")).collect();
    assert!(running.output().text() == expected);
}

#[test]
fn the_log_is_rotated_and_bounded() {
    let fixture = Fixture::shell("seq 1 100000").with(|c| {
        let LogConfig::JsonFile(log) = &mut c.log else { unreachable!() };
        (log.max_size, log.max_files) = (100_000, 3);
    });
    let mut running = fixture.start();
    running.exited();
    let mut kept = Vec::new();
    for name in ["log.2", "log.1", "log"] {
        let path = fixture.temp.path().join(name);
        assert!(fs::metadata(&path).unwrap().len() < 101_000);
        kept.extend(read_log(&path).into_iter().flat_map(|(_, bytes)| bytes));
    }
    let expected: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(expected.as_bytes().ends_with(&kept) && kept.len() > 10_000);
    assert!(!fixture.temp.path().join("log.3").exists());
}

#[test]
fn binary_output_is_logged_byte_exact() {
    let fixture = Fixture::shell("head -c 300000 /dev/urandom | tee /tmp/copy");
    let mut running = fixture.start_attached();
    let output = running.output();
    running.exited();
    let log: Vec<u8> = fixture.log().into_iter().flat_map(|(_, bytes)| bytes).collect();
    assert_eq!(output.stdout.len(), 300_000);
    assert!(log == output.stdout);
}

#[test]
fn a_full_pipe_of_input_does_not_hold_up_output() {
    let fixture =
        Fixture::shell("seq 1 100000; sleep 100").with(|c| (c.open_stdin, c.log) = (true, LogConfig::None));
    let mut running = fixture.start_attached();
    let mut stdin = running.stdin();
    stdin.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let chunk = vec![0; 1 << 20];
    let since = Instant::now();
    while std::io::Write::write(&mut stdin, &chunk).is_ok() {
        assert!(since.elapsed() < Duration::from_secs(10), "input is taken without a bound");
    }
    let mut attach = running.attach.take().unwrap();
    read_until(&mut attach, "\n100000\n");
    running.client.kill(9, false).unwrap();
    assert_eq!(running.exited().exit_code, 137);
    eventually("the container is gone", || running.client.release().is_ok());
}
