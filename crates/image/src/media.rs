//! Media types of OCI 1.1 and Docker schema 2, and what they say about content.

use crate::encode::Encoding;

/// OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
pub const OCI_EMPTY: &str = "application/vnd.oci.empty.v1+json";

/// Docker image manifest, version 2 schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
pub const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";
pub const DOCKER_FOREIGN_LAYER: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
/// Docker's older manifests, refused with a clear text.
pub const DOCKER_SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1+json";
pub const DOCKER_SCHEMA1_SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";

/// A single image's manifest.
pub fn is_manifest(media_type: &str) -> bool {
    matches!(media_type, OCI_MANIFEST | DOCKER_MANIFEST)
}

/// A list of manifests.
pub fn is_index(media_type: &str) -> bool {
    matches!(media_type, OCI_INDEX | DOCKER_INDEX)
}

/// A configuration that describes a runnable image (others belong to artifacts).
pub fn is_image_config(media_type: &str) -> bool {
    matches!(media_type, OCI_CONFIG | DOCKER_CONFIG)
}

/// A file system layer of a kind this store can extract.
pub fn is_layer(media_type: &str) -> bool {
    let base = media_type.split('+').next().unwrap_or_default();
    matches!(base, OCI_LAYER | "application/vnd.oci.image.layer.nondistributable.v1.tar")
        || matches!(media_type, DOCKER_LAYER | DOCKER_LAYER_GZIP | DOCKER_LAYER_ZSTD | DOCKER_FOREIGN_LAYER)
        || media_type == "application/vnd.docker.image.rootfs.foreign.diff.tar"
}

/// The type of a layer that is not compressed once it is; `None` of one that is compressed, or never sent.
pub fn compressed(plain: &str, encoding: Encoding) -> Option<&'static str> {
    match (plain, encoding) {
        (OCI_LAYER, Encoding::Gzip(_)) => Some(OCI_LAYER_GZIP),
        (OCI_LAYER, Encoding::Zstd(_)) => Some(OCI_LAYER_ZSTD),
        (DOCKER_LAYER, Encoding::Gzip(_)) => Some(DOCKER_LAYER_GZIP),
        (DOCKER_LAYER, Encoding::Zstd(_)) => Some(DOCKER_LAYER_ZSTD),
        _ => None,
    }
}

/// A layer that is fetched from its own URLs rather than from the registry, and never pushed.
pub fn is_foreign(media_type: &str) -> bool {
    media_type.contains(".foreign.") || media_type.contains(".nondistributable.")
}
