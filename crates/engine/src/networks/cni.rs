//! Networks of the driver `cni`: made by plugins of the host, from a configuration that is read once, when the network is
//! created, and kept with its record.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bollard_stubs::models::NetworkCreateRequest;
use brigantine_network::cni::NetworkList;
use jiff::Timestamp;

use super::options::{self, Options};
use super::{Driver, Networks, Record, VERSION, plumbing};
use crate::ids::new_id;
use crate::{Error, Result};

/// The configuration's file, or the name of a network that one of the configured directory's files describes.
const CONF: &str = "conf";

/// More than any configuration has.
const MOST: u64 = 1 << 20;

impl Networks {
    pub(super) async fn make_foreign(&self, request: NetworkCreateRequest) -> Result<Record> {
        let ipam = request.ipam.as_ref();
        let has_addresses = ipam.is_some_and(|ipam| {
            ipam.config.as_ref().is_some_and(|config| !config.is_empty())
                || ipam.driver.as_deref().is_some_and(|driver| !matches!(driver, "" | "default" | "cni"))
        });
        if has_addresses || request.internal == Some(true) || request.enable_ipv6 == Some(true) {
            return Err(Error::invalid(
                "what a network of the driver cni is like stands in its configuration (-o conf=FILE): subnets, IPv6 and --internal cannot be given here",
            ));
        }
        let options: BTreeMap<String, String> = request.options.unwrap_or_default().into_iter().collect();
        options::check_prefix(Options(&options))?;
        let wanted = options.get(CONF).cloned().unwrap_or_else(|| request.name.clone());
        let (dir, plumbing) = (self.config.cni_config_dir.clone(), self.plumbing());
        let id = new_id();
        let segment = id.clone();
        let list = crate::blocking(move || {
            let list = find(&dir, &wanted)?;
            plumbing.add_foreign(&segment, list)
        })
        .await?;
        Ok(Record {
            version: VERSION,
            id,
            name: request.name,
            driver: Driver::Cni,
            created: Timestamp::now(),
            internal: false,
            attachable: request.attachable.unwrap_or_default(),
            options,
            labels: request.labels.unwrap_or_default().into_iter().collect(),
            ipam_options: BTreeMap::new(),
            ip_range: None,
            reserved: BTreeMap::new(),
            ip_range6: None,
            reserved6: BTreeMap::new(),
            ipv6_by_default: true,
            bridge: None,
            parent: None,
            foreign: Some(list),
            template: None,
            config_from: request.config_from.and_then(|from| from.network).unwrap_or_default(),
        })
    }
}

/// A configuration by its file's path or by its network's name.
fn find(dir: &Path, wanted: &str) -> Result<NetworkList> {
    if wanted.starts_with('/') {
        return read(Path::new(wanted));
    }
    // As libcni: by the order of their names, lists before lone plugins of the same name.
    let entries = std::fs::read_dir(dir).into_iter().flatten().filter_map(std::result::Result::ok);
    let is_configuration = |file: &PathBuf| {
        file.extension()
            .is_some_and(|ending| ["conf", "conflist", "json"].iter().any(|known| ending == *known))
    };
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_configuration).collect();
    files.sort();
    let mut unreadable = None;
    for file in files {
        match read(&file) {
            Ok(list) if list.name() == wanted => return Ok(list),
            Ok(_) => {}
            Err(error) => unreadable = unreadable.or(Some(error)),
        }
    }
    let text = format!(
        "there is no configuration of a CNI network {wanted:?} in {} (--cni-config-dir); name its file with -o {CONF}=/PATH",
        dir.display()
    );
    Err(match unreadable {
        // It may be the one that was meant.
        Some(error) => Error::invalid(text).because(error),
        None => Error::invalid(text),
    })
}

fn read(file: &Path) -> Result<NetworkList> {
    use std::io::Read as _;
    let place = file.display().to_string();
    let mut text = String::new();
    let mut open = || std::fs::File::open(file)?.take(MOST).read_to_string(&mut text);
    open()
        .map_err(|error| Error::invalid(format!("read CNI network configuration {place}")).because(error))?;
    NetworkList::parse(&text, &place).map_err(plumbing::refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_found_by_path_and_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write(
            "10-lan.conflist",
            r#"{ "cniVersion": "1.0.0", "name": "lan", "plugins": [{ "type": "bridge" }] }"#,
        );
        write("20-old.conf", r#"{ "cniVersion": "0.4.0", "name": "old", "type": "ptp" }"#);
        write("readme.txt", "no configuration");
        let path = dir.path().join("10-lan.conflist");
        assert_eq!(find(dir.path(), path.to_str().unwrap()).unwrap().name(), "lan");
        assert_eq!(find(dir.path(), "lan").unwrap().name(), "lan");
        assert_eq!(find(dir.path(), "old").unwrap().name(), "old");
        let error = find(dir.path(), "sea").unwrap_err();
        assert!(
            error.to_string().contains("\"sea\"") && error.class() == crate::Class::InvalidParameter,
            "{error}"
        );
        write("30-broken.conflist", "{");
        assert!(find(dir.path(), "sea").unwrap_err().report().contains("30-broken"), "it may be meant");
        assert!(find(dir.path(), "/no/such/file").unwrap_err().to_string().contains("/no/such/file"));
    }
}
