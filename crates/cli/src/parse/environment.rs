//! `--env`, `--env-file`, `--label`, `--label-file`: names and values from flags and files.

use std::collections::HashMap;

/// The lines of files, then the flags: later ones win by being later. A bare name takes its value from this process's
/// environment, and is left out when it has none there.
pub fn variables(files: &[&str], flags: &[&str]) -> Result<Vec<String>, String> {
    let mut all = Vec::new();
    for file in files {
        all.extend(read_file(file, "env").map(|lines| lines.into_iter().filter_map(filled))?);
    }
    all.extend(flags.iter().filter_map(|flag| filled((*flag).to_owned())));
    Ok(all)
}

/// Why an `--env` value is refused.
pub fn check_variable(text: &str) -> Result<(), String> {
    if text.is_empty() || text.starts_with('=') {
        return Err(format!("invalid environment variable: {text}"));
    }
    Ok(())
}

fn filled(line: String) -> Option<String> {
    if line.contains('=') {
        return Some(line);
    }
    std::env::var(&line).ok().map(|value| format!("{line}={value}"))
}

pub fn labels(files: &[&str], flags: &[&str]) -> Result<HashMap<String, String>, String> {
    let mut all = HashMap::new();
    for file in files {
        for line in read_file(file, "label")? {
            let (key, value) = line.split_once('=').unwrap_or((&line, ""));
            all.insert(key.to_owned(), value.to_owned());
        }
    }
    all.extend(pairs(flags));
    Ok(all)
}

/// `key=value` flags as a map; a bare key has an empty value.
pub fn pairs(flags: &[&str]) -> HashMap<String, String> {
    flags
        .iter()
        .map(|flag| flag.split_once('=').unwrap_or((flag, "")))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// The lines of a file that say something: not blank, not a comment, blanks before the name dropped.
fn read_file(path: &str, what: &str) -> Result<Vec<String>, String> {
    let bytes =
        std::fs::read(path).map_err(|error| format!("open {path}: {}", crate::output::os_text(&error)))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        format!(
            "invalid {what} file ({path}): invalid utf8 bytes at line {}",
            good.split(|b| *b == b'\n').count()
        )
    })?;
    let mut lines = Vec::new();
    for line in text.trim_start_matches('\u{feff}').lines() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let name = line.split_once('=').map_or(line, |(name, _)| name);
        if name.is_empty() {
            return Err(format!("invalid {what} file ({path}): no variable name on line '{line}'"));
        }
        if name.contains([' ', '\t']) {
            return Err(format!("invalid {what} file ({path}): variable '{name}' contains whitespaces"));
        }
        lines.push(line.to_owned());
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_as_docker_reads_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("env");
        let name = path.to_str().unwrap();
        std::fs::write(&path, "# comment\n\nA=1\n  B=two words \nNO_SUCH_VARIABLE_HERE\n").unwrap();
        assert_eq!(variables(&[name], &["C=3"]).unwrap(), ["A=1", "B=two words ", "C=3"]);
        std::fs::write(&path, "A B=c\n").unwrap();
        assert_eq!(
            variables(&[name], &[]).unwrap_err(),
            format!("invalid env file ({name}): variable 'A B' contains whitespaces")
        );
        std::fs::write(&path, "=c\n").unwrap();
        assert_eq!(
            variables(&[name], &[]).unwrap_err(),
            format!("invalid env file ({name}): no variable name on line '=c'")
        );
        assert_eq!(variables(&["/nope"], &[]).unwrap_err(), "open /nope: no such file or directory");
    }
}
