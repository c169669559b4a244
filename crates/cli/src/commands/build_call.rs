//! `brig build --call`: what the engine tells of a Dockerfile without building it, in buildx's tables or as JSON.

use crate::args::Matches;
use crate::fault::{Fault, Outcome};
use crate::output;
use crate::value::Value;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    what: What,
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Check,
    Outline,
    Targets,
}

impl Call {
    /// `None` is a build.
    pub fn of(matches: &Matches) -> Outcome<Option<Self>> {
        Self::parse(matches.text("call"), matches.is("check"))
    }

    fn parse(text: &str, check: bool) -> Outcome<Option<Self>> {
        let wrong = |why: &str| Fault::said(format!("--call {text}: {why}"));
        let (mut fields, mut json) = (text.split(','), false);
        let name = fields.next().unwrap_or_default();
        for field in fields {
            match field {
                "format=json" => json = true,
                "format=text" | "format=" => json = false,
                _ => return Err(wrong("format=text and format=json are known")),
            }
        }
        let what = match name {
            "" | "build" if check => What::Check,
            "" | "build" => return Ok(None),
            "check" | "lint" => What::Check,
            "outline" => What::Outline,
            "targets" => What::Targets,
            _ => return Err(wrong("build, check, outline and targets are known")),
        };
        Ok(Some(Self { what, json }))
    }

    /// The request's name for it.
    pub fn name(self) -> &'static str {
        match self.what {
            What::Check => "check",
            What::Outline => "outline",
            What::Targets => "targets",
        }
    }

    /// Whether more than the Dockerfile and its ignore file is looked at.
    pub fn needs_contexts(self) -> bool {
        self.what == What::Check
    }

    /// Shows the answer.
    pub fn show(self, told: &Value) -> Outcome {
        if self.json {
            output::line(&told.to_indented());
        }
        match self.what {
            What::Check => checked(told, self.json),
            What::Outline if !self.json => {
                output::write(&outline(told));
                Ok(())
            }
            What::Targets if !self.json => {
                output::write(&targets(told));
                Ok(())
            }
            What::Outline | What::Targets => Ok(()),
        }
    }
}

/// What the build checks found; anything at all is a failure.
fn checked(told: &Value, json: bool) -> Outcome {
    let warnings = told.at("Warnings").list();
    for warning in warnings.iter().filter(|_| !json) {
        output::line(&format!("WARNING: {}", warning.at("Rule").text()));
        output::line(warning.at("Excerpt").text());
    }
    match warnings.len() {
        0 => {
            if !json {
                output::line("Check complete, no warnings found.");
            }
            Ok(())
        }
        1 => Err(Fault::said("1 warning was found")),
        count => Err(Fault::said(format!("{count} warnings were found"))),
    }
}

fn targets(told: &Value) -> String {
    let mut rows = vec![["TARGET".to_owned(), "DESCRIPTION".to_owned()]];
    for target in told.at("targets").list() {
        let (name, default) = (target.at("name").text(), target.at("default").bool());
        let name = match (name, default) {
            ("", true) => "(default)".to_owned(),
            (name, true) => format!("{name} (default)"),
            (name, false) => name.to_owned(),
        };
        rows.push([name, target.at("description").text().to_owned()]);
    }
    columns(&rows, 2)
}

fn outline(told: &Value) -> String {
    let text = |value: &Value, key: &str| value.at(key).text().to_owned();
    let mut tables = Vec::new();
    let (name, description) = (text(told, "name"), text(told, "description"));
    if !name.is_empty() || !description.is_empty() {
        let mut rows = vec![["TARGET:".to_owned(), name]];
        if !description.is_empty() {
            rows.push(["DESCRIPTION:".to_owned(), description]);
        }
        tables.push(columns(&rows, 3));
    }
    let args = told.at("args").list();
    if !args.is_empty() {
        let mut rows = vec![["BUILD ARG", "VALUE", "DESCRIPTION"].map(str::to_owned)];
        rows.extend(args.iter().map(|arg| [text(arg, "name"), text(arg, "value"), text(arg, "description")]));
        tables.push(columns(&rows, 3));
    }
    for (key, title) in [("secrets", "SECRET"), ("ssh", "SSH")] {
        let all = told.at(key).list();
        if !all.is_empty() {
            let mut rows = vec![[title.to_owned(), "REQUIRED".to_owned()]];
            let required = |one: &Value| if one.at("required").bool() { "true" } else { "" }.to_owned();
            rows.extend(all.iter().map(|one| [text(one, "name"), required(one)]));
            tables.push(columns(&rows, 3));
        }
    }
    tables.join("\n")
}

/// Rows with `gap` blanks between the widest cells.
fn columns<const N: usize>(rows: &[[String; N]], gap: usize) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width + gap - cell.chars().count()));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_is_read() {
        let parse = |text, check| Call::parse(text, check).ok().unwrap();
        assert_eq!(parse("", false), None);
        assert_eq!(parse("build", true), Some(Call { what: What::Check, json: false }));
        assert_eq!(parse("outline,format=json", false), Some(Call { what: What::Outline, json: true }));
        assert_eq!(parse("targets,format=text", false), Some(Call { what: What::Targets, json: false }));
        for text in ["stages", "outline,format=xml", "targets,x"] {
            assert!(Call::parse(text, false).is_err(), "{text}");
        }
    }

    #[test]
    fn tables_are_buildxs() {
        let told = Value::parse(
            br#"{"name":"app","description":"the program","args":[{"name":"V","value":"1","description":"what version"},{"name":"LONG"}],
                "secrets":[{"name":"token","required":true}],"ssh":[{"name":"default"}]}"#,
        );
        insta::assert_snapshot!(outline(&told.unwrap()), @r"
        TARGET:        app
        DESCRIPTION:   the program

        BUILD ARG   VALUE   DESCRIPTION
        V           1       what version
        LONG

        SECRET   REQUIRED
        token    true

        SSH       REQUIRED
        default
        ");
        let told = Value::parse(
            br#"{"targets":[{"name":"base"},{"name":"app","default":true,"description":"the program"}]}"#,
        );
        insta::assert_snapshot!(targets(&told.unwrap()), @r"
        TARGET         DESCRIPTION
        base
        app (default)  the program
        ");
    }
}
