//! OCI runtime: spec to namespaces, mounts, cgroups, capabilities, seccomp, lifecycle
