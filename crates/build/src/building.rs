//! One build from its request to its result: the Dockerfile is read and planned, the context taken in, the graph
//! solved, the image made.
//!
//! Invariant: when a build is over, however it ended, its own files are gone and nothing works for it alone.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use brigantine_image::{Lease, Reference};
use brigantine_session::Session;
use futures_util::future::try_join_all;
use tokio::sync::mpsc;

use crate::access::Access;
use crate::cache::{self, CachePlace, Imports};
use crate::convert::{Options, Plan};
use crate::definition::Definition;
use crate::dockerfile::{Fault, Warning};
use crate::error::{Context as _, Error, Result, invalid};
use crate::graph::{NamedContext, Op, VertexId};
use crate::history::{Recording, Steps};
use crate::pattern::Ignore;
use crate::product::Solved;
use crate::solver::{self, Job};
use crate::source::Source;
use crate::tree::Tree;
use crate::{
    Builder, Built, Checked, ContextSource, Event, Remark, Request, Side, convert, dockerfile, epoch, ids,
    received, records, resolve, snapshot,
};

/// A build that can begin.
struct Prepared {
    request: Request,
    lease: Lease,
    scratch: Arc<Scratch>,
    main: Option<Tree>,
    /// The Dockerfile and its name.
    text: String,
    name: String,
    plan: Arc<Plan>,
    resolver: resolve::Images,
    access: Access,
    imports: Arc<Imports>,
    ignore: Ignore,
    /// Where the context is to be asked for.
    sent_for: Option<Arc<Session>>,
    /// Contexts with names that the client's session lent.
    named: Vec<(String, Tree)>,
    /// Kept contexts, which nobody else may change meanwhile.
    taken: Vec<Arc<received::Taken>>,
}

fn refused(warnings: &[Warning]) -> Error {
    let mut rules: Vec<&str> = warnings.iter().map(|warning| warning.rule.name()).collect();
    rules.sort_unstable();
    rules.dedup();
    invalid(format!(
        "the Dockerfile's build checks ({}) are set to fail the build: see brig build --check",
        rules.join(", ")
    ))
}

impl Builder {
    /// Builds. Dropping the future cancels the build: what only it was waiting for is ended and cleaned away.
    pub async fn build(&self, request: Request, events: mpsc::Sender<Event>) -> Result<Built> {
        let tags = request.tags.iter().map(Reference::familiar).collect();
        let target = request.options.target.clone().unwrap_or_default();
        let mut recording = Recording::new(Arc::clone(&self.solver), &ids::new(), tags, target);
        let result = Box::pin(self.run(request, &events, recording.steps())).await;
        recording.ended(&result);
        result
    }

    async fn run(&self, request: Request, events: &mpsc::Sender<Event>, steps: Arc<Steps>) -> Result<Built> {
        let started = records::now();
        let remote = match &request.context {
            ContextSource::Remote(url) => Some(url.clone()),
            _ => None,
        };
        let prepared = self.prepare(request, events).await?;
        if prepared.plan.refused {
            return Err(refused(&prepared.plan.warnings));
        }
        send(events, Event::Planned(Arc::clone(&prepared.plan))).await;
        let Prepared {
            mut request,
            lease,
            scratch,
            main,
            plan,
            resolver,
            access,
            imports,
            named,
            taken,
            text,
            name,
            ..
        } = self.receive(prepared, events).await?;
        request.options.export.inline_cache |=
            request.cache_to.iter().any(|to| to.place == CachePlace::Inline)
                || wants_inline(&request.options);
        let solver = Arc::clone(&self.solver);
        let mut contexts: HashMap<String, Arc<Tree>> = HashMap::new();
        contexts.extend(main.map(|tree| (String::new(), Arc::new(tree))));
        contexts.extend(named.into_iter().map(|(name, tree)| (name, Arc::new(tree))));
        let epoch = epoch::given(&request.options)?;
        let namespace = match request.options.build_args.get("BUILDKIT_CACHE_MOUNT_NS") {
            Some(Some(namespace)) => namespace.clone(),
            _ => String::new(),
        };
        let targets: Vec<VertexId> =
            std::iter::once(plan.target).chain(plan.others.iter().map(|other| other.target)).collect();
        // A build without a context has none to tell of.
        let context_there = contexts.contains_key("");
        let scans: Vec<VertexId> =
            plan.all_scans().filter(|scan| context_there || !takes_context(&plan, *scan)).collect();
        let job = Job::new(
            solver,
            Files { scratch: Arc::clone(&scratch), _contexts: taken },
            Arc::new(plan.graph.clone()),
            contexts,
            request.secrets,
            lease.clone(),
            events.clone(),
            epoch,
            namespace,
            steps,
            request.session.clone(),
            imports,
            [&targets[..], &scans].concat(),
        );
        // However this ends, no work is kept alive by the job's own memory of it.
        let stop = Stop(Arc::clone(&job));
        try_join_all(targets.iter().chain(&scans).map(|target| job.result(*target))).await?;
        let mut results: BTreeMap<VertexId, Arc<solver::Output>> = BTreeMap::new();
        let caches = targets.iter().copied().filter(|_| request.options.export.inline_cache);
        let of_caches: Vec<VertexId> =
            caches.flat_map(|target| cache::of_image(&plan.graph, target)).collect();
        let mut definitions = BTreeMap::new();
        for vertex in of_caches {
            results.insert(vertex, job.result(vertex).await?);
            definitions.insert(vertex, job.definition_key(vertex).await?);
        }
        let histories = plan.others.iter().flat_map(|other| &other.history).chain(&plan.history);
        for vertex in histories.filter_map(|item| item.vertex).chain(targets.iter().chain(&scans).copied()) {
            results.insert(vertex, job.result(vertex).await?);
        }
        let mut materials = resolver.materials();
        if request.options.export.provenance.is_some() {
            materials.extend(job.materials().await?);
        }
        send(events, Event::Exporting).await;
        let mut bases = resolver.layers();
        bases.extend(job.imports().blobs());
        let (planned, blobs, held) = (Arc::clone(&plan), bases.clone(), lease.clone());
        let solved = Solved {
            solver: Arc::clone(&self.solver),
            id: scratch.id.clone(),
            lease,
            plan,
            results,
            definitions,
            bases,
            epoch,
            tags: request.tags,
            options: request.options,
            dockerfile: (name, text),
            materials,
            started,
            ended: records::now(),
            remote,
        };
        let result = Arc::new(solved).product(request.product, request.session, events).await;
        if result.is_ok() {
            let exporter = cache::Exporter {
                solver: Arc::clone(&self.solver),
                access: &access,
                lease: held,
                graph: &planned.graph,
                targets: &targets,
                blobs,
                events,
            };
            for to in &request.cache_to {
                exporter.write(to, |vertex| job.at_hand(vertex)).await?;
            }
        }
        drop(stop);
        drop(job);
        drop(scratch);
        result
    }

    /// Takes in what the plan uses of the contexts that are to be sent for.
    async fn receive(&self, mut prepared: Prepared, events: &mpsc::Sender<Event>) -> Result<Prepared> {
        let main = prepared.sent_for.take().map(|_session| received::Lent::MAIN);
        let contexts = &prepared.request.options.contexts;
        let named = contexts.iter().filter_map(|(name, kind)| match kind {
            NamedContext::Local(folder) => Some(received::Lent { name, folder }),
            _ => None,
        });
        let lent: Vec<received::Lent<'_>> = main.into_iter().chain(named).collect();
        let Some(first) = lent.first() else { return Ok(prepared) };
        let Some(session) = &prepared.request.session else {
            let what = format!("the context {} is a folder of the client's, which lends none", first.name);
            return Err(invalid(what));
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&prepared.scratch.dir)
            .doing(|| format!("create {}", prepared.scratch.dir.display()))?;
        let receiving = received::Receiving {
            session,
            contexts: &self.solver.contexts,
            plan: &prepared.plan,
            hashes: &self.solver.hashes,
            events,
            scratch: &prepared.scratch,
        };
        let ignore = &prepared.ignore;
        let all = lent.iter().map(|one| receiving.context(*one, one.name.is_empty().then_some(ignore)));
        let received = try_join_all(all).await?;
        let names: Vec<String> = lent.iter().map(|one| one.name.to_owned()).collect();
        for (name, received) in names.into_iter().zip(received) {
            let Some((tree, taken)) = received else { continue };
            prepared.taken.push(taken);
            match name.as_str() {
                "" => prepared.main = Some(tree),
                _ => prepared.named.push((name, tree)),
            }
        }
        Ok(prepared)
    }

    /// What the build checks have to say of a Dockerfile; nothing is run. Base images are pulled if they must be, for
    /// some checks need their configuration.
    pub async fn check(&self, request: Request, events: mpsc::Sender<Event>) -> Result<Checked> {
        let prepared = self.prepare(request, &events).await?;
        let remark = |warning: &Warning| Remark {
            rule: warning.rule,
            message: warning.message.clone(),
            line: warning.span.first,
            excerpt: Fault::new(warning.span, &*warning.message).excerpt(&prepared.name, &prepared.text),
        };
        Ok(Checked {
            warnings: prepared.plan.warnings.iter().map(remark).collect(),
            refused: prepared.plan.refused,
        })
    }

    /// Everything up to the plan.
    async fn prepare(&self, mut request: Request, events: &mpsc::Sender<Event>) -> Result<Prepared> {
        let lease = self.solver.store.lease().doing(|| "begin a build".to_owned())?;
        let Definition { source, sent_for, scratch } = self.definition(&mut request, events).await?;
        let Source { tree: main, ignore, text, name, taken, time } = source;
        let file = dockerfile::parse(&text).map_err(|fault| Error::fault(fault, &name, &text))?;
        self.settle_epoch(&mut request, &file, time, &scratch.id).await?;
        let access = Access::new(
            request.registry.clone(),
            std::mem::take(&mut request.credentials),
            request.session.clone(),
        );
        let store = &self.solver.store;
        let resolver =
            resolve::Images::new(store.clone(), access.clone(), request.pull, lease.clone(), events.clone());
        let plan = convert::convert_all(&file, &name, &text, &request.options, &ignore, &resolver);
        let imports = Imports::load(&request.cache_from, &access, store, &lease, events);
        let (plan, imports) = tokio::join!(plan, imports);
        let plan = plan?;
        let plan = Arc::new(plan);
        Ok(Prepared {
            request,
            lease,
            scratch,
            main,
            text,
            name,
            plan,
            resolver,
            access,
            imports,
            ignore,
            sent_for,
            named: Vec::new(),
            taken: taken.into_iter().collect(),
        })
    }
}

/// Sends an event to whoever watches, if anybody does.
pub(crate) async fn send(events: &mpsc::Sender<Event>, event: Event) {
    if events.send(event).await.is_err() {
        tracing::trace!("a build's event had no reader");
    }
}

/// Does work beside the graph, telling when it begins and how it ends.
pub(crate) async fn beside<T>(
    events: &mpsc::Sender<Event>,
    name: &str,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let tell = |news| send(events, Event::Side { name: name.to_owned(), news });
    tell(Side::Began).await;
    let result = work.await;
    tell(Side::Ended(result.as_ref().err().map(Error::report))).await;
    result
}

/// What a build has on disk. A step that others wait for may look at it after the build has ended.
pub(crate) struct Files {
    pub scratch: Arc<Scratch>,
    /// Nobody else may change them meanwhile.
    pub _contexts: Vec<Arc<received::Taken>>,
}

/// A build's own files, gone when it ends.
pub(crate) struct Scratch {
    pub dir: PathBuf,
    pub id: String,
    pub tmp: PathBuf,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        snapshot::remove_tree(&self.dir);
        let Ok(entries) = fs::read_dir(&self.tmp) else { return };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(&self.id) {
                let path = entry.path();
                if path.is_dir() {
                    snapshot::remove_tree(&path);
                } else if let Err(error) = fs::remove_file(&path) {
                    tracing::warn!(path = %path.display(), %error, "remove a build's file");
                }
            }
        }
    }
}

struct Stop(Arc<Job>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.stop();
        self.0.solver.mounts.forget();
    }
}

/// Whether a step takes files of the main context.
fn takes_context(plan: &Plan, step: VertexId) -> bool {
    let inputs = &plan.graph.get(step).inputs;
    inputs.iter().any(|input| matches!(&plan.graph.get(*input).op, Op::Context { name } if name.is_empty()))
}

/// Whether the build argument of that name asks for an inline cache, as BuildKit's frontend reads it.
fn wants_inline(options: &Options) -> bool {
    matches!(options.build_args.get("BUILDKIT_INLINE_CACHE"), Some(Some(text)) if matches!(&**text, "1" | "true" | "t" | "T" | "TRUE" | "True"))
}
