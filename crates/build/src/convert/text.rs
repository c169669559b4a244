//! The words of history and configuration: quoted commands, durations, ports, signals.

use super::state::State;
use crate::dockerfile::Form;
use crate::dockerfile::instruction::Healthcheck;

pub(super) fn command_words(form: &Form, state: &State) -> Vec<String> {
    match form {
        Form::Exec(words) => words.clone(),
        Form::Shell(text) if text.is_empty() => Vec::new(),
        Form::Shell(text) => {
            let mut words = state.shell();
            words.push(text.clone());
            words
        }
    }
}

/// `["a" "b"]`, as history has it.
pub(super) fn quoted(words: &[String]) -> String {
    let words: Vec<String> =
        words.iter().map(|word| serde_json::to_string(word).unwrap_or_default()).collect();
    format!("[{}]", words.join(" "))
}

pub(super) fn health_text(check: &Healthcheck) -> String {
    let duration = |nanos: Option<i64>| go_duration(nanos.unwrap_or_default());
    format!(
        "&{{{} {:?} {:?} {:?} {:?} {}}}",
        quoted(&check.test),
        duration(check.interval),
        duration(check.timeout),
        duration(check.start_period),
        duration(check.start_interval),
        check.retries.map_or_else(|| "'\\x00'".to_owned(), |retries| format!("'\\x{retries:02x}'")),
    )
}

/// `1m30s`.
pub(super) fn go_duration(nanos: i64) -> String {
    if nanos == 0 {
        return "0s".to_owned();
    }
    let seconds = nanos as f64 / 1e9;
    if seconds < 1.0 {
        return format!("{}ms", nanos as f64 / 1e6);
    }
    let (hours, minutes) = (nanos / 3_600_000_000_000, nanos / 60_000_000_000 % 60);
    let rest = seconds - (nanos / 60_000_000_000 * 60) as f64;
    match (hours, minutes) {
        (0, 0) => format!("{rest}s"),
        (0, minutes) => format!("{minutes}m{rest}s"),
        (hours, minutes) => format!("{hours}h{minutes}m{rest}s"),
    }
}

/// `80`, `80/udp`, `8000-8010/tcp`; of `ADDRESS:HOST:CONTAINER` only what is in the container counts.
pub(super) fn ports(text: &str) -> Option<Vec<String>> {
    let (range, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let range = range.rsplit(':').next().unwrap_or(range);
    let protocol = protocol.to_ascii_lowercase();
    if !matches!(protocol.as_str(), "tcp" | "udp" | "sctp") {
        return None;
    }
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last).then(|| (first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

/// A signal by number or name, with or without SIG.
pub(super) fn is_signal(text: &str) -> bool {
    const NAMES: &[&str] = &[
        "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL",
        "PIPE", "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP",
        "TTIN", "TTOU", "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ",
    ];
    if let Ok(number) = text.parse::<u32>() {
        return (1..=64).contains(&number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    NAMES.contains(&name)
        || name
            .strip_prefix("RTMIN+")
            .or_else(|| name.strip_prefix("RTMAX-"))
            .is_some_and(|number| number.parse::<u32>().is_ok_and(|number| number <= 15))
        || matches!(name, "RTMIN" | "RTMAX")
}
