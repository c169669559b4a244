//! docker's document of one image: what inspect shows.

use brigantine_image::{Digest, Image, ImageConfig, LayerFiles, Reference, Store};
use serde_json::{Value, json};

pub(super) fn descriptor(image: &Image) -> Value {
    let descriptor = image.index.as_ref().unwrap_or(&image.manifest);
    json!({
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest.to_string(),
        "size": descriptor.size,
    })
}

/// What an index names, as clients of 1.48 read it; nothing for an image without one.
pub(super) fn manifests(store: &Store, image: &Image) -> Result<Vec<Value>, brigantine_image::Error> {
    let mut all = Vec::new();
    for one in image.index.iter().map(|index| store.indexed(index)).collect::<Result<Vec<_>, _>>()?.concat() {
        let content =
            one.manifest.config.size + one.manifest.layers.iter().map(|layer| layer.size).sum::<u64>();
        let attested = one.descriptor.annotations.get("vnd.docker.reference.digest");
        let mut shown = json!({
            "ID": one.descriptor.digest.to_string(),
            "Descriptor": one.descriptor,
            "Available": true,
            "Size": { "Content": content, "Total": content },
        });
        if let Some(image) = attested {
            shown["Kind"] = "attestation".into();
            shown["AttestationData"] = json!({ "For": image });
        } else {
            shown["Kind"] = "image".into();
            shown["ImageData"] = json!({
                "Platform": one.descriptor.platform,
                "Identity": null,
                "Containers": null,
                "Size": { "Unpacked": 0 },
            });
        }
        all.push(shown);
    }
    Ok(all)
}

pub(super) fn document(image: &Image, layers: &[LayerFiles], driver: &str) -> Value {
    let config: &ImageConfig = &image.config;
    let names = |names: &[Reference]| names.iter().map(Reference::familiar).collect::<Vec<_>>();
    let mut document = json!({
        "Id": image.id.to_string(),
        "RepoTags": names(&image.tags),
        "RepoDigests": names(&image.digests),
        "Parent": image.parent.as_ref().map(Digest::to_string).unwrap_or_default(),
        "Comment": config.comment.clone().unwrap_or_default(),
        "Created": config.created.clone().unwrap_or_else(|| brigantine_engine::ZERO_TIME.to_owned()),
        "Container": "",
        "ContainerConfig": container_config(None),
        "DockerVersion": config.docker_version.clone().unwrap_or_default(),
        "Author": config.author.clone().unwrap_or_default(),
        "Config": container_config(Some(config)),
        "Architecture": config.architecture,
        "Os": if config.os.is_empty() { "linux" } else { &config.os },
        "Size": image.size,
        "VirtualSize": image.size,
        "GraphDriver": graph_driver(layers, driver),
        "RootFS": {
            "Type": "layers",
            "Layers": config.rootfs.diff_ids.iter().map(Digest::to_string).collect::<Vec<_>>(),
        },
        "Metadata": {
            "LastTagTime": image.last_tagged.clone().unwrap_or_else(|| brigantine_engine::ZERO_TIME.to_owned()),
        },
        "Descriptor": descriptor(image),
    });
    if let Some(variant) = &config.variant {
        document["Variant"] = variant.clone().into();
    }
    if let Some(version) = &config.os_version {
        document["OsVersion"] = version.clone().into();
    }
    document
}

fn graph_driver(layers: &[LayerFiles], driver: &str) -> Value {
    let mut paths = layers.iter().map(|files| files.shown().display().to_string());
    let mut data = serde_json::Map::new();
    if let Some(top) = paths.next() {
        data.insert("UpperDir".to_owned(), top.into());
        let lower = paths.collect::<Vec<_>>().join(":");
        if !lower.is_empty() {
            data.insert("LowerDir".to_owned(), lower.into());
        }
    }
    json!({ "Name": driver, "Data": data })
}

/// docker's container configuration of an image, with the fields that only containers set at their zero values:
/// older clients read them without looking.
fn container_config(config: Option<&ImageConfig>) -> Value {
    let empty = brigantine_image::ContainerConfig::default();
    let config = config.map_or(&empty, |config| &config.config);
    let set = |keys: Vec<&String>| {
        (!keys.is_empty())
            .then(|| keys.into_iter().map(|key| (key.clone(), json!({}))).collect::<serde_json::Map<_, _>>())
    };
    let mut document = json!({
        "Hostname": "", "Domainname": "", "User": config.user,
        "AttachStdin": false, "AttachStdout": false, "AttachStderr": false,
        "Tty": false, "OpenStdin": false, "StdinOnce": false,
        "Env": config.env, "Cmd": config.cmd, "Image": "",
        "Volumes": set(config.volumes.iter().collect()),
        "WorkingDir": config.working_dir, "Entrypoint": config.entrypoint, "OnBuild": config.on_build,
        "Labels": (!config.labels.is_empty()).then_some(&config.labels),
    });
    if let Some(ports) = set(config.exposed_ports.iter().collect()) {
        document["ExposedPorts"] = ports.into();
    }
    if config.args_escaped {
        document["ArgsEscaped"] = true.into();
    }
    for (key, value) in [
        ("Healthcheck", serde_json::to_value(&config.healthcheck)),
        ("StopSignal", serde_json::to_value(&config.stop_signal)),
        ("Shell", serde_json::to_value(&config.shell)),
    ] {
        if let Ok(value) = value
            && !value.is_null()
        {
            document[key] = value;
        }
    }
    document
}
