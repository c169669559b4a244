//! Reading specs as forgivingly as runc does: capabilities that nobody knows are left out with a
//! warning, and a process needs neither user nor directory. Only what strict reading refuses comes here.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Global;
use crate::spec::{Capability, LinuxMemoryPolicy, Process, Spec};

/// And whether strict reading takes it as well.
pub(super) fn spec(bytes: &[u8], global: &Global) -> Result<(Spec, bool), serde_json::Error> {
    read(bytes, global, |value| value.get_mut("process"))
}

pub(super) fn process(bytes: &[u8], global: &Global) -> Result<Process, serde_json::Error> {
    read(bytes, global, |value| Some(value)).map(|(process, _)| process)
}

fn read<T: DeserializeOwned>(
    bytes: &[u8],
    global: &Global,
    process: impl Fn(&mut Value) -> Option<&mut Value>,
) -> Result<(T, bool), serde_json::Error> {
    let strict = match serde_json::from_slice(bytes) {
        Ok(read) => return Ok((read, true)),
        Err(e) => e,
    };
    let Ok(mut value) = serde_json::from_slice::<Value>(bytes) else { return Err(strict) };
    if let Some(process) = process(&mut value).and_then(Value::as_object_mut) {
        process.entry("user").or_insert_with(|| json!({"uid": 0, "gid": 0}));
        process.entry("cwd").or_insert_with(|| json!("/"));
        let mut unknown = Vec::new();
        let sets = process.get_mut("capabilities").and_then(Value::as_object_mut);
        for list in sets.into_iter().flat_map(|sets| sets.values_mut()).filter_map(Value::as_array_mut) {
            list.retain(|name| {
                let known = !name.is_string() || serde_json::from_value::<Capability>(name.clone()).is_ok();
                let shown = name.as_str().unwrap_or_default();
                if !known && !unknown.iter().any(|u| u == shown) {
                    unknown.push(shown.to_owned());
                }
                known
            });
        }
        if !unknown.is_empty() {
            let list = unknown.join(" ");
            global.write(&format!("ignoring unknown or unavailable capabilities: [{list}]"), "warning");
        }
        // The specification's name for what the types call SCHED_RESET_ON_FORK.
        let flags = process.get_mut("scheduler").and_then(|s| s.get_mut("flags"));
        for flag in flags.and_then(Value::as_array_mut).into_iter().flatten() {
            if flag == "SCHED_FLAG_RESET_ON_FORK" {
                *flag = json!("SCHED_RESET_ON_FORK");
            }
        }
    }
    if let Some(policy) = value.pointer("/linux/memoryPolicy") {
        memory_policy(policy)?;
    }
    // Where the error is, the strict one says.
    serde_json::from_value(value).map(|read| (read, false)).map_err(|_unused| strict)
}

/// Which part of a memory policy is wrong.
fn memory_policy(policy: &Value) -> Result<(), serde_json::Error> {
    let known = |mode: &Value, flags: &[&Value]| {
        let whole = json!({"mode": mode, "nodes": "0", "flags": flags});
        serde_json::from_value::<LinuxMemoryPolicy>(whole).is_ok()
    };
    let wrong = |text: String| serde::de::Error::custom(format!("invalid memory policy {text}"));
    let mode = &policy["mode"];
    if !known(mode, &[]) {
        return Err(wrong(format!("mode {mode}")));
    }
    let flags = policy["flags"].as_array();
    match flags.into_iter().flatten().find(|flag| !known(mode, &[flag])) {
        Some(flag) => Err(wrong(format!("flag {flag}"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_or_unknown_is_forgiven_and_nothing_else() {
        let global = Global::default();
        let read = |json: Value| process(json.to_string().as_bytes(), &global);
        let found =
            read(json!({"args": ["a"], "capabilities": {"bounding": ["CAP_KILL", "CAP_NOT_YET"]}})).unwrap();
        assert_eq!(found.cwd(), std::path::Path::new("/"));
        let bounding = found.capabilities().as_ref().unwrap().bounding().clone().unwrap();
        assert_eq!(bounding.into_iter().collect::<Vec<_>>(), [Capability::Kill]);
        assert!(read(json!({"args": "a"})).is_err());
        assert!(spec(b"{\"process\": ", &global).is_err());
    }
}
