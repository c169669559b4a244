//! Each endpoint with what nobody should send: wrong types, absurd numbers, unknown and half-known names, states that do
//! not fit. Every answer is one of those that are expected, has a message, and changes nothing.

use brigantine_testkit::{Engine, http};
use serde_json::{Value, json};

/// One wrong request and the statuses that are right for it.
struct Wrong {
    method: &'static str,
    path: String,
    body: Option<Value>,
    statuses: &'static [u16],
}

fn wrong(method: &'static str, path: impl Into<String>, statuses: &'static [u16]) -> Wrong {
    Wrong { method, path: path.into(), body: None, statuses }
}

fn with(method: &'static str, path: impl Into<String>, body: Value, statuses: &'static [u16]) -> Wrong {
    Wrong { method, path: path.into(), body: Some(body), statuses }
}

/// Names that nothing has, however they are written.
const NOBODY: [&str; 6] = ["nobody", "ffffffffffff", "%00", "..", "a%20b", "%F0%9F%90%B3"];

/// Requests for something that does not exist.
fn unknown() -> Vec<Wrong> {
    let mut all = Vec::new();
    for name in NOBODY {
        let none: &[u16] = &[400, 404];
        for (method, verb) in [
            ("GET", "json"),
            ("GET", "top"),
            ("GET", "logs?stdout=1"),
            ("GET", "stats?stream=0"),
            ("GET", "changes"),
            ("GET", "export"),
            ("GET", "archive?path=/"),
            ("GET", "attach/ws"),
            ("POST", "start"),
            ("POST", "stop"),
            ("POST", "restart"),
            ("POST", "kill"),
            ("POST", "pause"),
            ("POST", "unpause"),
            ("POST", "wait"),
            ("POST", "resize?h=1&w=1"),
            ("POST", "attach?stream=1"),
            ("POST", "rename?name=x"),
        ] {
            all.push(wrong(method, format!("/containers/{name}/{verb}"), none));
        }
        all.push(with("POST", format!("/containers/{name}/update"), json!({}), none));
        all.push(with("POST", format!("/containers/{name}/exec"), json!({ "Cmd": ["true"] }), none));
        all.push(wrong("DELETE", format!("/containers/{name}"), none));
        all.push(wrong("GET", format!("/exec/{name}/json"), none));
        all.push(with("POST", format!("/exec/{name}/start"), json!({}), none));
        all.push(wrong("POST", format!("/exec/{name}/resize?h=1&w=1"), none));
        for (method, verb) in [
            ("GET", "/json"),
            ("GET", "/history"),
            ("GET", "/get"),
            ("POST", "/tag?repo=x"),
            ("POST", "/push"),
            ("DELETE", ""),
        ] {
            all.push(wrong(method, format!("/images/{name}{verb}"), none));
        }
        all.push(wrong("GET", format!("/volumes/{name}"), none));
        all.push(wrong("DELETE", format!("/volumes/{name}"), none));
        all.push(wrong("GET", format!("/networks/{name}"), none));
        all.push(wrong("DELETE", format!("/networks/{name}"), none));
        all.push(with("POST", format!("/networks/{name}/connect"), json!({ "Container": "up" }), none));
        all.push(with("POST", format!("/networks/{name}/disconnect"), json!({ "Container": "up" }), none));
        all.push(wrong("POST", format!("/commit?container={name}"), none));
    }
    all
}

/// Requests about what exists that are wrong in themselves.
fn nonsense() -> Vec<Wrong> {
    let bad: &[u16] = &[400];
    let mut all = Vec::new();
    for body in [
        json!({}),
        json!({ "Image": "" }),
        json!({ "Image": 5 }),
        json!({ "Image": ["busybox"] }),
        json!([]),
        json!("busybox"),
        json!({ "Image": "busybox", "Cmd": { "a": 1 } }),
        json!({ "Image": "busybox", "Env": "A=b" }),
        json!({ "Image": "busybox", "Env": ["=b"] }),
        json!({ "Image": "busybox", "ExposedPorts": { "99999/tcp": {} } }),
        json!({ "Image": "busybox", "ExposedPorts": { "80/x": {} } }),
        json!({ "Image": "busybox", "StopSignal": "SIGNOT" }),
        json!({ "Image": "busybox", "WorkingDir": "relative" }),
        json!({ "Image": "busybox", "Volumes": { "rel": {} } }),
        json!({ "Image": "busybox", "Healthcheck": { "Test": ["CMD", "x"], "Interval": -5 } }),
        json!({ "Image": "busybox", "HostConfig": [] }),
    ] {
        all.push(with("POST", "/containers/create", body, bad));
    }
    for host in [
        json!({ "Memory": -5 }),
        json!({ "Memory": 1 }),
        json!({ "Memory": "much" }),
        json!({ "Memory": 1e30 }),
        json!({ "MemorySwap": 5 }),
        json!({ "NanoCpus": -1 }),
        json!({ "NanoCpus": i64::MAX }),
        json!({ "CpuPeriod": 1 }),
        json!({ "CpuQuota": 1 }),
        json!({ "CpusetCpus": "x" }),
        json!({ "CpusetCpus": "0-99999" }),
        json!({ "PidsLimit": "x" }),
        json!({ "BlkioWeight": 5 }),
        json!({ "OomScoreAdj": 5000 }),
        json!({ "ShmSize": -1 }),
        json!({ "IpcMode": "odd" }),
        json!({ "PidMode": "odd" }),
        json!({ "UTSMode": "odd" }),
        json!({ "UsernsMode": "odd" }),
        json!({ "CgroupnsMode": "odd" }),
        json!({ "NetworkMode": "container:" }),
        json!({ "RestartPolicy": { "Name": "sometimes" } }),
        json!({ "RestartPolicy": { "Name": "always", "MaximumRetryCount": 3 } }),
        json!({ "RestartPolicy": { "Name": "always" }, "AutoRemove": true }),
        json!({ "Binds": ["a:b:c:d"] }),
        json!({ "Binds": ["/a:/b", "/c:/b"] }),
        json!({ "Mounts": [{ "Type": "odd", "Target": "/x" }] }),
        json!({ "Mounts": [{ "Type": "bind", "Source": "", "Target": "/x" }] }),
        json!({ "Tmpfs": { "/": "" } }),
        json!({ "PortBindings": { "80/tcp": [{ "HostPort": "99999" }] } }),
        json!({ "PortBindings": { "x/tcp": [] } }),
        json!({ "PortBindings": { "80/tcp": [{ "HostIp": "1.2.3", "HostPort": "1" }] } }),
        json!({ "CapAdd": ["FLY"] }),
        json!({ "SecurityOpt": ["odd"] }),
        json!({ "Ulimits": [{ "Name": "odd", "Soft": 1, "Hard": 1 }] }),
        json!({ "Ulimits": [{ "Name": "nofile", "Soft": 9, "Hard": 1 }] }),
        json!({ "DeviceCgroupRules": ["everything"] }),
        json!({ "ExtraHosts": ["nothing"] }),
        json!({ "Dns": ["not an address"] }),
        json!({ "LogConfig": { "Type": "odd" } }),
        json!({ "LogConfig": { "Type": "json-file", "Config": { "max-size": "x" } } }),
        json!({ "Runtime": "odd" }),
        json!({ "ConsoleSize": [1, 2, 3, -4] }),
        json!({ "Links": ["nobody:x"] }),
    ] {
        let what = json!({ "Image": "busybox", "HostConfig": host });
        all.push(with("POST", "/containers/create", what, bad));
    }
    all.push(with("POST", "/containers/create", json!({ "Image": "nowhere/none" }), &[404]));
    all.push(with("POST", "/containers/create?name=up", json!({ "Image": "busybox" }), &[409]));
    all.push(with("POST", "/containers/create?name=a%2Fb", json!({ "Image": "busybox" }), bad));
    all.push(with("POST", "/containers/create?platform=vax/vms", json!({ "Image": "busybox" }), &[400, 404]));
    all.push(with(
        "POST",
        "/containers/create",
        json!({ "Image": "busybox", "HostConfig": { "VolumesFrom": ["nobody"] } }),
        &[404],
    ));
    all.push(with(
        "POST",
        "/containers/create",
        json!({ "Image": "busybox", "HostConfig": { "VolumesFrom": ["up:odd"] } }),
        bad,
    ));
    for path in [
        "/containers/up/logs",
        "/containers/up/logs?stdout=1&since=yesterday",
        "/containers/up/archive",
        "/containers/json?limit=x",
        "/containers/json?filters=%5B",
        "/containers/json?filters=%7B%22status%22%3A%5B%22odd%22%5D%7D",
        "/containers/json?filters=%7B%22exited%22%3A%5B%22x%22%5D%7D",
        "/events?since=yesterday",
        "/events?since=9&until=1",
        "/events?filters=%7B%22odd%22%3A%5B%22x%22%5D%7D",
        "/images/json?filters=%7B%22dangling%22%3A%5B%22x%22%5D%7D",
        "/volumes?filters=%7B%22dangling%22%3A%5B%22x%22%5D%7D",
        "/networks?filters=%7B%22type%22%3A%5B%22odd%22%5D%7D",
        "/system/df?type=odd",
        "/images/get",
        "/v1.99/info",
        "/images/Bad:Ref:x/json",
    ] {
        all.push(wrong("GET", path, bad));
    }
    all.push(wrong("GET", "/containers/up/archive?path=/no/such", &[404]));
    for path in [
        "/containers/up/kill?signal=odd",
        "/containers/up/kill?signal=999",
        "/containers/up/stop?t=x",
        "/containers/up/resize",
        "/containers/up/resize?h=x&w=1",
        "/containers/up/resize?h=99999&w=1",
        "/containers/up/wait?condition=odd",
        "/containers/up/rename",
        "/containers/up/rename?name=a%20b",
        "/containers/up/attach?stream=1&detachKeys=odd",
        "/containers/prune?filters=%7B%22odd%22%3A%5B%22x%22%5D%7D",
        "/images/busybox/tag?repo=Not%20Good",
        "/images/create",
        "/images/create?fromImage=Not%20Good",
        "/images/prune?filters=%7B%22until%22%3A%5B%22x%22%5D%7D",
        "/volumes/prune?filters=%7B%22odd%22%3A%5B%22x%22%5D%7D",
        "/build?dockerfile=..%2F..%2Fetc%2Fpasswd&remote=odd%3A%2F%2Fx",
        "/build?cpuperiod=x",
        "/commit?container=up&repo=Not%20Good",
    ] {
        all.push(wrong("POST", path, bad));
    }
    all.push(wrong("POST", "/containers/up/start", &[304]));
    all.push(wrong("POST", "/containers/down/stop", &[304]));
    all.push(wrong("POST", "/containers/down/kill", &[409]));
    all.push(wrong("POST", "/containers/down/pause", &[409]));
    all.push(wrong("POST", "/containers/up/unpause", &[409]));
    all.push(wrong("GET", "/containers/down/top", &[409]));
    all.push(wrong("POST", "/containers/down/resize?h=1&w=1", &[409]));
    all.push(wrong("DELETE", "/containers/up", &[409]));
    all.push(wrong("POST", "/containers/up/rename?name=down", &[409]));
    all.push(wrong("DELETE", "/volumes/kept", &[409]));
    all.push(wrong("DELETE", "/images/busybox", &[409]));
    all.push(with("POST", "/containers/down/exec", json!({ "Cmd": ["true"] }), &[409]));
    for body in [
        json!({}),
        json!({ "Cmd": [] }),
        json!({ "Cmd": ["x"], "User": "nobody-here" }),
        json!({ "Cmd": ["x"], "Env": ["=x"] }),
    ] {
        all.push(with("POST", "/containers/up/exec", body, bad));
    }
    for body in [
        json!({ "Memory": 1 }),
        json!({ "CpuPeriod": 1 }),
        json!({ "RestartPolicy": { "Name": "odd" } }),
        json!([]),
    ] {
        all.push(with("POST", "/containers/up/update", body, bad));
    }
    for body in [
        json!({}),
        json!({ "Name": "" }),
        json!({ "Name": "a/b" }),
        json!({ "Name": "n", "IPAM": { "Config": [{ "Subnet": "x" }] } }),
        json!({ "Name": "n", "IPAM": { "Config": [{ "Subnet": "10.9.0.0/24", "Gateway": "10.8.0.1" }] } }),
        json!({ "Name": 5 }),
        json!({ "Name": "n", "Options": { "com.docker.network.driver.mtu": "x" } }),
    ] {
        all.push(with("POST", "/networks/create", body, bad));
    }
    all.push(with("POST", "/networks/create", json!({ "Name": "bridge" }), &[403, 409]));
    all.push(with("POST", "/networks/create", json!({ "Name": "n", "Driver": "odd" }), &[400, 404]));
    all.push(wrong("DELETE", "/networks/bridge", &[403]));
    all.push(with("POST", "/networks/none/connect", json!({ "Container": "nobody" }), &[404]));
    all.push(with("POST", "/networks/bridge/connect", json!({ "Container": "up" }), &[403]));
    for body in
        [json!({ "Name": "a/b" }), json!({ "Name": 5 }), json!({ "Name": "v", "DriverOpts": { "odd": "x" } })]
    {
        all.push(with("POST", "/volumes/create", body, bad));
    }
    all.push(with("POST", "/volumes/create", json!({ "Name": "v", "Driver": "odd" }), &[400, 404]));
    for body in [
        json!({}),
        json!({ "Project": "" }),
        json!({ "Project": "p", "Allow": ["all"] }),
        json!({ "Project": "p", "Path": "x" }),
    ] {
        all.push(with("POST", "/sockets/create", body, bad));
    }
    all.push(wrong("DELETE", "/sockets/nobody", &[404]));
    all
}

#[test]
fn what_nobody_should_send_is_answered_and_changes_nothing() {
    let engine = Engine::with_busybox();
    if engine.is_peer() {
        return; // Docker has other statuses for some of it.
    }
    engine.docker(["run", "-d", "--name", "up", "-v", "kept:/kept", "busybox", "sleep", "1000"]).ok();
    engine.docker(["create", "--name", "down", "busybox", "true"]).ok();
    let state = || {
        let lists = ["/containers/json?all=1", "/volumes", "/networks", "/images/json", "/sockets"];
        let mut all: Vec<Value> = lists.iter().map(|path| engine.get(path)).collect();
        // It counts the seconds.
        for one in all[0].as_array_mut().into_iter().flatten() {
            one["Status"] = Value::Null;
        }
        all
    };
    let before = state();
    let mut faults = Vec::new();
    for request in unknown().into_iter().chain(nonsense()) {
        let Wrong { method, path, body, statuses } = request;
        let text = body.as_ref().map(ToString::to_string);
        let body = text.as_ref().map(|text| ("application/json", text.as_bytes()));
        let answer = http::exchange(engine.connect(), method, &path, body);
        let said = answer.text();
        let explained = answer.status == 304
            || serde_json::from_str::<Value>(&said)
                .is_ok_and(|v| v["message"].as_str().is_some_and(|m| !m.is_empty()));
        if !statuses.contains(&answer.status) || !explained {
            let text = text.unwrap_or_default();
            faults.push(format!("{method} {path} {text}: {} {}", answer.status, said.trim()));
        }
    }
    assert!(faults.is_empty(), "{} wrong answers:\n{}", faults.len(), faults.join("\n"));
    for (after, before) in state().iter().zip(&before) {
        assert_eq!(after, before);
    }
}
