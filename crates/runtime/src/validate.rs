//! A `config.json` looked through without making anything of it: what is wrong with the text itself is told before there
//! is a container. It must take any bytes whatsoever without a panic and within bounded memory.

use std::path::Path;

use crate::error::Error;
use crate::spec::Spec;
use crate::{cgroup, hooks, identity, mounts, netdev, seccomp};

/// The largest `config.json` that is read.
pub const LIMIT: usize = 16 << 20;

/// Reads a spec, and compiles the parts that depend on nothing but it: process, mount options, seccomp filter, device
/// rules, network devices, hooks.
pub fn validate(bytes: &[u8]) -> Result<Spec, Error> {
    if bytes.len() > LIMIT {
        return Err(Error::invalid(format!("config.json: {} bytes are too many", bytes.len())));
    }
    let spec: Spec =
        serde_json::from_slice(bytes).map_err(|e| Error::invalid(format!("config.json: {e}")))?;
    if let Some(process) = spec.process() {
        identity::compile(process, None, false)?;
    }
    for mount in spec.mounts().iter().flatten() {
        mounts::Options::parse(mount.options().iter().flatten().map(String::as_str))?;
        mounts::target(mount.destination(), false)?;
    }
    if let Some(linux) = spec.linux() {
        for path in linux.masked_paths().iter().chain(linux.readonly_paths()).flatten() {
            mounts::target(Path::new(path), false)?;
        }
        if let Some(filter) = linux.seccomp() {
            seccomp::compile(filter)?;
        }
        if let Some(resources) = linux.resources() {
            cgroup::check(resources)?;
        }
        if let Some(personality) = linux.personality() {
            identity::personality(personality)?;
        }
        identity::memory_policy(linux.memory_policy().as_ref())?;
        netdev::compile(linux.net_devices().as_ref())?;
    }
    if let Some(list) = spec.hooks() {
        hooks::check_all(list)?;
    }
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn config() -> Value {
        let seccomp = profile::seccomp(&profile::SeccompContext {
            capabilities: profile::capabilities(),
            kernel: None,
        });
        json!({
            "ociVersion": "1.2.0",
            "process": {"user": {"uid": 0, "gid": 0, "additionalGids": [5]}, "args": ["sh", "-c", "true"], "cwd": "/",
                "env": ["PATH=/bin", "A=b"], "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 9, "soft": 9}],
                "capabilities": {"bounding": ["CAP_KILL"]}, "oomScoreAdj": 100,
                "scheduler": {"policy": "SCHED_BATCH", "nice": 3}},
            "root": {"path": "rootfs"},
            "mounts": profile::mounts(64 << 20),
            "hooks": {"poststop": [{"path": "/bin/true", "timeout": 3}]},
            "linux": {"resources": {"devices": profile::device_rules(), "memory": {"limit": 1 << 30}},
                "namespaces": [{"type": "pid"}, {"type": "mount", "path": "/proc/1/ns/mnt"}],
                "maskedPaths": profile::masked_paths(), "readonlyPaths": profile::readonly_paths(),
                "seccomp": seccomp.unwrap()},
        })
    }

    /// The places of a document, each as the way to it.
    fn places(value: &Value, at: &str, all: &mut Vec<String>) {
        all.push(at.to_owned());
        match value {
            Value::Object(fields) => {
                for (key, inner) in fields {
                    places(inner, &format!("{at}/{key}"), all);
                }
            }
            Value::Array(items) => {
                for (n, inner) in items.iter().enumerate().take(4) {
                    places(inner, &format!("{at}/{n}"), all);
                }
            }
            _ => {}
        }
    }

    fn odd() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            ".{0,40}".prop_map(Value::from),
            Just(json!("a\u{0}b")),
            Just(json!("../../..")),
            Just(json!("x".repeat(9000))),
            Just(json!([])),
            Just(json!({})),
            Just(json!([[[[[[]]]]]])),
        ]
    }

    #[test]
    fn a_good_one_is_good() {
        let spec = validate(config().to_string().as_bytes()).unwrap();
        assert_eq!(spec.version(), "1.2.0");
    }

    /// What the fuzz target (`fuzz/config.rs`) asserts, on what it starts from and what it has found.
    #[test]
    fn the_fuzzers_inputs_are_taken_or_refused() {
        for dir in ["seeds", "found"] {
            // Elsewhere, where the test was brought without its sources.
            let fuzz = std::env::var_os("BRIG_TEST_FUZZ").map_or_else(
                || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz"),
                std::path::PathBuf::from,
            );
            let path = fuzz.join(dir);
            for file in std::fs::read_dir(&path).unwrap() {
                let file = file.unwrap().path();
                match validate(&std::fs::read(&file).unwrap()) {
                    Ok(spec) => assert_eq!(validate(&serde_json::to_vec(&spec).unwrap()).unwrap(), spec),
                    Err(e) => {
                        assert!(dir == "found", "{}: {e}", file.display());
                        assert!(!e.to_string().contains('\n'), "{}: {e}", file.display());
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn any_value_anywhere_is_taken_or_refused(place: prop::sample::Index, value in odd()) {
            let mut config = config();
            let mut all = Vec::new();
            places(&config, "", &mut all);
            let place = &all[place.index(all.len())];
            *config.pointer_mut(place).unwrap() = value;
            if let Err(e) = validate(config.to_string().as_bytes()) {
                let text = e.to_string();
                prop_assert!(!text.is_empty() && !text.contains('\n'), "{text}");
            }
        }

        #[test]
        fn any_damage_is_taken_or_refused(at: prop::sample::Index, length in 0_usize..9, bytes: Vec<u8>) {
            let mut text = config().to_string().into_bytes();
            let at = at.index(text.len());
            let end = (at + length).min(text.len());
            text.splice(at..end, bytes.into_iter().take(20));
            drop(validate(&text));
        }
    }
}
