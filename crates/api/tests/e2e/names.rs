//! Names of containers for each other: who has which, who is asked about others, and that it goes on without a daemon.

use std::{
    net::UdpSocket,
    sync::{Arc, Mutex},
    time::Duration,
};

use brigantine_testkit::{Client, Outside, until, wait::PATIENCE};

use crate::Host;

both![names_are_answered, links_are_known_to_who_has_them];

/// What `nslookup` says about a name inside a container.
fn asks(host: &Host, id: &str, name: &str) -> String {
    let output = host.cli(["exec", id, "nslookup", name]).run();
    format!("{}{}", output.stdout, output.stderr)
}

fn names_are_answered(client: Client) {
    let host = Host::new(client);
    host.cli(["network", "create", "--subnet", "10.77.0.0/24", "shore"]).ok();
    host.cli(["network", "create", "--subnet", "10.78.0.0/24", "sea"]).ok();
    host.cli([
        "run",
        "-d",
        "--name",
        "One",
        "--network",
        "shore",
        "--network-alias",
        "svc",
        "busybox",
        "sleep",
        "1000",
    ])
    .ok();
    let two = host
        .background(&["--network", "shore", "--network-alias", "svc", "--hostname", "twohost"], "sleep 1000");
    let far = host.background(&["--network", "sea", "--name", "far"], "sleep 1000");
    let resolv = host.cli(["exec", &two, "cat", "/etc/resolv.conf"]).ok();
    assert!(resolv.contains("nameserver 127.0.0.11") && resolv.contains("ndots:0"), "{resolv}");
    let one = host.inspect("One")["NetworkSettings"]["Networks"]["shore"].clone();
    let (ip, id) =
        (one["IPAddress"].as_str().unwrap(), host.inspect("One")["Id"].as_str().unwrap().to_owned());
    for name in ["One", "one", "one.shore", &id[..12]] {
        let text = asks(&host, &two, name);
        assert!(text.contains(ip), "{name}: {text}");
    }
    // Also IPv6, in reverse, and both addresses of a shared alias.
    let text = asks(&host, &two, "one");
    assert!(text.contains(one["GlobalIPv6Address"].as_str().unwrap()), "{text}");
    let text = asks(&host, &two, ip);
    assert!(text.to_lowercase().contains("one.shore"), "{text}");
    let text = asks(&host, &two, "svc");
    assert!(text.contains("10.77.0.2") && text.contains("10.77.0.3"), "{text}");
    assert!(asks(&host, "One", "twohost").contains("10.77.0.3"));
    let text = asks(&host, &two, "far");
    assert!(!text.contains("10.78.0."), "a name of another network: {text}");

    // Names come and go with connections, and follow a new name.
    host.cli(["network", "connect", "--alias", "visitor", "shore", &far]).ok();
    assert!(asks(&host, &two, "visitor").contains("10.77.0.4"));
    host.cli(["rename", "far", "near"]).ok();
    assert!(asks(&host, &two, "near").contains("10.77.0.4"));
    host.cli(["network", "disconnect", "shore", &far]).ok();
    assert!(!asks(&host, &two, "near").contains("10.77.0.4"));

    // A container of the default network gets names with its first network that has any.
    let late = host.background(&[], "sleep 1000");
    assert!(!host.cli(["exec", &late, "cat", "/etc/resolv.conf"]).ok().contains("127.0.0.11"));
    host.cli(["network", "connect", "shore", &late]).ok();
    assert!(asks(&host, &late, "one").contains(ip));

    // Port 53 is the container's own: a name server can be run in it.
    let served = host.cli(["exec", &two, "sh", "-c", "nc -l -p 53 </dev/null & sleep 0.3; kill %1"]).run();
    assert!(!served.stderr.contains("in use"), "{served}");
    host.cli(["rm", "-f", "One", &two, &far, &late]).ok();
    host.cli(["network", "rm", "shore", "sea"]).ok();
    host.assert_nothing_left();
}

fn links_are_known_to_who_has_them(client: Client) {
    let host = Host::new(client);
    host.cli(["run", "-d", "--name", "db", "--expose", "5432", "-e", "SIZE=big", "busybox", "sleep", "1000"])
        .ok();
    let at = host.inspect("db")["NetworkSettings"]["IPAddress"].as_str().unwrap().to_owned();
    let text = host.script(&["--link", "db:store"], "cat /etc/hosts; env");
    assert!(text.contains(&format!("{at}\tstore ")), "{text}");
    assert!(
        text.contains(&format!("STORE_PORT_5432_TCP_ADDR={at}")) && text.contains("STORE_ENV_SIZE=big"),
        "{text}"
    );
    let user = host.background(&["--link", "db"], "sleep 1000");
    host.cli(["run", "-d", "--name", "squatter", "busybox", "sleep", "1000"]).ok();
    host.cli(["restart", "-t", "0", "db"]).ok();
    let now = host.inspect("db")["NetworkSettings"]["IPAddress"].as_str().unwrap().to_owned();
    assert!(host.cli(["exec", &user, "cat", "/etc/hosts"]).ok().contains(&format!("{now}\tdb ")));
    host.cli(["run", "--rm", "--link", "nobody:x", "busybox", "true"]).exits(125).expect_stderr("nobody");

    host.cli(["network", "create", "shore"]).ok();
    host.cli(["run", "-d", "--name", "cache", "--network", "shore", "busybox", "sleep", "1000"]).ok();
    let linked = host.background(&["--network", "shore", "--link", "cache:fast"], "sleep 1000");
    let at = host.inspect("cache")["NetworkSettings"]["Networks"]["shore"]["IPAddress"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(asks(&host, &linked, "fast").contains(&at));
    assert!(!asks(&host, "cache", "fast").contains(&at), "a link is nobody else's");
    host.cli(["rm", "-f", "db", &user, "squatter", "cache", &linked]).ok();
    host.cli(["network", "rm", "shore"]).ok();
    host.assert_nothing_left();
}

/// A name server on the other machine: every name is at 203.0.113.7. What it was asked is kept.
fn name_server(outside: &Outside) -> Arc<Mutex<Vec<String>>> {
    let socket = outside.within(|| UdpSocket::bind((Outside::ADDRESS, 53)).unwrap());
    let heard = Arc::new(Mutex::new(Vec::new()));
    let theirs = Arc::clone(&heard);
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let (end, name) = name_in(&buffer[..length]);
            theirs.lock().unwrap().push(name);
            let is_a = buffer[end + 1] == 1;
            let mut answer = buffer[..end + 4].to_vec();
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
            if is_a {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 203, 0, 113, 7]);
            }
            socket.send_to(&answer, from).ok();
        }
    });
    heard
}

/// Where the first question's name ends, and the name.
fn name_in(message: &[u8]) -> (usize, String) {
    let (mut at, mut labels) = (12, Vec::new());
    while message[at] != 0 {
        let length = usize::from(message[at]);
        labels.push(String::from_utf8_lossy(&message[at + 1..=at + length]).into_owned());
        at += 1 + length;
    }
    (at + 1, labels.join("."))
}

/// The bytes of an answer to a question for an address, asked by a socket of the container's network.
fn ask(socket: &UdpSocket, name: &str) -> Option<Vec<u8>> {
    let mut question = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        question.push(u8::try_from(label.len()).unwrap());
        question.extend(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    socket.send(&question).ok()?;
    let mut buffer = [0; 512];
    let length = socket.recv(&mut buffer).ok()?;
    Some(buffer[..length].to_vec())
}

fn resolver_of(host: &Host, id: &str) -> UdpSocket {
    let socket = host.within_container(id, || {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect("127.0.0.11:53").unwrap();
        socket
    });
    socket.set_read_timeout(Some(Duration::from_secs(8))).unwrap();
    socket
}

/// The host's resolv.conf, in the engine's own mount namespace.
pub(super) fn set_resolv_conf(host: &Host, text: &str) {
    let path = host.dir().join("resolv.conf");
    let is_new = !path.exists();
    std::fs::write(&path, text).unwrap();
    if is_new {
        let status =
            host.sandbox().command("mount").arg("--bind").arg(&path).arg("/etc/resolv.conf").status();
        assert!(status.unwrap().success());
    }
}

/// CVE-2024-29018: whoever has no way out must not get words out by asking for names, either.
#[test]
fn an_internal_network_asks_nobody_outside() {
    let host = Host::new(Client::Brig);
    let outside = Outside::connect(&host.engine);
    let heard = name_server(&outside);
    set_resolv_conf(&host, &format!("nameserver {}\n", Outside::ADDRESS));
    host.cli(["network", "create", "--internal", "cave"]).ok();
    host.cli(["network", "create", "shore"]).ok();
    let inside = host.background(&["--network", "cave", "--name", "inside"], "sleep 1000");
    let open = host.background(&["--network", "shore"], "sleep 1000");
    let answer = ask(&resolver_of(&host, &open), "secret.example.org").unwrap();
    assert!(answer.ends_with(&[203, 0, 113, 7]), "the host's server is asked");
    assert_eq!(*heard.lock().unwrap(), ["secret.example.org"]);
    let answer = ask(&resolver_of(&host, &inside), "stolen.example.org").unwrap();
    assert_eq!(answer[3] & 0x0f, 3, "NXDOMAIN");
    let answer = ask(&resolver_of(&host, &inside), "inside").unwrap();
    assert_eq!((answer[3] & 0x0f, answer[7]), (0, 1));
    assert_eq!(heard.lock().unwrap().len(), 1, "nothing has got out");
}

/// The host's servers are those of its resolv.conf as it is now.
#[test]
fn servers_are_the_hosts_of_this_moment_or_the_containers_own() {
    let host = Host::new(Client::Brig);
    let outside = Outside::connect(&host.engine);
    let heard = name_server(&outside);
    set_resolv_conf(&host, "nameserver 192.0.2.99\n");
    host.cli(["network", "create", "shore"]).ok();
    let open = host.background(&["--network", "shore"], "sleep 1000");
    set_resolv_conf(&host, &format!("# changed\nnameserver {}\n", Outside::ADDRESS));
    let socket = resolver_of(&host, &open);
    let answered =
        until(PATIENCE, || ask(&socket, "one.example.org").filter(|a| a.ends_with(&[203, 0, 113, 7])));
    assert!(answered.is_some(), "{:?}", heard.lock().unwrap());
    set_resolv_conf(&host, "nameserver 192.0.2.99\n");
    let own = host.background(&["--network", "shore", "--dns", &Outside::ADDRESS.to_string()], "sleep 1000");
    let answer = ask(&resolver_of(&host, &own), "two.example.org").unwrap();
    assert!(answer.ends_with(&[203, 0, 113, 7]), "its own server");
}

#[test]
fn names_go_on_without_a_daemon_and_after_the_helpers_end() {
    let mut host = Host::new(Client::Brig);
    host.cli(["network", "create", "shore"]).ok();
    let one = host.background(&["--network", "shore", "--name", "one"], "sleep 1000");
    let two = host.background(&["--network", "shore", "--name", "two"], "sleep 1000");
    let socket = resolver_of(&host, &two);
    let finds = |socket: &UdpSocket| ask(socket, "one").is_some_and(|answer| answer[7] == 1);
    assert!(finds(&socket));
    host.engine.kill_daemon();
    assert!(finds(&socket), "without a daemon");
    host.engine.restart_daemon();
    assert!(finds(&socket), "with the next daemon");
    let three = host.background(&["--network", "shore", "--name", "three"], "sleep 1000");
    assert!(ask(&socket, "three").is_some_and(|answer| answer[7] == 1), "one that came later");

    // Should the helper itself be killed, the daemon starts another and gives it all it needs.
    let helper = || {
        let output = host.sandbox().command("pgrep").args(["-f", "daemon network-helper"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let former = helper();
    assert!(!former.is_empty());
    assert!(host.sandbox().command("kill").args(["-9", &former]).status().unwrap().success());
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(until(PATIENCE, || finds(&socket).then_some(())).is_some(), "after the helper's end");
    assert_ne!(helper(), former);
    host.cli(["rm", "-f", &one, &two, &three]).ok();
    host.cli(["network", "rm", "shore"]).ok();
}
