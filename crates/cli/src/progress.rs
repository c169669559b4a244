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

pub struct Progress {
    sink: Sink,
    bars: Option<MultiProgress>,
    lines: Vec<(String, ProgressBar)>,
}

impl Progress {
    pub fn new(sink: Sink) -> Self {
        let bars = match sink {
            Sink::Stdout if terminal::stdout_is_terminal() => Some(ProgressDrawTarget::stdout()),
            Sink::Stderr if terminal::stderr_is_terminal() => Some(ProgressDrawTarget::stderr()),
            _ => None,
        };
        Self { sink, bars: bars.map(MultiProgress::with_draw_target), lines: Vec::new() }
    }

    /// Shows a stream of progress to its end; `aux` sees the results in it. An error in the stream becomes a fault.
    pub async fn follow(mut self, mut lines: Lines, mut aux: impl FnMut(&Value)) -> Outcome {
        let mut result = Ok(());
        while let Some(message) = lines.next().await? {
            if let Some(error) = message.get("errorDetail").or_else(|| message.get("error")) {
                let text = match error {
                    Value::Text(text) => text.as_str(),
                    detail => detail.at("message").text(),
                };
                let code = i32::try_from(error.at("code").int()).unwrap_or(1);
                result = Err(Fault::Coded { text: text.to_owned(), code: if code == 0 { 1 } else { code } });
                break;
            }
            if let Some(result) = message.get("aux") {
                aux(result);
                continue;
            }
            self.show(&message);
        }
        for (_, bar) in &self.lines {
            bar.abandon();
        }
        result
    }

    fn show(&mut self, message: &Value) {
        let (id, status) = (message.at("id").text(), message.at("status").text());
        let detail = message.at("progressDetail");
        let (current, total) = (detail.at("current").int(), detail.at("total").int());
        if let Some(stream) = message.get("stream") {
            self.say(stream.text().trim_end_matches('\n'));
        } else if self.bars.is_some() && !id.is_empty() {
            let bar = self.bar(id);
            if total > 0 {
                bar.set_style(style("{prefix}: {msg} [{bar:40.=>}] {decimal_bytes}/{decimal_total_bytes}"));
                bar.set_length(total.unsigned_abs());
                bar.set_position(current.unsigned_abs());
            } else {
                bar.set_style(style("{prefix}: {msg}"));
            }
            bar.set_message(status.to_owned());
        } else if total > 0 || current > 0 {
            // A running count is for terminals.
        } else if id.is_empty() {
            self.say(status);
        } else {
            self.say(&format!("{id}: {status}"));
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
