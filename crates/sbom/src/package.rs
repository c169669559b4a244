//! One package, and its package URL (github.com/package-url/purl-spec).

use crate::Distribution;

/// Whose package.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Deb,
    Apk,
    Rpm,
    Cargo,
    Npm,
    Python,
    Go,
}

impl Kind {
    /// Its type in a package URL.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deb => "deb",
            Self::Apk => "apk",
            Self::Rpm => "rpm",
            Self::Cargo => "cargo",
            Self::Npm => "npm",
            Self::Python => "pypi",
            Self::Go => "golang",
        }
    }
}

/// A package that is installed, or built into a program.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    pub kind: Kind,
    pub name: String,
    pub version: String,
    pub architecture: String,
    pub purl: String,
    /// As the package says it: not always an SPDX expression.
    pub license: String,
    /// Who made it, as the package says.
    pub supplier: String,
    /// The file that tells of it, from the root.
    pub source: String,
}

impl Package {
    pub fn new(kind: Kind, name: &str, version: &str, source: &str) -> Self {
        Self {
            kind,
            name: name.to_owned(),
            version: version.to_owned(),
            architecture: String::new(),
            purl: purl(kind, name, version, &[]),
            license: String::new(),
            supplier: String::new(),
            source: source.to_owned(),
        }
    }

    /// A distribution's package.
    pub fn of_distribution(
        kind: Kind,
        of: &Distribution,
        name: &str,
        version: &str,
        architecture: &str,
        source: &str,
    ) -> Self {
        let mut package = Self::new(kind, name, version, source);
        architecture.clone_into(&mut package.architecture);
        let full = if of.id.is_empty() { name.to_owned() } else { format!("{}/{name}", of.id) };
        let distro = if of.version.is_empty() { of.id.clone() } else { format!("{}-{}", of.id, of.version) };
        package.purl = purl(kind, &full, version, &[("arch", architecture), ("distro", &distro)]);
        package
    }
}

/// `pkg:type/namespace/name@version?qualifiers`.
pub(crate) fn purl(kind: Kind, name: &str, version: &str, qualifiers: &[(&str, &str)]) -> String {
    let name = match kind {
        // As pypi.org knows it.
        Kind::Python => name.to_ascii_lowercase().replace('_', "-"),
        Kind::Npm | Kind::Cargo => name.to_owned(),
        Kind::Deb | Kind::Apk | Kind::Rpm | Kind::Go => name.to_ascii_lowercase(),
    };
    let parts: Vec<String> = name.split('/').map(encoded).collect();
    let mut purl = format!("pkg:{}/{}", kind.as_str(), parts.join("/"));
    if !version.is_empty() {
        purl.push('@');
        purl.push_str(&encoded(version));
    }
    let given: Vec<String> = qualifiers
        .iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(key, value)| format!("{key}={}", encoded(value)))
        .collect();
    if !given.is_empty() {
        purl.push('?');
        purl.push_str(&given.join("&"));
    }
    purl
}

fn encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b':') {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push_str(&hex::encode_upper([byte]));
        }
    }
    out
}
