//! Results of `brig image append` and `mutate`: an image that is there already, handed out as `brig build` does.
//!
//! Invariant: where no image is asked for, it is removed again, unless it is somebody's.

use brigantine_session::Lending;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use tokio::sync::mpsc;

use crate::client::encode;
use crate::commands::build_lend;
use crate::commands::build_output::{Built, Outputs, discard};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::progress::{Progress, Sink};

/// Hands out what the image `id` is.
pub async fn deliver(context: &Context, outputs: &Outputs, id: &str) -> Outcome {
    let delivered = each(context, outputs, id).await;
    if outputs.keeps_image() {
        return delivered;
    }
    let discarded = discard(context, id).await;
    // The first failure is the one to tell.
    delivered.and(discarded)
}

async fn each(context: &Context, outputs: &Outputs, id: &str) -> Outcome {
    let (receiving, mut archives) = outputs.receive()?;
    let image = archives.remove("image");
    let sent = async {
        if let Some(place) = image {
            send_image(context, outputs, id, place).await?;
        }
        if archives.is_empty() {
            return Ok(());
        }
        // A build of nothing but the image sends its files.
        let ask = outputs.asked_for_files(context.client.post("/build").query("version", "1"));
        let lent = build_lend::lend(context, Lending { archives, ..Lending::default() }, None).await?;
        let ask = ask.maybe("session", lent.as_ref().map(|lent| lent.session.as_str()));
        let dockerfile =
            Full::new(Bytes::from(format!("FROM {id}\n"))).map_err(|never| match never {}).boxed();
        let lines = ask.stream(dockerfile, "application/x-tar").send().await?.into_lines();
        Progress::new(Sink::Nowhere).follow(lines, |_| {}).await
    };
    let sent = sent.await;
    let received = receiving.finish(sent.is_ok()).await;
    sent.and(received)?;
    let found = context.client.get(format!("/images/{}/json", encode(id))).send().await?.value().await?;
    outputs.deliver(context, &Built::of_image(id, &found)).await
}

/// The image's archive, by its names, so that they are in it.
async fn send_image(context: &Context, outputs: &Outputs, id: &str, place: mpsc::Sender<Bytes>) -> Outcome {
    let mut ask = context.client.get("/images/get");
    if outputs.tags().is_empty() {
        ask = ask.query("names", id);
    }
    for tag in outputs.tags() {
        ask = ask.query("names", tag);
    }
    let mut body = ask.send().await?.into_stream();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Fault::said(format!("the engine's answer broke off: {error}")))?;
        let data = frame.into_data().unwrap_or_default();
        if !data.is_empty() && place.send(data).await.is_err() {
            // Its own end says why.
            return Ok(());
        }
    }
    // An empty piece is its end.
    drop(place.send(Bytes::new()).await);
    Ok(())
}
