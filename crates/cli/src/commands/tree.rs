//! Which command stands under which name. Docker's names, all of them: those not built yet say so.

use super::{
    append, attach, bootstrap, build, builder, builder_cache, check, commit, completion, copy, cp, create,
    daemon, diff, doctor, events, exec, explore, export, history, images, import, info, inspect, kill, load,
    login, logs, manifest, network, pause, port, prune, ps, pull, push, registry, rename, restart, rm, rmi,
    run, save, sbom, search, socket, start, stats, stop, system, tag, top, update, version, volume, wait,
};
use crate::args::{Entry, Group, named, verb};
use Entry::Absent;

pub static ROOT: Group = Group {
    name: "brig",
    about: "",
    entries: &[
        verb(&attach::COMMAND),
        verb(&build::COMMAND),
        verb(&completion::COMMAND),
        verb(&create::COMMAND),
        verb(&daemon::COMMAND),
        verb(&doctor::COMMAND),
        verb(&events::COMMAND),
        verb(&exec::COMMAND),
        verb(&history::COMMAND),
        verb(&images::COMMAND),
        verb(&import::COMMAND),
        verb(&info::COMMAND),
        verb(&inspect::ANY),
        verb(&kill::COMMAND),
        verb(&load::COMMAND),
        verb(&login::LOGIN),
        verb(&login::LOGOUT),
        verb(&logs::COMMAND),
        verb(&pause::PAUSE),
        verb(&pause::UNPAUSE),
        verb(&port::COMMAND),
        verb(&ps::COMMAND),
        verb(&pull::COMMAND),
        verb(&push::COMMAND),
        verb(&rename::COMMAND),
        verb(&restart::COMMAND),
        named("rm", &["remove"], &rm::COMMAND),
        verb(&rmi::COMMAND),
        verb(&run::COMMAND),
        verb(&save::COMMAND),
        verb(&sbom::COMMAND),
        verb(&search::COMMAND),
        verb(&start::COMMAND),
        verb(&stats::COMMAND),
        verb(&stop::COMMAND),
        verb(&tag::COMMAND),
        verb(&top::COMMAND),
        verb(&update::COMMAND),
        verb(&version::COMMAND),
        verb(&wait::COMMAND),
        Entry::Group(&CONTAINER),
        Entry::Group(&IMAGE),
        Entry::Group(&MANIFEST),
        Entry::Group(&NETWORK),
        Entry::Group(&REGISTRY),
        Entry::Group(&SOCKET),
        Entry::Group(&SYSTEM),
        Entry::Group(&VOLUME),
        Entry::Group(&BUILDER),
        Absent("buildx", "building with BuildKit"),
        Absent("checkpoint", "checkpoints of containers"),
        verb(&commit::COMMAND),
        Absent("compose", "running applications of many containers"),
        Absent("config", "Swarm configurations"),
        Absent("context", "contexts"),
        verb(&cp::COMMAND),
        verb(&diff::COMMAND),
        verb(&export::COMMAND),
        Absent("node", "Swarm nodes"),
        Absent("plugin", "plugins"),
        Absent("secret", "Swarm secrets"),
        Absent("service", "Swarm services"),
        Absent("stack", "Swarm stacks"),
        Absent("swarm", "Swarm"),
        Absent("trust", "signing images"),
    ],
};

static CONTAINER: Group = Group {
    name: "container",
    about: "Manage containers",
    entries: &[
        verb(&attach::COMMAND),
        verb(&create::COMMAND),
        verb(&exec::COMMAND),
        verb(&inspect::CONTAINER),
        verb(&kill::COMMAND),
        verb(&logs::COMMAND),
        named("ls", &["list", "ps"], &ps::COMMAND),
        verb(&pause::PAUSE),
        verb(&port::COMMAND),
        verb(&prune::CONTAINER),
        verb(&rename::COMMAND),
        verb(&restart::COMMAND),
        named("rm", &["remove"], &rm::COMMAND),
        verb(&run::COMMAND),
        verb(&start::COMMAND),
        verb(&stats::COMMAND),
        verb(&stop::COMMAND),
        verb(&top::COMMAND),
        verb(&pause::UNPAUSE),
        verb(&update::COMMAND),
        verb(&wait::COMMAND),
        verb(&commit::COMMAND),
        verb(&cp::COMMAND),
        verb(&diff::COMMAND),
        verb(&export::COMMAND),
    ],
};

static IMAGE: Group = Group {
    name: "image",
    about: "Manage images",
    entries: &[
        verb(&append::APPEND),
        verb(&bootstrap::COMMAND),
        verb(&copy::COMMAND),
        verb(&history::COMMAND),
        verb(&import::COMMAND),
        verb(&inspect::IMAGE),
        verb(&load::COMMAND),
        verb(&append::MUTATE),
        named("ls", &["list"], &images::COMMAND),
        verb(&prune::IMAGE),
        verb(&pull::COMMAND),
        verb(&push::COMMAND),
        named("rm", &["remove"], &rmi::COMMAND),
        verb(&save::COMMAND),
        verb(&tag::COMMAND),
        verb(&explore::EXPLORE),
        verb(&explore::DIFF),
        verb(&explore::TREE),
    ],
};

static BUILDER: Group = Group {
    name: "builder",
    about: "Manage builds",
    entries: &[
        verb(&build::COMMAND),
        Entry::Group(&builder_cache::CACHE),
        verb(&builder::DU),
        verb(&builder::EXPLAIN),
        verb(&builder::HISTORY),
        verb(&prune::BUILDER),
    ],
};

static NETWORK: Group = Group {
    name: "network",
    about: "Manage networks",
    entries: &[
        verb(&network::CONNECT),
        verb(&network::CREATE),
        verb(&network::DISCONNECT),
        verb(&inspect::NETWORK),
        named("ls", &["list"], &network::LIST),
        verb(&prune::NETWORK),
        named("rm", &["remove"], &network::REMOVE),
    ],
};

static REGISTRY: Group = Group {
    name: "registry",
    about: "Run a registry",
    entries: &[verb(&registry::COLLECT), verb(&registry::SERVE)],
};

static MANIFEST: Group = Group {
    name: "manifest",
    about: "Manage manifests and lists of them in registries",
    entries: &[
        verb(&manifest::ANNOTATE),
        verb(&manifest::CREATE),
        verb(&manifest::INSPECT),
        verb(&manifest::PUSH),
        named("rm", &[], &manifest::REMOVE),
    ],
};

static VOLUME: Group = Group {
    name: "volume",
    about: "Manage volumes",
    entries: &[
        verb(&volume::CREATE),
        verb(&inspect::VOLUME),
        named("ls", &["list"], &volume::LIST),
        verb(&prune::VOLUME),
        named("rm", &["remove"], &volume::REMOVE),
        Absent("update", "updating cluster volumes"),
    ],
};

static SOCKET: Group = Group {
    name: "socket",
    about: "Manage sockets that let their users at one project only",
    entries: &[
        verb(&socket::CREATE),
        named("ls", &["list"], &socket::LIST),
        named("rm", &["remove"], &socket::REMOVE),
    ],
};

static SYSTEM: Group = Group {
    name: "system",
    about: "Manage the engine as a whole",
    entries: &[
        verb(&check::COMMAND),
        verb(&system::DF),
        verb(&events::COMMAND),
        verb(&info::COMMAND),
        verb(&prune::SYSTEM),
        Absent("dial-stdio", "carrying the API over standard input and output"),
    ],
};
