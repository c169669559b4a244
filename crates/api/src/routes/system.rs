//! The engine as a whole: ping, version, info, disk usage, login.
//!
//! Invariant: `info` states what is so on this host; what does not exist here is stated as absent.

use brigantine_engine::Config;
use brigantine_engine::runtimes::{OWN, Runtime, RuntimeTable};
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde_json::{Value, json};

use super::State;
use super::credentials::AuthConfig;
use super::host;
use super::images::Summary;
use crate::http::{ApiVersion, Error, Reply, Request, Router};

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router
        .get("/_ping", ping)
        .head("/_ping", ping)
        .get("/version", version)
        .get("/info", info)
        .get("/system/df", disk_usage)
        .post("/system/check", check)
        .post("/auth", auth);
}

/// The engine's own version.
const VERSION: &str = env!("CARGO_PKG_VERSION");

pub(super) async fn ping(_state: State, request: Request) -> Result<Reply, Error> {
    let body = if request.method() == http::Method::HEAD { "" } else { "OK" };
    Ok(Reply::bytes(StatusCode::OK, "text/plain; charset=utf-8", body)
        .header(HeaderName::from_static("builder-version"), HeaderValue::from_static("1"))
        .header(HeaderName::from_static("swarm"), HeaderValue::from_static("inactive"))
        .header(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, no-store, must-revalidate"))
        .header(header::PRAGMA, HeaderValue::from_static("no-cache")))
}

pub(super) async fn version(_state: State, _request: Request) -> Result<Reply, Error> {
    let kernel = host::kernel_version();
    let commit = option_env!("BRIGANTINE_COMMIT").unwrap_or_default();
    let built = option_env!("BRIGANTINE_BUILD_TIME").unwrap_or_default();
    Reply::json(&json!({
        "Platform": { "Name": "Brigantine" },
        "Components": [{
            "Name": "Engine",
            "Version": VERSION,
            "Details": {
                "ApiVersion": ApiVersion::MAX.to_string(),
                "MinAPIVersion": ApiVersion::MIN.to_string(),
                "Arch": host::go_arch(),
                "BuildTime": built,
                "Experimental": "false",
                "GitCommit": commit,
                "GoVersion": "",
                "KernelVersion": kernel,
                "Os": "linux",
            },
        }],
        "Version": VERSION,
        "ApiVersion": ApiVersion::MAX.to_string(),
        "MinAPIVersion": ApiVersion::MIN.to_string(),
        "GitCommit": commit,
        // Docker's clients show it; this engine is not made of Go.
        "GoVersion": "",
        "Os": "linux",
        "Arch": host::go_arch(),
        "KernelVersion": kernel,
        "BuildTime": built,
    }))
}

async fn info(state: State, _request: Request) -> Result<Reply, Error> {
    let images = state.engine.images().with(|store| Ok(store.list()?.len())).await?;
    Reply::json(&about(&state, state.engine.containers().counts(), images))
}

/// The document of `info`, with so many running, paused and stopped containers and so many images.
pub(super) fn about(
    state: &State,
    (running, paused, stopped): (usize, usize, usize),
    images: usize,
) -> Value {
    let config = state.engine.config();
    let live = state.daemon.live();
    let cgroups = host::Cgroups::detect();
    let mut warnings: Vec<String> = Vec::new();
    for (there, what) in [
        (cgroups.memory, "memory limit"),
        (cgroups.swap, "swap limit"),
        (cgroups.cpu_quota, "cpu cfs quota"),
        (cgroups.cpuset, "cpuset"),
        (cgroups.pids, "pids limit"),
    ] {
        if !there {
            warnings.push(format!("WARNING: No {what} support"));
        }
    }
    let forwarding = host::is_one("/proc/sys/net/ipv4/ip_forward");
    if !forwarding {
        warnings.push("WARNING: IPv4 forwarding is disabled".to_owned());
    }
    let mut security = vec!["name=seccomp,profile=builtin".to_owned()];
    if host::is_one("/sys/module/apparmor/parameters/enabled") {
        security.insert(0, "name=apparmor".to_owned());
    }
    if config.userns.is_some() {
        security.push("name=userns".to_owned());
    }
    if config.no_new_privileges {
        security.push("name=no-new-privileges".to_owned());
    }
    if cgroups.unified {
        security.push("name=cgroupns".to_owned());
    }
    let (cidrs, hosts): (Vec<String>, Vec<String>) =
        live.insecure_registries.iter().cloned().partition(|rule| rule.contains('/'));
    let mut index_configs = serde_json::Map::new();
    index_configs.insert(
        "docker.io".to_owned(),
        json!({ "Name": "docker.io", "Mirrors": live.registry_mirrors, "Secure": true, "Official": true }),
    );
    for host in hosts {
        index_configs
            .insert(host.clone(), json!({ "Name": host, "Mirrors": [], "Secure": false, "Official": false }));
    }
    let insecure: Vec<String> =
        ["::1/128".to_owned(), "127.0.0.0/8".to_owned()].into_iter().chain(cidrs).collect();
    let pools: Vec<Value> = config
        .default_address_pools
        .iter()
        .map(|(base, size)| json!({ "Base": base.to_string(), "Size": size }))
        .collect();
    let system = host::os_release();
    let authorization = state.daemon.authorization();
    let mut document = json!({
        "ID": state.engine.id(),
        "Containers": running + paused + stopped,
        "ContainersRunning": running,
        "ContainersPaused": paused,
        "ContainersStopped": stopped,
        "Images": images,
        "Driver": super::images::driver(state.engine.images().store()),
        "DriverStatus": [["Backing Filesystem", host::filesystem(&config.data_root)], ["Supports d_type", "true"], ["Layers", state.engine.images().store().storage().as_str()]],
        "Plugins": {
            "Volume": volume_drivers(),
            "Network": ["bridge", "cni", "host", "ipvlan", "macvlan", "null", "overlay"],
            "Authorization": if authorization.is_empty() { Value::Null } else { json!(*authorization) },
            "Log": brigantine_engine::containers::logging::DRIVERS,
        },
        "MemoryLimit": cgroups.memory,
        "SwapLimit": cgroups.swap,
        "KernelMemoryTCP": false,
        "CpuCfsPeriod": cgroups.cpu_quota,
        "CpuCfsQuota": cgroups.cpu_quota,
        "CPUShares": cgroups.cpu_shares,
        "CPUSet": cgroups.cpuset,
        "PidsLimit": cgroups.pids,
        "OomKillDisable": cgroups.memory && !cgroups.unified,
        "IPv4Forwarding": forwarding,
        "BridgeNfIptables": host::is_one("/proc/sys/net/bridge/bridge-nf-call-iptables"),
        "BridgeNfIp6tables": host::is_one("/proc/sys/net/bridge/bridge-nf-call-ip6tables"),
        "Debug": live.debug,
        "NFd": host::count_entries("/proc/self/fd"),
        "NGoroutines": host::count_entries("/proc/self/task"),
        "NEventsListener": 0,
        "SystemTime": jiff::Timestamp::now().to_string(),
        "LoggingDriver": config.log_driver,
        "CgroupDriver": if config.systemd_cgroup { "systemd" } else { "cgroupfs" },
        "CgroupVersion": if cgroups.unified { "2" } else { "1" },
        "KernelVersion": host::kernel_version(),
        "OperatingSystem": system.name,
        "OSVersion": system.version,
        "OSType": "linux",
        "Architecture": std::env::consts::ARCH,
    });
    let table = state.engine.containers().runtimes().table();
    let rest = json!({
        "IndexServerAddress": "https://index.docker.io/v1/",
        "RegistryConfig": {
            "AllowNondistributableArtifactsCIDRs": null,
            "AllowNondistributableArtifactsHostnames": null,
            "InsecureRegistryCIDRs": insecure,
            "IndexConfigs": index_configs,
            "Mirrors": live.registry_mirrors,
        },
        "NCPU": std::thread::available_parallelism().map_or(1, usize::from),
        "MemTotal": host::memory_total(),
        "GenericResources": null,
        "DockerRootDir": config.data_root.display().to_string(),
        "HttpProxy": live.http_proxy.as_deref().map(host::without_password).unwrap_or_default(),
        "HttpsProxy": live.https_proxy.as_deref().map(host::without_password).unwrap_or_default(),
        "NoProxy": live.no_proxy.clone().unwrap_or_default(),
        "Name": host::hostname(),
        "Labels": live.labels,
        "ExperimentalBuild": false,
        "ServerVersion": VERSION,
        "Runtimes": runtimes(config, &table),
        "DefaultRuntime": table.default,
        "Swarm": {
            "NodeID": "", "NodeAddr": "", "LocalNodeState": "inactive", "ControlAvailable": false, "Error": "",
            "RemoteManagers": null,
        },
        "LiveRestoreEnabled": true,
        "Isolation": "",
        "InitBinary": "brig-runtime",
        "ContainerdCommit": { "ID": "", "Expected": "" },
        "RuncCommit": { "ID": VERSION, "Expected": VERSION },
        "InitCommit": { "ID": VERSION, "Expected": VERSION },
        "SecurityOptions": security,
        "CDISpecDirs": config.cdi_dirs,
        "DefaultAddressPools": pools,
        "FirewallBackend": state.engine.networks().firewall_backend().map(|driver| json!({ "Driver": driver })),
        "ProductLicense": "Apache-2.0",
        "Warnings": warnings,
    });
    if let (Value::Object(document), Value::Object(rest)) = (&mut document, rest) {
        document.extend(rest);
    }
    document
}

/// The own driver, and plugins that a file tells of.
fn volume_drivers() -> Vec<String> {
    std::iter::once("local".to_owned()).chain(brigantine_engine::plugins::names()).collect()
}

/// The OCI runtimes that containers can have.
fn runtimes(config: &Config, table: &RuntimeTable) -> Value {
    let own = json!({ "path": config.runtime_exe.display().to_string() });
    let mut all = serde_json::Map::from_iter([(OWN.to_owned(), own)]);
    for (name, Runtime { path, args }) in &table.others {
        let mut runtime = json!({ "path": path.display().to_string() });
        if !args.is_empty() {
            runtime["runtimeArgs"] = json!(args);
        }
        all.insert(name.clone(), runtime);
    }
    all.into()
}

async fn disk_usage(state: State, request: Request) -> Result<Reply, Error> {
    let wanted: Vec<&str> = request.query().all("type").collect();
    for kind in &wanted {
        if !matches!(*kind, "container" | "image" | "volume" | "build-cache") {
            return Err(Error::invalid(format!("unknown object type: {kind}")));
        }
    }
    let about = |kind: &str| wanted.is_empty() || wanted.contains(&kind);
    let mut document =
        json!({ "LayersSize": 0, "Images": null, "Containers": null, "Volumes": null, "BuildCache": null });
    if about("image") {
        let version = request.version();
        let uses = state.engine.containers().image_uses();
        let (layers, images) = state
            .engine
            .images()
            .with(move |store| {
                let usage = store.usage()?;
                let images: Vec<Summary> = usage
                    .images
                    .iter()
                    .map(|of| {
                        let id = of.image.id.to_string();
                        let containers = uses.iter().filter(|used| used.image == id).count();
                        Summary::of(&of.image, version).with_usage(of.shared, containers)
                    })
                    .collect();
                // What is on disk, as `du` would say.
                Ok((usage.layers_disk + usage.blobs, images))
            })
            .await?;
        document["LayersSize"] = layers.into();
        document["Images"] = to_value(&images)?;
    }
    if about("build-cache") {
        document["BuildCache"] = super::build_cache::usage(&state).await?;
    }
    super::usage::add_containers_and_volumes(&state, &mut document, about("container"), about("volume"))
        .await?;
    Reply::json(&document)
}

/// Ours: every blob and layer against its digest; `repair=1` puts right what is wrong.
async fn check(state: State, request: Request) -> Result<Reply, Error> {
    let repair = request.query().flag("repair");
    let of = state.clone();
    let checked = state
        .engine
        .images()
        .with(move |store| store.check(repair, &of.engine.containers().images_in_use()))
        .await?;
    if repair {
        state.engine.images().forget();
    }
    Reply::json(&checked)
}

pub(super) fn to_value<T: serde::Serialize>(value: &T) -> Result<Value, Error> {
    serde_json::to_value(value).map_err(|error| Error::internal(format!("writing the answer: {error}")))
}

async fn auth(state: State, mut request: Request) -> Result<Reply, Error> {
    let config: AuthConfig = request.json_body().await?;
    let registry = config.registry();
    let Some(credentials) = config.credentials() else {
        return Err(Error::invalid("no credentials: a user name with a password, or a token, is needed"));
    };
    state.registry.login(&registry, credentials).await.map_err(|error| match error.class() {
        brigantine_registry::Class::Unauthorized => {
            Error::unauthorized(format!("Get \"https://{registry}/v2/\": {}", error.report()))
        }
        _ => Error::from(error),
    })?;
    Reply::json(&json!({ "Status": "Login Succeeded", "IdentityToken": "" }))
}
