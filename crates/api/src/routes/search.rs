//! `GET /images/search`: looking for repositories in a registry.

use serde_json::{Value, json};

use super::{State, credentials};
use crate::http::filters::Filters;
use crate::http::{Error, Reply, Request, Router};

/// The most that is answered, and what is when nothing is asked for: docker's figures.
const MOST: usize = 100;
const DEFAULT: usize = 25;

/// Binds the area's routes.
pub fn bind(router: &mut Router<State>) {
    router.get("/images/search", search);
}

async fn search(state: State, request: Request) -> Result<Reply, Error> {
    let query = request.query();
    let given = query.text("term").filter(|term| !term.is_empty());
    let given = given.ok_or_else(|| Error::invalid("term is needed: what to look for"))?;
    let limit = match query.text("limit").filter(|limit| !limit.is_empty()) {
        None => DEFAULT,
        Some(limit) => match limit.parse::<i64>() {
            Ok(0) => DEFAULT,
            Ok(limit) if (1..=MOST as i64).contains(&limit) => usize::try_from(limit).unwrap_or(MOST),
            _ => return Err(Error::invalid(format!("limit {limit} is outside the range of [1, {MOST}]"))),
        },
    };
    let filters = Filters::parse(query.text("filters"))?.allow(&["stars", "is-official", "is-automated"])?;
    let (official, automated) = (filters.flag("is-official")?, filters.flag("is-automated")?);
    let mut stars = 0;
    for given in filters.get("stars") {
        let least: u64 =
            given.parse().map_err(|_error| Error::invalid(format!("invalid filter 'stars={given}'")))?;
        stars = stars.max(least);
    }
    let (domain, term) = split(given);
    let found = state.registry.search(domain, term, MOST, credentials::from_header(&request)).await?;
    let wanted = found.iter().filter(|found| {
        found.star_count >= stars
            && official.is_none_or(|official| official == found.is_official)
            && automated.is_none_or(|automated| automated == found.is_automated)
    });
    let results: Vec<Value> = wanted
        .take(limit)
        .map(|found| {
            json!({
                "name": found.name,
                "description": found.description,
                "star_count": found.star_count,
                "is_official": found.is_official,
                "is_automated": found.is_automated,
            })
        })
        .collect();
    Reply::json(&results)
}

/// The registry that a term names, and what to look for there.
fn split(term: &str) -> (&str, &str) {
    match term.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => match host {
            "docker.io" | "index.docker.io" => ("docker.io", rest),
            host => (host, rest),
        },
        _ => ("docker.io", term),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_may_name_its_registry() {
        assert_eq!(split("debian"), ("docker.io", "debian"));
        assert_eq!(split("team/app"), ("docker.io", "team/app"));
        assert_eq!(split("localhost:5000/app"), ("localhost:5000", "app"));
        assert_eq!(split("index.docker.io/app"), ("docker.io", "app"));
        assert_eq!(split("quay.io/"), ("quay.io", ""));
    }
}
