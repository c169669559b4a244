//! Endpoints of docker's API that are not built: each answers with a sentence, none is faked.
//!
//! Invariant: clients that probe for swarm or plugins get the answer of a docker engine that has none.

use super::State;
use crate::http::{Error, Reply, Request, Router};

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router.get("/plugins", no_plugins);
    for pattern in ["/plugins/{any:.*}", "/plugins"] {
        for method in [http::Method::GET, http::Method::POST, http::Method::DELETE] {
            router.route(method, pattern, plugins);
        }
    }
    router.post("/swarm/leave", not_in_swarm);
    for pattern in [
        "/swarm",
        "/swarm/{any:.*}",
        "/nodes",
        "/nodes/{any:.*}",
        "/services",
        "/services/{any:.*}",
        "/tasks",
        "/tasks/{any:.*}",
        "/secrets",
        "/secrets/{any:.*}",
        "/configs",
        "/configs/{any:.*}",
    ] {
        for method in [http::Method::GET, http::Method::POST, http::Method::DELETE] {
            router.route(method, pattern, swarm);
        }
    }
    router
        .post("/grpc", grpc)
        .get("/containers/{name}/checkpoints", checkpoints)
        .post("/containers/{name}/checkpoints", checkpoints)
        .delete("/containers/{name}/checkpoints/{checkpoint}", checkpoints);
}

async fn no_plugins(_state: State, _request: Request) -> Result<Reply, Error> {
    Reply::json::<[(); 0]>(&[])
}

async fn plugins(_state: State, _request: Request) -> Result<Reply, Error> {
    Err(Error::not_implemented("plugins are not supported by this engine"))
}

async fn not_in_swarm(_state: State, _request: Request) -> Result<Reply, Error> {
    Err(Error::unavailable("This node is not part of a swarm"))
}

async fn swarm(_state: State, request: Request) -> Result<Reply, Error> {
    if request.path() == "/swarm/init" || request.path() == "/swarm/join" {
        return Err(Error::not_implemented("swarm is not supported by this engine"));
    }
    Err(Error::unavailable(
        "This node is not a swarm manager. Use \"docker swarm init\" or \"docker swarm join\" to connect this node to swarm and try again.",
    ))
}

async fn grpc(_state: State, _request: Request) -> Result<Reply, Error> {
    Err(Error::not_implemented(
        "BuildKit's control interface, which buildx speaks, is not built yet: build without buildx, or with brig build",
    ))
}

async fn checkpoints(_state: State, _request: Request) -> Result<Reply, Error> {
    Err(Error::not_implemented("checkpoints are not built yet"))
}
