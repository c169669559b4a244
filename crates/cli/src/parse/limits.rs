//! CPU shares of time, ulimits, devices and their rates.

use bollard_stubs::models::{
    DeviceMapping, DeviceRequest, ResourcesBlkioWeightDevice, ResourcesUlimits, ThrottleDevice,
};

use super::comma_separated;
use crate::units;

/// `--cpus 1.5` in billionths of a CPU.
pub fn cpus(text: &str) -> Result<i64, String> {
    let fail = || format!("failed to parse {text} as a rational number");
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !digits(whole) || !digits(fraction) {
        return Err(fail());
    }
    let fraction = fraction.trim_end_matches('0');
    if fraction.len() > 9 {
        return Err("value is too precise".to_owned());
    }
    let whole: i64 = if whole.is_empty() { 0 } else { whole.parse().ok().ok_or_else(fail)? };
    let parts: i64 = format!("{fraction:0<9}").parse().ok().ok_or_else(fail)?;
    whole.checked_mul(1_000_000_000).and_then(|nanos| nanos.checked_add(parts)).ok_or_else(fail)
}

const ULIMITS: &[&str] = &[
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// `nofile=1024[:2048]`.
pub fn ulimit(text: &str) -> Result<ResourcesUlimits, String> {
    let (name, limits) = text.split_once('=').ok_or_else(|| format!("invalid ulimit argument: {text}"))?;
    if !ULIMITS.contains(&name) {
        return Err(format!("invalid ulimit type: {name}"));
    }
    let number = |part: &str| {
        part.parse::<i64>()
            .ok()
            .ok_or_else(|| format!("strconv.ParseInt: parsing \"{part}\": invalid syntax"))
    };
    let (soft, hard) = match limits.split_once(':') {
        Some((_, hard)) if hard.contains(':') => {
            return Err(format!(
                "too many limit value arguments - {limits}, can only have up to two, `soft[:hard]`"
            ));
        }
        Some((soft, hard)) => (number(soft)?, number(hard)?),
        None => (number(limits)?, number(limits)?),
    };
    if hard != -1 && soft == -1 {
        return Err(format!(
            "ulimit soft limit must be less than or equal to hard limit: soft: -1 (unlimited), hard: {hard}"
        ));
    }
    if hard != -1 && soft > hard {
        return Err(format!("ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}"));
    }
    Ok(ResourcesUlimits { name: Some(name.to_owned()), soft: Some(soft), hard: Some(hard) })
}

/// `--device host[:inside][:rwm]`, or a device of the container device interface, `vendor/class=name`.
pub enum Device {
    Host(DeviceMapping),
    Interface(String),
}

pub fn device(text: &str) -> Result<Device, String> {
    if !text.starts_with('/') && text.contains('/') && text.contains('=') {
        return Ok(Device::Interface(text.to_owned()));
    }
    let parts: Vec<&str> = text.split(':').collect();
    let mode = |text: &str| !text.is_empty() && text.bytes().all(|b| b"rwm".contains(&b));
    let (host, inside, permissions) = match parts[..] {
        [host] => (host, host, "rwm"),
        [host, second] if mode(second) => (host, host, second),
        [host, inside] => (host, inside, "rwm"),
        [host, inside, permissions] if mode(permissions) => (host, inside, permissions),
        [_, _, permissions] => return Err(format!("bad mode specified: {permissions}")),
        _ => return Err(format!("bad format for path: {text}")),
    };
    Ok(Device::Host(DeviceMapping {
        path_on_host: Some(host.to_owned()),
        path_in_container: Some(inside.to_owned()),
        cgroup_permissions: Some(permissions.to_owned()),
    }))
}

/// `--device-read-bps /dev/sda:1mb`.
pub fn bytes_rate(text: &str) -> Result<ThrottleDevice, String> {
    rate(
        text,
        |value| units::parse_bytes(value).ok(),
        "<number>[<unit>]. Number must be a positive integer. Unit is optional and can be kb, mb, or gb",
    )
}

/// `--device-read-iops /dev/sda:100`.
pub fn io_rate(text: &str) -> Result<ThrottleDevice, String> {
    rate(
        text,
        |value| value.parse::<u64>().ok().and_then(|n| i64::try_from(n).ok()),
        "<number>. Number must be a positive integer",
    )
}

fn rate(text: &str, parse: impl Fn(&str) -> Option<i64>, form: &str) -> Result<ThrottleDevice, String> {
    let (path, value) = text
        .split_once(':')
        .filter(|(path, _)| !path.is_empty())
        .ok_or_else(|| format!("bad format: {text}"))?;
    if !path.starts_with("/dev/") {
        return Err(format!("bad format for device path: {text}"));
    }
    let rate = parse(value).ok_or_else(|| {
        format!("invalid rate for device: {text}. The correct format is <device-path>:{form}")
    })?;
    Ok(ThrottleDevice { path: Some(path.to_owned()), rate: Some(rate) })
}

pub fn weight_device(text: &str) -> Result<ResourcesBlkioWeightDevice, String> {
    let (path, weight) = text
        .split_once(':')
        .filter(|(path, _)| !path.is_empty())
        .ok_or_else(|| format!("bad format: {text}"))?;
    if !path.starts_with("/dev/") {
        return Err(format!("bad format for device path: {text}"));
    }
    let weight = weight.parse::<usize>().ok().filter(|w| *w == 0 || (10..=1000).contains(w));
    let weight = weight.ok_or_else(|| format!("invalid weight for device: {text}"))?;
    Ok(ResourcesBlkioWeightDevice { path: Some(path.to_owned()), weight: Some(weight) })
}

/// `--gpus all`, `--gpus 2`, `--gpus device=0`, with `driver=`, `capabilities=`, `count=`.
pub fn gpus(text: &str) -> Result<DeviceRequest, String> {
    let mut request = DeviceRequest { driver: Some(String::new()), ..DeviceRequest::default() };
    let mut capabilities = vec!["gpu".to_owned()];
    let count = |value: &str| match value {
        "all" => Ok(-1),
        _ => value.parse::<i64>().ok().ok_or_else(|| {
            format!("invalid count ({value}): value must be either \"all\" or an integer: invalid syntax")
        }),
    };
    for field in comma_separated(text)? {
        match field.split_once('=') {
            None => request.count = Some(count(&field)?),
            Some(("count", value)) => request.count = Some(count(value)?),
            Some(("driver", value)) => request.driver = Some(value.to_owned()),
            Some(("device", value)) => {
                request.device_ids = Some(value.split(',').map(str::to_owned).collect());
            }
            Some(("capabilities", value)) => capabilities.extend(value.split(',').map(str::to_owned)),
            Some(("options", value)) => {
                request.options = Some(super::environment::pairs(&value.split(',').collect::<Vec<_>>()));
            }
            Some((key, _)) => return Err(format!("unexpected key '{key}' in '{field}'")),
        }
    }
    if request.count.is_none() && request.device_ids.is_none() {
        request.count = Some(1);
    }
    request.capabilities = Some(vec![capabilities]);
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_exact() {
        assert_eq!(cpus("1.5"), Ok(1_500_000_000));
        assert_eq!(cpus(".25"), Ok(250_000_000));
        assert_eq!(cpus("foo"), Err("failed to parse foo as a rational number".into()));
        assert_eq!(cpus("0.1234567890123"), Err("value is too precise".into()));
    }

    #[test]
    fn ulimits_and_devices_are_refused_in_dockers_words() {
        assert_eq!(ulimit("nofile=1:2").unwrap().hard, Some(2));
        assert_eq!(ulimit("x").unwrap_err(), "invalid ulimit argument: x");
        assert_eq!(ulimit("foo=1").unwrap_err(), "invalid ulimit type: foo");
        assert_eq!(
            ulimit("nofile=5:1").unwrap_err(),
            "ulimit soft limit must be less than or equal to hard limit: 5 > 1"
        );
        assert!(device("a:b:zz").is_err_and(|e| e == "bad mode specified: zz"));
        assert!(device("a:b:c:d").is_err_and(|e| e == "bad format for path: a:b:c:d"));
        assert_eq!(bytes_rate("/dev/sda:1mb").unwrap().rate, Some(1 << 20));
        assert_eq!(bytes_rate("foo").unwrap_err(), "bad format: foo");
    }

    #[test]
    fn gpus_parse() {
        assert_eq!(gpus("all").unwrap().count, Some(-1));
        assert_eq!(gpus("\"device=0,1\"").unwrap().device_ids.unwrap(), ["0", "1"]);
        assert!(gpus("foo").unwrap_err().contains("invalid count (foo)"));
    }
}
