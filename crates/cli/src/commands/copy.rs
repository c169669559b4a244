//! `brig image copy`: images between registries, layouts and archives, without an engine.

use std::sync::{Arc, Mutex, PoisonError};

use brigantine_registry::copy::{CopyOptions, Location};
use brigantine_registry::{Credentials, Progress, Report};

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::output;
use crate::progress::{self, Bars};
use crate::registries;

pub static COMMAND: Command = Command {
    name: "copy",
    usage: "[OPTIONS] SOURCE TARGET",
    about: "Copy an image between registries (docker://NAME), oci:, oci-archive:, docker-archive: and dir:",
    flags: &[
        Flag::text("certs-dir", "Directory of hosts' certificates and hosts.toml, before the system's"),
        Flag::text("dest-creds", "user:password at the target, instead of what login keeps"),
        Flag::list("insecure-registry", "Host that may be reached without TLS"),
        Flag::text("platform", "Copy only the image of this platform; all of them otherwise"),
        Flag::switch("quiet", "Print the digest only").short('q'),
        Flag::switch("referrers", "Copy what refers to the image as well (signatures, bills of materials)"),
        Flag::text("src-creds", "user:password at the source, instead of what login keeps"),
    ],
    operands: Operands::Exactly(2),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let parse = |index| matches.operand(index).parse::<Location>().map_err(registries::fault);
    let (from, to) = (parse(0)?, parse(1)?);
    let platform = match matches.optional("platform") {
        None => None,
        Some(text) => Some(text.parse().map_err(|error: brigantine_image::PlatformError| {
            matches.invalid("platform", text, &error.to_string())
        })?),
    };
    let options = CopyOptions {
        platform,
        referrers: matches.is("referrers"),
        from: credentials(context, &matches, "src-creds", &from)?,
        to: credentials(context, &matches, "dest-creds", &to)?,
    };
    let quiet = matches.is("quiet");
    let client = registries::client(matches.owned_list("insecure-registry"), matches.optional("certs-dir"));
    let bars =
        Arc::new(Mutex::new(Bars::new(if quiet { progress::Sink::Nowhere } else { progress::Sink::Stdout })));
    let report: Report = Arc::new(move |step: Progress| {
        let mut bars = bars.lock().unwrap_or_else(PoisonError::into_inner);
        bars.show(step.id.as_deref().unwrap_or_default(), &step.status, step.amount);
    });
    // In tasks of its own: this thread shows what happens.
    let copied = client.copy(&from, &to, options, report).await.map_err(registries::fault)?;
    if quiet {
        output::line(copied.digest.as_str());
    }
    Ok(())
}

fn credentials(
    context: &Context,
    matches: &Matches,
    flag: &str,
    location: &Location,
) -> Outcome<Option<Credentials>> {
    let Location::Registry(reference) = location else {
        if matches.given(flag) {
            return Err(Fault::said(format!("--{flag}: {location} is no registry")));
        }
        return Ok(None);
    };
    match matches.optional(flag) {
        None => registries::credentials(context, reference),
        Some(given) => {
            let (username, password) =
                given.split_once(':').ok_or_else(|| Fault::said(format!("--{flag} is not user:password")))?;
            Ok(Some(Credentials::Password { username: username.to_owned(), password: password.to_owned() }))
        }
    }
}
