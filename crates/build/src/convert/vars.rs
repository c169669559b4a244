//! Build arguments: the global scope, platform arguments, and those that need not be declared.

use std::collections::BTreeMap;

use brigantine_image::Platform;

use super::{Options, at};
use crate::dockerfile::{Command, Dockerfile, Fault, Shell};

/// Passed to RUN without a declaration, and kept out of history and cache keys.
pub(super) const PROXIES: &[&str] = &[
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "FTP_PROXY",
    "ftp_proxy",
    "NO_PROXY",
    "no_proxy",
    "ALL_PROXY",
    "all_proxy",
];

/// Arguments the frontend itself reads.
const BUILT_IN: &[&str] = &[
    "BUILDKIT_BUILD_NAME",
    "BUILDKIT_CACHE_MOUNT_NS",
    "BUILDKIT_CONTEXT_KEEP_GIT_DIR",
    "BUILDKIT_DOCKERFILE_CHECK",
    "BUILDKIT_INLINE_CACHE",
    "BUILDKIT_MULTI_PLATFORM",
    "BUILDKIT_SANDBOX_HOSTNAME",
    "BUILDKIT_SBOM_SCAN_CONTEXT",
    "BUILDKIT_SBOM_SCAN_STAGE",
    "BUILDKIT_SYNTAX",
    "SOURCE_DATE_EPOCH",
];

/// The global scope of a build.
#[derive(Debug, Clone, Default)]
pub(super) struct Globals {
    /// What FROM sees: platform arguments and ARGs before the first FROM.
    pub values: BTreeMap<String, String>,
    /// Names declared by an ARG before the first FROM, with or without a value.
    pub declared: Vec<String>,
}

fn platform_args(options: &Options, target: &Platform) -> BTreeMap<String, String> {
    let build = Platform::host();
    let mut values = BTreeMap::new();
    for (prefix, platform) in [("TARGET", target), ("BUILD", &build)] {
        let variant = platform.variant.clone().unwrap_or_default();
        let mut all = format!("{}/{}", platform.os, platform.architecture);
        if !variant.is_empty() {
            all = format!("{all}/{variant}");
        }
        values.insert(format!("{prefix}PLATFORM"), all);
        values.insert(format!("{prefix}OS"), platform.os.clone());
        values.insert(format!("{prefix}OSVERSION"), platform.os_version.clone().unwrap_or_default());
        values.insert(format!("{prefix}ARCH"), platform.architecture.clone());
        values.insert(format!("{prefix}VARIANT"), variant);
    }
    values.insert("TARGETSTAGE".to_owned(), options.target.clone().unwrap_or_else(|| "default".to_owned()));
    for (name, value) in &options.build_args {
        if let (Some(known), Some(value)) = (values.get_mut(name), value) {
            known.clone_from(value);
        }
    }
    values
}

pub(super) fn globals(file: &Dockerfile, options: &Options, target: &Platform) -> Result<Globals, Fault> {
    let mut globals = Globals { values: platform_args(options, target), declared: Vec::new() };
    for instruction in &file.globals {
        let Command::Arg(names) = &instruction.command else { continue };
        for (name, default) in names {
            let shell = Shell::new(file.directives.escape, &globals.values);
            let name = shell.word(name).map_err(at(instruction.span))?;
            let value = match options.build_args.get(&name) {
                Some(Some(given)) => Some(given.clone()),
                _ => default
                    .as_deref()
                    .map(|text| shell.word(text))
                    .transpose()
                    .map_err(at(instruction.span))?,
            };
            if let Some(value) = value {
                globals.values.insert(name.clone(), value);
            }
            globals.declared.push(name);
        }
    }
    Ok(globals)
}

/// What an ARG before the first FROM says that an argument is, if it is not given.
pub(crate) fn global_default(file: &Dockerfile, options: &Options, name: &str) -> Option<String> {
    let platform = options.platform.clone().unwrap_or_else(Platform::host);
    // What is wrong there is told when the Dockerfile is converted.
    globals(file, options, &platform).ok()?.values.remove(name)
}

/// The arguments that were given and that nobody declared.
pub(super) fn unconsumed(options: &Options, used: &[String]) -> Vec<String> {
    let known = |name: &String| {
        used.contains(name) || PROXIES.contains(&name.as_str()) || BUILT_IN.contains(&name.as_str())
    };
    options.build_args.keys().filter(|name| !known(name)).cloned().collect()
}

/// The proxy variables among the arguments.
pub(super) fn proxies(options: &Options) -> Vec<String> {
    PROXIES
        .iter()
        .filter_map(|name| Some(format!("{name}={}", options.build_args.get(*name)?.as_ref()?)))
        .collect()
}
