//! What attests to an image: in-toto statements with SLSA provenance and SPDX documents, in a manifest of its own
//! beside the image's, as BuildKit writes them (its docs/attestations; slsa.dev/provenance/v1).
//!
//! Invariant: in mode `min` neither build arguments nor steps are told; secrets are never.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use brigantine_image::{Descriptor, Digest, Lease, Manifest, Platform, Reference, Store, media};
use brigantine_registry::redacted;
use serde_json::{Value, json};

use crate::convert::Options;
use crate::error::{Context, Error, Result};
use crate::graph::{Graph, Op};
use crate::wanted::Provenance;

const STATEMENT: &str = "https://in-toto.io/Statement/v1";
const PROVENANCE: &str = "https://slsa.dev/provenance/v1";
const SPDX: &str = "https://spdx.dev/Document";
const IN_TOTO: &str = "application/vnd.in-toto+json";
const PREDICATE: &str = "in-toto.io/predicate-type";
const ARTIFACT: &str = "application/vnd.docker.attestation.manifest.v1+json";
const BUILD_TYPE: &str = "https://github.com/moby/buildkit/blob/master/docs/attestations/slsa-definitions.md";

/// Something that went into a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Material {
    /// A package URL, or where a file or repository is from.
    pub uri: String,
    /// `sha256` or `sha1`.
    pub algorithm: &'static str,
    pub digest: String,
}

/// What is known of a build when it has ended.
pub(crate) struct Known<'b> {
    pub id: &'b str,
    pub options: &'b Options,
    pub graph: &'b Graph,
    pub dockerfile: (&'b str, &'b str),
    pub materials: &'b [Material],
    /// Nanoseconds since the epoch.
    pub started: i64,
    pub ended: i64,
    /// A repository or archive that was the context.
    pub remote: Option<&'b str>,
}

/// A predicate with its type.
pub(crate) struct Predicate {
    kind: &'static str,
    /// What is told of, if that is not the result.
    scan: Option<String>,
    pub predicate: Value,
}

impl Predicate {
    /// What it is called as a file.
    pub fn file_name(&self) -> String {
        match &self.scan {
            _ if self.kind != SPDX => "provenance.json".to_owned(),
            None => "sbom.spdx.json".to_owned(),
            Some(scan) => format!("sbom-{scan}.spdx.json"),
        }
    }

    /// It, said of `subjects`.
    pub fn statement(&self, subjects: &[Value]) -> Value {
        json!({ "_type": STATEMENT, "predicateType": self.kind, "subject": subjects, "predicate": self.predicate })
    }
}

/// A file that something is said of.
pub(crate) fn file_subject(path: &str, sha256: &[u8]) -> Value {
    json!({ "name": path, "digest": { "sha256": hex::encode(sha256) } })
}

/// An image's name with its platform as a package URL.
pub fn purl(name: &Reference, platform: &Platform) -> String {
    let familiar = name.familiar_name();
    let (version, digest) = match (name.tag(), name.digest()) {
        (Some(tag), _) => (format!("@{tag}"), String::new()),
        (None, Some(digest)) => (String::new(), format!("digest={digest}&")),
        (None, None) => (String::new(), String::new()),
    };
    let platform = platform.to_string().replace('/', "%2F");
    format!("pkg:docker/{}{version}?{digest}platform={platform}", familiar.replace(':', "%3A"))
}

fn time(nanos: i64) -> String {
    crate::export::time(nanos)
}

impl Known<'_> {
    /// How the image came about.
    pub fn provenance(&self, mode: Provenance) -> Predicate {
        let max = mode == Provenance::Max;
        let mut args = serde_json::Map::new();
        let mut put = |key: String, value: &str| drop(args.insert(key, value.into()));
        if let Some(target) = &self.options.target {
            put("target".to_owned(), target);
        }
        if max {
            for (name, value) in &self.options.build_args {
                if let Some(value) = value {
                    put(format!("build-arg:{name}"), value);
                }
            }
            for (name, value) in &self.options.labels {
                put(format!("label:{name}"), value);
            }
        }
        let (file, text) = self.dockerfile;
        let mut source = json!({ "path": file });
        if let Some(remote) = self.remote {
            source["uri"] = remote.into();
        }
        let mut request = json!({ "frontend": "dockerfile.v0", "args": args });
        if self.remote.is_none() {
            request["locals"] = json!([{ "name": "context" }, { "name": "dockerfile" }]);
        }
        let mut internal = json!({ "builderPlatform": Platform::host().to_string() });
        let mut metadata = json!({});
        if max {
            internal["buildConfig"] = json!({ "llbDefinition": self.steps() });
            metadata["source"] = json!({ "infos": [{ "filename": file, "language": "Dockerfile", "data": STANDARD.encode(redacted(text).as_bytes()) }] });
        }
        let dependencies: Vec<Value> = self
            .materials
            .iter()
            .map(|material| json!({ "uri": material.uri, "digest": { material.algorithm: material.digest } }))
            .collect();
        let mut predicate = json!({
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": { "configSource": source, "request": request },
                "internalParameters": internal,
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": { "id": "" },
                "metadata": {
                    "invocationId": self.id,
                    "startedOn": time(self.started),
                    "finishedOn": time(self.ended),
                    "buildkit_metadata": metadata,
                    "buildkit_hermetic": false,
                    "buildkit_completeness": { "request": max, "resolvedDependencies": false },
                    "buildkit_reproducible": false,
                },
            },
        });
        hide_passwords(&mut predicate);
        Predicate { kind: PROVENANCE, scan: None, predicate }
    }

    fn steps(&self) -> Vec<Value> {
        let step = |id: usize| format!("step{id}");
        let all = self.graph.vertices.iter().enumerate();
        all.map(|(id, vertex)| {
            let inputs: Vec<String> = vertex.inputs.iter().map(|input| format!("{}:0", step(input.0))).collect();
            let op = match &vertex.op {
                Op::Run(run) => json!({ "exec": { "meta": { "args": run.args, "env": run.env, "cwd": run.cwd, "user": run.user } } }),
                Op::Files(actions) => json!({ "file": { "actions": actions } }),
                Op::Http { url, .. } => json!({ "source": { "identifier": url } }),
                Op::Git { url, reference, .. } => json!({ "source": { "identifier": format!("git://{url}#{reference}") } }),
                Op::Image { diff_ids } => json!({ "source": { "identifier": format!("docker-image://{}", vertex.name.trim_start_matches("FROM ")), "layers": diff_ids } }),
                Op::Context { name } => json!({ "source": { "identifier": format!("local://{}", if name.is_empty() { "context" } else { name }) } }),
                Op::Scratch => json!({ "source": { "identifier": "scratch" } }),
            };
            json!({ "id": step(id), "op": op, "inputs": inputs })
        })
        .collect()
    }
}

/// Those of URLs, wherever they stand: what is attested to is read by others.
fn hide_passwords(value: &mut Value) {
    match value {
        Value::String(text) => *text = redacted(text).into_owned(),
        Value::Array(all) => all.iter_mut().for_each(hide_passwords),
        Value::Object(all) => all.values_mut().for_each(hide_passwords),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// An SPDX document as a predicate: of the result, or of something else with a name.
pub(crate) fn sbom(scan: Option<&str>, document: Value) -> Predicate {
    Predicate { kind: SPDX, scan: scan.map(str::to_owned), predicate: document }
}

/// Writes the manifest that attests to `image`; tells it as an index has it.
pub(crate) fn write(
    store: &Store,
    lease: &Lease,
    image: &Descriptor,
    platform: &Platform,
    names: &[Reference],
    predicates: Vec<Predicate>,
) -> Result<Descriptor> {
    let what = || "write an attestation".to_owned();
    let digest = |digest: &Digest| json!({ digest.algorithm().as_str(): digest.hex() });
    let subject = |name: String| json!({ "name": name, "digest": digest(&image.digest) });
    let mut subjects: Vec<Value> = names.iter().map(|name| subject(purl(name, platform))).collect();
    if subjects.is_empty() {
        subjects.push(subject("_".to_owned()));
    }
    let mut layers = Vec::new();
    for predicate in predicates {
        let raw = serde_json::to_vec(&predicate.statement(&subjects))
            .map_err(|error| Error::Executor(format!("write an attestation: {error}")))?;
        let digest = store.content().put(lease, &raw).doing(what)?;
        let mut layer = Descriptor::new(IN_TOTO, digest, raw.len() as u64);
        layer.annotations.insert(PREDICATE.to_owned(), predicate.kind.to_owned());
        layers.push(layer);
    }
    let empty = store.content().put(lease, b"{}").doing(what)?;
    let mut config = Descriptor::new(media::OCI_EMPTY, empty, 2);
    config.data = Some("e30=".to_owned());
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(media::OCI_MANIFEST.to_owned()),
        artifact_type: Some(ARTIFACT.to_owned()),
        config,
        layers,
        subject: Some(Descriptor::new(&image.media_type, image.digest.clone(), image.size)),
        annotations: BTreeMap::new(),
    };
    let mut descriptor = store.put_any_manifest(lease, &manifest).doing(what)?;
    descriptor.annotations = BTreeMap::from([
        ("vnd.docker.reference.type".to_owned(), "attestation-manifest".to_owned()),
        ("vnd.docker.reference.digest".to_owned(), image.digest.to_string()),
    ]);
    descriptor.platform = Some(Platform {
        os: "unknown".to_owned(),
        architecture: "unknown".to_owned(),
        ..Platform::default()
    });
    Ok(descriptor)
}
