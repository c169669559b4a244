//! The container's first process: program, environment, directory, user, privileges.

use brigantine_runtime::spec::{Capability, Process, UserBuilder};

use super::{Inputs, SecurityOptions, capabilities, resources};
use crate::Result;
use crate::error::Context;
use crate::users::User;

/// The search path of containers whose image sets none.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub(crate) fn process(
    inputs: &Inputs<'_>,
    bounding: &[Capability],
    security: &SecurityOptions,
) -> Result<Process> {
    let record = inputs.record;
    let (config, host) = (&record.config, &record.host_config);
    let tty = record.tty();
    let mut args = vec![record.path.clone()];
    args.extend(record.args.iter().cloned());
    if host.init.unwrap_or(inputs.config.init) {
        // Its name makes it the reaper.
        let mut with_init = [super::mounts::INIT, "--"].map(str::to_owned).to_vec();
        with_init.append(&mut args);
        args = with_init;
    }
    let hostname = match (&inputs.uts, config.hostname.as_deref()) {
        (super::Namespace::Host, _) | (_, None | Some("")) => inputs.host_name,
        (_, Some(name)) => name,
    };
    let given: Vec<String> =
        inputs.link_variables.iter().chain(config.env.iter().flatten()).cloned().collect();
    let env = environment(hostname, tty, &given, &inputs.user.home);
    let cwd = config.working_dir.as_deref().filter(|dir| !dir.is_empty()).unwrap_or("/");

    let mut process = Process::default();
    process.set_terminal(Some(tty));
    process.set_args(Some(args));
    process.set_env(Some(env));
    process.set_cwd(cwd.into());
    process.set_user(user(&inputs.user)?);
    process.set_capabilities(Some(capabilities::sets(bounding, inputs.user.uid)));
    process.set_rlimits(Some(resources::rlimits(host, inputs.config)?));
    process.set_no_new_privileges(Some(security.no_new_privileges));
    process.set_apparmor_profile(if record.privileged() { None } else { security.apparmor.clone() });
    process.set_oom_score_adj(host.oom_score_adj.and_then(|adj| i32::try_from(adj).ok()));
    Ok(process)
}

/// The user as the runtime specification writes it.
pub(crate) fn user(user: &User) -> Result<brigantine_runtime::spec::User> {
    UserBuilder::default()
        .uid(user.uid)
        .gid(user.gid)
        .additional_gids(user.groups.clone())
        .build()
        .doing(|| "describe the user".to_owned())
}

/// What every process gets.
pub(crate) fn defaults(hostname: &str, tty: bool) -> Vec<String> {
    let mut env = vec![PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if tty {
        env.push("TERM=xterm".to_owned());
    }
    env
}

/// docker's order: defaults first, then what the image and the request set; the home directory if nobody did.
fn environment(hostname: &str, tty: bool, given: &[String], home: &str) -> Vec<String> {
    let mut env = defaults(hostname, tty);
    for variable in given {
        set(&mut env, variable);
    }
    if !env.iter().any(|variable| variable.starts_with("HOME=")) {
        env.push(format!("HOME={home}"));
    }
    env
}

/// Sets `NAME=value`, in the place of an earlier one; a name alone removes it.
pub(crate) fn set(env: &mut Vec<String>, variable: &str) {
    let name = variable.split('=').next().unwrap_or_default();
    let same = |other: &String| other.split('=').next() == Some(name);
    if !variable.contains('=') {
        env.retain(|other| !same(other));
        return;
    }
    match env.iter_mut().find(|other| same(other)) {
        Some(other) => variable.clone_into(other),
        None => env.push(variable.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_variables_win_in_place() {
        let given = ["PATH=/x", "A=1", "A=2", "TERM"].map(str::to_owned);
        assert_eq!(environment("h", true, &given, "/root"), ["PATH=/x", "HOSTNAME=h", "A=2", "HOME=/root"]);
        assert_eq!(environment("h", false, &["HOME=/h".to_owned()], "/root").last().unwrap(), "HOME=/h");
    }
}
