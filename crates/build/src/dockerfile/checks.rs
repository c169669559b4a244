//! Build checks: remarks on Dockerfiles that are valid, but probably not meant the way they are written.
//!
//! The rules carry the frontend's names (docs.docker.com, "Build checks"). Here are those that need only the text;
//! the ones that need variables, base images or the context's ignore file are made by [`crate::convert`].
//! `# check=` directives and `BUILDKIT_DOCKERFILE_CHECK` decide which are told, and whether they fail the build.

use std::collections::BTreeSet;
use std::fmt;

use super::flags::nearest;
use super::instruction::{Command, Form, Instruction};
use super::{Dockerfile, Span};

/// A check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub enum Rule {
    ConsistentInstructionCasing,
    CopyIgnoredFile,
    DuplicateStageName,
    ExposeInvalidFormat,
    ExposeProtoCasing,
    FromAsCasing,
    FromPlatformFlagConstDisallowed,
    InvalidBaseImagePlatform,
    InvalidDefaultArgInFrom,
    InvalidDefinitionDescription,
    #[serde(rename = "JSONArgsRecommended")]
    JsonArgsRecommended,
    LegacyKeyValueFormat,
    MaintainerDeprecated,
    MultipleInstructionsDisallowed,
    NoEmptyContinuation,
    RedundantTargetPlatform,
    ReservedStageName,
    SecretsUsedInArgOrEnv,
    StageNameCasing,
    UndefinedArgInFrom,
    UndefinedVar,
    WorkdirRelativePath,
}

impl Rule {
    pub const ALL: [Self; 22] = [
        Self::ConsistentInstructionCasing,
        Self::CopyIgnoredFile,
        Self::DuplicateStageName,
        Self::ExposeInvalidFormat,
        Self::ExposeProtoCasing,
        Self::FromAsCasing,
        Self::FromPlatformFlagConstDisallowed,
        Self::InvalidBaseImagePlatform,
        Self::InvalidDefaultArgInFrom,
        Self::InvalidDefinitionDescription,
        Self::JsonArgsRecommended,
        Self::LegacyKeyValueFormat,
        Self::MaintainerDeprecated,
        Self::MultipleInstructionsDisallowed,
        Self::NoEmptyContinuation,
        Self::RedundantTargetPlatform,
        Self::ReservedStageName,
        Self::SecretsUsedInArgOrEnv,
        Self::StageNameCasing,
        Self::UndefinedArgInFrom,
        Self::UndefinedVar,
        Self::WorkdirRelativePath,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::ConsistentInstructionCasing => "ConsistentInstructionCasing",
            Self::CopyIgnoredFile => "CopyIgnoredFile",
            Self::DuplicateStageName => "DuplicateStageName",
            Self::ExposeInvalidFormat => "ExposeInvalidFormat",
            Self::ExposeProtoCasing => "ExposeProtoCasing",
            Self::FromAsCasing => "FromAsCasing",
            Self::FromPlatformFlagConstDisallowed => "FromPlatformFlagConstDisallowed",
            Self::InvalidBaseImagePlatform => "InvalidBaseImagePlatform",
            Self::InvalidDefaultArgInFrom => "InvalidDefaultArgInFrom",
            Self::InvalidDefinitionDescription => "InvalidDefinitionDescription",
            Self::JsonArgsRecommended => "JSONArgsRecommended",
            Self::LegacyKeyValueFormat => "LegacyKeyValueFormat",
            Self::MaintainerDeprecated => "MaintainerDeprecated",
            Self::MultipleInstructionsDisallowed => "MultipleInstructionsDisallowed",
            Self::NoEmptyContinuation => "NoEmptyContinuation",
            Self::RedundantTargetPlatform => "RedundantTargetPlatform",
            Self::ReservedStageName => "ReservedStageName",
            Self::SecretsUsedInArgOrEnv => "SecretsUsedInArgOrEnv",
            Self::StageNameCasing => "StageNameCasing",
            Self::UndefinedArgInFrom => "UndefinedArgInFrom",
            Self::UndefinedVar => "UndefinedVar",
            Self::WorkdirRelativePath => "WorkdirRelativePath",
        }
    }

    /// Told only when asked for.
    fn experimental(self) -> bool {
        self == Self::InvalidDefinitionDescription
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A remark of one of the checks.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Warning {
    pub rule: Rule,
    pub message: String,
    pub span: Span,
}

impl Warning {
    pub fn new(rule: Rule, span: Span, message: impl Into<String>) -> Self {
        Self { rule, message: message.into(), span }
    }
}

/// What a `check=` directive says: `skip=A,B|all;error=true;experimental=C|all`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Checks {
    skip: Names,
    experimental: Names,
    /// Remarks fail the build.
    pub error: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Names {
    all: bool,
    some: BTreeSet<String>,
}

impl Names {
    fn parse(text: &str) -> Self {
        Self {
            all: text.trim().eq_ignore_ascii_case("all"),
            some: text.split(',').map(|name| name.trim().to_owned()).collect(),
        }
    }

    fn have(&self, rule: Rule) -> bool {
        self.all || self.some.iter().any(|name| name.eq_ignore_ascii_case(rule.name()))
    }
}

impl Checks {
    /// Decodes a directive's value.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut checks = Self::default();
        for part in text.split(';').map(str::trim).filter(|part| !part.is_empty()) {
            let Some((key, value)) = part.split_once('=') else {
                return Err(format!(
                    "invalid check option {part:?}: skip=, error= or experimental= is expected"
                ));
            };
            match key.trim().to_ascii_lowercase().as_str() {
                "skip" => checks.skip = Names::parse(value),
                "experimental" => checks.experimental = Names::parse(value),
                "error" => {
                    checks.error = match value.trim().to_ascii_lowercase().as_str() {
                        "true" | "1" => true,
                        "false" | "0" => false,
                        other => return Err(format!("invalid check option error={other}: not a boolean")),
                    }
                }
                other => {
                    return Err(format!(
                        "invalid check option {other:?}: skip=, error= or experimental= is expected"
                    ));
                }
            }
        }
        Ok(checks)
    }

    fn tells(&self, rule: Rule) -> bool {
        !self.skip.have(rule) && (!rule.experimental() || self.experimental.have(rule))
    }

    /// What is left of `warnings`: each once, in the file's order.
    pub fn select(&self, file: &Dockerfile, warnings: Vec<Warning>) -> Vec<Warning> {
        let quiet: Vec<(Span, Self)> = file
            .stages
            .iter()
            .flat_map(|stage| std::iter::once(&stage.from).chain(&stage.instructions))
            .chain(&file.globals)
            .filter_map(|instruction| {
                Some((instruction.span, Self::parse(instruction.check.as_deref()?).ok()?))
            })
            .collect();
        let mut left: Vec<Warning> = Vec::new();
        for warning in warnings {
            let skipped = quiet.iter().any(|(span, own)| {
                (span.first..=span.last).contains(&warning.span.first) && own.skip.have(warning.rule)
            });
            if self.tells(warning.rule) && !skipped && !left.contains(&warning) {
                left.push(warning);
            }
        }
        left.sort_by_key(|warning| (warning.span.first, warning.span.column, warning.rule));
        left
    }
}

/// The remarks that need no more than the file.
pub(super) fn remarks(file: &Dockerfile, text: &str) -> Vec<Warning> {
    let mut found = Vec::new();
    casing(file, &mut found);
    stage_names(file, &mut found);
    let lines: Vec<&str> = text.lines().collect();
    for global in &file.globals {
        described(global, &lines, &mut found);
    }
    for stage in &file.stages {
        from(&stage.from, &mut found);
        described(&stage.from, &lines, &mut found);
        let mut shell_set = false;
        let mut effective: [Option<&Instruction>; 3] = [None; 3];
        for instruction in &stage.instructions {
            let span = instruction.span;
            let only = match &instruction.command {
                Command::Cmd(_) => Some((0, "CMD")),
                Command::Entrypoint(_) => Some((1, "ENTRYPOINT")),
                Command::Healthcheck(_) => Some((2, "HEALTHCHECK")),
                _ => None,
            };
            if let Some((slot, keyword)) = only
                && let Some(earlier) = effective[slot].replace(instruction)
            {
                found.push(Warning::new(
                    Rule::MultipleInstructionsDisallowed,
                    earlier.span,
                    format!("this {keyword} has no effect: a later one in the same stage replaces it"),
                ));
            }
            match &instruction.command {
                Command::Shell(_) => shell_set = true,
                Command::Cmd(Form::Shell(text)) | Command::Entrypoint(Form::Shell(text))
                    if !shell_set && !text.is_empty() =>
                {
                    let keyword = instruction.keyword.to_ascii_uppercase();
                    found.push(Warning::new(
                        Rule::JsonArgsRecommended,
                        span,
                        format!(
                            "{keyword} in shell form starts a shell that keeps signals from the program: write it as a JSON array"
                        ),
                    ));
                }
                Command::Maintainer(_) => found.push(Warning::new(
                    Rule::MaintainerDeprecated,
                    span,
                    "MAINTAINER is deprecated: use LABEL org.opencontainers.image.authors",
                )),
                Command::Env(pairs) => {
                    legacy(instruction, "ENV", &mut found);
                    for (name, _) in pairs {
                        secret(name, "ENV", span, &mut found);
                    }
                }
                Command::Label(_) => legacy(instruction, "LABEL", &mut found),
                Command::Arg(names) => {
                    described(instruction, &lines, &mut found);
                    for (name, _) in names {
                        secret(name, "ARG", span, &mut found);
                    }
                }
                Command::Expose(text) => expose(text, span, &mut found),
                _ => {}
            }
        }
    }
    found
}

fn casing(file: &Dockerfile, found: &mut Vec<Warning>) {
    let all: Vec<&Instruction> = file
        .globals
        .iter()
        .chain(file.stages.iter().flat_map(|stage| std::iter::once(&stage.from).chain(&stage.instructions)))
        .collect();
    let lower = all.iter().filter(|one| is_lower(&one.keyword)).count();
    let upper = all.iter().filter(|one| is_upper(&one.keyword)).count();
    let (wanted, right): (&str, fn(&str) -> bool) =
        if lower > upper { ("lower", is_lower) } else { ("upper", is_upper) };
    for instruction in all.into_iter().filter(|one| !right(&one.keyword)) {
        found.push(Warning::new(
            Rule::ConsistentInstructionCasing,
            instruction.span,
            format!(
                "{:?} is written unlike most instructions of this file, which are in {wanted} case",
                instruction.keyword
            ),
        ));
    }
}

fn is_lower(word: &str) -> bool {
    !word.contains(|c: char| c.is_ascii_uppercase())
}

fn is_upper(word: &str) -> bool {
    !word.contains(|c: char| c.is_ascii_lowercase())
}

/// The words of a FROM as they are written: `as` and the stage's name.
fn as_written(from: &Instruction) -> Option<(&str, &str)> {
    let mut words = from.original.split_whitespace().rev();
    let (name, keyword) = (words.next()?, words.next()?);
    keyword.eq_ignore_ascii_case("as").then_some((keyword, name))
}

fn stage_names(file: &Dockerfile, found: &mut Vec<Warning>) {
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    for stage in &file.stages {
        let (Some(name), Some((_, written))) = (stage.name(), as_written(&stage.from)) else { continue };
        let span = stage.from.span;
        if !is_lower(written) {
            found.push(Warning::new(
                Rule::StageNameCasing,
                span,
                format!("stage names are compared in lower case: write {name:?} instead of {written:?}"),
            ));
        }
        if matches!(name, "scratch" | "context") {
            found.push(Warning::new(
                Rule::ReservedStageName,
                span,
                format!("the stage name {name:?} is reserved: choose another"),
            ));
        }
        if !seen.insert(name) {
            found.push(Warning::new(
                Rule::DuplicateStageName,
                span,
                format!("the stage name {name:?} is used twice: the later stage hides the earlier"),
            ));
        }
    }
}

fn from(from: &Instruction, found: &mut Vec<Warning>) {
    let Command::From { platform, name, .. } = &from.command else { return };
    let span = from.span;
    if let Some((keyword, _)) = as_written(from)
        && !(is_lower(keyword) && is_lower(&from.keyword) || is_upper(keyword) && is_upper(&from.keyword))
    {
        found.push(Warning::new(
            Rule::FromAsCasing,
            span,
            format!("{:?} and {keyword:?} are not written in the same case", from.keyword),
        ));
    }
    let Some(platform) = platform.as_deref() else { return };
    if matches!(platform, "$TARGETPLATFORM" | "${TARGETPLATFORM}") {
        found.push(Warning::new(
            Rule::RedundantTargetPlatform,
            span,
            format!("--platform={platform} is what FROM does anyway: leave it out"),
        ));
    } else if !platform.contains('$') {
        // A stage that is named after its platform is meant for it.
        let named = name.as_deref().is_some_and(|name| {
            platform.split('/').any(|part| !part.is_empty() && name.contains(&part.to_ascii_lowercase()))
        });
        if !named {
            found.push(Warning::new(
                Rule::FromPlatformFlagConstDisallowed,
                span,
                format!("--platform={platform} is a constant: the image is for that platform whatever is asked for"),
            ));
        }
    }
}

fn legacy(instruction: &Instruction, keyword: &str, found: &mut Vec<Warning>) {
    let first = instruction.original.split_whitespace().nth(1).unwrap_or_default();
    if !first.contains('=') {
        found.push(Warning::new(
            Rule::LegacyKeyValueFormat,
            instruction.span,
            format!("write {keyword} {first}=value: the form with a blank is a leftover"),
        ));
    }
}

fn secret(name: &str, keyword: &str, span: Span, found: &mut Vec<Warning>) {
    const SECRET: &[&str] = &[
        "apikey",
        "auth",
        "credential",
        "credentials",
        "key",
        "password",
        "pword",
        "passwd",
        "secret",
        "token",
    ];
    let lower = name.to_ascii_lowercase();
    let mut parts = lower.split('_');
    if parts.clone().any(|part| SECRET.contains(&part)) && !parts.any(|part| part == "public") {
        found.push(Warning::new(
            Rule::SecretsUsedInArgOrEnv,
            span,
            format!(
                "{keyword} {name:?} looks like a secret, and stays in the image: use RUN --mount=type=secret"
            ),
        ));
    }
}

fn expose(text: &str, span: Span, found: &mut Vec<Warning>) {
    for word in text.split_whitespace() {
        let (ports, protocol) = word.split_once('/').unwrap_or((word, ""));
        if !protocol.contains('$') && !is_lower(protocol) {
            found.push(Warning::new(
                Rule::ExposeProtoCasing,
                span,
                format!("the protocol of {word} is to be in lower case"),
            ));
        }
        if !ports.contains('$') && ports.contains(':') {
            found.push(Warning::new(
                Rule::ExposeInvalidFormat,
                span,
                format!("EXPOSE names the container's port alone: {word} has an address or a host port"),
            ));
        }
    }
}

/// A comment right above a stage or an argument describes it by its name first.
fn described(instruction: &Instruction, lines: &[&str], found: &mut Vec<Warning>) {
    let name = match &instruction.command {
        Command::From { name, .. } => name.as_deref(),
        Command::Arg(names) => names.first().map(|(name, _)| name.as_str()),
        _ => None,
    };
    let Some(name) = name else { return };
    let Some(above) = instruction.span.first.checked_sub(2).and_then(|at| lines.get(at)) else { return };
    let Some(comment) = above.trim().strip_prefix('#').map(str::trim) else { return };
    let directive = comment.split_once('=').is_some_and(|(key, _)| !key.trim().contains(' '));
    let first = comment.split_whitespace().next();
    if !comment.is_empty() && !directive && first.is_none_or(|first| !first.eq_ignore_ascii_case(name)) {
        found.push(Warning::new(
            Rule::InvalidDefinitionDescription,
            instruction.span,
            format!("the comment above {name} should begin with its name, or an empty line should part them"),
        ));
    }
}

/// A name that `name` may have been meant to be.
pub(crate) fn suggestion<'n>(name: &str, known: impl IntoIterator<Item = &'n str>) -> String {
    let known: Vec<&str> = known.into_iter().collect();
    nearest(name, &known).map_or_else(String::new, |near| format!(" (did you mean ${near}?)"))
}
