//! What becomes of a graph that is solved: an image of the store, files for the client, or both.
//!
//! Invariant: where no image is asked for there is none, at no time.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use brigantine_image::{Descriptor, Lease, Reference};
use brigantine_session::Session;
use tokio::sync::mpsc;

use crate::attest::{Known, Material};
use crate::building::{beside, send};
use crate::convert::{Options, Plan};
use crate::error::{Result, invalid};
use crate::export::Exporting;
use crate::graph::VertexId;
use crate::solver::{Output, Solver, blocking};
use crate::wanted::Provenance;
use crate::{Built, Event, Product, Side, deliver};

/// What making the image is called.
const EXPORTING: &str = "exporting to image";

/// A build whose steps are done.
pub(crate) struct Solved {
    pub solver: Arc<Solver>,
    pub id: String,
    pub lease: Lease,
    pub plan: Arc<Plan>,
    /// Results of all vertices that an image or its history needs.
    pub results: BTreeMap<VertexId, Arc<Output>>,
    /// The keys of the steps' definitions that an inline cache lists.
    pub definitions: BTreeMap<VertexId, String>,
    /// The blobs of base images' layers, by diff id.
    pub bases: HashMap<String, Descriptor>,
    pub epoch: Option<i64>,
    pub tags: Vec<Reference>,
    pub options: Options,
    /// Name and text.
    pub dockerfile: (String, String),
    pub materials: Vec<Material>,
    /// Nanoseconds since the epoch.
    pub started: i64,
    pub ended: i64,
    /// A repository or archive that was the context.
    pub remote: Option<String>,
}

impl Solved {
    fn known(&self) -> Known<'_> {
        Known {
            id: &self.id,
            options: &self.options,
            graph: &self.plan.graph,
            dockerfile: (&self.dockerfile.0, &self.dockerfile.1),
            materials: &self.materials,
            started: self.started,
            ended: self.ended,
            remote: self.remote.as_deref(),
        }
    }

    pub fn exporting(&self) -> Exporting<'_> {
        Exporting {
            solver: &self.solver,
            lease: &self.lease,
            plan: &self.plan,
            results: &self.results,
            definitions: &self.definitions,
            bases: &self.bases,
            epoch: self.epoch,
            tags: self.tags.clone(),
            wanted: &self.options.export,
            known: self.known(),
        }
    }

    /// Makes what is asked for.
    pub async fn product(
        self: Arc<Self>,
        product: Product,
        session: Option<Arc<Session>>,
        events: &mpsc::Sender<Event>,
    ) -> Result<Built> {
        let mode = self.options.export.provenance.unwrap_or(Provenance::Min);
        let mut built = Built {
            image: None,
            replaced: Vec::new(),
            id: self.id.clone(),
            provenance: self.known().provenance(mode).predicate,
        };
        if matches!(product, Product::Image | Product::Archive { image: true, .. }) {
            self.image(&mut built, events).await?;
        }
        if let Product::Files | Product::Archive { .. } = product {
            let session = session.ok_or_else(|| invalid("files can be sent to a client's session only"))?;
            let side = if product == Product::Files { "exporting to client" } else { "sending tarball" };
            let runtime = tokio::runtime::Handle::current();
            let solved = Arc::clone(&self);
            let sending = blocking(move || match product {
                Product::Archive { name, .. } => deliver::archive(&solved, &session, &runtime, name),
                _ => deliver::files(&solved, &session, &runtime),
            });
            beside(events, side, sending).await?;
        }
        Ok(built)
    }

    async fn image(self: &Arc<Self>, built: &mut Built, events: &mpsc::Sender<Event>) -> Result<()> {
        beside(events, EXPORTING, async {
            let solved = Arc::clone(self);
            let (image, replaced) = blocking(move || solved.exporting().run()).await?;
            let id = format!("writing image {}", image.id);
            let named = self.tags.iter().map(|name| format!("naming to {}", name.familiar()));
            for what in std::iter::once(id).chain(named) {
                let news = Side::Count { what, current: 0, total: None, done: true };
                send(events, Event::Side { name: EXPORTING.to_owned(), news }).await;
            }
            (built.image, built.replaced) = (Some(image), replaced);
            Ok(())
        })
        .await
    }
}
