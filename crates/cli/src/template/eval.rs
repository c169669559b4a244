//! Runs a template over a value.

use super::Error;
use super::parse::{Base, Node, Operand, Pipeline};
use crate::value::Value;

/// What a field that is not there means.
#[derive(Debug, Clone, Copy)]
pub enum Missing {
    /// Rows of a list: the field is unknown to this kind of row.
    UnknownField(&'static str),
    /// The header row of a table: every value is a column's title, and functions leave titles alone.
    Titles(&'static str),
    /// Documents: no such key, except the keys the engine leaves out when they are empty.
    Fails,
}

/// The value a template is about, and how it is read.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    data: &'a Value,
    missing: Missing,
}

impl<'a> Scope<'a> {
    pub fn new(data: &'a Value, missing: Missing) -> Self {
        Self { data, missing }
    }
}

/// Keys that the engine omits from its documents when they are empty: absent means empty, not unknown.
const OMITTED_WHEN_EMPTY: &[&str] = &[
    "Annotations",
    "ArgsEscaped",
    "Author",
    "ClusterInfo",
    "Comment",
    "ConfigFrom",
    "Container",
    "CreatedAt",
    "DockerVersion",
    "DriverConfig",
    "DriverOpts",
    "Error",
    "ExposedPorts",
    "Health",
    "Healthcheck",
    "Links",
    "MacAddress",
    "Manifests",
    "Mounts",
    "NetworkDisabled",
    "OnBuild",
    "Options",
    "OsVersion",
    "Parent",
    "Peers",
    "RepoDigests",
    "RepoTags",
    "Scope",
    "Shell",
    "SizeRootFs",
    "SizeRw",
    "Status",
    "StopSignal",
    "StopTimeout",
    "StorageOpt",
    "Sysctls",
    "Tmpfs",
    "UsageData",
    "Variant",
    "Warnings",
];

/// Functions that change values but not titles.
const KEEP_TITLES: &[&str] = &["json", "title", "lower", "upper", "split", "join", "truncate"];

pub fn run(nodes: &[Node], scope: &Scope<'_>, out: &mut String) -> Result<(), Error> {
    let mut machine =
        Machine { missing: scope.missing, variables: vec![("$".to_owned(), scope.data.clone())] };
    machine.block(nodes, scope.data, out)
}

struct Machine {
    missing: Missing,
    variables: Vec<(String, Value)>,
}

impl Machine {
    fn block(&mut self, nodes: &[Node], dot: &Value, out: &mut String) -> Result<(), Error> {
        let depth = self.variables.len();
        for node in nodes {
            match node {
                Node::Literal(text) => out.push_str(text),
                Node::Print(pipeline) => {
                    let value = self.pipeline(pipeline, dot)?;
                    if pipeline.declares.is_empty() {
                        out.push_str(&value.to_string());
                    } else {
                        self.set(pipeline, value);
                    }
                }
                Node::If { arms, otherwise, with } => {
                    let before = self.variables.len();
                    let mut chosen = None;
                    for (condition, body) in arms {
                        let value = self.pipeline(condition, dot)?;
                        self.set(condition, value.clone());
                        if truth(&value) {
                            chosen = Some((body, value));
                            break;
                        }
                    }
                    match chosen {
                        Some((body, value)) if *with => self.block(body, &value, out)?,
                        Some((body, _)) => self.block(body, dot, out)?,
                        None => self.block(otherwise, dot, out)?,
                    }
                    self.variables.truncate(before);
                }
                Node::Range { over, body, otherwise } => self.range(over, body, otherwise, dot, out)?,
            }
        }
        self.variables.truncate(depth);
        Ok(())
    }

    fn range(
        &mut self,
        over: &Pipeline,
        body: &[Node],
        otherwise: &[Node],
        dot: &Value,
        out: &mut String,
    ) -> Result<(), Error> {
        let items: Vec<(Value, Value)> = match self.pipeline(over, dot)? {
            Value::List(items) => {
                items.into_iter().enumerate().map(|(i, item)| (Value::Int(i as i64), item)).collect()
            }
            Value::Map(mut entries) => {
                entries.sort_by(|a, b| a.0.cmp(&b.0));
                entries.into_iter().map(|(key, value)| (Value::Text(key), value)).collect()
            }
            Value::Int(count) => (0..count).map(|i| (Value::Int(i), Value::Int(i))).collect(),
            Value::Null => Vec::new(),
            other => {
                return Err(failure(&over.commands[0][0], format!("range can't iterate over {other}")));
            }
        };
        if items.is_empty() {
            return self.block(otherwise, dot, out);
        }
        for (key, item) in items {
            let depth = self.variables.len();
            match over.declares.as_slice() {
                [value] => self.variables.push((value.clone(), item.clone())),
                [first, second] => {
                    self.variables.push((first.clone(), key));
                    self.variables.push((second.clone(), item.clone()));
                }
                _ => {}
            }
            self.block(body, &item, out)?;
            self.variables.truncate(depth);
        }
        Ok(())
    }

    fn set(&mut self, pipeline: &Pipeline, value: Value) {
        let Some(name) = pipeline.declares.first() else { return };
        if pipeline.assigns
            && let Some(slot) = self.variables.iter_mut().rev().find(|(n, _)| n == name)
        {
            slot.1 = value;
            return;
        }
        self.variables.push((name.clone(), value));
    }

    fn pipeline(&mut self, pipeline: &Pipeline, dot: &Value) -> Result<Value, Error> {
        let mut piped = None;
        for command in &pipeline.commands {
            piped = Some(self.command(command, dot, piped)?);
        }
        Ok(piped.unwrap_or_default())
    }

    fn command(&mut self, command: &[Operand], dot: &Value, piped: Option<Value>) -> Result<Value, Error> {
        let (first, rest) = command
            .split_first()
            .ok_or_else(|| Error::Parse { line: 1, text: "missing value for command".to_owned() })?;
        if let Base::Function(name) = &first.base {
            let mut arguments = Vec::new();
            for operand in rest {
                arguments.push(self.operand(operand, dot)?);
                // `and` and `or` stop at the argument that decides.
                let last = arguments.last().is_some_and(truth);
                if (name == "and" && !last) || (name == "or" && last) {
                    return Ok(arguments.pop().unwrap_or_default());
                }
            }
            arguments.extend(piped);
            if matches!(self.missing, Missing::Titles(_)) && KEEP_TITLES.contains(&name.as_str()) {
                return Ok(if arguments.is_empty() { Value::Null } else { arguments.swap_remove(0) });
            }
            return call(name, arguments)
                .map_err(|text| failure(first, format!("error calling {name}: {text}")));
        }
        let value = self.operand(first, dot)?;
        match (rest, piped) {
            ([], None) => Ok(value),
            // `.Label "key"`: the one method with an argument that docker's rows have.
            ([argument], None) if matches!(value, Value::Map(_)) => {
                let key = self.operand(argument, dot)?;
                if matches!(self.missing, Missing::Titles(_)) {
                    let last = key.text().rsplit('.').next().unwrap_or_default();
                    return Ok(Value::Text(last.replace(['-', '_'], " ")));
                }
                Ok(value.get(key.text()).cloned().unwrap_or_else(|| Value::from("")))
            }
            _ => Err(failure(first, format!("can't give argument to non-function {}", name_of(first)))),
        }
    }

    fn operand(&mut self, operand: &Operand, dot: &Value) -> Result<Value, Error> {
        let base = match &operand.base {
            Base::Dot => dot.clone(),
            Base::Variable(name) => self
                .variables
                .iter()
                .rev()
                .find(|(n, _)| n == name)
                .map(|(_, v)| v.clone())
                .unwrap_or_default(),
            Base::Text(text) => Value::Text(text.clone()),
            Base::Int(number) => Value::Int(*number),
            Base::Float(number) => Value::Float(*number),
            Base::Bool(value) => Value::Bool(*value),
            Base::Nil => Value::Null,
            Base::Group(pipeline) => self.pipeline(pipeline, dot)?,
            Base::Function(name) => call(name, Vec::new())
                .map_err(|text| failure(operand, format!("error calling {name}: {text}")))?,
        };
        let mut value = base;
        for (depth, field) in operand.fields.iter().enumerate() {
            value = self.member(operand, depth, value, field)?;
        }
        Ok(value)
    }

    fn member(&self, operand: &Operand, depth: usize, value: Value, field: &str) -> Result<Value, Error> {
        if let Some(found) = value.get_folded(field) {
            return Ok(found.clone());
        }
        let fail = |text: String| {
            let before: usize = operand.fields[..depth].iter().map(|f| f.len() + 1).sum();
            let mut error = failure(operand, text);
            if let Error::Execute { column, .. } = &mut error {
                *column += before;
            }
            error
        };
        match (self.missing, &value) {
            (Missing::UnknownField(kind) | Missing::Titles(kind), Value::Map(_)) if depth == 0 => {
                Err(fail(format!("can't evaluate field {field} in type {kind}")))
            }
            (_, Value::Map(_)) if OMITTED_WHEN_EMPTY.contains(&field) => Ok(Value::Null),
            (Missing::Fails, Value::Map(_)) => Err(fail(format!("map has no entry for key \"{field}\""))),
            (_, Value::Map(_) | Value::Null) => Ok(Value::Null),
            (_, Value::List(_)) => {
                Err(fail(format!("can't evaluate field {field} in type []interface {{}}")))
            }
            (_, Value::Text(_)) => Err(fail(format!("can't evaluate field {field} in type string"))),
            (_, Value::Int(_) | Value::Float(_)) => {
                Err(fail(format!("can't evaluate field {field} in type float64")))
            }
            (_, Value::Bool(_)) => Err(fail(format!("can't evaluate field {field} in type bool"))),
        }
    }
}

fn name_of(operand: &Operand) -> String {
    let base = match &operand.base {
        Base::Variable(name) | Base::Function(name) => name.clone(),
        Base::Text(text) => format!("{text:?}"),
        Base::Int(number) => number.to_string(),
        Base::Float(number) => number.to_string(),
        Base::Bool(value) => value.to_string(),
        Base::Nil => "nil".to_owned(),
        Base::Dot if operand.fields.is_empty() => ".".to_owned(),
        Base::Dot | Base::Group(_) => String::new(),
    };
    operand.fields.iter().fold(base, |name, field| format!("{name}.{field}"))
}

fn failure(operand: &Operand, text: String) -> Error {
    Error::Execute { column: operand.column, node: name_of(operand), text }
}

pub fn truth(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Int(number) => *number != 0,
        Value::Float(number) => *number != 0.0,
        Value::Text(text) => !text.is_empty(),
        Value::List(items) => !items.is_empty(),
        Value::Map(entries) => !entries.is_empty(),
    }
}

fn call(name: &str, mut arguments: Vec<Value>) -> Result<Value, String> {
    let wants = |count: usize| {
        if arguments.len() < count {
            Err(format!("wrong number of args for {name}: want {count} got {}", arguments.len()))
        } else {
            Ok(())
        }
    };
    let text = |value: &Value| value.to_string();
    Ok(match name {
        "and" | "or" => {
            wants(1)?;
            arguments.pop().unwrap_or_default()
        }
        "not" => {
            wants(1)?;
            Value::Bool(!truth(&arguments[0]))
        }
        "eq" => {
            wants(2)?;
            Value::Bool(arguments[1..].iter().any(|other| equal(&arguments[0], other)))
        }
        "ne" => {
            wants(2)?;
            Value::Bool(!equal(&arguments[0], &arguments[1]))
        }
        "lt" | "le" | "gt" | "ge" => {
            wants(2)?;
            let order = compare(&arguments[0], &arguments[1])?;
            Value::Bool(match name {
                "lt" => order.is_lt(),
                "le" => order.is_le(),
                "gt" => order.is_gt(),
                _ => order.is_ge(),
            })
        }
        "len" => {
            wants(1)?;
            Value::Int(match &arguments[0] {
                Value::Text(text) => text.len(),
                Value::List(items) => items.len(),
                Value::Map(entries) => entries.len(),
                Value::Null => 0,
                other => return Err(format!("len of type {}", kind(other))),
            } as i64)
        }
        "index" => {
            wants(1)?;
            let mut value = arguments.remove(0);
            for key in arguments {
                value = index(value, &key)?;
            }
            value
        }
        "print" => Value::Text(arguments.iter().map(text).collect::<String>()),
        "println" => Value::Text(arguments.iter().map(text).collect::<Vec<_>>().join(" ") + "\n"),
        "printf" => {
            wants(1)?;
            Value::Text(printf(arguments[0].text(), &arguments[1..]))
        }
        "json" => {
            wants(1)?;
            Value::Text(arguments[0].to_json())
        }
        "upper" => {
            wants(1)?;
            Value::Text(text(&arguments[0]).to_uppercase())
        }
        "lower" => {
            wants(1)?;
            Value::Text(text(&arguments[0]).to_lowercase())
        }
        "title" => {
            wants(1)?;
            let source = text(&arguments[0]);
            let mut chars = source.chars();
            Value::Text(chars.next().map_or_else(String::new, |c| c.to_uppercase().chain(chars).collect()))
        }
        // In a header row `table` marks the column; in rows it is the value itself.
        "table" => {
            wants(1)?;
            arguments.remove(0)
        }
        "join" => {
            wants(2)?;
            Value::Text(arguments[0].list().iter().map(text).collect::<Vec<_>>().join(arguments[1].text()))
        }
        "split" => {
            wants(2)?;
            Value::List(text(&arguments[0]).split(arguments[1].text()).map(Value::from).collect())
        }
        "pad" => {
            wants(3)?;
            let spaces = |value: &Value| " ".repeat(usize::try_from(value.int()).unwrap_or(0));
            let source = text(&arguments[0]);
            if source.is_empty() {
                Value::Text(source)
            } else {
                Value::Text(format!("{}{source}{}", spaces(&arguments[1]), spaces(&arguments[2])))
            }
        }
        "truncate" => {
            wants(2)?;
            let length = usize::try_from(arguments[1].int()).unwrap_or(0);
            Value::Text(text(&arguments[0]).chars().take(length).collect())
        }
        other => return Err(format!("function \"{other}\" not defined")),
    })
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nil",
        Value::Bool(_) => "bool",
        Value::Int(_) => "int",
        Value::Float(_) => "float64",
        Value::Text(_) => "string",
        Value::List(_) => "slice",
        Value::Map(_) => "map",
    }
}

fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Int(_), Value::Float(_)) | (Value::Float(_), Value::Int(_)) => {
            (a.float() - b.float()).abs() < f64::EPSILON
        }
        _ => a == b,
    }
}

fn compare(a: &Value, b: &Value) -> Result<std::cmp::Ordering, String> {
    match (a, b) {
        (Value::Text(a), Value::Text(b)) => Ok(a.cmp(b)),
        (Value::Int(a), Value::Int(b)) => Ok(a.cmp(b)),
        (Value::Int(_) | Value::Float(_), Value::Int(_) | Value::Float(_)) => {
            a.float().partial_cmp(&b.float()).ok_or_else(|| "not comparable".to_owned())
        }
        _ => Err("incompatible types for comparison".to_owned()),
    }
}

fn index(value: Value, key: &Value) -> Result<Value, String> {
    match value {
        Value::Map(entries) => {
            let texts = entries.iter().all(|(_, v)| matches!(v, Value::Text(_)));
            let found = entries.into_iter().find(|(k, _)| k == key.text()).map(|(_, v)| v);
            Ok(found.unwrap_or_else(|| if texts { Value::from("") } else { Value::Null }))
        }
        Value::List(mut items) => match usize::try_from(key.int()) {
            Ok(at) if at < items.len() => Ok(items.swap_remove(at)),
            _ => Err(format!("index out of range: {key}")),
        },
        Value::Null => Err("index of untyped nil".to_owned()),
        other => Err(format!("can't index item of type {}", kind(&other))),
    }
}

/// The verbs people use in formats: `%s %d %v %q %x %t %f %%`, with width, `-`, `0` and precision.
fn printf(format: &str, arguments: &[Value]) -> String {
    let mut out = String::new();
    let mut next = arguments.iter();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut flags = String::new();
        while let Some(c) = chars.peek().filter(|c| "-+0 #".contains(**c)) {
            flags.push(*c);
            chars.next();
        }
        let mut digits = String::new();
        while let Some(c) = chars.peek().filter(|c| c.is_ascii_digit() || **c == '.') {
            digits.push(*c);
            chars.next();
        }
        let Some(verb) = chars.next() else {
            out.push_str("%!(NOVERB)");
            break;
        };
        if verb == '%' {
            out.push('%');
            continue;
        }
        let Some(value) = next.next() else {
            out.extend(["%!", verb.encode_utf8(&mut [0; 4]), "(MISSING)"]);
            continue;
        };
        let (width, precision) = match digits.split_once('.') {
            Some((width, precision)) => (width, Some(precision.parse::<usize>().unwrap_or(0))),
            None => (digits.as_str(), None),
        };
        let width = width.parse::<usize>().unwrap_or(0);
        let body = match verb {
            'q' => format!("{:?}", value.to_string()),
            'x' => match value {
                Value::Int(number) => format!("{number:x}"),
                other => other.to_string().bytes().map(|b| format!("{b:02x}")).collect::<Vec<_>>().concat(),
            },
            'f' => format!("{:.*}", precision.unwrap_or(6), value.float()),
            's' => match precision {
                Some(length) => value.to_string().chars().take(length).collect(),
                None => value.to_string(),
            },
            _ => value.to_string(),
        };
        let padding = width.saturating_sub(body.chars().count());
        if flags.contains('-') {
            out.push_str(&body);
            out.push_str(&" ".repeat(padding));
        } else if flags.contains('0') {
            out.push_str(&"0".repeat(padding));
            out.push_str(&body);
        } else {
            out.push_str(&" ".repeat(padding));
            out.push_str(&body);
        }
    }
    out
}
