//! The part of Go's text/template that `--format` needs.
//!
//! Fields, variables, pipelines, `if`/`with`/`range` with `else`, comparisons, and docker's functions. Messages are Go's,
//! because people search for them.

mod eval;
mod lex;
mod parse;

pub use eval::{Missing, Scope};

#[derive(Debug, Clone)]
pub struct Template {
    nodes: Vec<parse::Node>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("template: :{line}: {text}")]
    Parse { line: usize, text: String },
    #[error("template: :1:{column}: executing \"\" at <{node}>: {text}")]
    Execute { column: usize, node: String, text: String },
}

impl Template {
    pub fn parse(source: &str) -> Result<Self, Error> {
        parse::parse(source).map(|nodes| Self { nodes })
    }

    pub fn render(&self, scope: &Scope<'_>) -> Result<String, Error> {
        let mut out = String::new();
        eval::run(&self.nodes, scope, &mut out)?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::value::Value;

    fn render(source: &str) -> Result<String, Error> {
        let data = Value::parse(
            br#"{"Name":"web","ID":"0123456789ab","N":3,"Zero":0,"On":true,"Off":false,"Labels":{"b":"2","a":"1"},
                 "List":["x","y","z"],"Empty":[],"Null":null,"State":{"Status":"running","ExitCode":0},
                 "Ports":{"80/tcp":[{"HostIp":"0.0.0.0","HostPort":"8080"}],"81/tcp":null}}"#,
        )
        .unwrap();
        Template::parse(source)?.render(&Scope::new(&data, Missing::Fails))
    }

    #[test]
    fn renders_as_go_does() {
        // Each right side is what docker's command prints for the same data.
        for (source, want) in [
            ("{{.Name}}", "web"),
            ("a{{- .Name -}} b", "awebb"),
            ("{{.State.Status}} {{.State.ExitCode}}", "running 0"),
            ("{{.id}}", "0123456789ab"),
            ("{{json .Labels}}", r#"{"b":"2","a":"1"}"#),
            ("{{.Labels}}", "map[a:1 b:2]"),
            ("{{.List}}", "[x y z]"),
            ("{{upper .Name}} {{.Name | upper | lower}}", "WEB web"),
            ("{{join .List \",\"}}", "x,y,z"),
            ("{{index .List 1}} {{index .Labels \"a\"}}", "y 1"),
            ("{{index .Labels \"none\"}}", ""),
            ("{{(index (index .Ports \"80/tcp\") 0).HostPort}}", "8080"),
            ("{{range .List}}[{{.}}]{{end}}", "[x][y][z]"),
            ("{{range $i, $e := .List}}{{$i}}={{$e}};{{end}}", "0=x;1=y;2=z;"),
            ("{{range $k, $v := .Labels}}{{$k}}:{{$v}} {{end}}", "a:1 b:2 "),
            ("{{range .Empty}}x{{else}}none{{end}}", "none"),
            (
                "{{range $p, $c := .Ports}}{{$p}}->{{if $c}}{{(index $c 0).HostPort}}{{else}}-{{end}} {{end}}",
                "80/tcp->8080 81/tcp->- ",
            ),
            ("{{if .On}}yes{{else}}no{{end}}{{if .Off}}yes{{else}}no{{end}}", "yesno"),
            ("{{if eq .Name \"web\"}}a{{else if .On}}b{{else}}c{{end}}", "a"),
            ("{{if ne .N 3}}a{{else if .On}}b{{else}}c{{end}}", "b"),
            ("{{if and .On (not .Off)}}both{{end}}", "both"),
            ("{{or .Zero .Name}}", "web"),
            ("{{and .Name .N}}", "3"),
            ("{{len .List}} {{len .Name}}", "3 3"),
            ("{{with .State}}{{.Status}}{{end}}", "running"),
            ("{{$x := .Name}}{{$x}}-{{$.N}}", "web-3"),
            ("{{println .Name}}", "web\n"),
            ("{{printf \"%s=%d %q %-5s|%05d\" .Name .N .Name .Name .N}}", "web=3 \"web\" web  |00003"),
            ("{{split .Name \"e\"}}", "[w b]"),
            ("{{title .Name}} {{pad .Name 1 2}}| {{truncate .ID 4}}", "Web  web  | 0123"),
            ("{{lt .N 4}} {{ge .N 4}}", "true false"),
            ("{{.Null}}", "<no value>"),
            ("{{/* nothing */}}x", "x"),
            ("{{\"a\\tb\"}}{{`c\\t`}}", "a\tbc\\t"),
            ("{{true}} {{1.5}}", "true 1.5"),
        ] {
            assert_eq!(render(source).unwrap(), want, "{source}");
        }
    }

    #[test]
    fn errors_are_gos() {
        for (source, want) in [
            ("{{.ID", "template: :1: unclosed action"),
            ("{{foo .ID}}", "template: :1: function \"foo\" not defined"),
            ("{{if .ID}}", "template: :1: unexpected EOF"),
            ("{{end}}", "template: :1: unexpected {{end}}"),
            ("{{$x}}", "template: :1: undefined variable \"$x\""),
            ("{{.Foo}}", "template: :1:2: executing \"\" at <.Foo>: map has no entry for key \"Foo\""),
            (
                "{{.State.Foo}}",
                "template: :1:8: executing \"\" at <.State.Foo>: map has no entry for key \"Foo\"",
            ),
        ] {
            assert_eq!(render(source).unwrap_err().to_string(), want, "{source}");
        }
    }
}
