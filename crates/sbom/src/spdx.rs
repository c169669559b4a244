//! The list of packages as an SPDX document (spdx.github.io/spdx-spec/v2.3, JSON).
//!
//! Invariant: the same packages of the same subject at the same time give the same bytes.

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{Found, Kind, Package};

/// What the document is about.
#[derive(Debug, Clone, Default)]
pub struct Subject {
    /// An image's name, or its digest.
    pub name: String,
    /// Its package URL, if it has one.
    pub purl: String,
    /// RFC 3339, in whole seconds and UTC.
    pub created: String,
    /// `brigantine-0.1.0`.
    pub tool: String,
}

/// Licenses whose identifiers packages are known to use; a declared license with any other is told in words.
const LICENSES: &[&str] = &[
    "0BSD",
    "AFL-2.1",
    "AGPL-3.0-only",
    "AGPL-3.0-or-later",
    "Apache-1.1",
    "Apache-2.0",
    "Artistic-1.0",
    "Artistic-1.0-Perl",
    "Artistic-2.0",
    "BSD-1-Clause",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSD-4-Clause",
    "BSL-1.0",
    "BlueOak-1.0.0",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC0-1.0",
    "CDDL-1.0",
    "EPL-1.0",
    "EPL-2.0",
    "FSFAP",
    "FSFUL",
    "FSFULLR",
    "FTL",
    "GFDL-1.3-or-later",
    "GPL-1.0-or-later",
    "GPL-2.0-only",
    "GPL-2.0-or-later",
    "GPL-3.0-only",
    "GPL-3.0-or-later",
    "HPND",
    "ICU",
    "IJG",
    "ISC",
    "LGPL-2.0-or-later",
    "LGPL-2.1-only",
    "LGPL-2.1-or-later",
    "LGPL-3.0-only",
    "LGPL-3.0-or-later",
    "Libpng",
    "MIT",
    "MIT-0",
    "MPL-1.1",
    "MPL-2.0",
    "NCSA",
    "OFL-1.1",
    "OLDAP-2.8",
    "OpenSSL",
    "PHP-3.01",
    "PSF-2.0",
    "PostgreSQL",
    "Python-2.0",
    "Ruby",
    "SISSL",
    "TCL",
    "Unicode-3.0",
    "Unicode-DFS-2016",
    "Unlicense",
    "Vim",
    "W3C",
    "WTFPL",
    "X11",
    "Zlib",
    "bzip2-1.0.6",
    "curl",
    "zlib-acknowledgement",
];

/// Makes the document.
pub fn spdx(subject: &Subject, found: &Found) -> Value {
    let mut packages = vec![json!({
        "name": subject.name,
        "SPDXID": "SPDXRef-Subject",
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": false,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": "NOASSERTION",
        "copyrightText": "NOASSERTION",
        "primaryPackagePurpose": "CONTAINER",
    })];
    if !subject.purl.is_empty() {
        packages[0]["externalRefs"] = json!([reference(&subject.purl)]);
    }
    let mut relationships = vec![relationship("SPDXRef-DOCUMENT", "DESCRIBES", "SPDXRef-Subject")];
    let mut hasher = Sha256::new();
    hasher.update(&subject.name);
    hasher.update(&subject.created);
    for package in &found.packages {
        let id = id_of(package);
        hasher.update(&id);
        relationships.push(relationship("SPDXRef-Subject", "CONTAINS", &id));
        packages.push(described(package, id));
    }
    let unique = hex::encode(&hasher.finalize()[..16]);
    let name: String = subject
        .name
        .chars()
        .map(
            |letter| if letter.is_ascii_alphanumeric() || matches!(letter, '.' | '-') { letter } else { '-' },
        )
        .collect();
    let mut document = json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": subject.name,
        "documentNamespace": format!("https://spdx.org/spdxdocs/{name}-{unique}"),
        "creationInfo": { "created": subject.created, "creators": [format!("Tool: {}", subject.tool)] },
        "packages": packages,
        "relationships": relationships,
    });
    if !found.unread.is_empty() {
        document["comment"] = format!("Not everything could be read:\n{}", found.unread.join("\n")).into();
    }
    document
}

fn relationship(from: &str, kind: &str, to: &str) -> Value {
    json!({ "spdxElementId": from, "relationshipType": kind, "relatedSpdxElement": to })
}

fn reference(purl: &str) -> Value {
    json!({ "referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": purl })
}

/// An identifier may have letters, digits, `.` and `-` only: what it is made of follows as a digest.
fn id_of(package: &Package) -> String {
    let unique = Sha256::digest(format!("{}\n{}", package.purl, package.source));
    let name: String =
        package.name.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-')).collect();
    format!("SPDXRef-Package-{}-{name}-{}", package.kind.as_str(), hex::encode(&unique[..8]))
}

fn described(package: &Package, id: String) -> Value {
    let mut entry = json!({
        "name": package.name,
        "SPDXID": id,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": false,
        "sourceInfo": format!("found in /{}", package.source),
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": "NOASSERTION",
        "copyrightText": "NOASSERTION",
        "externalRefs": [reference(&package.purl)],
        "primaryPackagePurpose": if package.kind == Kind::Go { "LIBRARY" } else { "APPLICATION" },
    });
    if matches!(package.kind, Kind::Cargo | Kind::Npm | Kind::Python) {
        entry["primaryPackagePurpose"] = "LIBRARY".into();
    }
    if !package.version.is_empty() {
        entry["versionInfo"] = package.version.clone().into();
    }
    let supplier = package.supplier.trim().replace('\n', " ");
    if supplier.is_empty() {
        entry["supplier"] = "NOASSERTION".into();
    } else {
        // `Person: Name (address)`.
        let (name, address) = supplier.split_once('<').unwrap_or((&supplier, ""));
        let (name, address) = (name.trim(), address.trim_end_matches('>').trim());
        let kind = if address.is_empty() { "Organization" } else { "Person" };
        let plain = |text: &str| text.replace(['(', ')'], "");
        entry["supplier"] = match (name, address) {
            ("", "") => "NOASSERTION".into(),
            ("", address) => format!("{kind}: {}", plain(address)).into(),
            (name, address) if address.contains('@') => {
                format!("{kind}: {} ({})", plain(name), plain(address)).into()
            }
            (name, _) => format!("{kind}: {}", plain(name)).into(),
        };
    }
    let license = package.license.trim();
    if is_expression(license) {
        entry["licenseDeclared"] = license.into();
    } else if !license.is_empty() {
        entry["licenseComments"] = format!("declared by the package: {license}").into();
    }
    entry
}

/// Whether a text is an SPDX expression of known licenses, without exceptions.
fn is_expression(text: &str) -> bool {
    let mut wanted = true;
    let mut depth = 0_i32;
    for word in text.replace('(', " ( ").replace(')', " ) ").split_whitespace() {
        match word {
            "(" if wanted => depth += 1,
            ")" if !wanted => depth -= 1,
            "AND" | "OR" if !wanted => wanted = true,
            license if wanted && LICENSES.contains(&license) => wanted = false,
            _ => return false,
        }
        if depth < 0 {
            return false;
        }
    }
    !wanted && depth == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_told_from_other_words() {
        for text in ["MIT", "MIT OR Apache-2.0", "(MIT AND BSD-3-Clause) OR ISC"] {
            assert!(is_expression(text), "{text}");
        }
        for text in ["", "GPL", "MIT OR", "MIT Apache-2.0", "(MIT", "MIT)", "GPLv2+ and BSD", "AND"] {
            assert!(!is_expression(text), "{text}");
        }
    }
}
