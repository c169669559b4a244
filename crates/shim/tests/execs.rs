//! Further processes: streams, status, failures, terminals, records.

mod common;

use std::net::Shutdown;
use std::thread;

use brigantine_shim::{ClientError, ConsoleSize, Event, FailureKind, exec_record};
use common::{Fixture, eventually, read_output, read_until, write_all};

#[test]
fn an_exec_has_streams_and_a_status() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let mut running = fixture.start();
    let mut exec =
        running.client.exec(&fixture.exec("e1", &["sh", "-c", "echo out; echo err >&2; exit 7"])).unwrap();
    let output = read_output(&mut exec.stream);
    assert_eq!((output.text().as_str(), &output.stderr[..]), ("out\n", &b"err\n"[..]));
    let record = output.exec.unwrap();
    assert_eq!((record.exit_code, record.pid), (7, exec.pid));
    assert_eq!(running.client.exec_state("e1").unwrap().exit, Some(record.clone()));
    assert_eq!(exec_record(&fixture.config.dir, "e1").unwrap(), Some(record.clone()));
    assert_eq!(running.events.read().unwrap(), Some(Event::ExecExited(record)));
    running.client.exec_forget("e1").unwrap();
    assert!(running.client.exec_state("e1").is_err());
    assert_eq!(exec_record(&fixture.config.dir, "e1").unwrap(), None);
    assert!(fixture.log().is_empty(), "an exec's output is not in the container's log");
}

#[test]
fn a_missing_program_is_a_typed_failure() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let running = fixture.start();
    for (args, kind, code) in [
        (&["nonsense"][..], FailureKind::NotFound, 127),
        (&["/bin/nonsense"], FailureKind::NotFound, 127),
        (&["/etc"], FailureKind::PermissionDenied, 126),
    ] {
        match running.client.exec(&fixture.exec("bad", args)) {
            Err(ClientError::Refused(failure)) => {
                assert_eq!((failure.kind, failure.exit_code()), (kind, code), "{failure}");
                assert!(failure.message.contains(args[0]), "{failure}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(running.client.state().unwrap().execs.is_empty());
}

#[test]
fn input_reaches_an_exec_and_half_closes() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let running = fixture.start();
    let mut config = fixture.exec("in", &["wc", "-c"]);
    config.stdin = true;
    let mut exec = running.client.exec(&config).unwrap();
    write_all(&mut exec.stream, &vec![b'x'; 300_000]);
    exec.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_output(&mut exec.stream).text().trim(), "300000");
}

#[test]
fn an_exec_on_a_terminal_is_resized() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let running = fixture.start();
    let mut config = fixture.exec("tty", &["sh", "-c", "stty size; read x; stty size"]);
    (config.terminal, config.stdin) = (true, true);
    config.console_size = Some(ConsoleSize { height: 20, width: 90 });
    let mut exec = running.client.exec(&config).unwrap();
    read_until(&mut exec.stream, "20 90");
    running.client.exec_resize("tty", ConsoleSize { height: 21, width: 91 }).unwrap();
    write_all(&mut exec.stream, b"\n");
    let output = read_output(&mut exec.stream);
    assert!(output.text().contains("21 91"), "{}", output.text());
    assert_eq!(output.exec.unwrap().exit_code, 0);
}

#[test]
fn a_terminals_first_size_is_there_before_the_program_looks() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let running = fixture.start();
    for n in 0..100 {
        let mut config = fixture.exec(&format!("tty{n}"), &["stty", "size"]);
        config.terminal = true;
        config.console_size = Some(ConsoleSize { height: 20, width: 90 });
        let mut exec = running.client.exec(&config).unwrap();
        assert_eq!(read_output(&mut exec.stream).text().trim(), "20 90");
    }
}

#[test]
fn several_execs_run_at_once() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let running = fixture.start();
    thread::scope(|scope| {
        for n in 0..16 {
            let (client, fixture) = (&running.client, &fixture);
            scope.spawn(move || {
                let script = format!("seq 1 5000; exit {n}");
                let mut exec = client.exec(&fixture.exec(&format!("e{n}"), &["sh", "-c", &script])).unwrap();
                let output = read_output(&mut exec.stream);
                assert!(output.text().ends_with("\n5000\n"));
                assert_eq!(output.exec.unwrap().exit_code, n);
            });
        }
    });
}

#[test]
fn an_exec_whose_client_vanishes_goes_on_and_is_recorded() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let running = fixture.start();
    let exec = running.client.exec(&fixture.exec("alone", &["sh", "-c", "seq 1 100000; exit 5"])).unwrap();
    drop(exec.stream);
    eventually("the exec ends", || running.client.exec_state("alone").unwrap().exit.is_some());
    assert_eq!(exec_record(&fixture.config.dir, "alone").unwrap().unwrap().exit_code, 5);
}

#[test]
fn an_exec_is_signalled_and_ends_with_its_container() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let mut running = fixture.start();
    let mut first = running.client.exec(&fixture.exec("first", &["sleep", "500"])).unwrap();
    running.client.exec_kill("first", 15).unwrap();
    let record = read_output(&mut first.stream).exec.unwrap();
    assert_eq!((record.exit_code, record.signal), (143, Some(15)));
    let mut second = running.client.exec(&fixture.exec("second", &["sleep", "500"])).unwrap();
    running.client.kill(9, false).unwrap();
    assert_eq!(read_output(&mut second.stream).exec.unwrap().exit_code, 137);
    assert_eq!(running.exited().exit_code, 137);
    assert!(matches!(
        running.client.exec(&fixture.exec("late", &["true"])),
        Err(ClientError::Refused(failure)) if failure.kind == FailureKind::NotRunning
    ));
    running.client.release().unwrap();
    fixture.assert_nothing_left();
}

#[test]
fn a_background_child_that_keeps_the_pipe_does_not_keep_the_exec() {
    let fixture = Fixture::new(&["/bin/sleep", "1000"]);
    let running = fixture.start();
    let mut exec =
        running.client.exec(&fixture.exec("bg", &["sh", "-c", "sleep 900 & echo started"])).unwrap();
    let output = read_output(&mut exec.stream);
    assert_eq!((output.text().as_str(), output.exec.unwrap().exit_code), ("started\n", 0));
}
