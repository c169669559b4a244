//! The processes of a container, as `ps` on the host shows them.

use serde_json::{Value, json};

use super::Containers;
use crate::error::Context;
use crate::{Error, Result};

impl Containers {
    /// Runs the host's `ps` with `arguments` (docker's default is `-ef`) and keeps the container's lines.
    pub async fn top(&self, reference: &str, arguments: &str) -> Result<Value> {
        let container = self.find(reference)?;
        let live = container.running()?;
        let pids = live
            .ask(brigantine_shim::Client::pids)
            .await
            .doing(|| format!("list the processes of container {}", container.id))?;
        let arguments = if arguments.trim().is_empty() { "-ef" } else { arguments };
        let output = tokio::process::Command::new("ps")
            .args(arguments.split_whitespace())
            .env("LC_ALL", "C")
            .output()
            .await
            .map_err(|error| {
                Error::internal("error running ps: is it installed on the host?").because(error)
            })?;
        if !output.status.success() {
            return Err(Error::invalid(format!(
                "error running ps: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            )));
        }
        let (titles, processes) = select(&String::from_utf8_lossy(&output.stdout), &pids)?;
        self.publish(&container, "top", &[]);
        Ok(json!({ "Titles": titles, "Processes": processes }))
    }
}

/// The titles, and the lines whose PID is one of `pids`.
fn select(output: &str, pids: &[i32]) -> Result<(Vec<String>, Vec<Vec<String>>)> {
    let mut lines = output.lines();
    let titles: Vec<String> =
        lines.next().unwrap_or_default().split_whitespace().map(str::to_owned).collect();
    let at = titles
        .iter()
        .position(|title| title == "PID")
        .ok_or_else(|| Error::invalid("Couldn't find PID field in ps output"))?;
    let processes = lines
        .filter_map(|line| {
            let mut fields: Vec<String> = Vec::new();
            let mut rest = line.trim_start();
            // The last column, the command, holds spaces.
            while fields.len() + 1 < titles.len() {
                let end = rest.find(char::is_whitespace)?;
                fields.push(rest[..end].to_owned());
                rest = rest[end..].trim_start();
            }
            fields.push(rest.trim_end().to_owned());
            let pid: i32 = fields[at].parse().ok()?;
            pids.contains(&pid).then_some(fields)
        })
        .collect();
    Ok((titles, processes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_containers_lines_are_kept() {
        let output = "UID   PID  CMD\nroot  1  /sbin/init splash\nroot  42  sleep 100 s\n";
        let (titles, processes) = select(output, &[42]).unwrap();
        assert_eq!(titles, ["UID", "PID", "CMD"]);
        assert_eq!(processes, [["root", "42", "sleep 100 s"]]);
        assert!(select("A B\n", &[]).is_err());
    }
}
