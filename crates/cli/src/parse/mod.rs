//! Values of flags that have a grammar of their own: ports, mounts, environments, limits, networks.
//!
//! Pure functions from text to the API's types; a refused value is explained in docker's words.

pub mod container;
pub mod environment;
pub mod limits;
pub mod mounts;
pub mod networks;
pub mod ports;
pub mod security;

/// Splits one line of comma-separated values, where quotes keep commas.
pub fn comma_separated(text: &str) -> Result<Vec<String>, String> {
    let mut fields = Vec::new();
    let mut field = String::new();
    let mut chars = text.chars().peekable();
    loop {
        if field.is_empty() && chars.peek() == Some(&'"') {
            chars.next();
            loop {
                match chars.next() {
                    Some('"') if chars.peek() == Some(&'"') => {
                        chars.next();
                        field.push('"');
                    }
                    Some('"') => break,
                    Some(c) => field.push(c),
                    None => {
                        return Err(format!(
                            "parse error on line 1, column {}: extraneous or missing \" in quoted-field",
                            text.len() + 1
                        ));
                    }
                }
            }
        }
        match chars.next() {
            Some(',') => fields.push(std::mem::take(&mut field)),
            Some(c) => field.push(c),
            None => {
                fields.push(field);
                return Ok(fields);
            }
        }
    }
}

/// Go's strconv.ParseBool.
pub fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn quotes_keep_commas() {
        assert_eq!(super::comma_separated("a=b,\"c=d,e\",f").unwrap(), ["a=b", "c=d,e", "f"]);
        assert!(super::comma_separated("\"a").is_err());
    }
}
