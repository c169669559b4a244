//! Wrong input gets a clear error with the right status, and leaves nothing half-made.

use std::{
    io::{Read as _, Write as _},
    time::Duration,
};

use brigantine_testkit::{
    Engine,
    fixtures::{Archive, Layer, busybox_layer},
};
use serde_json::json;

/// Loads an archive that must be refused; the error.
#[track_caller]
fn refused(engine: &Engine, bytes: &[u8]) -> String {
    let answer = engine.post_bytes("/images/load?quiet=1", "application/x-tar", bytes);
    let text = answer.text();
    // Docker answers before it looks into the archive.
    assert!(answer.status == 200 && text.contains("errorDetail"), "loaded: {} {text}", answer.status);
    assert_eq!(engine.get("/images/json").as_array().map(Vec::len), Some(0), "an image is half there");
    engine.assert_nothing_left();
    if !engine.is_peer() {
        let left = std::fs::read_dir(engine.data_root().join("image/tmp")).map_or(0, |l| l.flatten().count());
        assert_eq!(left, 0, "files are left in the store's tmp");
    }
    text
}

#[test]
fn an_unknown_image_is_404_and_named() {
    let engine = Engine::start();
    let answer = engine.post("/containers/create", &json!({ "Image": "nothing/here" })).expect(404);
    assert_eq!(answer.message(), "No such image: nothing/here:latest");
    assert!(
        engine
            .request("GET", "/images/nothing/json")
            .expect(404)
            .message()
            .contains("No such image: nothing")
    );
    engine.request("GET", "/images/Bad:Ref:x/json").expect(400);
}

#[test]
fn a_bad_name_is_400() {
    let engine = Engine::with_busybox();
    let answer = engine.post("/containers/create?name=a%20b", &json!({ "Image": "busybox" })).expect(400);
    assert!(answer.message().contains("a b"), "{}", answer.text());
    assert_eq!(engine.get("/containers/json?all=1"), json!([]));
}

#[test]
fn malformed_json_is_400() {
    let engine = Engine::with_busybox();
    for body in ["{\"Image\": ", "[]", "nonsense", "{\"Image\": 5}", "{\"Cmd\": {\"a\": 1}}"] {
        let answer = engine.post_bytes("/containers/create", "application/json", body.as_bytes());
        // Docker 20.10 called half of these an internal error.
        assert!(answer.status == 400 || engine.is_peer(), "{body}: {} {}", answer.status, answer.text());
        answer.message();
    }
    let answer = engine.post_bytes("/containers/create", "text/plain", b"{}");
    assert_eq!(answer.status, 400, "{}", answer.text());
    assert_eq!(engine.get("/containers/json?all=1"), json!([]));
}

#[test]
fn keys_match_in_any_case_and_nulls_count_for_nothing() {
    let engine = Engine::with_busybox();
    let body = json!({ "image": "busybox", "CMD": ["true"], "Env": null, "hostconfig": { "autoremove": null }, "Unknown": { "x": 1 } });
    let id = engine.post("/containers/create", &body).expect(201).json()["Id"].as_str().unwrap().to_owned();
    assert_eq!(engine.inspect(&id)["Config"]["Cmd"], json!(["true"]));
}

#[test]
fn an_oversized_body_is_refused() {
    let engine = Engine::start();
    if engine.is_peer() {
        return; // Docker reads whatever comes.
    }
    let mut stream = engine.connect();
    let head = "POST /containers/create HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9000000000\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let filler = vec![b' '; 1 << 20];
    for _ in 0..64 {
        if stream.write_all(&filler).is_err() {
            break;
        }
    }
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    let text = String::from_utf8_lossy(&answer);
    assert!(text.starts_with("HTTP/1.1 4"), "{text}");
    engine.get("/info");
}

#[test]
fn a_half_sent_request_makes_nothing() {
    let engine = Engine::with_busybox();
    for part in [
        "POST /containers/cre",
        "POST /containers/create HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\nContent-Type: application/json\r\n\r\n{\"Image\":\"busybox\"",
        "\0\0\0\0\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
    ] {
        let mut stream = engine.connect();
        stream.write_all(part.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut rest = Vec::new();
        // Whatever the answer is, the connection ends.
        stream.read_to_end(&mut rest).ok();
    }
    assert_eq!(engine.get("/containers/json?all=1"), json!([]));
}

#[test]
fn an_unknown_path_is_404_in_dockers_form() {
    let engine = Engine::start();
    for (method, path) in [("GET", "/no/such/path"), ("DELETE", "/version"), ("GET", "/v1.30/nothing")] {
        assert_eq!(engine.request(method, path).expect(404).message(), "page not found", "{method} {path}");
    }
}

#[test]
fn a_bad_filter_is_400() {
    let engine = Engine::start();
    if !engine.is_peer() {
        // Docker 20.10 called this an internal error.
        engine.request("GET", "/containers/json?filters=%7Bnonsense").expect(400);
    }
    engine.request("GET", "/containers/json?filters=%7B%22no-such-filter%22%3A%5B%22x%22%5D%7D").expect(400);
    for filters in ["{\"status\":{\"running\":true}}", "{\"status\":[\"running\"]}"] {
        let path = format!("/containers/json?filters={}", brigantine_testkit::http::escape(filters));
        assert_eq!(engine.get(&path), json!([]));
    }
}

#[test]
fn a_corrupt_archive_is_refused() {
    let engine = Engine::start();
    refused(&engine, b"this is no archive at all, but long enough to look at its first bytes");
    refused(&engine, &vec![0xff; 10_000]);
    let whole = Archive::new("x:1").layer(busybox_layer().unwrap()).bytes();
    refused(&engine, &whole[..whole.len() / 2]);
    // Bytes of the layer are changed on the way.
    let mut changed = whole.clone();
    let middle = changed.len() / 2;
    for byte in &mut changed[middle..middle + 16] {
        *byte ^= 0x55;
    }
    refused(&engine, &changed);
}

#[test]
fn a_layer_that_is_not_what_the_config_says_is_refused() {
    let engine = Engine::start();
    let lie = "sha256:0000000000000000000000000000000000000000000000000000000000000000";
    let bytes = Archive::new("x:1").layer(busybox_layer().unwrap()).diff_ids(&[lie]).bytes();
    let text = refused(&engine, &bytes);
    assert!(text.contains("0000000000"), "{text}");
}

#[test]
fn a_truncated_layer_is_refused() {
    let engine = Engine::start();
    let layer = busybox_layer().unwrap();
    refused(&engine, &Archive::new("x:1").layer(layer[..layer.len() / 2].to_vec()).bytes());
}

#[test]
fn a_path_that_climbs_out_of_a_layer_does_not() {
    let engine = Engine::start();
    let victim = engine.dir().join("victim");
    let deep = format!("{}../{}", "../".repeat(20), victim.strip_prefix("/").unwrap().display());
    for layer in [
        Layer::default().file(&deep, 0o644, b"escaped").finish(),
        Layer::default()
            .symlink("up", engine.dir().to_str().unwrap())
            .file("up/victim", 0o644, b"escaped")
            .finish(),
        Layer::default().hardlink("link", "../../../../../../../../../../etc/shadow").finish(),
        Layer::default()
            .symlink("up", "../../../../../../../../../..")
            .file("up/tmp/bt-victim", 0o644, b"escaped")
            .finish(),
    ] {
        let bytes = Archive::new("x:1").layer(layer).cmd(&["x"]).bytes();
        let answer = engine.post_bytes("/images/load?quiet=1", "application/x-tar", &bytes);
        assert!(!victim.exists(), "a layer wrote outside: {}", answer.text());
        assert!(!std::path::Path::new("/tmp/bt-victim").exists(), "a layer wrote outside: {}", answer.text());
        // Following a link inside the image's own root would be as good as refusing it.
        engine.request("DELETE", "/images/x:1");
    }
}

#[test]
fn an_archive_that_names_files_outside_itself_is_refused() {
    let engine = Engine::start();
    let layer = busybox_layer().unwrap();
    let good = Archive::new("x:1").layer(layer);
    for manifest in [
        json!([{ "Config": "../../../../etc/passwd", "RepoTags": ["x:1"], "Layers": [] }]),
        json!([{ "Config": "config.json", "RepoTags": ["x:1"], "Layers": ["../../../etc/passwd"] }]),
        json!([{ "Config": "missing.json", "RepoTags": ["x:1"], "Layers": ["missing.tar"] }]),
        json!("nonsense"),
    ] {
        let mut archive = Layer::default();
        archive.file("config.json", 0o644, &good.config_bytes());
        archive.file("manifest.json", 0o644, manifest.to_string().as_bytes());
        refused(&engine, &archive.finish());
    }
}

/// Device nodes of an image are there, owned and numbered as it says, in every form of storage; what may be done with them
/// is up to the container's own rules: no image widens these.
#[test]
fn device_nodes_in_a_layer_give_no_access() {
    let layer = Layer::default()
        .dir("nodes", 0o755)
        .device("nodes/null", 0o666, 1, 3)
        .device("nodes/mem", 0o666, 1, 1)
        .device("nodes/kmsg", 0o666, 1, 11)
        .finish();
    let bytes = Archive::new("nodes:1").layer(busybox_layer().unwrap()).layer(layer).bytes();
    const SHOW: &str = "stat -c '%n %F %t:%T %a' /nodes/*";
    for storage in ["erofs", "overlay", "copy"] {
        let engine = Engine::builder().flag(format!("--storage={storage}")).start();
        engine.post_bytes("/images/load?quiet=1", "application/x-tar", &bytes).expect(200);
        let run = |script: &str| {
            engine.brig(["run", "--rm", "--network", "none", "nodes:1", "sh", "-c", script]).run()
        };
        let shown = run(SHOW);
        let expected = [
            "kmsg character special file 1:b 666",
            "mem character special file 1:1 666",
            "null character special file 1:3 666",
        ];
        let lines: Vec<&str> = shown.stdout.lines().map(|line| line.trim_start_matches("/nodes/")).collect();
        assert_eq!(lines, expected, "{storage}: {shown}");
        assert_eq!(
            run("echo gone > /nodes/null").code,
            0,
            "{storage}: it is among what every container may use"
        );
        for forbidden in ["mem", "kmsg"] {
            let refused = run(&format!("head -c 1 /nodes/{forbidden}"));
            assert!(
                refused.code != 0 && refused.stderr.contains("Operation not permitted"),
                "{storage}: {refused}"
            );
        }
        // What a container makes itself goes into a layer, too.
        let make = "mknod /nodes/made c 1 5 && rm /nodes/mem";
        engine.brig(["run", "--name", "maker", "--network", "none", "nodes:1", "sh", "-c", make]).ok();
        engine.brig(["commit", "maker", "nodes:2"]).ok();
        let shown = engine.brig(["run", "--rm", "--network", "none", "nodes:2", "sh", "-c", SHOW]).ok();
        assert!(
            shown.contains("/nodes/made character special file 1:5") && !shown.contains("/nodes/mem"),
            "{storage}: {shown}"
        );
    }
}
