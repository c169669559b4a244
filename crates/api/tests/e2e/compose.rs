//! docker-compose 1.29, as Debian has it, with a project of three services.

use std::process::Command;

use brigantine_testkit::Client;

use crate::Host;

const PROJECT: &str = r#"
version: "3"
services:
  db:
    image: busybox
    command: sh -c "echo stored >/var/db/file; echo db is up; sleep 1000"
    volumes: ["store:/var/db"]
  app:
    image: busybox
    command: sh -c "echo app says $$WORD; sleep 1000"
    environment: { WORD: hello }
    depends_on: [db]
    volumes: ["store:/shared:ro"]
  web:
    image: busybox
    command: sh -c "echo web is up; sleep 1000"
    depends_on: [app]
    ports: ["18080:80"]
    restart: unless-stopped
volumes:
  store: {}
"#;

#[test]
fn a_project_of_three_services_goes_up_and_down() {
    let host = Host::new(Client::Docker);
    let dir = host.dir().join("project");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("docker-compose.yml"), PROJECT).unwrap();
    let compose = |args: &[&str]| {
        let out = Command::new("docker-compose")
            .args(["--no-ansi", "-p", "shop"])
            .args(args)
            .current_dir(&dir)
            .env("DOCKER_HOST", format!("unix://{}", host.socket_path().display()))
            .env("HOME", host.dir())
            .env_remove("DOCKER_CONTEXT")
            .stdin(std::process::Stdio::null())
            .output()
            .expect("docker-compose: apt-get install docker-compose");
        let text =
            format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "docker-compose {args:?}: {text}");
        text
    };
    compose(&["up", "-d"]);
    let ps = compose(&["ps"]);
    assert_eq!(ps.matches(" Up ").count(), 3, "{ps}");
    assert!(ps.contains("0.0.0.0:18080->80/tcp"), "{ps}");
    host.wait_log("shop_app_1", "app says hello");
    let logs = compose(&["logs", "--no-color", "app"]);
    assert!(logs.contains("app says hello"), "{logs}");
    assert!(compose(&["exec", "-T", "app", "cat", "/shared/file"]).contains("stored"));
    // Up again changes nothing; a changed service is made anew.
    let before = host.inspect("shop_db_1")["Id"].clone();
    compose(&["up", "-d"]);
    assert_eq!(host.inspect("shop_db_1")["Id"], before);
    std::fs::write(dir.join("docker-compose.yml"), PROJECT.replace("WORD: hello", "WORD: again")).unwrap();
    compose(&["up", "-d"]);
    host.wait_log("shop_app_1", "app says again");
    compose(&["stop", "-t", "1"]);
    compose(&["start"]);
    assert!(compose(&["top"]).contains("sleep 1000"));
    compose(&["down", "-v", "-t", "1"]);
    assert_eq!(host.get("/containers/json?all=1").as_array().map_or(0, Vec::len), 0);
    host.assert_nothing_left();
}
