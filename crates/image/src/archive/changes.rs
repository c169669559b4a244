//! Dockerfile-style instructions that change an image's configuration, as import and commit take them.

use std::collections::BTreeSet;

use crate::error::{Error, Result};
use crate::model::{ContainerConfig, Healthcheck};

/// Applies the instructions in order.
pub fn apply_changes(config: &mut ContainerConfig, changes: &[String]) -> Result<()> {
    let mut cmd_set = false;
    for change in changes.iter().flat_map(|change| change.lines()).filter(|line| !line.trim().is_empty()) {
        apply(config, change.trim(), &mut cmd_set)?;
    }
    Ok(())
}

fn apply(config: &mut ContainerConfig, change: &str, cmd_set: &mut bool) -> Result<()> {
    let (instruction, rest) = change.split_once(char::is_whitespace).unwrap_or((change, ""));
    let instruction = instruction.to_ascii_uppercase();
    let rest = rest.trim();
    let bad = |problem: &str| Error::Invalid(format!("change {change:?}: {problem}"));
    if rest.is_empty()
        && matches!(instruction.as_str(), "ENV" | "EXPOSE" | "LABEL" | "USER" | "VOLUME" | "WORKDIR")
    {
        return Err(bad(&format!("{instruction} requires an argument")));
    }
    match instruction.as_str() {
        "CMD" => {
            config.cmd = command(config, rest);
            config.args_escaped = false;
            *cmd_set = true;
        }
        "ENTRYPOINT" => {
            config.entrypoint = command(config, rest);
            if !*cmd_set {
                config.cmd = None;
            }
        }
        "ENV" => {
            for (name, value) in pairs(rest, config).map_err(|problem| bad(&problem))? {
                set_env(config, &name, &value);
            }
        }
        "LABEL" => config.labels.extend(pairs(rest, config).map_err(|problem| bad(&problem))?),
        "EXPOSE" => {
            for word in words(rest, config).map_err(|problem| bad(&problem))? {
                config.exposed_ports.extend(ports(&word).ok_or_else(|| bad("not a port"))?);
            }
        }
        "USER" => config.user = expand(rest, config).map_err(|problem| bad(&problem))?,
        "VOLUME" => {
            let volumes = match array(rest) {
                Some(volumes) => volumes,
                None => words(rest, config).map_err(|problem| bad(&problem))?,
            };
            if volumes.iter().any(|volume| volume.trim().is_empty()) {
                return Err(bad("VOLUME specified can not be an empty string"));
            }
            config.volumes.extend(volumes);
        }
        "WORKDIR" => {
            let dir = expand(rest, config).map_err(|problem| bad(&problem))?;
            config.working_dir = join(&config.working_dir, &dir);
        }
        "STOPSIGNAL" => {
            let signal = expand(rest, config).map_err(|problem| bad(&problem))?;
            let named = signal.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-'));
            if signal.is_empty() || !named {
                return Err(bad("invalid signal"));
            }
            config.stop_signal = Some(signal);
        }
        "HEALTHCHECK" => config.healthcheck = Some(healthcheck(rest).map_err(|problem| bad(&problem))?),
        "ONBUILD" => {
            let trigger = rest.split_whitespace().next().unwrap_or_default().to_ascii_uppercase();
            if matches!(trigger.as_str(), "" | "ONBUILD" | "FROM" | "MAINTAINER") {
                return Err(bad(&format!("{trigger} isn't allowed as an ONBUILD trigger")));
            }
            config.on_build.get_or_insert_default().push(rest.to_owned());
        }
        _ => return Err(Error::Invalid(format!("{instruction} is not a valid change command"))),
    }
    Ok(())
}

/// A JSON array of strings, if it is one.
fn array(text: &str) -> Option<Vec<String>> {
    text.starts_with('[').then(|| serde_json::from_str(text).ok()).flatten()
}

/// The exec form, or the shell form wrapped in the image's shell.
fn command(config: &ContainerConfig, text: &str) -> Option<Vec<String>> {
    if let Some(words) = array(text) {
        return Some(words);
    }
    if text.is_empty() {
        return None;
    }
    let mut words = config.shell.clone().unwrap_or_else(|| vec!["/bin/sh".to_owned(), "-c".to_owned()]);
    words.push(text.to_owned());
    Some(words)
}

pub(super) fn set_env(config: &mut ContainerConfig, name: &str, value: &str) {
    let line = format!("{name}={value}");
    let env = config.env.get_or_insert_default();
    match env.iter_mut().find(|known| known.split('=').next() == Some(name)) {
        Some(known) => *known = line,
        None => env.push(line),
    }
}

fn env<'a>(config: &'a ContainerConfig, name: &str) -> Option<&'a str> {
    config
        .env
        .iter()
        .flatten()
        .find_map(|line| line.split_once('=').filter(|(n, _)| *n == name).map(|(_, v)| v))
}

/// `a=b "c d"=e`, or the old form `name the whole rest`.
fn pairs(text: &str, config: &ContainerConfig) -> Result<Vec<(String, String)>, String> {
    let first = text.split_whitespace().next().unwrap_or_default();
    if !first.contains('=') {
        let (name, value) = text.split_once(char::is_whitespace).ok_or("must have a name and a value")?;
        return Ok(vec![(name.to_owned(), expand(value.trim(), config)?)]);
    }
    words(text, config)?
        .into_iter()
        .map(|word| match word.split_once('=') {
            Some(("", _)) => Err("names can not be blank".to_owned()),
            Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
            None => Err(format!("can't find = in {word:?}")),
        })
        .collect()
}

/// One word, quotes and all, with variables filled in; blanks stay.
fn expand(text: &str, config: &ContainerConfig) -> Result<String, String> {
    Ok(lex(text, config, false)?.into_iter().next().unwrap_or_default())
}

/// Words separated by blanks, quotes and variables resolved.
fn words(text: &str, config: &ContainerConfig) -> Result<Vec<String>, String> {
    lex(text, config, true)
}

fn lex(text: &str, config: &ContainerConfig, split: bool) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    let mut word: Option<String> = None;
    let mut quote: Option<char> = None;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some('\''), '\'') => quote = None,
            (Some('\''), c) => word.get_or_insert_default().push(c),
            (Some('"'), '"') => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (_, '\\') => {
                let next = chars.next().unwrap_or('\\');
                let word = word.get_or_insert_default();
                if quote.is_some() && !matches!(next, '"' | '$' | '\\') {
                    word.push('\\');
                }
                word.push(next);
            }
            (_, '$') => {
                let value = variable(&mut chars, config)?;
                word.get_or_insert_default().push_str(&value);
            }
            (None, c) if split && c.is_whitespace() => found.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err("a quote is not closed".to_owned());
    }
    found.extend(word);
    Ok(found)
}

/// `$NAME`, `${NAME}`, `${NAME:-word}`, `${NAME:+word}`.
fn variable(
    chars: &mut std::iter::Peekable<std::str::Chars<'_>>,
    config: &ContainerConfig,
) -> Result<String, String> {
    let in_name = |c: &char| c.is_ascii_alphanumeric() || *c == '_';
    if chars.next_if_eq(&'{').is_none() {
        let mut name = String::new();
        while let Some(c) = chars.next_if(in_name) {
            name.push(c);
        }
        return Ok(if name.is_empty() {
            "$".to_owned()
        } else {
            env(config, &name).unwrap_or_default().to_owned()
        });
    }
    let mut inside = String::new();
    loop {
        match chars.next() {
            Some('}') => break,
            Some(c) => inside.push(c),
            None => return Err("a ${ is not closed".to_owned()),
        }
    }
    let end = inside.find(|c: char| !in_name(&c)).unwrap_or(inside.len());
    let (name, modifier) = inside.split_at(end);
    let value = env(config, name);
    match modifier.split_at_checked(2) {
        _ if name.is_empty() => Err(format!("${{{inside}}} names no variable")),
        _ if modifier.is_empty() => Ok(value.unwrap_or_default().to_owned()),
        Some((":-", other)) => Ok(value.filter(|value| !value.is_empty()).unwrap_or(other).to_owned()),
        Some((":+", other)) => {
            Ok(if value.is_some_and(|value| !value.is_empty()) { other.to_owned() } else { String::new() })
        }
        _ => Err(format!("unsupported modifier in ${{{inside}}}")),
    }
}

/// `80`, `80/udp`, `8000-8010/tcp`.
pub(super) fn ports(text: &str) -> Option<BTreeSet<String>> {
    let (range, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    if !matches!(protocol.as_str(), "tcp" | "udp" | "sctp") {
        return None;
    }
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
    if first > last {
        return None;
    }
    Some((first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

/// `path` from the directory `base`, made plain.
fn join(base: &str, path: &str) -> String {
    let whole = if path.starts_with('/') { path.to_owned() } else { format!("{base}/{path}") };
    let mut parts: Vec<&str> = Vec::new();
    for part in whole.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// `[--interval=DURATION …] CMD command` or `NONE`.
fn healthcheck(text: &str) -> Result<Healthcheck, String> {
    let mut check = Healthcheck::default();
    let mut rest = text;
    while let Some(flag) = rest.strip_prefix("--") {
        let (flag, after) = flag.split_once(char::is_whitespace).unwrap_or((flag, ""));
        rest = after.trim_start();
        let (name, value) = flag.split_once('=').ok_or_else(|| format!("--{flag} requires a value"))?;
        let field = match name {
            "interval" => &mut check.interval,
            "timeout" => &mut check.timeout,
            "start-period" => &mut check.start_period,
            "start-interval" => &mut check.start_interval,
            "retries" => {
                let retries = value.parse().ok().filter(|n: &i64| *n >= 0);
                check.retries = Some(retries.ok_or_else(|| format!("--retries={value} is not a count"))?);
                continue;
            }
            _ => return Err(format!("unknown flag --{name}")),
        };
        *field = Some(duration(value).ok_or_else(|| format!("--{name}={value} is not a duration"))?);
    }
    let (kind, rest) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let rest = rest.trim();
    check.test = Some(match kind.to_ascii_uppercase().as_str() {
        "NONE" if rest.is_empty() => vec!["NONE".to_owned()],
        "CMD" if !rest.is_empty() => match array(rest) {
            Some(words) => std::iter::once("CMD".to_owned()).chain(words).collect(),
            None => vec!["CMD-SHELL".to_owned(), rest.to_owned()],
        },
        "NONE" => return Err("HEALTHCHECK NONE takes no arguments".to_owned()),
        "CMD" => return Err("missing command after HEALTHCHECK CMD".to_owned()),
        other => return Err(format!("unknown type {other:?} in HEALTHCHECK (try CMD)")),
    });
    Ok(check)
}

/// Go's durations (`1m30s`, `500ms`) in nanoseconds.
fn duration(text: &str) -> Option<i64> {
    const UNITS: [(&str, f64); 7] =
        [("ns", 1.0), ("us", 1e3), ("µs", 1e3), ("ms", 1e6), ("s", 1e9), ("m", 60e9), ("h", 3600e9)];
    if text == "0" {
        return Some(0);
    }
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').filter(|at| *at > 0)?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let factor = UNITS.iter().find(|(name, _)| *name == &rest[..unit])?.1;
        total += number * factor;
        rest = &rest[unit..];
    }
    (!text.is_empty() && total < 9e18).then_some(total as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(changes: &[&str]) -> Result<ContainerConfig> {
        let mut config = ContainerConfig::default();
        let changes: Vec<String> = changes.iter().map(|&c| c.to_owned()).collect();
        apply_changes(&mut config, &changes)?;
        Ok(config)
    }

    #[test]
    fn instructions_change_what_they_name() {
        let config = changed(&[
            "CMD [\"sh\", \"-l\"]",
            "entrypoint /run.sh",
            "ENV A=1 B=\"two words\" C='$A'",
            "ENV PATH $A:/bin",
            "ENV A=${A}0 D=${NONE:-d} E=${A:+e}",
            "EXPOSE 80 53/udp 8000-8001",
            "LABEL a=b \"c d\"=e",
            "USER 1000:1000",
            "VOLUME [\"/data\"]",
            "VOLUME /x /y",
            "WORKDIR /srv",
            "WORKDIR app/../www",
            "STOPSIGNAL SIGINT",
            "HEALTHCHECK --interval=1m30s --retries=3 CMD curl -f http://localhost/",
            "ONBUILD RUN make",
        ])
        .unwrap();
        assert_eq!(config.cmd.unwrap(), ["sh", "-l"]);
        assert_eq!(config.entrypoint.unwrap(), ["/bin/sh", "-c", "/run.sh"]);
        assert_eq!(config.env.unwrap(), ["A=10", "B=two words", "C=$A", "PATH=1:/bin", "D=d", "E=e"]);
        assert_eq!(
            config.exposed_ports.into_iter().collect::<Vec<_>>(),
            ["53/udp", "80/tcp", "8000/tcp", "8001/tcp"]
        );
        assert_eq!(config.labels.get("c d").map(String::as_str), Some("e"));
        assert_eq!(config.volumes.into_iter().collect::<Vec<_>>(), ["/data", "/x", "/y"]);
        assert_eq!(config.working_dir, "/srv/www");
        let check = config.healthcheck.unwrap();
        assert_eq!((check.interval, check.retries), (Some(90_000_000_000), Some(3)));
        assert_eq!(check.test.unwrap(), ["CMD-SHELL", "curl -f http://localhost/"]);
        assert_eq!(config.on_build.unwrap(), ["RUN make"]);
    }

    #[test]
    fn an_entrypoint_resets_an_inherited_command() {
        let mut config = ContainerConfig { cmd: Some(vec!["old".to_owned()]), ..ContainerConfig::default() };
        apply_changes(&mut config, &["ENTRYPOINT [\"/e\"]".to_owned()]).unwrap();
        assert_eq!(config.cmd, None);
    }

    #[test]
    fn what_is_no_change_is_refused() {
        for bad in [
            "RUN make",
            "FROM x",
            "ENV",
            "ENV A",
            "EXPOSE x",
            "EXPOSE 9-8",
            "EXPOSE 80/foo",
            "LABEL =x",
            "HEALTHCHECK CMD",
            "HEALTHCHECK --interval=x CMD y",
            "ENV A=\"open",
            "ONBUILD FROM x",
            "STOPSIGNAL a b",
        ] {
            assert!(matches!(changed(&[bad]), Err(Error::Invalid(_))), "{bad}");
        }
        assert_eq!(changed(&["RUN x"]).unwrap_err().to_string(), "RUN is not a valid change command");
    }
}
