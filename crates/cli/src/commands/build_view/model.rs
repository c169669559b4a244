//! What is known of a build, and how that looks on so many rows and columns.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use brigantine_session::{Status, StatusLog, StatusVertex, StatusVertexProgress, Timestamp};
use console::{Style, measure_text_width, strip_ansi_codes, truncate_str};

use crate::units;

/// Lines of output that are shown below a step that runs.
const TAIL: usize = 6;
/// Lines that are kept of each step, for the case that it fails.
const KEPT: usize = 1000;
/// Characters of one line that are kept.
const LONGEST: usize = 4096;

/// A build so far.
pub(super) struct Model {
    began: Instant,
    vertices: Vec<Vertex>,
    places: HashMap<String, usize>,
    warnings: Vec<String>,
    /// Whose colours: those of standard error.
    stderr: bool,
}

#[derive(Default)]
struct Vertex {
    name: String,
    /// When this program heard of its beginning: its clock may not be the engine's.
    began: Option<Instant>,
    started: Option<Timestamp>,
    took: Option<Duration>,
    cached: bool,
    error: String,
    parts: Vec<Part>,
    /// Whole lines.
    lines: VecDeque<String>,
    /// Lines that are not kept any more.
    lost: usize,
    /// A line that is not ended.
    open: String,
}

struct Part {
    id: String,
    current: i64,
    total: i64,
    began: Instant,
    took: Option<Duration>,
}

impl Model {
    pub fn new(stderr: bool) -> Self {
        let (vertices, places, warnings) = (Vec::new(), HashMap::new(), Vec::new());
        Self { began: Instant::now(), vertices, places, warnings, stderr }
    }

    /// Without colours where there shall be none.
    fn style(&self) -> Style {
        if self.stderr { Style::new().for_stderr() } else { Style::new() }
    }

    pub fn update(&mut self, status: Status) {
        for vertex in status.vertexes {
            self.vertex(vertex);
        }
        for part in status.statuses {
            self.part(part);
        }
        for log in status.logs {
            self.log(&log);
        }
        self.warnings.extend(status.warnings.iter().map(|w| String::from_utf8_lossy(&w.short).into_owned()));
    }

    fn known(&mut self, digest: &str) -> &mut Vertex {
        let at = *self.places.entry(digest.to_owned()).or_insert(self.vertices.len());
        if at == self.vertices.len() {
            self.vertices.push(Vertex::default());
        }
        &mut self.vertices[at]
    }

    fn vertex(&mut self, told: StatusVertex) {
        let known = self.known(&told.digest);
        known.name = plain(&told.name);
        if let Some(started) = told.started {
            known.began.get_or_insert_with(Instant::now);
            known.started.get_or_insert(started);
        }
        known.cached |= told.cached;
        if !told.error.is_empty() {
            known.error = told.error;
        }
        if let Some(completed) = told.completed {
            known.took = Some(between(known.started.as_ref(), &completed));
        }
    }

    fn part(&mut self, told: StatusVertexProgress) {
        let known = self.known(&told.vertex);
        let id = plain(&told.id);
        let took = told.completed.map(|completed| between(told.started.as_ref(), &completed));
        match known.parts.iter_mut().find(|part| part.id == id) {
            Some(part) => (part.current, part.total, part.took) = (told.current, told.total, took),
            None => known.parts.push(Part {
                id,
                current: told.current,
                total: told.total,
                began: Instant::now(),
                took,
            }),
        }
    }

    fn log(&mut self, told: &StatusLog) {
        let known = self.known(&told.vertex);
        let text = String::from_utf8_lossy(&told.msg);
        let mut pieces = text.split('\n');
        known.open.extend(pieces.next().unwrap_or_default().chars().take(LONGEST));
        for piece in pieces {
            let line = std::mem::take(&mut known.open);
            known.lines.push_back(line.trim_end_matches('\r').chars().take(LONGEST).collect());
            known.open = piece.chars().take(LONGEST).collect();
        }
        while known.lines.len() > KEPT {
            known.lines.pop_front();
            known.lost += 1;
        }
    }

    /// What fits on a terminal while the build goes on: what runs before what has ended, the latest before the first.
    pub fn frame(&self, rows: usize, columns: usize) -> Vec<String> {
        let mut blocks: Vec<(bool, Vec<String>)> = self
            .vertices
            .iter()
            .filter(|vertex| vertex.is_shown())
            .map(|vertex| {
                (vertex.took.is_none(), vertex.lines(columns, vertex.took.is_none(), &self.style()))
            })
            .collect();
        let most = rows.saturating_sub(1).max(1);
        let height =
            |blocks: &[(bool, Vec<String>)]| blocks.iter().map(|(_, lines)| lines.len()).sum::<usize>();
        while height(&blocks) > most {
            let Some(at) = blocks.iter().position(|(runs, _)| !runs) else { break };
            blocks.remove(at);
        }
        let mut lines: Vec<String> = blocks.into_iter().flat_map(|(_, lines)| lines).collect();
        // Where even what runs is too much, the latest is shown.
        lines.drain(..lines.len().saturating_sub(most));
        lines.insert(0, self.head(columns, ""));
        lines
    }

    /// The whole list, when all is over.
    pub fn last(&self, columns: usize) -> Vec<String> {
        let mut lines = vec![self.head(columns, " FINISHED")];
        if self.vertices.iter().any(|vertex| !vertex.error.is_empty()) {
            lines = vec![self.head(columns, " ERROR")];
        }
        let shown = self.vertices.iter().filter(|vertex| vertex.is_shown());
        lines.extend(shown.flat_map(|vertex| vertex.lines(columns, false, &self.style())));
        lines
    }

    fn head(&self, columns: usize, end: &str) -> String {
        let done = self.vertices.iter().filter(|vertex| vertex.took.is_some()).count();
        let time = seconds(self.began.elapsed());
        let text = format!("[+] Building {time} ({done}/{}){end}", self.vertices.len());
        truncate_str(&text, columns.saturating_sub(1), "").into_owned()
    }

    /// What steps that failed have said, as far as it is kept.
    pub fn failures(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for vertex in self.vertices.iter().filter(|vertex| !vertex.error.is_empty()) {
            if vertex.lines.is_empty() && vertex.open.is_empty() {
                continue;
            }
            lines.push("------".to_owned());
            lines.push(format!(" > {}:", vertex.name));
            if vertex.lost > 0 {
                lines.push(format!("({} lines before these: --progress plain shows all)", vertex.lost));
            }
            lines.extend(vertex.said().map(plain));
            lines.push("------".to_owned());
        }
        lines
    }

    pub fn warnings(&self) -> Vec<String> {
        if self.warnings.is_empty() {
            return Vec::new();
        }
        let count = match self.warnings.len() {
            1 => "1 warning found (brig build --check shows the place):".to_owned(),
            count => format!("{count} warnings found (brig build --check shows the places):"),
        };
        let each = self.warnings.iter().map(|warning| format!(" - {}", plain(warning)));
        [String::new(), count].into_iter().chain(each).collect()
    }
}

impl Vertex {
    /// What waits for others is counted, not shown.
    fn is_shown(&self) -> bool {
        self.began.is_some() || self.took.is_some()
    }

    fn said(&self) -> impl Iterator<Item = &str> {
        let open = Some(self.open.as_str()).filter(|open| !open.is_empty());
        self.lines.iter().map(String::as_str).chain(open)
    }

    fn lines(&self, columns: usize, tail: bool, base: &Style) -> Vec<String> {
        let style = match (self.took, self.error.is_empty()) {
            (_, false) => base.clone().red(),
            (Some(_), true) => base.clone().blue(),
            (None, true) => base.clone(),
        };
        let mark = match (self.cached, self.error.is_empty()) {
            (_, false) => "ERROR ",
            (true, true) => "CACHED ",
            (false, true) => "",
        };
        let time = self.took.or_else(|| self.began.map(|began| began.elapsed())).unwrap_or_default();
        let mut lines = vec![row(&format!("=> {mark}{}", self.name), &seconds(time), columns, &style)];
        for part in &self.parts {
            let bytes = |n: i64| units::human_size(n as f64, 3);
            let amount = match (part.current, part.total) {
                (0, 0) => String::new(),
                (current, 0) => format!(" {}", bytes(current)),
                (current, total) => format!(" {} / {}", bytes(current), bytes(total)),
            };
            let time = part.took.unwrap_or_else(|| part.began.elapsed());
            lines.push(row(&format!("=> => {}{amount}", part.id), &seconds(time), columns, &style));
        }
        if tail {
            let said: Vec<&str> = self.said().collect();
            for line in &said[said.len().saturating_sub(TAIL)..] {
                let text = format!(" => => # {}", plain(line));
                let shown = truncate_str(&text, columns.saturating_sub(1), "").into_owned();
                lines.push(base.clone().dim().apply_to(shown).to_string());
            }
        }
        lines
    }
}

/// A line with a time at its end, where there is room for one.
fn row(left: &str, right: &str, columns: usize, style: &Style) -> String {
    const NARROW: usize = 30;
    let width = columns.saturating_sub(1);
    let left = format!(" {left}");
    let text = if width < NARROW {
        truncate_str(&left, width, "").into_owned()
    } else {
        let room = width - right.len() - 1;
        let left = truncate_str(&left, room, "…");
        let blanks = width - right.len() - measure_text_width(&left);
        format!("{left}{}{right}", " ".repeat(blanks))
    };
    style.apply_to(text).to_string()
}

/// Text without anything that moves the cursor: of a line that overwrites itself, what is left at its end.
fn plain(text: &str) -> String {
    let text = strip_ansi_codes(text);
    let last = text.rsplit('\r').find(|part| !part.is_empty()).unwrap_or_default();
    let mut shown = String::with_capacity(last.len());
    for letter in last.chars() {
        match letter {
            '\t' => shown.push_str("    "),
            letter if letter.is_control() => {}
            letter => shown.push(letter),
        }
    }
    shown
}

fn between(started: Option<&Timestamp>, completed: &Timestamp) -> Duration {
    let nanos = |at: &Timestamp| i128::from(at.seconds) * 1_000_000_000 + i128::from(at.nanos);
    let took = started.map_or(0, |started| nanos(completed) - nanos(started));
    Duration::from_nanos(u64::try_from(took).unwrap_or_default())
}

fn seconds(time: Duration) -> String {
    format!("{:.1}s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vertex(digest: &str, name: &str, state: &str) -> StatusVertex {
        let at = |seconds| Some(Timestamp { seconds, nanos: 500_000_000 });
        StatusVertex {
            digest: digest.to_owned(),
            name: name.to_owned(),
            started: (state != "waits").then(|| at(10)).flatten(),
            completed: matches!(state, "done" | "cached" | "failed").then(|| at(12)).flatten(),
            cached: state == "cached",
            error: if state == "failed" { "exit code: 1".to_owned() } else { String::new() },
            ..StatusVertex::default()
        }
    }

    fn log(vertex: &str, text: &str) -> StatusLog {
        StatusLog { vertex: vertex.to_owned(), msg: text.as_bytes().to_vec(), ..StatusLog::default() }
    }

    /// Without colours, and times that pass while the test runs made equal.
    fn shown(lines: &[String]) -> String {
        let plain: Vec<String> = lines.iter().map(|line| strip_ansi_codes(line).into_owned()).collect();
        plain.join("\n").replace("0.1s", "0.0s").replace("0.2s", "0.0s")
    }

    #[test]
    fn what_runs_has_its_last_lines_and_what_ended_is_one_line() {
        let mut model = Model::new(false);
        let lines: String =
            ["0", "1", "2", "3", "4", "5", "6", "7", "8"].map(|n| ["line ", n, "\n"].concat()).concat();
        model.update(Status {
            vertexes: vec![
                vertex("a", "[internal] load build definition from Dockerfile", "done"),
                vertex("b", "[1/3] FROM busybox", "cached"),
                vertex("c", "[2/3] RUN make all", "runs"),
                vertex("d", "[3/3] RUN later", "waits"),
            ],
            logs: vec![log("a", "hidden\n"), log("c", &lines), log("c", "10%\r20%\rhalf\t\x1b[31mred\x07")],
            ..Status::default()
        });
        insta::assert_snapshot!(shown(&model.frame(30, 60)), @r"
        [+] Building 0.0s (2/4)
         => [internal] load build definition from Dockerfile   2.0s
         => CACHED [1/3] FROM busybox                          2.0s
         => [2/3] RUN make all                                 0.0s
         => => # line 4
         => => # line 5
         => => # line 6
         => => # line 7
         => => # line 8
         => => # half    red
        ");
        // Few rows: what has ended goes first, then the older lines.
        let few = model.frame(5, 60);
        assert_eq!(few.len(), 5, "{few:?}");
        assert!(few.last().unwrap().contains("half    red") && !shown(&few).contains("CACHED"), "{few:?}");
        for columns in [1, 2, 10, 29, 31, 200] {
            for line in model.frame(30, columns).iter().chain(&model.last(columns)) {
                assert!(measure_text_width(line) < columns.max(2), "{columns}: {line:?}");
            }
        }
    }

    #[test]
    fn a_step_that_fails_is_told_with_what_it_said() {
        let mut model = Model::new(false);
        let many = (0..KEPT + 5).map(|n| n.to_string()).collect::<Vec<_>>().join("\n") + "\n";
        model.update(Status {
            vertexes: vec![vertex("c", "[2/2] RUN make", "failed")],
            logs: vec![log("c", &many), log("c", "no newline")],
            ..Status::default()
        });
        let last = shown(&model.last(60));
        assert!(last.contains(" ERROR") && last.contains("=> ERROR [2/2] RUN make"), "{last}");
        let told = model.failures();
        assert_eq!(
            told[..4],
            ["------", " > [2/2] RUN make:", "(5 lines before these: --progress plain shows all)", "5"]
        );
        assert_eq!(told[told.len() - 2..], ["no newline", "------"]);
    }

    #[test]
    fn parts_count_bytes() {
        let mut model = Model::new(false);
        let part = |current, total| StatusVertexProgress {
            id: "transferring context:".to_owned(),
            vertex: "a".to_owned(),
            current,
            total,
            ..StatusVertexProgress::default()
        };
        model.update(Status {
            vertexes: vec![vertex("a", "load", "runs")],
            statuses: vec![part(0, 0), part(1500, 3000)],
            ..Status::default()
        });
        let frame = shown(&model.frame(10, 60));
        assert!(frame.contains("=> => transferring context: 1.5kB / 3kB"), "{frame}");
    }
}
