//! `brig build --progress tty`: a live view of the graph. Steps that run have their time and their last lines of output;
//! what has ended is one line; when all is over the whole list stays.
//!
//! Invariant: no line is longer than the terminal is wide and no frame higher than it is, whatever a step prints; where
//! the output is no terminal there is no view.

mod model;

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use brigantine_session::{Message as _, Status};
use console::Term;

use crate::client::Lines;
use crate::fault::{Fault, Outcome};
use crate::progress::{Sink, error_in};
use crate::terminal;
use crate::value::Value;

use model::Model;

/// How often what runs is shown anew.
const PACE: Duration = Duration::from_millis(100);

/// The view of one build.
pub struct View {
    term: Term,
    model: Model,
    /// Widths of the lines that are on the screen.
    drawn: Vec<usize>,
}

/// Whether a live view can be drawn there.
pub fn fits(sink: Sink) -> bool {
    let dumb = std::env::var("TERM").is_ok_and(|name| name == "dumb");
    !dumb
        && match sink {
            Sink::Stdout => terminal::stdout_is_terminal(),
            Sink::Stderr => terminal::stderr_is_terminal(),
            Sink::Nowhere => false,
        }
}

impl View {
    pub fn new(sink: Sink) -> Self {
        let stderr = sink == Sink::Stderr;
        let term = if stderr { Term::buffered_stderr() } else { Term::buffered_stdout() };
        Self { term, model: Model::new(stderr), drawn: Vec::new() }
    }

    /// Shows a build's trace to its end; `aux` sees the results in it.
    pub async fn follow(mut self, mut lines: Lines, mut aux: impl FnMut(&Value)) -> Outcome {
        let mut pace = tokio::time::interval(PACE);
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let result = loop {
            tokio::select! {
                message = lines.next() => match message {
                    Ok(Some(message)) => {
                        if let Some(fault) = error_in(&message) {
                            break Err(fault);
                        }
                        self.take(&message, &mut aux);
                    }
                    Ok(None) => break Ok(()),
                    Err(fault) => break Err(fault),
                },
                _ = pace.tick() => self.draw()?,
            }
        };
        self.end()?;
        result
    }

    fn take(&mut self, message: &Value, aux: &mut impl FnMut(&Value)) {
        let Some(result) = message.get("aux") else { return };
        if message.at("id").text() != "moby.buildkit.trace" {
            aux(result);
            return;
        }
        let raw = STANDARD.decode(result.text()).unwrap_or_default();
        if let Ok(status) = Status::decode(&raw[..]) {
            self.model.update(status);
        }
    }

    /// Draws over what was drawn before.
    fn draw(&mut self) -> Outcome {
        let (rows, columns) = self.size();
        let lines = self.model.frame(rows.saturating_sub(1), columns);
        self.replace(&lines, columns).map_err(failed)
    }

    /// The last frame: everything, and what the steps that failed have said.
    fn end(&mut self) -> Outcome {
        let (_, columns) = self.size();
        let lines = self.model.last(columns);
        self.replace(&lines, columns).map_err(failed)?;
        for line in self.model.failures().into_iter().chain(self.model.warnings()) {
            self.term.write_line(&line).map_err(failed)?;
        }
        self.term.flush().map_err(failed)
    }

    fn size(&self) -> (usize, usize) {
        let (rows, columns) = self.term.size_checked().unwrap_or((24, 80));
        (usize::from(rows), usize::from(columns).max(1))
    }

    fn replace(&mut self, lines: &[String], columns: usize) -> std::io::Result<()> {
        // A terminal that was made narrower has broken long lines.
        let height = self.drawn.iter().map(|width| width.div_ceil(columns).max(1)).sum();
        self.term.move_cursor_up(height)?;
        for line in lines {
            self.term.clear_line()?;
            self.term.write_line(line)?;
        }
        self.term.clear_to_end_of_screen()?;
        self.term.flush()?;
        self.drawn = lines.iter().map(|line| console::measure_text_width(line)).collect();
        Ok(())
    }
}

fn failed(error: std::io::Error) -> Fault {
    Fault::io("write to the terminal")(error)
}
