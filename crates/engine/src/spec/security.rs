//! `--security-opt`: system call filter, privileges that an exec may gain, AppArmor and SELinux labels, open paths.

use brigantine_runtime::profile::{self, SeccompContext};
use brigantine_runtime::spec::{Capability, LinuxSeccomp};

use crate::config::Config;
use crate::{Error, Result};

/// The security options of a container, decoded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Options {
    seccomp: Seccomp,
    pub no_new_privileges: bool,
    pub apparmor: Option<String>,
    pub selinux: Option<String>,
    /// Neither masked nor read-only system paths.
    pub open_paths: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Seccomp {
    #[default]
    Builtin,
    Unconfined,
    /// A profile in docker's JSON format.
    Profile(String),
}

impl Options {
    pub(crate) fn parse(options: &[String], config: &Config) -> Result<Self> {
        let mut parsed = Self { no_new_privileges: config.no_new_privileges, ..Self::default() };
        parsed.seccomp = match config.seccomp_profile.as_str() {
            "" | "builtin" | "default" => Seccomp::Builtin,
            "unconfined" => Seccomp::Unconfined,
            path => Seccomp::Profile(std::fs::read_to_string(path).map_err(|error| {
                Error::internal(format!("read the default seccomp profile {path}")).because(error)
            })?),
        };
        let mut labels = Vec::new();
        for option in options {
            let wrong = || Error::invalid(format!("invalid --security-opt 2: \"{option}\""));
            match option.as_str() {
                "no-new-privileges" => {
                    parsed.no_new_privileges = true;
                    continue;
                }
                "disable" => continue,
                _ => {}
            }
            let (name, value) = option
                .split_once('=')
                .or_else(|| option.split_once(':'))
                .ok_or_else(|| Error::invalid(format!("invalid --security-opt 1: \"{option}\"")))?;
            match name {
                "label" => labels.push(value.to_owned()),
                "apparmor" => parsed.apparmor = (value != "unconfined").then(|| value.to_owned()),
                "seccomp" => {
                    parsed.seccomp = match value {
                        "builtin" => Seccomp::Builtin,
                        "unconfined" => Seccomp::Unconfined,
                        json => Seccomp::Profile(json.to_owned()),
                    };
                }
                "no-new-privileges" => {
                    parsed.no_new_privileges = match value {
                        "true" | "1" => true,
                        "false" | "0" => false,
                        _ => return Err(wrong()),
                    };
                }
                "systempaths" if value == "unconfined" => parsed.open_paths = true,
                "writable-cgroups" => {
                    return Err(Error::not_implemented("--security-opt writable-cgroups is not supported"));
                }
                _ => return Err(wrong()),
            }
        }
        if labels.iter().any(|label| label != "disable") {
            return Err(Error::not_implemented("SELinux labels (--security-opt label=…) are not supported"));
        }
        Ok(parsed)
    }

    /// The filter for a container with these capabilities.
    pub(crate) fn seccomp(&self, bounding: &[Capability]) -> Result<Option<LinuxSeccomp>> {
        let context = SeccompContext { capabilities: bounding.to_vec(), ..SeccompContext::default() };
        match &self.seccomp {
            Seccomp::Unconfined => Ok(None),
            Seccomp::Builtin => profile::seccomp(&context)
                .map(Some)
                .map_err(|error| Error::internal("load the default seccomp profile").because(error)),
            Seccomp::Profile(json) => profile::parse_seccomp(json.as_bytes(), &context)
                .map(Some)
                .map_err(|error| Error::invalid("invalid seccomp profile").because(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Result<Options> {
        Options::parse(&options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>(), &Config::default())
    }

    #[test]
    fn options_in_both_spellings() {
        let options =
            parse(&["no-new-privileges", "seccomp:unconfined", "apparmor=mine", "systempaths=unconfined"])
                .unwrap();
        assert!(options.no_new_privileges && options.open_paths);
        assert_eq!(options.apparmor.as_deref(), Some("mine"));
        assert_eq!(options.seccomp(&[]).unwrap(), None);
        assert!(!parse(&["no-new-privileges=false"]).unwrap().no_new_privileges);
        assert!(parse(&["label=disable"]).is_ok());
    }

    #[test]
    fn bad_options_are_named() {
        assert_eq!(parse(&["x"]).unwrap_err().to_string(), "invalid --security-opt 1: \"x\"");
        assert_eq!(parse(&["a=b"]).unwrap_err().to_string(), "invalid --security-opt 2: \"a=b\"");
        assert!(parse(&["no-new-privileges=maybe"]).is_err());
    }
}
