//! What an SBOM attestation tells of beside the result: `BUILDKIT_SBOM_SCAN_CONTEXT` and `BUILDKIT_SBOM_SCAN_STAGE`
//! (docs.docker.com/build/metadata/attestations/sbom). Either is true, false, or the names of the stages it is true for.

use std::collections::BTreeMap;

use super::dispatch::Conversion;
use crate::dockerfile::{Command, Dockerfile, Fault, Span};
use crate::graph::{Action, How, Op, Vertex, VertexId};

const CONTEXT: &str = "BUILDKIT_SBOM_SCAN_CONTEXT";
const STAGE: &str = "BUILDKIT_SBOM_SCAN_STAGE";

/// Where there is no better place to blame.
const BEGINNING: Span = Span { first: 1, last: 1, column: 1 };

/// Whether it is one of these arguments, which are variables for nobody.
pub(super) fn is_scan(name: &str) -> bool {
    name == CONTEXT || name == STAGE
}

impl Conversion<'_> {
    /// The file systems to look through besides the result, by the names of their documents.
    pub(super) fn scans(&mut self) -> Result<BTreeMap<String, VertexId>, Fault> {
        let mut found = BTreeMap::new();
        if !self.options.export.sbom {
            return Ok(found);
        }
        if self.scanned(CONTEXT, self.target)? {
            found.insert("context".to_owned(), self.whole_context());
        }
        for (number, state) in &self.stages {
            if *number != self.target && self.scanned(STAGE, *number)? {
                found.insert(stage_name(self.file, *number), state.root);
            }
        }
        Ok(found)
    }

    fn scanned(&self, name: &str, number: usize) -> Result<bool, Fault> {
        let own = self.stages.get(&number).and_then(|state| state.scans.get(name));
        let value = own.map(|(value, span)| (value.as_str(), *span)).or_else(|| {
            let given = self.options.build_args.get(name).and_then(Option::as_ref);
            let value = given.or_else(|| self.globals.values.get(name))?;
            Some((value.as_str(), declared(self.file, name)))
        });
        let Some((value, span)) = value else { return Ok(false) };
        holds(self.file, value, number).map_err(|wrong| {
            Fault::new(
                span,
                format!("{name}={value}: {wrong:?} is neither true nor false nor a stage's name"),
            )
        })
    }

    /// The main context as a file system.
    fn whole_context(&mut self) -> VertexId {
        let inputs = vec![self.scratch(BEGINNING), self.context("", BEGINNING)];
        let op = Op::Files(vec![Action::Copy {
            input: 1,
            sources: vec!["/".to_owned()],
            destination: "/".to_owned(),
            many: false,
            how: How::default(),
        }]);
        let name = "[internal] take the build context in for its SBOM".to_owned();
        self.graph.add(Vertex { op, inputs, name, no_cache: false, span: BEGINNING })
    }
}

fn declared(file: &Dockerfile, name: &str) -> Span {
    let is_it = |command: &Command| matches!(command, Command::Arg(names) if names.iter().any(|(known, _)| known == name));
    file.globals.iter().find(|global| is_it(&global.command)).map_or(BEGINNING, |global| global.span)
}

fn stage_name(file: &Dockerfile, number: usize) -> String {
    file.stages[number].name().map_or_else(|| format!("stage-{number}"), str::to_owned)
}

/// Whether a value is true for a stage. The error is what no stage is called.
fn holds<'v>(file: &Dockerfile, value: &'v str, number: usize) -> Result<bool, &'v str> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => return Ok(true),
        "" | "0" | "f" | "F" | "false" | "FALSE" | "False" => return Ok(false),
        _ => {}
    }
    let is = |name: &str, number| stage_name(file, number).eq_ignore_ascii_case(name);
    let mut names = value.split(',').map(str::trim);
    match names.clone().find(|name| !(0..file.stages.len()).any(|number| is(name, number))) {
        Some(unknown) => Err(unknown),
        None => Ok(names.any(|name| is(name, number))),
    }
}
