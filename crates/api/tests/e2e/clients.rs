//! Clients of others, in small programs of our own.

use std::process::Command;

use bollard::Docker;
use bollard::exec::StartExecResults;
use bollard::models::{
    ContainerCreateBody, ExecConfig, HostConfig, NetworkCreateRequest, VolumeCreateRequest,
};
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, CreateContainerOptionsBuilder, EventsOptionsBuilder, LogsOptionsBuilder,
    RemoveContainerOptionsBuilder, RemoveVolumeOptions, StatsOptionsBuilder,
};
use brigantine_testkit::{Engine, Invocation, fixtures};
use futures_util::StreamExt as _;
use tokio::io::AsyncWriteExt as _;

/// dockerode, Node's client. Its packages come from npm once and stay beside what cargo builds.
#[test]
fn dockerode_drives_a_containers_whole_life() {
    let engine = Engine::with_busybox();
    let packages = fixtures::target_dir().join("dockerode-4");
    let modules = packages.join("node_modules");
    if !modules.join("dockerode").exists() {
        let install = ["install", "--no-audit", "--no-fund", "--silent", "--prefix"];
        let status = Command::new("npm").args(install).arg(&packages).arg("dockerode@4").status();
        assert!(status.is_ok_and(|status| status.success()), "npm cannot install dockerode");
    }
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/dockerode.js");
    let mut node = Command::new("node");
    node.arg(program).arg(engine.socket_path()).arg(modules);
    assert_eq!(Invocation::new(node).ok(), "all of it");
    engine.assert_nothing_left();
}

/// bollard, Rust's client, which says the newest version of the API without asking first.
#[tokio::test(flavor = "multi_thread")]
async fn bollard_drives_a_containers_whole_life() {
    let engine = Engine::with_busybox();
    let socket = engine.socket_path().display().to_string();
    let docker = Docker::connect_with_unix(&socket, 60, bollard::API_DEFAULT_VERSION).unwrap();
    assert_eq!(docker.ping().await.unwrap(), "OK");
    let events = {
        let docker = docker.clone();
        tokio::spawn(async move {
            let mut stream = Box::pin(docker.events(Some(EventsOptionsBuilder::new().since("1").build())));
            let mut seen = Vec::new();
            while let Some(event) = stream.next().await {
                seen.extend(event.unwrap().action);
                if seen.last().is_some_and(|action| action == "destroy") {
                    break;
                }
            }
            seen
        })
    };
    docker
        .create_volume(VolumeCreateRequest { name: Some("rust".into()), ..Default::default() })
        .await
        .unwrap();
    docker.create_network(NetworkCreateRequest { name: "rust".into(), ..Default::default() }).await.unwrap();
    let body = ContainerCreateBody {
        image: Some("busybox".into()),
        cmd: Some(vec!["cat".into()]),
        open_stdin: Some(true),
        stdin_once: Some(true),
        host_config: Some(HostConfig {
            binds: Some(vec!["rust:/data".into()]),
            network_mode: Some("rust".into()),
            ..Default::default()
        }),
        ..Default::default()
    };
    let options = CreateContainerOptionsBuilder::new().name("rust").build();
    docker.create_container(Some(options), body).await.unwrap();
    let options = AttachContainerOptionsBuilder::new().stdin(true).stdout(true).stream(true).build();
    let mut attached = docker.attach_container("rust", Some(options)).await.unwrap();
    docker.start_container("rust", None).await.unwrap();

    let exec = ExecConfig {
        cmd: Some(["sh", "-c", "echo inside; exit 5"].map(str::to_owned).to_vec()),
        attach_stdout: Some(true),
        ..Default::default()
    };
    let exec = docker.create_exec("rust", exec).await.unwrap().id;
    let StartExecResults::Attached { mut output, .. } = docker.start_exec(&exec, None).await.unwrap() else {
        panic!("detached");
    };
    let mut said = String::new();
    while let Some(part) = output.next().await {
        said.push_str(&part.unwrap().to_string());
    }
    assert_eq!(said.trim(), "inside");
    assert_eq!(docker.inspect_exec(&exec).await.unwrap().exit_code, Some(5));

    let options = StatsOptionsBuilder::new().stream(false).build();
    let stats = Box::pin(docker.stats("rust", Some(options))).next().await.unwrap().unwrap();
    assert!(stats.cpu_stats.is_some_and(|cpu| cpu.online_cpus.is_some_and(|cpus| cpus > 0)));

    attached.input.write_all(b"to and fro\n").await.unwrap();
    attached.input.shutdown().await.unwrap();
    let mut echoed = String::new();
    while let Some(part) = attached.output.next().await {
        echoed.push_str(&part.unwrap().to_string());
    }
    assert_eq!(echoed, "to and fro\n");
    let ended = Box::pin(docker.wait_container("rust", None)).next().await.unwrap().unwrap();
    assert_eq!(ended.status_code, 0);
    let options = LogsOptionsBuilder::new().stdout(true).build();
    let log = Box::pin(docker.logs("rust", Some(options))).next().await.unwrap().unwrap();
    assert_eq!(log.to_string(), "to and fro\n");
    let options = RemoveContainerOptionsBuilder::new().v(true).build();
    docker.remove_container("rust", Some(options)).await.unwrap();
    docker.remove_network("rust").await.unwrap();
    docker.remove_volume("rust", None::<RemoveVolumeOptions>).await.unwrap();
    let missing = docker.inspect_container("rust", None).await.unwrap_err();
    assert!(
        matches!(missing, bollard::errors::Error::DockerResponseServerError { status_code: 404, .. }),
        "{missing}"
    );
    let seen = events.await.unwrap();
    for action in ["create", "attach", "start", "exec_die", "die", "destroy"] {
        assert!(seen.iter().any(|one| one == action), "no {action} in {seen:?}");
    }
    engine.assert_nothing_left();
}

/// testcontainers, as a Rust project's tests use it: waits, mapped ports, files in and out, execs, networks, and that
/// nothing is left when its handles are dropped. It reads `$DOCKER_HOST`, so it is a process of its own: this test, run
/// again in the engine's sandbox.
#[test]
fn testcontainers_starts_waits_and_cleans_up() {
    const INSIDE: &str = "BRIG_TEST_INSIDE";
    const NAME: &str = "clients::testcontainers_starts_waits_and_cleans_up";
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        return runtime.block_on(use_testcontainers());
    }
    let engine = Engine::with_busybox();
    let mut again = engine.sandbox().command(std::env::current_exe().unwrap());
    again.args(["--exact", NAME, "--nocapture"]).env(INSIDE, "1").env("HOME", engine.dir().join("home"));
    again.env("DOCKER_HOST", format!("unix://{}", engine.socket_path().display()));
    let output = Invocation::new(again).run().expect_code(0);
    assert!(output.stdout.contains("1 passed"), "{output}");
    engine.assert_nothing_left();
}

async fn use_testcontainers() {
    use testcontainers::core::{ExecCommand, IntoContainerPort as _, WaitFor};
    use testcontainers::runners::AsyncRunner as _;
    use testcontainers::{GenericImage, ImageExt as _};
    use tokio::io::AsyncReadExt as _;

    let script = "cat /data/greeting; mkdir /www; echo served >/www/index.html; echo ready; exec httpd -f -p 8080 -h /www";
    let server = GenericImage::new("busybox", "latest")
        .with_exposed_port(8080.tcp())
        .with_wait_for(WaitFor::message_on_stdout("ready"))
        .with_cmd(["sh", "-c", script])
        .with_env_var("COLOUR", "red")
        .with_copy_to("/data/greeting", b"copied in\n".to_vec())
        .with_network("tests")
        .with_container_name("served")
        .start()
        .await
        .unwrap();
    let log = String::from_utf8(server.stdout_to_vec().await.unwrap()).unwrap();
    assert_eq!(log, "copied in\nready\n");
    // The mapped port, as inspect tells it right after the start.
    let port = server.get_host_port_ipv4(8080).await.unwrap();
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("served\n"), "{answer}");
    let mut done = server.exec(ExecCommand::new(["sh", "-c", "echo $COLOUR; exit 3"])).await.unwrap();
    assert_eq!(done.stdout_to_vec().await.unwrap(), b"red\n");
    assert_eq!(done.exit_code().await.unwrap(), Some(3));
    // Another one on the same network knows the first by its name.
    let client = GenericImage::new("busybox", "latest")
        .with_wait_for(WaitFor::exit(testcontainers::core::wait::ExitWaitStrategy::new().with_exit_code(0)))
        .with_cmd(["wget", "-q", "-O", "-", "http://served:8080/"])
        .with_network("tests")
        .start()
        .await
        .unwrap();
    assert_eq!(client.stdout_to_vec().await.unwrap(), b"served\n");
    client.rm().await.unwrap();
    server.stop().await.unwrap();
    drop(server);
}
