//! Sizes, durations and times, in the words docker's users know: `1.99MB`, `About an hour ago`, `1m30s`.

use std::sync::OnceLock;

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

const DECIMAL: [&str; 9] = ["B", "kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB"];
const BINARY: [&str; 9] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB"];

/// Powers of 1000 with up to `digits` significant digits.
pub fn human_size(bytes: f64, digits: usize) -> String {
    scaled(bytes, 1000.0, &DECIMAL, digits)
}

/// Powers of 1024 with up to four significant digits.
pub fn binary_size(bytes: f64) -> String {
    scaled(bytes, 1024.0, &BINARY, 4)
}

fn scaled(mut size: f64, base: f64, units: &[&str], digits: usize) -> String {
    let mut unit = 0;
    while size >= base && unit + 1 < units.len() {
        size /= base;
        unit += 1;
    }
    let mut text = significant(size, digits);
    // 999.9 with three digits is the next unit's 1, not 1e+03.
    if base < 1001.0 && text == "1000" && digits < 4 && unit + 1 < units.len() {
        "1".clone_into(&mut text);
        unit += 1;
    }
    format!("{text}{}", units[unit])
}

/// C's `%.*g` for the numbers a size can be.
fn significant(number: f64, digits: usize) -> String {
    if number == 0.0 {
        return "0".to_owned();
    }
    let before = number.abs().log10().floor() as i32 + 1;
    let decimals = usize::try_from(digits as i32 - before).unwrap_or(0);
    let text = format!("{number:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// `64m`, `1.5GiB`, `512` as bytes.
pub fn parse_bytes(text: &str) -> Result<i64, String> {
    let invalid = || format!("invalid size: '{text}'");
    let split = text.rfind(|c: char| c.is_ascii_digit() || c == '.' || c == ' ').ok_or_else(invalid)?;
    let (number, suffix) = if text.as_bytes()[split] == b' ' {
        (&text[..split], &text[split + 1..])
    } else {
        (&text[..=split], &text[split + 1..])
    };
    let number: f64 = number.parse().ok().ok_or_else(invalid)?;
    if number < 0.0 {
        return Err(invalid());
    }
    let lower = suffix.to_ascii_lowercase();
    let bad = || format!("invalid suffix: '{suffix}'");
    let mut letters = lower.chars();
    let power = match letters.next() {
        None => return Ok(number as i64),
        Some('b') if lower.len() == 1 => 0,
        Some('k') => 1,
        Some('m') => 2,
        Some('g') => 3,
        Some('t') => 4,
        Some('p') => 5,
        Some(_) => return Err(bad()),
    };
    match letters.as_str() {
        "" | "b" | "ib" => Ok((number * 1024_f64.powi(power)) as i64),
        _ => Err(bad()),
    }
}

/// A Go duration in nanoseconds.
pub fn parse_duration(text: &str) -> Result<i64, String> {
    let invalid = || format!("time: invalid duration \"{text}\"");
    let (sign, mut rest) = match text.as_bytes().first() {
        Some(b'-') => (-1.0, &text[1..]),
        Some(b'+') => (1.0, &text[1..]),
        _ => (1.0, text),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut total = 0.0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest[..end].parse().ok().ok_or_else(invalid)?;
        rest = &rest[end..];
        if rest.is_empty() {
            return Err(format!("time: missing unit in duration \"{text}\""));
        }
        let end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let unit = match &rest[..end] {
            "ns" => 1.0,
            "us" | "µs" | "μs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            other => return Err(format!("time: unknown unit \"{other}\" in duration \"{text}\"")),
        };
        rest = &rest[end..];
        total += number * unit;
    }
    Ok((sign * total) as i64)
}

/// How long something took or has lasted, in words.
pub fn human_duration(seconds: i64) -> String {
    let minutes = seconds / 60;
    let hours = (seconds + 1800) / 3600;
    match seconds {
        s if s < 1 => "Less than a second".to_owned(),
        1 => "1 second".to_owned(),
        s if s < 60 => format!("{s} seconds"),
        _ if minutes == 1 => "About a minute".to_owned(),
        _ if minutes < 60 => format!("{minutes} minutes"),
        _ if hours == 1 => "About an hour".to_owned(),
        _ if hours < 48 => format!("{hours} hours"),
        _ if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        _ if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        _ if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        _ => format!("{} years", seconds / 3600 / 24 / 365),
    }
}

pub fn now() -> i64 {
    Timestamp::now().as_second()
}

/// `2 minutes ago` for a unix time; `N/A` for none.
pub fn ago(unix: i64) -> String {
    if unix <= 0 { "N/A".to_owned() } else { format!("{} ago", human_duration(now() - unix)) }
}

/// The local zone, read once. /etc/localtime is the zone itself: searching the zone database for its name, as
/// `TimeZone::system` does, takes longer than the rest of the client.
fn local_zone() -> &'static TimeZone {
    static ZONE: OnceLock<TimeZone> = OnceLock::new();
    ZONE.get_or_init(|| match std::env::var("TZ") {
        Ok(name) if name.is_empty() || name == "UTC" => TimeZone::UTC,
        Ok(_) => TimeZone::system(),
        Err(_) => std::fs::read("/etc/localtime")
            .ok()
            .and_then(|data| TimeZone::tzif("Local", &data).ok())
            .unwrap_or(TimeZone::UTC),
    })
}

fn zoned(stamp: Timestamp) -> Zoned {
    stamp.to_zoned(local_zone().clone())
}

/// Go's `Time.String`: `2026-11-22 22:29:10 +0000 UTC`, with nanoseconds when there are any.
pub fn go_time(stamp: Timestamp) -> String {
    let zoned = zoned(stamp);
    let fraction = fraction(zoned.subsec_nanosecond());
    let abbreviation = zoned.strftime("%Z").to_string();
    let name = if abbreviation == "Etc/UTC" { "UTC".to_owned() } else { abbreviation };
    format!("{}{fraction} {} {name}", zoned.strftime("%Y-%m-%d %H:%M:%S"), zoned.strftime("%z"))
}

/// RFC 3339 in the local zone; `padded` keeps all nine digits.
pub fn rfc3339(stamp: Timestamp, padded: bool) -> String {
    let zoned = zoned(stamp);
    let nanos = zoned.subsec_nanosecond();
    let fraction = if padded { format!(".{nanos:09}") } else { fraction(nanos) };
    let offset = if zoned.offset().is_zero() { "Z".to_owned() } else { zoned.strftime("%:z").to_string() };
    format!("{}{fraction}{offset}", zoned.strftime("%Y-%m-%dT%H:%M:%S"))
}

fn fraction(nanos: i32) -> String {
    if nanos == 0 { String::new() } else { format!(".{nanos:09}").trim_end_matches('0').to_owned() }
}

pub fn from_unix(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// What `--since` and `--until` take: a time, a date, or a duration before now; as `seconds.nanos` for the engine.
pub fn point_in_time(text: &str) -> Result<String, String> {
    if let Ok(nanos) = parse_duration(text) {
        let at = Timestamp::now().as_nanosecond() - i128::from(nanos);
        return Ok(format!("{}.{:09}", at.div_euclid(1_000_000_000), at.rem_euclid(1_000_000_000)));
    }
    let number = text.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
    if number && !text.is_empty() {
        return Ok(text.to_owned());
    }
    let stamp = text.parse::<Timestamp>().ok().or_else(|| {
        let local = |civil: jiff::civil::DateTime| {
            civil.to_zoned(local_zone().clone()).ok().map(|zoned| zoned.timestamp())
        };
        let padded = match text.len() {
            13 => format!("{text}:00:00"),
            16 => format!("{text}:00"),
            _ => text.to_owned(),
        };
        padded
            .parse::<jiff::civil::DateTime>()
            .or_else(|_| padded.parse::<jiff::civil::Date>().map(|d| d.at(0, 0, 0, 0)))
            .ok()
            .and_then(local)
    });
    match stamp {
        Some(stamp) => Ok(format!("{}.{:09}", stamp.as_second(), stamp.subsec_nanosecond())),
        None => Err(format!(
            "failed to parse value as time or duration: \"{text}\": give a time (2026-01-02T15:04:05Z), a date, a unix time, or a duration (10m)"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_dockers_digits() {
        assert_eq!(human_size(0.0, 3), "0B");
        assert_eq!(human_size(1_986_000.0, 3), "1.99MB");
        assert_eq!(human_size(1_986_000.0, 4), "1.986MB");
        assert_eq!(human_size(7_940_000.0, 4), "7.94MB");
        assert_eq!(human_size(116_600_000.0, 3), "117MB");
        assert_eq!(human_size(999_900.0, 3), "1MB");
        assert_eq!(binary_size(565_248.0), "552KiB");
        assert_eq!(binary_size(25_276_510_208.0), "23.54GiB");
        assert_eq!(binary_size(1023.0), "1023B");
    }

    #[test]
    fn byte_sizes_parse_as_go_units_does() {
        assert_eq!(parse_bytes("512"), Ok(512));
        assert_eq!(parse_bytes("64m"), Ok(64 << 20));
        assert_eq!(parse_bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_bytes("2 kB"), Ok(2048));
        assert_eq!(parse_bytes("5b"), Ok(5));
        assert_eq!(parse_bytes("xx"), Err("invalid size: 'xx'".into()));
        assert_eq!(parse_bytes("5x"), Err("invalid suffix: 'x'".into()));
        assert_eq!(parse_bytes("-1"), Err("invalid size: '-1'".into()));
    }

    #[test]
    fn durations_parse_as_gos() {
        assert_eq!(parse_duration("1m30s"), Ok(90_000_000_000));
        assert_eq!(parse_duration("1.5h"), Ok(5_400_000_000_000));
        assert_eq!(parse_duration("250ms"), Ok(250_000_000));
        assert_eq!(parse_duration("10"), Err("time: missing unit in duration \"10\"".into()));
        assert_eq!(parse_duration("x"), Err("time: invalid duration \"x\"".into()));
        assert_eq!(parse_duration("3y"), Err("time: unknown unit \"y\" in duration \"3y\"".into()));
    }

    #[test]
    fn ages_are_words() {
        for (seconds, words) in [
            (0, "Less than a second"),
            (1, "1 second"),
            (59, "59 seconds"),
            (60, "About a minute"),
            (119, "About a minute"),
            (120, "2 minutes"),
            (3599, "59 minutes"),
            (3600, "About an hour"),
            (5400, "2 hours"),
            (47 * 3600, "47 hours"),
            (48 * 3600, "2 days"),
            (14 * 86400, "2 weeks"),
            (60 * 86400, "2 months"),
            (6 * 366 * 86400, "6 years"),
        ] {
            assert_eq!(human_duration(seconds), words);
        }
    }

    #[test]
    fn times_for_the_engine_are_unix_seconds() {
        assert_eq!(point_in_time("1700000000").unwrap(), "1700000000");
        assert_eq!(point_in_time("2023-11-14T22:13:20Z").unwrap(), "1700000000.000000000");
        assert_eq!(point_in_time("2023-11-14T22:13:20.5Z").unwrap(), "1700000000.500000000");
        assert!(point_in_time("10m").unwrap().contains('.'));
        assert!(point_in_time("soon").unwrap_err().contains("soon"));
    }
}
