//! Creating a container: the image's hints merged under the request's wishes, checked, named, stored.

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;

use bollard_stubs::models::{
    ContainerConfig, ContainerCreateBody, EndpointSettings, HealthConfig, HostConfig,
    HostConfigCgroupnsModeEnum, HostConfigLogConfig, NetworkingConfig, RestartPolicy, RestartPolicyNameEnum,
};
use brigantine_image::ContainerConfig as Hints;
use brigantine_network::PortRequest;
use jiff::Timestamp;

use super::record::{Record, State, VERSION};
use super::{Container, Containers, validate};
use crate::config::{DefaultCgroupns, DefaultIpc};
use crate::db::Durability;
use crate::error::Context;
use crate::ids::{new_id, short};
use crate::project::{self, Confinement};
use crate::volumes::{LOCAL, MountKind, MountRecord, Requested, copy_up, remove_tree, requested};
use crate::{Error, Result, names, spec};

/// A creation request as the API decoded it.
#[derive(Debug, Clone, Default)]
pub struct CreateRequest {
    pub name: Option<String>,
    pub platform: Option<String>,
    /// Of the interface on the network of the network mode.
    pub mac_address: Option<String>,
    pub body: ContainerCreateBody,
    /// Through whose socket it came, if not through one that may do everything.
    pub within: Option<Confinement>,
}

/// What a container is called, and whose it is.
struct Named<'a> {
    id: &'a str,
    name: &'a str,
    project: Option<String>,
    within: Option<&'a Confinement>,
}

/// The answer to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Created {
    pub id: String,
    pub warnings: Vec<String>,
}

impl Containers {
    /// Creates a container. After a failure nothing of it is left.
    pub async fn create(self: &Arc<Self>, request: CreateRequest) -> Result<Created> {
        let (mut config, mut host, mut networking) = parts(request.body);
        let image_name = config.image.clone().unwrap_or_default();
        if image_name.is_empty() {
            return Err(Error::invalid("no image was named: Image must not be empty"));
        }
        let mut warnings = validate::host_config(&host, &config)?;
        self.check_runtime(&host)?;
        self.checked_size(&host).await?;
        if self.config.userns.is_some() && host.userns_mode.as_deref() != Some("host") {
            validate::remapped(&host)?;
        }
        let within = request.within.as_ref();
        let image = self.image_within(&image_name, within).await?;
        let project = match within {
            Some(within) => {
                let labels = config.labels.get_or_insert_default();
                labels.insert(project::LABEL.to_owned(), within.project.clone());
                Some(within.project.clone())
            }
            // Before the image's labels are among them.
            None => config.labels.as_ref().and_then(|labels| labels.get(project::LABEL).cloned()),
        };
        if let Some(platform) = request.platform.as_deref().filter(|platform| !platform.is_empty()) {
            check_platform(&image_name, platform, &image.config)?;
        }
        merge(&mut config, &image.config.config);
        let (path, args) = command(&config)?;
        check_config(&config, &host)?;
        self.defaults(&mut host)?;
        host.links = self.links(&host)?;
        if let Some(mac) = request.mac_address.filter(|mac| !mac.is_empty()) {
            let mode = host.network_mode.clone().unwrap_or_default();
            let all = networking.get_or_insert_default().endpoints_config.get_or_insert_default();
            let settings = all.entry(mode).or_default();
            if settings.mac_address.as_deref().is_none_or(str::is_empty) {
                settings.mac_address = Some(mac);
            }
        }

        let id = new_id();
        let name = self.choose_name(request.name.as_deref(), &id)?;
        let built = self
            .build(
                Named { id: &id, name: &name, project, within },
                &image,
                (path, args),
                config,
                host,
                networking.as_ref(),
                &mut warnings,
            )
            .await;
        match built {
            Ok(container) => {
                self.publish(&container, "create", &[]);
                Ok(Created { id, warnings })
            }
            Err(error) => {
                self.give_name_back(&name, &id);
                Err(error)
            }
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one record, put together here and nowhere else"
    )]
    async fn build(
        self: &Arc<Self>,
        Named { id, name, project, within }: Named<'_>,
        image: &brigantine_image::Image,
        (path, args): (String, Vec<String>),
        mut config: ContainerConfig,
        host_config: HostConfig,
        networking: Option<&NetworkingConfig>,
        warnings: &mut Vec<String>,
    ) -> Result<Arc<Container>> {
        let endpoints = self.endpoints(&host_config, networking)?;
        if config.hostname.as_deref().unwrap_or_default().is_empty() {
            config.hostname = match host_config.network_mode.as_deref() {
                Some("host") => Some(super::name_files::host_name()),
                Some(mode) if mode.starts_with("container:") => None,
                _ => Some(short(id).to_owned()),
            };
        }
        let inherited = self.volumes_from(&host_config)?;
        let wanted = requested(&host_config, config.volumes.as_deref().unwrap_or_default(), inherited)?;
        let mut record = Record {
            version: VERSION,
            id: id.to_owned(),
            name: name.to_owned(),
            created: Timestamp::now(),
            image_id: image.id.to_string(),
            layers: image.config.rootfs.diff_ids.iter().map(ToString::to_string).collect(),
            path,
            args,
            config,
            host_config,
            endpoints,
            mounts: Vec::new(),
            state: State::default(),
            restart_count: 0,
            stopped_by_request: false,
            project,
            confined: within.is_some(),
        };
        self.check_confined(&record)?;
        self.check_options(&record)?;
        if record.config.healthcheck.as_ref().is_some_and(super::health::is_bad) {
            warnings.push("the image's health check is not usable and will not run".to_owned());
        }
        if let Some(requests) = record.host_config.device_requests.clone().filter(|all| !all.is_empty()) {
            let dirs = self.config.cdi_dirs.clone();
            // Found again at the start: files may have changed by then.
            crate::blocking(move || crate::cdi::find(&requests, &dirs).map(drop)).await?;
        }
        let built = self.make(&mut record, wanted, within).await;
        if let Err(error) = built {
            self.volumes.release(id, &record.mounts, true).await;
            let dir = self.dir(id);
            crate::blocking(move || remove_tree(&dir)).await?;
            return Err(error);
        }
        let container = Container::new(record);
        let durability = if container.with(|inner| inner.record.auto_remove()) {
            Durability::Written
        } else {
            Durability::Synced
        };
        if let Err(error) = self.persist(&container, durability).await {
            let mounts = container.with(|inner| inner.record.mounts.clone());
            self.volumes.release(id, &mounts, true).await;
            let dir = self.dir(id);
            crate::blocking(move || remove_tree(&dir)).await?;
            return Err(error);
        }
        self.insert(Arc::clone(&container));
        Ok(container)
    }

    /// Makes the container's directory and volumes; fills `record.mounts` as it goes.
    async fn make(
        &self,
        record: &mut Record,
        wanted: Vec<Requested>,
        within: Option<&Confinement>,
    ) -> Result<()> {
        let dir = self.dir(&record.id);
        let own = dir.clone();
        crate::blocking(move || {
            let what = || format!("create directory {}", dir.display());
            std::fs::DirBuilder::new().mode(0o700).create(&dir).doing(what)?;
            // The upper directory is the container's `/`.
            std::fs::DirBuilder::new().mode(0o755).create(dir.join("upper")).doing(what)?;
            std::fs::DirBuilder::new().mode(0o700).create(dir.join("work")).doing(what)
        })
        .await?;
        if let Some(bytes) = crate::quota::size_option(record.host_config.storage_opt.iter().flatten())? {
            self.limit_size(&own, bytes).await?;
        }
        for mut request in wanted {
            if request.mount.kind == MountKind::Image {
                let image = self.image_within(&request.mount.name, within).await?;
                request.mount.image = image.id.to_string();
                request.mount.layers = image.config.rootfs.diff_ids.iter().map(ToString::to_string).collect();
                record.mounts.push(request.mount);
            } else if request.mount.volume().is_some() {
                let driver = match request.volume_driver.as_str() {
                    "" => record.host_config.volume_driver.clone().unwrap_or_default(),
                    driver => driver.to_owned(),
                };
                let mut labels = request.volume_labels;
                if let Some(within) = within {
                    labels.insert(project::LABEL.to_owned(), within.project.clone());
                }
                let name = &request.mount.name;
                let volume = self.volumes.ensure(name, &driver, labels, request.volume_options).await?;
                if let Some(within) = within {
                    self.volumes.within(&volume.name, &within.project)?;
                }
                request.mount.name.clone_from(&volume.name);
                record.mounts.push(request.mount);
                self.volumes.acquire(&record.id, &record.mounts[record.mounts.len() - 1..]);
                let mount = record.mounts[record.mounts.len() - 1].clone();
                let has_files = volume.has_own_files() || volume.driver != LOCAL;
                if !mount.no_copy && mount.subpath.is_empty() && has_files {
                    let (images, image, layers) =
                        (Arc::clone(&self.images), record.image_id.clone(), record.layers.clone());
                    let (volumes, id) = (Arc::clone(&self.volumes), record.id.clone());
                    crate::blocking(move || {
                        // A plugin's volume is there only while it is mounted.
                        volumes.mount_for(&id, std::slice::from_ref(&mount))?;
                        let target = volumes.source(&volume.name);
                        let copied = copy_up(&images.layers(&image, &layers)?, &mount.destination, &target);
                        volumes.unmount_for(&id);
                        copied
                    })
                    .await?;
                }
            } else {
                record.mounts.push(request.mount);
            }
        }
        Ok(())
    }

    fn choose_name(&self, wanted: Option<&str>, id: &str) -> Result<String> {
        if let Some(wanted) = wanted.filter(|name| !name.is_empty()) {
            let name = wanted.strip_prefix('/').unwrap_or(wanted);
            if !names::is_valid(name) {
                return Err(Error::invalid(format!(
                    "Invalid container name ({wanted}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"
                )));
            }
            self.take_name(name, id)?;
            Ok(name.to_owned())
        } else {
            for attempt in 0..32 {
                let name = names::random(attempt);
                if self.take_name(&name, id).is_ok() {
                    return Ok(name);
                }
            }
            let name = short(id).to_owned();
            self.take_name(&name, id)?;
            Ok(name)
        }
    }

    /// Networks by name with what is asked for each.
    fn endpoints(
        &self,
        host: &HostConfig,
        networking: Option<&NetworkingConfig>,
    ) -> Result<BTreeMap<String, EndpointSettings>> {
        let mode = host.network_mode.as_deref().unwrap_or("bridge");
        let mut wanted: BTreeMap<String, EndpointSettings> = networking
            .and_then(|networking| networking.endpoints_config.clone())
            .unwrap_or_default()
            .into_iter()
            .map(|(name, settings)| (if name == "default" { "bridge".to_owned() } else { name }, settings))
            .collect();
        if mode.starts_with("container:") {
            return if wanted.is_empty() {
                Ok(wanted)
            } else {
                Err(Error::invalid(
                    "conflicting options: a container's network cannot be shared and configured",
                ))
            };
        }
        let mut endpoints = BTreeMap::new();
        // A network that is not there yet may be by the time of the start, which refuses otherwise. Here, a client
        // would take "not found" for the image's.
        let known = |name: &str| {
            self.networks.find(name).map_or_else(|_absent| name.to_owned(), |network| network.name)
        };
        let main = known(mode);
        let mut settings = wanted.remove(mode).unwrap_or_default();
        if mode != main {
            settings = wanted.remove(&main).unwrap_or(settings);
        }
        endpoints.insert(main, settings);
        for (name, settings) in wanted {
            endpoints.insert(known(&name), settings);
        }
        if endpoints.len() > 1 && (endpoints.contains_key("host") || endpoints.contains_key("none")) {
            return Err(Error::invalid(
                "container cannot be connected to a network and to the host's or none",
            ));
        }
        for (name, settings) in &endpoints {
            super::endpoint::check(name, settings)?;
        }
        Ok(endpoints)
    }

    fn volumes_from(&self, host: &HostConfig) -> Result<Vec<MountRecord>> {
        let mut mounts = Vec::new();
        for entry in host.volumes_from.iter().flatten() {
            let (reference, mode) = entry.split_once(':').unwrap_or((entry, "rw"));
            let writable = match mode {
                "" | "rw" | "z" | "Z" => true,
                "ro" => false,
                _ => return Err(Error::invalid(format!("invalid mode: {mode}"))),
            };
            for mut mount in self.find(reference)?.record().mounts {
                mount.rw &= writable;
                mounts.push(mount);
            }
        }
        Ok(mounts)
    }

    /// What docker fills in when a request says nothing.
    fn defaults(&self, host: &mut HostConfig) -> Result<()> {
        let fill = |field: &mut Option<String>, value: &str| {
            if field.as_deref().unwrap_or_default().is_empty() {
                *field = Some(value.to_owned());
            }
        };
        if matches!(host.network_mode.as_deref(), None | Some("" | "default")) {
            host.network_mode = Some("bridge".to_owned());
        }
        fill(
            &mut host.ipc_mode,
            match self.config.default_ipc {
                DefaultIpc::Private => "private",
                DefaultIpc::Shareable => "shareable",
            },
        );
        fill(&mut host.runtime, &self.runtimes.default_name());
        if matches!(host.cgroupns_mode, None | Some(HostConfigCgroupnsModeEnum::EMPTY)) {
            host.cgroupns_mode = Some(match self.config.default_cgroupns {
                DefaultCgroupns::Private => HostConfigCgroupnsModeEnum::PRIVATE,
                DefaultCgroupns::Host => HostConfigCgroupnsModeEnum::HOST,
            });
        }
        if host.shm_size.unwrap_or_default() == 0 {
            host.shm_size = Some(self.config.default_shm_size);
        }
        let policy = host.restart_policy.get_or_insert_with(RestartPolicy::default);
        if matches!(policy.name, None | Some(RestartPolicyNameEnum::EMPTY)) {
            policy.name = Some(RestartPolicyNameEnum::NO);
        }
        policy.maximum_retry_count.get_or_insert(0);
        let log = host.log_config.get_or_insert_with(HostConfigLogConfig::default);
        let driver = log.typ.clone().filter(|driver| !driver.is_empty());
        if driver.is_none() {
            let mut options: std::collections::HashMap<_, _> =
                self.config.log_opts.clone().into_iter().collect();
            options.extend(log.config.take().unwrap_or_default());
            log.config = Some(options);
        }
        let driver = driver.unwrap_or_else(|| self.config.log_driver.clone());
        super::logging::check(&driver, log.config.as_ref())?;
        log.typ = Some(driver);
        log.config.get_or_insert_default();
        Ok(())
    }

    /// Parses everything that start will need, so that a mistake is an error now.
    fn check_options(&self, record: &Record) -> Result<()> {
        let host = &record.host_config;
        let list = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
        spec::capabilities::bounding(record.privileged(), &list(&host.cap_add), &list(&host.cap_drop))?;
        spec::SecurityOptions::parse(&list(&host.security_opt), &self.config)?;
        for rule in host.device_cgroup_rules.iter().flatten() {
            spec::resources::parse_device_rule(rule)?;
        }
        spec::resources::rlimits(host, &self.config)?;
        super::wires::port_requests(record, &self.config, None)?;
        for line in host.extra_hosts.iter().flatten() {
            super::name_files::extra_host(line, None)?;
        }
        Ok(())
    }
}

/// Splits the flat request.
fn parts(body: ContainerCreateBody) -> (ContainerConfig, HostConfig, Option<NetworkingConfig>) {
    let config = ContainerConfig {
        hostname: body.hostname,
        domainname: body.domainname,
        user: body.user,
        attach_stdin: body.attach_stdin,
        attach_stdout: body.attach_stdout,
        attach_stderr: body.attach_stderr,
        exposed_ports: body.exposed_ports,
        tty: body.tty,
        open_stdin: body.open_stdin,
        stdin_once: body.stdin_once,
        env: body.env,
        cmd: body.cmd,
        healthcheck: body.healthcheck,
        args_escaped: body.args_escaped,
        image: body.image,
        volumes: body.volumes,
        working_dir: body.working_dir,
        entrypoint: body.entrypoint,
        network_disabled: body.network_disabled,
        on_build: body.on_build,
        labels: body.labels,
        stop_signal: body.stop_signal,
        stop_timeout: body.stop_timeout,
        shell: body.shell,
    };
    let mut host = body.host_config.unwrap_or_default();
    if config.network_disabled == Some(true)
        && matches!(host.network_mode.as_deref(), None | Some("" | "default"))
    {
        host.network_mode = Some("none".to_owned());
    }
    (config, host, body.networking_config)
}

/// Lays the request over the image's hints: what the request says wins, lists of names are joined.
fn merge(config: &mut ContainerConfig, hints: &Hints) {
    let empty = |text: &Option<String>| text.as_deref().unwrap_or_default().is_empty();
    if empty(&config.user) {
        config.user = Some(hints.user.clone());
    }
    if empty(&config.working_dir) {
        config.working_dir = Some(hints.working_dir.clone());
    }
    if empty(&config.stop_signal) {
        config.stop_signal = hints.stop_signal.clone().filter(|signal| !signal.is_empty());
    }
    let join = |list: &mut Option<Vec<String>>, more: &std::collections::BTreeSet<String>| {
        let list = list.get_or_insert_default();
        for item in more {
            if !list.contains(item) {
                list.push(item.clone());
            }
        }
    };
    let exposed = hints.exposed_ports.iter().map(|port| with_protocol(port)).collect();
    let given = config.exposed_ports.take().unwrap_or_default();
    config.exposed_ports = Some(given.iter().map(|port| with_protocol(port)).collect());
    join(&mut config.exposed_ports, &exposed);
    join(&mut config.volumes, &hints.volumes);
    let env = config.env.get_or_insert_default();
    for variable in hints.env.iter().flatten() {
        let name = variable.split('=').next().unwrap_or_default();
        if !env.iter().any(|given| given.split('=').next() == Some(name)) {
            env.push(variable.clone());
        }
    }
    let labels = config.labels.get_or_insert_default();
    for (name, value) in &hints.labels {
        labels.entry(name.clone()).or_insert_with(|| value.clone());
    }
    let none = |list: &Option<Vec<String>>| list.as_ref().is_none_or(Vec::is_empty);
    if none(&config.entrypoint) {
        if none(&config.cmd) {
            config.cmd.clone_from(&hints.cmd);
        }
        if config.entrypoint.is_none() {
            config.entrypoint.clone_from(&hints.entrypoint);
        }
    }
    // `--entrypoint ""` takes the image's away.
    if config.entrypoint.as_ref().is_some_and(|list| list.len() == 1 && list[0].is_empty()) {
        config.entrypoint = None;
    }
    if none(&config.shell) {
        config.shell.clone_from(&hints.shell);
    }
    if let Some(hint) = &hints.healthcheck {
        let check = config.healthcheck.get_or_insert_with(HealthConfig::default);
        if none(&check.test) {
            check.test.clone_from(&hint.test);
        }
        let fill = |field: &mut Option<i64>, hint: Option<i64>| {
            if field.unwrap_or_default() == 0 {
                *field = hint;
            }
        };
        fill(&mut check.interval, hint.interval);
        fill(&mut check.timeout, hint.timeout);
        fill(&mut check.retries, hint.retries);
        fill(&mut check.start_period, hint.start_period);
        fill(&mut check.start_interval, hint.start_interval);
    }
}

/// `80` means `80/tcp`.
fn with_protocol(port: &str) -> String {
    if port.contains('/') { port.to_owned() } else { format!("{port}/tcp") }
}

/// The program and its arguments.
fn command(config: &ContainerConfig) -> Result<(String, Vec<String>)> {
    let mut words = config.entrypoint.iter().flatten().chain(config.cmd.iter().flatten()).cloned();
    let path = words.next().ok_or_else(|| Error::invalid("no command specified"))?;
    Ok((path, words.collect()))
}

fn check_config(config: &ContainerConfig, host: &HostConfig) -> Result<()> {
    if let Some(dir) = config.working_dir.as_deref().filter(|dir| !dir.is_empty())
        && !dir.starts_with('/')
    {
        return Err(Error::invalid(format!(
            "the working directory '{dir}' is invalid, it needs to be an absolute path"
        )));
    }
    if let Some(bad) =
        config.env.iter().flatten().find(|variable| variable.is_empty() || variable.starts_with('='))
    {
        return Err(Error::invalid(format!("invalid environment variable: {bad}")));
    }
    let words = config.entrypoint.iter().chain(config.cmd.iter()).chain(config.env.iter()).flatten();
    if words.into_iter().any(|word| word.contains('\0')) {
        return Err(Error::invalid("arguments and environment variables cannot contain a zero byte"));
    }
    if let Some(signal) = config.stop_signal.as_deref() {
        super::stop::parse_signal(signal)?;
    }
    if let Some(name) = config.hostname.as_deref()
        && (name.len() > 64 || name.contains(['/', '\0', '\n', ' ']))
    {
        return Err(Error::invalid(format!("invalid hostname: {name:?}")));
    }
    for port in config.exposed_ports.iter().flatten() {
        PortRequest::from_binding(port, "", "").map_err(|error| {
            Error::invalid(format!("invalid port specification: \"{port}\"")).because(error)
        })?;
    }
    if let Some(check) = &config.healthcheck {
        super::health::validate(check)?;
    }
    if config.stop_timeout.is_some_and(|timeout| timeout < -1) {
        return Err(Error::invalid("invalid stop timeout"));
    }
    if host.console_size.as_ref().is_some_and(|size| !matches!(size.len(), 0 | 2)) {
        return Err(Error::invalid("invalid console size: two numbers are expected"));
    }
    Ok(())
}

fn check_platform(name: &str, platform: &str, image: &brigantine_image::ImageConfig) -> Result<()> {
    let wanted: brigantine_image::Platform =
        platform.parse().map_err(|error: brigantine_image::PlatformError| {
            Error::invalid(format!("invalid platform {platform}")).because(error)
        })?;
    let have = image.platform();
    if wanted.os != have.os || wanted.architecture != have.architecture {
        return Err(Error::not_found(format!(
            "image with reference {name} was found but does not match the specified platform: wanted {}/{}, actual: {}/{}",
            wanted.os, wanted.architecture, have.os, have.architecture
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &[&str]) -> Option<Vec<String>> {
        Some(list.iter().map(|w| (*w).to_owned()).collect())
    }

    fn hints() -> Hints {
        Hints {
            user: "web".into(),
            env: words(&["PATH=/image", "A=image"]),
            entrypoint: words(&["/entry"]),
            cmd: words(&["arg"]),
            exposed_ports: ["80/tcp".to_owned()].into(),
            volumes: ["/data".to_owned()].into(),
            working_dir: "/srv".into(),
            labels: [("a".to_owned(), "image".to_owned()), ("b".to_owned(), "image".to_owned())].into(),
            stop_signal: Some("SIGQUIT".into()),
            ..Default::default()
        }
    }

    #[test]
    fn the_images_hints_fill_in() {
        let mut config = ContainerConfig { env: words(&["A=mine"]), ..Default::default() };
        config.labels = Some([("a".to_owned(), "mine".to_owned())].into());
        merge(&mut config, &hints());
        assert_eq!(config.env.as_deref().unwrap(), ["A=mine", "PATH=/image"]);
        assert_eq!(command(&config).unwrap(), ("/entry".into(), vec!["arg".into()]));
        assert_eq!(config.user.as_deref(), Some("web"));
        assert_eq!(config.labels.as_ref().unwrap()["a"], "mine");
        assert_eq!(config.labels.as_ref().unwrap()["b"], "image");
        assert_eq!(config.stop_signal.as_deref(), Some("SIGQUIT"));
    }

    #[test]
    fn a_new_entrypoint_drops_the_images_command() {
        let mut config = ContainerConfig { entrypoint: words(&["/mine"]), ..Default::default() };
        merge(&mut config, &hints());
        assert_eq!(command(&config).unwrap(), ("/mine".into(), vec![]));
        let mut config =
            ContainerConfig { entrypoint: words(&[""]), cmd: words(&["sh"]), ..Default::default() };
        merge(&mut config, &hints());
        assert_eq!(command(&config).unwrap(), ("sh".into(), vec![]));
        assert_eq!(command(&ContainerConfig::default()).unwrap_err().to_string(), "no command specified");
    }

    #[test]
    fn configurations_are_checked() {
        let check =
            |config: ContainerConfig| check_config(&config, &HostConfig::default()).unwrap_err().to_string();
        assert_eq!(
            check(ContainerConfig { working_dir: Some("rel".into()), ..Default::default() }),
            "the working directory 'rel' is invalid, it needs to be an absolute path"
        );
        assert_eq!(
            check(ContainerConfig { env: words(&["=x"]), ..Default::default() }),
            "invalid environment variable: =x"
        );
        assert_eq!(
            check(ContainerConfig { stop_signal: Some("SIGFOO".into()), ..Default::default() }),
            "invalid signal: SIGFOO"
        );
    }
}
