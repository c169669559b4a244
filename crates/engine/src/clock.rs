//! Time as Docker writes it: RFC 3339 in UTC with up to nine decimals, zero time for "never".

use std::time::Duration;

use jiff::Timestamp;

/// What Docker's documents show for a moment that has not come yet.
pub const ZERO_TIME: &str = "0001-01-01T00:00:00Z";

/// `2006-01-02T15:04:05.999999999Z`, trailing zeros cut, as Go prints it.
pub fn rfc3339_nano(time: Timestamp) -> String {
    time.to_string()
}

/// Whole seconds, as Docker shows a volume's age.
pub(crate) fn rfc3339_seconds(time: Timestamp) -> String {
    Timestamp::from_second(time.as_second()).unwrap_or(time).to_string()
}

/// The same for a moment that may not have come.
pub(crate) fn rfc3339_or_zero(time: Option<Timestamp>) -> String {
    time.map_or_else(|| ZERO_TIME.to_owned(), rfc3339_nano)
}

/// A moment as a client gives it to `since` and `until`: unix seconds with an optional fraction, or RFC 3339.
///
/// `None` for the empty string and for `0`, which mean "no limit".
pub fn parse_moment(text: &str) -> Result<Option<Timestamp>, String> {
    let text = text.trim();
    if text.is_empty() || text == "0" {
        return Ok(None);
    }
    let wrong = || format!("invalid time {text:?}: expected unix seconds or RFC 3339");
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if let Ok(seconds) = seconds.parse::<i64>() {
        if fraction.len() > 9 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        let nanos: i32 = if fraction.is_empty() {
            0
        } else {
            format!("{fraction:0<9}").parse().map_err(|_invalid| wrong())?
        };
        let nanos = if text.starts_with('-') { -nanos } else { nanos };
        return Timestamp::new(seconds, nanos).map(Some).map_err(|_out_of_range| wrong());
    }
    text.parse::<Timestamp>().map(Some).map_err(|_unparsable| wrong())
}

/// A length of time in Go's notation: `1h30m`, `1.5s`, `300ms`.
pub fn go_duration(text: &str) -> Option<Duration> {
    let mut total = 0_f64;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        total += number
            * match &rest[..unit] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                _ => return None,
            };
        rest = &rest[unit..];
    }
    (!text.is_empty()).then(|| Duration::try_from_secs_f64(total).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_come_as_seconds_fractions_or_rfc3339() {
        assert_eq!(parse_moment(""), Ok(None));
        assert_eq!(parse_moment("0"), Ok(None));
        assert_eq!(parse_moment("17.5"), Ok(Some(Timestamp::new(17, 500_000_000).unwrap())));
        assert_eq!(parse_moment("17.000000001"), Ok(Some(Timestamp::new(17, 1).unwrap())));
        assert_eq!(
            parse_moment("2026-01-02T03:04:05.6Z"),
            Ok(Some("2026-01-02T03:04:05.6Z".parse().unwrap()))
        );
        assert!(parse_moment("yesterday").is_err());
        assert!(parse_moment("1.0000000001").is_err());
    }

    #[test]
    fn zeros_are_cut_like_go_does() {
        assert_eq!(rfc3339_nano(Timestamp::new(0, 120_000_000).unwrap()), "1970-01-01T00:00:00.12Z");
        assert_eq!(rfc3339_nano(Timestamp::new(1, 0).unwrap()), "1970-01-01T00:00:01Z");
    }

    #[test]
    fn durations_in_gos_notation() {
        assert_eq!(go_duration("1h30m"), Some(Duration::from_mins(90)));
        assert_eq!(go_duration("1.5s"), Some(Duration::from_millis(1500)));
        for bad in ["", "1", "h", "1d", "-1s", "2026-01-01"] {
            assert_eq!(go_duration(bad), None, "{bad:?}");
        }
    }
}
