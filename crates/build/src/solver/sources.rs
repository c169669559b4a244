//! Sources from the web: downloads and repositories, each known by its own digest.

use std::sync::Arc;

use super::{Download, Job, Output, blocking, definition, digest_of};
use crate::access::Secrets;
use crate::attest::Material;
use crate::error::{Context as _, Result, invalid};
use crate::graph::{Op, VertexId};
use crate::pattern::Ignore;
use crate::run::resolve_source;
use crate::tree::Tree;

impl Job {
    /// The files and repositories from the web that went into the build.
    pub async fn materials(self: &Arc<Self>) -> Result<Vec<Material>> {
        let mut all = Vec::new();
        for (number, vertex) in self.graph.vertices.iter().enumerate() {
            let (uri, algorithm) = match &vertex.op {
                Op::Http { url, .. } => (url.clone(), "sha256"),
                Op::Git { url, reference, .. } if reference.is_empty() => (url.clone(), "sha1"),
                Op::Git { url, reference, .. } => (format!("{url}#{reference}"), "sha1"),
                _ => continue,
            };
            let output = self.result(VertexId(number)).await?;
            let digest = match &output.file {
                Some(file) => file.found.sha256.clone(),
                None => output.key.trim_start_matches("git:").to_owned(),
            };
            all.push(Material { uri, algorithm, digest });
        }
        Ok(all)
    }

    /// What servers may be shown.
    fn servers_secrets(&self) -> Secrets {
        Secrets::new(Arc::clone(&self.secrets), self.session.clone())
    }

    pub(super) async fn download(
        &self,
        url: &str,
        checksum: Option<&str>,
        name: &str,
    ) -> Result<Arc<Output>> {
        let path = self.solver.tmp.join(format!("{}-{}", self.id, digest_of(&[url])));
        let found = self.solver.downloads.fetch(url, checksum, &self.servers_secrets(), &path).await?;
        let mut output =
            Output::layers(Vec::new(), format!("http:{}:{}:{:?}", found.sha256, name, found.modified), 0);
        output.file = Some(Arc::new(Download { path, name: name.to_owned(), found }));
        Ok(Arc::new(output))
    }

    pub(super) async fn checkout(&self, op: &Op) -> Result<Arc<Output>> {
        let dir = self.solver.tmp.join(format!("{}-git-{}", self.id, digest_of(&[&definition(op)?])));
        let commit = crate::remote::checkout(op, &self.servers_secrets(), &dir).await?.id;
        let Op::Git { subdir, .. } = op else { return Err(invalid("not a git source")) };
        let (hashes, subdir) = (Arc::clone(&self.solver.hashes), subdir.clone());
        let tree = blocking(move || {
            let root = crate::tree::open_dir(&dir)?;
            let whole = Tree::folder(root, Ignore::default(), Arc::clone(&hashes));
            if subdir.is_empty() {
                return Ok(whole);
            }
            let real = resolve_source(&whole, &subdir)?;
            let root = whole
                .open(real.as_bytes(), rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY)
                .doing(|| format!("open {subdir} of the repository"))?;
            Ok(Tree::folder(root, Ignore::default(), hashes))
        })
        .await?;
        let mut output = Output::layers(Vec::new(), format!("git:{commit}"), 0);
        output.tree = Some(Arc::new(tree));
        Ok(Arc::new(output))
    }
}
