//! AppArmor: a container's profile confines its program and those executed in it. Where the kernel has none, asking for
//! one is refused.

#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

mod bundle;

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use bundle::{Bundle, eventually, lacking};
use serde_json::json;

/// A profile in the kernel, under a name of its own.
struct Profile {
    name: String,
}

fn parser(action: &str, text: &str) {
    let mut command = Command::new("apparmor_parser");
    let mut child = command.args([action, "--skip-cache"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "apparmor_parser {action}: {text}");
}

impl Profile {
    /// Everything is allowed but to touch `file`.
    fn denying(name: String, file: &str) -> Self {
        parser(
            "--replace",
            &format!(
                "profile {name} flags=(attach_disconnected,mediate_deleted) {{\n  file,\n  capability,\n  network,\n  \
                 mount,\n  signal,\n  ptrace,\n  unix,\n  deny {file} rwklx,\n}}\n"
            ),
        );
        Self { name }
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        parser("--remove", &format!("profile {} {{\n}}\n", self.name));
    }
}

fn enabled() -> bool {
    fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|t| t.trim() == "Y")
}

#[test]
fn a_profile_confines_the_container_and_its_execs() {
    if !enabled() {
        lacking("AppArmor");
        return;
    }
    let script =
        "cat /proc/self/attr/current; echo x >/tmp/secret || echo refused; echo x >/tmp/open && sleep 1000";
    let bundle = Bundle::new(&["/bin/sh", "-c", script]);
    let one = Profile::denying(format!("{}-one", bundle.id), "/tmp/secret");
    let other = Profile::denying(format!("{}-other", bundle.id), "/tmp/open");
    bundle.configure(|c| c["process"]["apparmorProfile"] = json!(one.name));
    bundle.good(&["run", "-d", "--bundle", bundle.dir(), &bundle.id]);
    eventually("the program has tried", || bundle.root().join("tmp/open").exists());
    let said = bundle.container_output();
    assert!(said.starts_with(&format!("{} (enforce)\n", one.name)) && said.contains("refused"), "{said}");
    assert!(!bundle.root().join("tmp/secret").exists());

    // An exec has the container's, or the one that it asks for.
    let label = ["cat", "/proc/self/attr/current"];
    let said = bundle.good(&[&["exec", &bundle.id][..], &label].concat());
    assert_eq!(said.trim(), format!("{} (enforce)", one.name));
    let said = bundle.good(&[&["exec", "--apparmor", &other.name, &bundle.id][..], &label].concat());
    assert_eq!(said.trim(), format!("{} (enforce)", other.name));
    let done = bundle.run(&["exec", "--apparmor", &other.name, &bundle.id, "cat", "/tmp/open"]);
    assert_ne!(done.code, 0, "{done:?}");

    let error = bundle.bad(&["exec", "--apparmor", "no-such-profile", &bundle.id, "true"]);
    assert!(error.contains("AppArmor") && error.contains("no-such-profile"), "{error}");
    bundle.good(&["delete", "--force", &bundle.id]);
    bundle.configure(|c| c["process"]["apparmorProfile"] = json!("no-such-profile"));
    let error = bundle.bad(&["run", "--bundle", bundle.dir(), &bundle.id]);
    assert!(error.contains("AppArmor") && error.contains("no-such-profile"), "{error}");
    bundle.assert_nothing_left();
}

#[test]
fn a_profile_is_refused_where_there_is_no_apparmor() {
    if enabled() {
        return;
    }
    let bundle = Bundle::new(&["/bin/true"]);
    bundle.configure(|c| c["process"]["apparmorProfile"] = json!("some-profile"));
    let error = bundle.bad(&["run", "--bundle", bundle.dir(), &bundle.id]);
    assert!(error.contains("\"some-profile\"") && error.contains("no AppArmor enabled"), "{error}");
    bundle.assert_nothing_left();
}
