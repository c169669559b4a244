//! Control groups on a machine where version 2 is all there is (`cargo xtask vm`): every controller's limits, device
//! rules, freezing. Elsewhere there is nothing to test.

#![expect(clippy::unwrap_used, reason = "a test says so by a panic")]

mod bundle;

use std::fs;
use std::path::Path;

use bundle::{Bundle, eventually, lacking};
use serde_json::json;

const TOP: &str = "/sys/fs/cgroup";

fn not_unified() -> bool {
    !Path::new(TOP).join("cgroup.controllers").exists() && lacking("a pure cgroup v2 hierarchy")
}

fn value(bundle: &Bundle, file: &str) -> String {
    let path = Path::new(TOP).join(&bundle.id).join(file);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).trim().to_owned()
}

fn assert_values(bundle: &Bundle, wanted: &[(&str, &str)]) {
    for (file, value) in wanted {
        assert_eq!(self::value(bundle, file), *value, "{file}");
    }
}

/// A disk of the machine: (major, minor).
fn disk() -> Option<(u64, u64)> {
    let disks = fs::read_dir("/sys/block").unwrap().flatten();
    let disk = disks.map(|d| d.path()).find(|d| d.join("device").exists())?;
    let numbers = fs::read_to_string(disk.join("dev")).unwrap();
    let (major, minor) = numbers.trim().split_once(':')?;
    Some((major.parse().unwrap(), minor.parse().unwrap()))
}

#[test]
fn each_controller_gets_its_limits() {
    if not_unified() {
        return;
    }
    let Some((major, minor)) = disk() else {
        lacking("a disk");
        return;
    };
    let bundle = Bundle::new(&["/bin/sleep", "1000"]);
    let rate = |rate: u64| json!([{"major": major, "minor": minor, "rate": rate}]);
    bundle.configure(|c| {
        c["linux"]["resources"] = json!({
            "memory": {"limit": 64 << 20, "reservation": 32 << 20, "swap": 96 << 20},
            "cpu": {"shares": 1024, "quota": 30000, "period": 50000, "burst": 1000, "cpus": "0", "mems": "0"},
            "pids": {"limit": 19},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
            "blockIO": {"throttleReadBpsDevice": rate(1 << 20), "throttleWriteIOPSDevice": rate(300)},
            "unified": {"memory.high": "50331648", "cgroup.max.depth": "7"},
        });
    });
    bundle.good(&["run", "-d", "--bundle", bundle.dir(), &bundle.id]);
    assert_values(
        &bundle,
        &[
            ("memory.max", "67108864"),
            ("memory.low", "33554432"),
            ("memory.swap.max", "33554432"),
            ("memory.high", "50331648"),
            ("cpu.weight", "39"),
            ("cpu.max", "30000 50000"),
            ("cpu.max.burst", "1000"),
            ("cpuset.cpus.effective", "0"),
            ("cpuset.mems", "0"),
            ("pids.max", "19"),
            ("hugetlb.2MB.max", "4194304"),
            ("io.max", &format!("{major}:{minor} rbps=1048576 wbps=max riops=max wiops=300")),
            ("cgroup.max.depth", "7"),
        ],
    );
    let pid = bundle.state()["pid"].to_string();
    assert_eq!(value(&bundle, "cgroup.procs"), pid);

    bundle.good(&[
        "update",
        "--memory",
        "41943040",
        "--memory-swap",
        "41943040",
        "--pids-limit",
        "23",
        &bundle.id,
    ]);
    bundle.good(&["update", "--cpu-quota", "-1", "--cpu-share", "2", &bundle.id]);
    assert_values(
        &bundle,
        &[
            ("memory.max", "41943040"),
            ("memory.swap.max", "0"),
            ("pids.max", "23"),
            ("cpu.max", "max 50000"),
            ("cpu.weight", "1"),
        ],
    );
    let stats: serde_json::Value =
        serde_json::from_str(&bundle.good(&["events", "--stats", &bundle.id])).unwrap();
    assert_eq!(stats["data"]["pids"]["limit"], json!(23));
    assert_eq!(stats["data"]["memory"]["usage"]["limit"], json!(41_943_040));
    bundle.good(&["delete", "--force", &bundle.id]);
    bundle.assert_nothing_left();
}

#[test]
fn what_the_kernel_has_no_file_for_is_refused_by_name() {
    if not_unified() {
        return;
    }
    let bundle = Bundle::new(&["/bin/true"]);
    for (resources, says) in [
        (json!({"unified": {"memory.nonsense": "1"}}), "memory.nonsense"),
        (json!({"unified": {"../memory.max": "1"}}), "is not a limit's file"),
        (json!({"memory": {"swap": 1 << 20}}), "needs one on memory"),
        (json!({"network": {"classID": 5}}), "net_cls cgroup controller is not available"),
        (json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 1}]}), "hugetlb.3MB.max"),
    ] {
        bundle.configure(|c| c["linux"]["resources"] = resources.clone());
        let error = bundle.bad(&["run", "--bundle", bundle.dir(), &bundle.id]);
        assert!(error.contains(says), "{resources}: {error}");
        bundle.assert_nothing_left();
    }
}

#[test]
fn device_rules_are_a_program() {
    if not_unified() {
        return;
    }
    let Some((major, minor)) = disk() else {
        lacking("a disk");
        return;
    };
    let script = "dd if=/dev/disk of=/dev/null bs=512 count=1 2>/dev/null && echo read\n\
        (echo x >/dev/disk) 2>/dev/null || echo no write\n\
        (echo y >/dev/null) && echo null";
    let bundle = Bundle::new(&["/bin/sh", "-c", script]);
    let with = |rules: serde_json::Value| {
        bundle.configure(|c| {
            c["linux"]["devices"] =
                json!([{"path": "/dev/disk", "type": "b", "major": major, "minor": minor}]);
            c["linux"]["resources"]["devices"] = rules;
        });
        bundle.good(&["run", "--bundle", bundle.dir(), &bundle.id])
    };
    let none = json!({"allow": false, "access": "rwm"});
    assert_eq!(with(json!([none])), "no write\nnull\n");
    let read = json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": "r"});
    assert_eq!(with(json!([none, read])), "read\nno write\nnull\n");
    // The last rule that fits decides.
    let block = json!({"allow": false, "type": "b", "access": "rwm"});
    assert_eq!(with(json!([none, read, block])), "no write\nnull\n");
}

#[test]
fn a_group_is_frozen_as_a_whole() {
    if not_unified() {
        return;
    }
    let bundle = Bundle::sleeping();
    let frozen = || value(&bundle, "cgroup.events").lines().any(|l| l == "frozen 1");
    assert!(!frozen());
    bundle.good(&["pause", &bundle.id]);
    assert!(frozen());
    assert_eq!(bundle.status(), "paused");
    assert!(bundle.bad(&["exec", &bundle.id, "true"]).contains("paused"));
    // A process that is let in does not run before the others do.
    let mut exec = bundle.command().args(["exec", "--ignore-paused", &bundle.id, "true"]).spawn().unwrap();
    eventually("the exec's process is in the group", || value(&bundle, "cgroup.procs").lines().count() == 2);
    assert!(exec.try_wait().unwrap().is_none());
    bundle.good(&["resume", &bundle.id]);
    assert!(exec.wait().unwrap().success());
    assert!(!frozen());
    bundle.good(&["pause", &bundle.id]);
    bundle.good(&["delete", "--force", &bundle.id]);
    bundle.assert_nothing_left();
}
