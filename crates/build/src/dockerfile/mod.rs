//! The Dockerfile language: text to instructions, each with its place in the file.
//!
//! [`parse`] does what needs no build: directives, continuation lines, heredocs, flags, forms, stages. Variables are
//! filled in later, by [`Shell`], when the stage's environment is known.

pub mod checks;
mod flags;
pub mod instruction;
mod lexer;
pub mod mount;
pub mod shell;

pub use checks::{Checks, Rule, Warning};
pub use flags::Flags;
pub use instruction::{Command, Form, Instruction, Stage, parse_line};
pub use lexer::{Directives, Heredoc, Line};
pub use mount::{Mount, MountKind};
pub use shell::Shell;

use std::fmt::Write as _;

use brigantine_registry::redacted;

/// The most a Dockerfile may hold, in bytes.
pub const MOST: usize = 16 << 20;

/// A place in a Dockerfile: lines from 1, both inclusive, and the column (from 1) where it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Span {
    pub first: usize,
    pub last: usize,
    pub column: usize,
}

/// A fault in a Dockerfile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    pub message: String,
    pub span: Span,
}

impl Fault {
    pub fn new(span: Span, message: impl Into<String>) -> Self {
        Self { message: message.into(), span }
    }

    /// The message with the place and the lines around it; passwords of URLs are not shown.
    pub fn excerpt(&self, file: &str, text: &str) -> String {
        let lines: Vec<&str> = text.lines().collect();
        let (first, last) = (self.span.first.max(1), self.span.last.max(self.span.first).max(1));
        let from = first.saturating_sub(3).max(1);
        let to = (last + 2).min(lines.len());
        let mut out = format!("{file}:{first}:{}: {}\n", self.span.column.max(1), self.message);
        for number in from..=to {
            let Some(line) = lines.get(number - 1) else { break };
            let mark = if (first..=last).contains(&number) { ">>>" } else { "   " };
            // A line may be very long: what is shown is for people.
            let shown: String = line.chars().take(200).collect();
            writeln!(out, "{number:4} | {mark} {shown}").unwrap_or_default();
        }
        redacted(&out).into_owned()
    }
}

/// What the comments right above an instruction say of `name`: the rest of the line that begins with it.
pub fn description(text: &str, span: Span, name: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().take(span.first.saturating_sub(1)).collect();
    let comments = lines.iter().rev().map_while(|line| line.trim().strip_prefix('#'));
    let said = comments.filter_map(|line| line.trim().strip_prefix(name)?.strip_prefix(' '));
    // The first of them, from above.
    said.last().map(|text| text.trim().to_owned()).filter(|_| !name.is_empty())
}

/// A parsed Dockerfile.
#[derive(Debug, Clone)]
pub struct Dockerfile {
    pub directives: Directives,
    /// ARGs before the first FROM.
    pub globals: Vec<Instruction>,
    pub stages: Vec<Stage>,
    pub warnings: Vec<Warning>,
}

/// Parses a Dockerfile.
pub fn parse(text: &str) -> Result<Dockerfile, Fault> {
    if text.len() > MOST {
        return Err(Fault::new(
            Span { first: 1, last: 1, column: 1 },
            format!("the Dockerfile is {} bytes long: at most {MOST} are read", text.len()),
        ));
    }
    let lexed = lexer::lex(text)?;
    let mut file = Dockerfile {
        directives: lexed.directives,
        globals: Vec::new(),
        stages: Vec::new(),
        warnings: lexed.warnings,
    };
    if lexed.lines.is_empty() {
        return Err(Fault::new(Span { first: 1, last: 1, column: 1 }, "file with no instructions"));
    }
    for line in lexed.lines {
        let instruction = instruction::parse_line(&line, file.directives.escape)?;
        match (&instruction.command, file.stages.last_mut()) {
            (Command::From { .. }, _) => {
                let number = file.stages.len();
                file.stages.push(Stage::new(number, instruction));
            }
            (_, Some(stage)) => stage.instructions.push(instruction),
            (Command::Arg { .. }, None) => file.globals.push(instruction),
            (_, None) => {
                return Err(Fault::new(
                    instruction.span,
                    "no build stage in current context: FROM must come first",
                ));
            }
        }
    }
    if file.stages.is_empty() {
        return Err(Fault::new(
            Span { first: 1, last: 1, column: 1 },
            "dockerfile contains no stages to build",
        ));
    }
    let remarks = checks::remarks(&file, text);
    file.warnings.extend(remarks);
    Ok(file)
}

#[cfg(test)]
mod tests;
