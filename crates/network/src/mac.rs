//! Hardware addresses. Generated ones are locally administered and derived from the IPv4 address, so that
//! an address and its hardware address move together and neighbours' caches stay right.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A 48-bit hardware address, written `02:42:ac:1e:00:02`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddr([u8; 6]);

/// The text is not a hardware address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid MAC address {0:?}: six bytes in hexadecimal separated by colons are expected")]
pub struct MacParseError(String);

impl MacAddr {
    pub fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// `02:42` and the four bytes of the address, as docker does.
    pub fn from_ipv4(ip: Ipv4Addr) -> Self {
        let [a, b, c, d] = ip.octets();
        Self([0x02, 0x42, a, b, c, d])
    }

    /// For an interface that has no IPv4 address: from the last four bytes of the IPv6 one.
    pub fn from_ip(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Self::from_ipv4(ip),
            IpAddr::V6(ip) => {
                let bytes = ip.octets();
                Self([0x02, 0x42, bytes[12], bytes[13], bytes[14], bytes[15]])
            }
        }
    }

    pub fn bytes(&self) -> [u8; 6] {
        self.0
    }

    /// Whether an interface may carry it: not multicast, not all zero.
    pub fn is_usable(&self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(":")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = MacParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || MacParseError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_not_hex| error())?;
        }
        if parts.next().is_some() { Err(error()) } else { Ok(Self(bytes)) }
    }
}

impl Serialize for MacAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_derived_from_the_ipv4_address_and_round_trips() {
        let mac = MacAddr::from_ipv4(Ipv4Addr::new(172, 30, 0, 2));
        assert_eq!(mac.to_string(), "02:42:ac:1e:00:02");
        assert_eq!("02:42:AC:1E:00:02".parse::<MacAddr>().unwrap(), mac);
        assert!(mac.is_usable());
        assert_eq!(serde_json::to_string(&mac).unwrap(), "\"02:42:ac:1e:00:02\"");
    }

    #[test]
    fn refuses_what_is_not_an_address() {
        for text in [
            "",
            "02:42:ac:1e:00",
            "02:42:ac:1e:00:02:03",
            "02:42:ac:1e:00:zz",
            "0242ac1e0002",
            "2:42:ac:1e:0:2",
        ] {
            assert!(text.parse::<MacAddr>().is_err(), "{text}");
        }
        assert!(!MacAddr::new([1, 0, 0, 0, 0, 0]).is_usable());
        assert!(!MacAddr::new([0; 6]).is_usable());
    }
}
