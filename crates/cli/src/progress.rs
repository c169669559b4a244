//! Progress of pulls, pushes and loads: bars on a terminal, plain lines elsewhere.

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::client::Lines;
use crate::fault::{Fault, Outcome};
use crate::value::Value;
use crate::{output, terminal};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sink {
    Stdout,
    Stderr,
    Nowhere,
}

/// Shows a stream of the engine's.
pub struct Progress {
    bars: Bars,
    /// Messages are shown as they come.
    raw: bool,
}

/// What is shown: a bar for each thing that is on its way.
pub struct Bars {
    sink: Sink,
    bars: Option<MultiProgress>,
    lines: Vec<(String, ProgressBar)>,
}

impl Progress {
    pub fn new(sink: Sink) -> Self {
        Self { bars: Bars::new(sink), raw: false }
    }

    /// Lines alone, on a terminal too.
    pub fn plain(mut self) -> Self {
        self.bars.bars = None;
        self
    }

    /// Each message as JSON on a line of its own, on standard error.
    pub fn raw(self) -> Self {
        Self { raw: true, ..self }
    }

    /// Shows a stream of progress to its end; `aux` sees the results in it. An error in the stream becomes a fault.
    pub async fn follow(mut self, mut lines: Lines, mut aux: impl FnMut(&Value)) -> Outcome {
        let mut result = Ok(());
        while let Some(message) = lines.next().await? {
            if self.raw {
                output::error_line(&serde_json::json!(message).to_string());
            }
            if let Some(fault) = error_in(&message) {
                result = Err(fault);
                break;
            }
            if let Some(result) = message.get("aux") {
                aux(result);
                continue;
            }
            if !self.raw {
                self.show(&message);
            }
        }
        self.bars.leave();
        result
    }

    fn show(&mut self, message: &Value) {
        if let Some(stream) = message.get("stream") {
            self.bars.say(stream.text().trim_end_matches('\n'));
            return;
        }
        let detail = message.at("progressDetail");
        let (current, total) =
            (detail.at("current").int().unsigned_abs(), detail.at("total").int().unsigned_abs());
        let amount = (current > 0 || total > 0).then_some((current, Some(total).filter(|total| *total > 0)));
        self.bars.show(message.at("id").text(), message.at("status").text(), amount);
    }
}

/// The error that a message of a stream is.
pub fn error_in(message: &Value) -> Option<Fault> {
    let error = message.get("errorDetail").or_else(|| message.get("error"))?;
    let text = match error {
        Value::Text(text) => text.as_str(),
        detail => detail.at("message").text(),
    };
    let code = i32::try_from(error.at("code").int()).unwrap_or(1);
    Some(Fault::Coded { text: text.to_owned(), code: if code == 0 { 1 } else { code } })
}

impl Bars {
    pub fn new(sink: Sink) -> Self {
        let bars = match sink {
            Sink::Stdout if terminal::stdout_is_terminal() => Some(ProgressDrawTarget::stdout()),
            Sink::Stderr if terminal::stderr_is_terminal() => Some(ProgressDrawTarget::stderr()),
            _ => None,
        };
        Self { sink, bars: bars.map(MultiProgress::with_draw_target), lines: Vec::new() }
    }

    /// One step: of `id`, or of the whole where that is empty.
    pub fn show(&mut self, id: &str, status: &str, amount: Option<(u64, Option<u64>)>) {
        if self.bars.is_some() && !id.is_empty() {
            let bar = self.bar(id);
            if let Some((current, Some(total))) = amount {
                bar.set_style(style(
                    "{prefix}: {msg} [{bar:40.=>}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec}",
                ));
                bar.set_length(total);
                bar.set_position(current);
            } else {
                bar.set_style(style("{prefix}: {msg}"));
            }
            bar.set_message(status.to_owned());
        } else if amount.is_some() {
            // A running count is for terminals.
        } else if id.is_empty() {
            self.say(status);
        } else {
            self.say(&format!("{id}: {status}"));
        }
    }

    /// Leaves the bars as they are.
    fn leave(&self) {
        for (_, bar) in &self.lines {
            bar.abandon();
        }
    }

    fn bar(&mut self, id: &str) -> ProgressBar {
        if let Some((_, bar)) = self.lines.iter().find(|(known, _)| known == id) {
            return bar.clone();
        }
        let mut bar = ProgressBar::new(0).with_prefix(id.to_owned());
        if let Some(bars) = &self.bars {
            bar = bars.add(bar);
        }
        self.lines.push((id.to_owned(), bar.clone()));
        bar
    }

    fn say(&mut self, line: &str) {
        // Lines after the bars keep the bars above them.
        for (_, bar) in self.lines.drain(..) {
            bar.abandon();
        }
        match self.sink {
            Sink::Stdout => output::line(line),
            Sink::Stderr => output::error_line(line),
            Sink::Nowhere => {}
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
