//! Lists: rows of named fields, shown as a table, by a template, or as JSON lines, as `--format` says.

mod table;

pub use table::{align, align_wide};

use crate::fault::{Fault, Outcome};
use crate::output;
use crate::template::{Missing, Scope, Template};
use crate::value::Value;

/// One row: the fields templates may name. Those in `hidden` answer templates but stay out of JSON.
#[derive(Debug, Default)]
pub struct Row {
    fields: Vec<(String, Value)>,
    hidden: Vec<(String, Value)>,
}

impl Row {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.fields.push((name.to_owned(), value.into()));
        self
    }

    /// A field for templates alone, such as the map behind `.Label "key"`.
    pub fn hidden(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.hidden.push((name.to_owned(), value.into()));
        self
    }

    fn json(&self) -> String {
        Self { fields: self.fields.clone(), hidden: Vec::new() }.into_document().to_json()
    }

    /// As a part of a document: what JSON has of it, in its order.
    pub fn into_document(self) -> Value {
        let mut fields = self.fields;
        fields.sort_by(|a, b| a.0.cmp(&b.0));
        Value::Map(fields)
    }

    fn value(self) -> Value {
        let mut all = self.fields;
        all.extend(self.hidden);
        Value::Map(all)
    }
}

/// A kind of list: its columns' titles, and the table shown when no format is given.
#[derive(Debug)]
pub struct Listing<'a> {
    /// Go's name of the row's type, for messages.
    pub kind: &'static str,
    pub titles: &'a [(&'a str, &'a str)],
    pub table: &'a str,
}

impl Listing<'_> {
    /// The whole list as text. `format` is empty for the default table.
    pub fn render(&self, format: &str, rows: Vec<Row>) -> Outcome<String> {
        let format = format.replace("\\t", "\t").replace("\\n", "\n");
        if format == "json" {
            return Ok(rows.iter().map(|row| row.json() + "\n").collect());
        }
        let (source, is_table) = match format.strip_prefix("table") {
            _ if format.is_empty() => (self.table, true),
            Some("") => (self.table, true),
            Some(rest) if rest.starts_with([' ', '\t']) => (rest.trim(), true),
            _ => (format.as_str(), false),
        };
        let template = Template::parse(source)
            .map_err(|error| Fault::said(format!("failed to parse template: {error}")))?;
        let fail = |error| Fault::said(format!("failed to execute template: {error}"));
        let mut text = String::new();
        if is_table {
            let mut titles: Vec<(String, Value)> =
                self.titles.iter().map(|(field, title)| ((*field).to_owned(), Value::from(*title))).collect();
            titles.push(("Label".to_owned(), Value::Map(Vec::new())));
            let titles = Value::Map(titles);
            text.push_str(&template.render(&Scope::new(&titles, Missing::Titles(self.kind))).map_err(fail)?);
            text.push('\n');
        }
        for row in rows {
            let value = row.value();
            text.push_str(
                &template.render(&Scope::new(&value, Missing::UnknownField(self.kind))).map_err(fail)?,
            );
            text.push('\n');
        }
        Ok(if is_table { align(&text) } else { text })
    }

    pub fn print(&self, format: &str, rows: Vec<Row>) -> Outcome {
        output::write(&self.render(format, rows)?);
        Ok(())
    }
}

/// Renders one document by a template, as `inspect` and `version` do.
pub fn document(format: &str, value: &Value) -> Outcome<String> {
    let source = if format == "json" { "{{json .}}" } else { format };
    let template =
        Template::parse(source).map_err(|error| Fault::said(format!("template parsing error: {error}")))?;
    template
        .render(&Scope::new(value, Missing::Fails))
        .map_err(|error| Fault::said(format!("template parsing error: {error}")))
}

/// `a=b,c=` sorted, as lists show labels.
pub fn labels(value: &Value) -> String {
    let mut pairs: Vec<String> =
        value.entries().iter().map(|(key, value)| format!("{key}={}", value.text())).collect();
    pairs.sort();
    pairs.join(",")
}

/// An id as lists show it: twelve digits, without its algorithm.
pub fn short_id(id: &str) -> &str {
    let bare = id.split_once(':').map_or(id, |(_, hex)| hex);
    bare.get(..12).unwrap_or(bare)
}

/// At most `width` characters, the last one an ellipsis when something is missing.
pub fn ellipsis(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width - 1).chain(['…']).collect()
}

/// `--filter key=value` flags as the query parameter the engine wants; None when there are none.
pub fn filters(given: &[&str]) -> Outcome<Option<String>> {
    let mut all: Vec<(String, Vec<(String, Value)>)> = Vec::new();
    for filter in given.iter().filter(|filter| !filter.is_empty()) {
        let Some((key, value)) = filter.split_once('=') else {
            return Err(Fault::said(format!(
                "invalid argument \"{filter}\" for \"-f, --filter\" flag: invalid filter '{filter}': use key=value"
            )));
        };
        let (key, value) = (key.trim().to_lowercase(), value.trim().to_owned());
        match all.iter_mut().find(|(known, _)| *known == key) {
            Some((_, values)) => values.push((value, Value::Bool(true))),
            None => all.push((key, vec![(value, Value::Bool(true))])),
        }
    }
    if all.is_empty() {
        return Ok(None);
    }
    let map = Value::Map(all.into_iter().map(|(key, values)| (key, Value::Map(values))).collect());
    serde_json::to_string(&map).map(Some).map_err(|error| Fault::said(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: Listing<'_> = Listing {
        kind: "*formatter.ContainerContext",
        titles: &[("ID", "CONTAINER ID"), ("Names", "NAMES")],
        table: "{{.ID}}\t{{.Names}}",
    };

    fn rows() -> Vec<Row> {
        let labels = Value::Map(vec![("a".to_owned(), Value::from("b"))]);
        vec![Row::new().with("Names", "web").with("ID", "11cf2b78be20").hidden("Label", labels)]
    }

    #[test]
    fn tables_templates_and_json() {
        assert_eq!(LIST.render("", rows()).unwrap(), "CONTAINER ID   NAMES\n11cf2b78be20   web\n");
        assert_eq!(
            LIST.render(r#"table {{.ID}}\t{{.Label "a"}}\t{{upper .Names}}"#, rows()).unwrap(),
            "CONTAINER ID   a         NAMES\n11cf2b78be20   b         WEB\n"
        );
        assert_eq!(LIST.render("json", rows()).unwrap(), "{\"ID\":\"11cf2b78be20\",\"Names\":\"web\"}\n");
        assert_eq!(LIST.render(r"{{.Names}}\t{{.ID}}", rows()).unwrap(), "web\t11cf2b78be20\n");
        assert_eq!(
            LIST.render("{{.Foo}}", rows()).unwrap_err().to_string(),
            "failed to execute template: template: :1:2: executing \"\" at <.Foo>: can't evaluate field Foo in type *formatter.ContainerContext"
        );
        assert_eq!(
            LIST.render("{{.ID", rows()).unwrap_err().to_string(),
            "failed to parse template: template: :1: unclosed action"
        );
    }

    #[test]
    fn filters_become_the_engines_maps() {
        assert_eq!(
            filters(&["label=a=b", "label=c", "status=exited"]).unwrap().unwrap(),
            r#"{"label":{"a=b":true,"c":true},"status":{"exited":true}}"#
        );
        assert!(filters(&["oops"]).unwrap_err().to_string().contains("oops"));
    }
}
