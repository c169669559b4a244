//! What an image holds, as an SPDX document: a route of ours.

use brigantine_image::{Lower, Reference, open_union};
use brigantine_sbom::Subject;

use super::State;
use crate::http::{Error, Reply, Request, Router};

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router.get("/images/{name:.*}/sbom", sbom);
}

async fn sbom(state: State, request: Request) -> Result<Reply, Error> {
    let name = request.param("name").to_owned();
    let read = move |store: &brigantine_image::Store| {
        let image = store.resolve(&name)?;
        store.ensure_unpacked(&image)?;
        // Held as long as it is read.
        let lease = store.lease()?;
        for diff_id in &image.config.rootfs.diff_ids {
            lease.hold(diff_id)?;
        }
        let files = store.layer_files(&image)?;
        let lowers =
            files.iter().map(brigantine_image::LayerFiles::open).collect::<Result<Vec<Lower>, _>>()?;
        let root = open_union(&lowers)?;
        let found = brigantine_sbom::scan(&root).map_err(|error| {
            brigantine_image::Error::Invalid(format!("look through {name} for packages: {error}"))
        })?;
        let known = image.tags.first().or(image.digests.first());
        let created = image.created.as_deref().and_then(|text| text.parse::<jiff::Timestamp>().ok());
        let subject = Subject {
            name: known.map_or_else(|| image.id.to_string(), Reference::familiar),
            purl: known
                .map(|name| brigantine_build::package_url(name, &image.config.platform()))
                .unwrap_or_default(),
            // The image's own time, so that the same image has the same document.
            created: jiff::Timestamp::from_second(created.map_or(0, jiff::Timestamp::as_second))
                .unwrap_or_default()
                .to_string(),
            tool: format!("brigantine-{}", env!("CARGO_PKG_VERSION")),
        };
        Ok(brigantine_sbom::spdx(&subject, &found))
    };
    Reply::json(&state.engine.images().with(read).await?)
}
