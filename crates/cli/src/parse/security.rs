//! `--security-opt`, and the namespaces a container may share.

/// What the options say: those for the engine, and whether /proc and /sys stay unmasked.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Security {
    pub options: Vec<String>,
    pub unmasked: bool,
}

/// The engine wants a seccomp profile's text, not its path: the file is the client's.
pub fn options(given: &[&str]) -> Result<Security, String> {
    let mut security = Security::default();
    for option in given {
        if *option == "systempaths=unconfined" {
            security.unmasked = true;
            continue;
        }
        let pair = option.split_once('=').or_else(|| option.split_once(':'));
        match pair {
            None if *option == "no-new-privileges" => security.options.push((*option).to_owned()),
            None => return Err(format!("Invalid --security-opt: {option:?}")),
            Some(("seccomp", profile)) if !["unconfined", "builtin"].contains(&profile) => {
                let text = std::fs::read_to_string(profile).map_err(|error| {
                    format!(
                        "opening seccomp profile ({profile}) failed: open {profile}: {}",
                        crate::output::os_text(&error)
                    )
                })?;
                let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| {
                    format!("compacting json for seccomp profile ({profile}) failed: {error}")
                })?;
                security.options.push(format!("seccomp={value}"));
            }
            Some(_) => security.options.push((*option).to_owned()),
        }
    }
    Ok(security)
}

/// Checks the value of `--pid`, `--uts`, `--userns`, `--cgroupns`.
pub fn namespace(flag: &str, value: &str) -> Result<(), String> {
    let right = match flag {
        "pid" => matches!(value, "" | "host") || shares_container(value),
        "uts" | "userns" => matches!(value, "" | "host"),
        _ => matches!(value, "" | "host" | "private"),
    };
    let name = match flag {
        "pid" => "PID",
        "uts" => "UTS",
        "userns" => "USER",
        _ => "CGROUP",
    };
    if right { Ok(()) } else { Err(format!("--{flag}: invalid {name} mode")) }
}

fn shares_container(value: &str) -> bool {
    value.strip_prefix("container:").is_some_and(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_pass_and_profiles_are_read() {
        assert_eq!(
            options(&["no-new-privileges", "apparmor=x"]).unwrap().options,
            ["no-new-privileges", "apparmor=x"]
        );
        assert!(options(&["systempaths=unconfined"]).unwrap().unmasked);
        assert_eq!(options(&["foo"]).unwrap_err(), "Invalid --security-opt: \"foo\"");
        assert_eq!(
            options(&["seccomp=/nope"]).unwrap_err(),
            "opening seccomp profile (/nope) failed: open /nope: no such file or directory"
        );
        assert_eq!(namespace("pid", "foo").unwrap_err(), "--pid: invalid PID mode");
    }
}
