//! `POST /session`: a client's connection on which the engine asks, and the client answers.

use brigantine_session::{Introduction, Sessions};

use super::State;
use crate::http::{Error, Reply, Request, Router, StreamType};

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router.post("/session", open);
}

async fn open(state: State, request: Request) -> Result<Reply, Error> {
    match request.upgrade() {
        Some(protocol) if protocol.eq_ignore_ascii_case("h2c") => {}
        Some(other) => {
            return Err(Error::invalid(format!(
                "a session speaks h2c: an upgrade to {other} cannot be made"
            )));
        }
        None => {
            return Err(Error::invalid(
                "a session takes over its connection: send Connection: Upgrade and Upgrade: h2c",
            ));
        }
    }
    let text = |name| request.header(name).unwrap_or_default().to_owned();
    let introduction = Introduction {
        id: text("x-docker-expose-session-uuid"),
        shared_key: text("x-docker-expose-session-sharedkey"),
        methods: request.headers("x-docker-expose-session-grpc-method").map(str::to_owned).collect(),
    };
    let seat = state.sessions.admit(introduction)?;
    Ok(Reply::hijack(&request, StreamType::Raw, move |stream| seat.run(stream)))
}

/// The session a request names, if it names one. The client has answered once: docker's waits for ever when its build
/// is refused before its session has begun.
pub async fn named(
    sessions: &Sessions,
    id: Option<&str>,
) -> Result<Option<std::sync::Arc<brigantine_session::Session>>, Error> {
    match id {
        None => Ok(None),
        Some(id) => {
            let session = sessions.get(id).await?;
            session.answers().await?;
            Ok(Some(session))
        }
    }
}

impl From<brigantine_session::Error> for Error {
    fn from(error: brigantine_session::Error) -> Self {
        use brigantine_session::Error as Session;
        let message = error.to_string();
        match error {
            Session::Unknown(_) => Self::not_found(message),
            Session::Taken(_) => Self::conflict(message),
            Session::TooMany(_) => Self::unavailable(message),
            _ => Self::invalid(message),
        }
    }
}
