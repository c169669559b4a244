//! `brig image explore`, `brig image diff` and `brig image tree`: what is in images, how they differ, what they share.

use std::collections::BTreeMap;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::client::encode;
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::value::Value;
use crate::{output, units};

pub static EXPLORE: Command = Command {
    name: "explore",
    usage: "[OPTIONS] IMAGE",
    about: "Show what each layer of an image adds, changes and hides, and what that wastes",
    flags: &[
        Flag::text("format", "'json' for programs"),
        Flag::text("layer", "List what this layer holds (1 is the lowest)"),
        Flag::text("top", "How many wasted paths to show").default("10"),
    ],
    operands: Operands::Exactly(1),
    run: runs!(explore),
    ..Command::EMPTY
};

pub static DIFF: Command = Command {
    name: "diff",
    usage: "[OPTIONS] IMAGE OTHER",
    about: "Show how what containers of two images see differs",
    flags: &[Flag::text("format", "'json' for programs")],
    operands: Operands::Exactly(2),
    run: runs!(diff),
    ..Command::EMPTY
};

pub static TREE: Command = Command {
    name: "tree",
    usage: "",
    about: "Show images by the layers they share",
    flags: &[Flag::switch("no-trunc", "Show everything in full")],
    operands: Operands::None,
    run: runs!(tree),
    ..Command::EMPTY
};

/// Whether the answer is to be printed as it is.
fn as_json(matches: &Matches) -> Outcome<bool> {
    match matches.text("format") {
        "" => Ok(false),
        "json" => Ok(true),
        other => Err(Fault::said(format!("--format {other:?}: only json is known here"))),
    }
}

fn size(value: &Value) -> String {
    units::human_size(value.float(), 3)
}

async fn explore(context: &Context, matches: Matches) -> Outcome {
    let json = as_json(&matches)?;
    let top: usize = matches
        .text("top")
        .parse()
        .map_err(|_error| Fault::said(format!("--top {:?} is not a number", matches.text("top"))))?;
    let path = format!("/images/{}/explore", encode(matches.operand(0)));
    let answer = context.client.get(path).send().await?.value().await?;
    if json {
        output::line(&answer.to_json());
        return Ok(());
    }
    let layers = answer.at("Layers").list();
    if let Some(wanted) = matches.optional("layer") {
        let layer = wanted.parse::<usize>().ok().and_then(|n| layers.get(n.checked_sub(1)?));
        let Some(layer) = layer else {
            return Err(Fault::said(format!("there is no layer {wanted:?}: the image has {}", layers.len())));
        };
        for entry in layer.at("Entries").list() {
            let mark = match entry.at("Change").text() {
                "added" => 'A',
                "modified" => 'C',
                _ => 'D',
            };
            let owner = format!("{}:{}", entry.at("Uid").int(), entry.at("Gid").int());
            let mut line = format!(
                "{mark} {:4} {owner:11} {:>8}  {}",
                entry.at("Mode").text(),
                size(entry.at("Size")),
                entry.at("Path").text()
            );
            if !entry.at("Link").text().is_empty() {
                line.push_str(" -> ");
                line.push_str(entry.at("Link").text());
            }
            output::line(&line);
        }
        return Ok(());
    }
    output::line(&format!(
        "{} in {} layers, {} of it wasted (efficiency {:.1} %)",
        size(answer.at("Size")),
        layers.len(),
        size(answer.at("Wasted")),
        answer.at("Efficiency").float() * 100.0
    ));
    output::line("");
    output::line("LAYER      SIZE   ADDED CHANGED REMOVED  CREATED BY");
    for (n, layer) in layers.iter().enumerate() {
        let by: String = layer.at("CreatedBy").text().replace(['\n', '\t'], " ").chars().take(60).collect();
        output::line(&format!(
            "{:5} {:>9} {:7} {:7} {:7}  {by}",
            n + 1,
            size(layer.at("Size")),
            layer.at("Added").int(),
            layer.at("Modified").int(),
            layer.at("Removed").int()
        ));
    }
    let wasted = answer.at("WastedPaths").list();
    if !wasted.is_empty() {
        output::line("");
        output::line("   WASTED  TIMES  PATH");
        for path in wasted.iter().take(top) {
            output::line(&format!(
                "{:>9}  {:5}  {}",
                size(path.at("Bytes")),
                path.at("Times").int(),
                path.at("Path").text()
            ));
        }
        if wasted.len() > top {
            output::line(&format!("           and {} more paths", wasted.len() - top));
        }
    }
    Ok(())
}

async fn diff(context: &Context, matches: Matches) -> Outcome {
    let json = as_json(&matches)?;
    let path = format!("/images/{}/diff", encode(matches.operand(0)));
    let answer = context.client.get(path).query("with", matches.operand(1)).send().await?.value().await?;
    if json {
        output::line(&answer.to_json());
        return Ok(());
    }
    for field in answer.at("Config").list() {
        let [name, before, after] = field.list() else { continue };
        output::line(&format!("{}: {} -> {}", name.text(), before.text(), after.text()));
    }
    for file in answer.at("Files").list() {
        let mark = match file.at("Change").text() {
            "added" => 'A',
            "removed" => 'D',
            _ => 'C',
        };
        let what: Vec<&str> = file.at("What").list().iter().map(Value::text).collect();
        let mut line = format!("{mark} {}", file.at("Path").text());
        if !what.is_empty() {
            line = format!("{line} ({})", what.join(", "));
        }
        output::line(&line);
    }
    Ok(())
}

/// Layers in common lead to a node of the tree; images hang where their last layer is.
#[derive(Default)]
struct Node {
    images: Vec<String>,
    children: BTreeMap<String, Node>,
}

pub(super) async fn tree(context: &Context, matches: Matches) -> Outcome {
    let full = matches.is("no-trunc");
    let images = context.client.get("/images/json").send().await?.value().await?;
    let mut root = Node::default();
    for image in images.list() {
        let id = image.at("Id").text();
        let details =
            context.client.get(format!("/images/{}/json", encode(id))).send().await?.value().await?;
        let mut at = &mut root;
        for layer in details.at("RootFS").at("Layers").list() {
            at = at.children.entry(layer.text().to_owned()).or_default();
        }
        let names: Vec<&str> = details.at("RepoTags").list().iter().map(Value::text).collect();
        let short = id.trim_start_matches("sha256:").get(..12).unwrap_or(id);
        let name = if names.is_empty() { "<none>".to_owned() } else { names.join(", ") };
        let id = if full { id } else { short };
        at.images.push(format!("{name} ({id}, {})", size(details.at("Size"))));
    }
    for line in lines(&root, full) {
        output::line(&line);
    }
    Ok(())
}

fn lines(node: &Node, full: bool) -> Vec<String> {
    let mut all = Vec::new();
    let mut branches: Vec<Vec<String>> = node.images.iter().map(|image| vec![image.clone()]).collect();
    for (layer, child) in &node.children {
        // Layers that nothing branches off or ends at are told of as one.
        let (mut last, mut end, mut more) = (layer, child, 0);
        while end.images.is_empty()
            && end.children.len() == 1
            && let Some((below, next)) = end.children.iter().next()
        {
            (last, end, more) = (below, next, more + 1);
        }
        let digest = last.trim_start_matches("sha256:");
        let digest = if full { digest } else { digest.get(..12).unwrap_or(digest) };
        let mut branch = vec![match more {
            0 => format!("layer {digest}"),
            more => format!("{} layers up to {digest}", more + 1),
        }];
        branch.extend(lines(end, full));
        branches.push(branch);
    }
    let count = branches.len();
    for (n, branch) in branches.into_iter().enumerate() {
        let last = n + 1 == count;
        for (m, line) in branch.into_iter().enumerate() {
            let prefix = match (m, last) {
                (0, false) => "├─ ",
                (0, true) => "└─ ",
                (_, false) => "│  ",
                (_, true) => "   ",
            };
            all.push(format!("{prefix}{line}"));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_hang_where_their_last_layer_is() {
        let mut root = Node::default();
        for (name, layers) in
            [("a", &["1", "2"][..]), ("b", &["1", "2", "3", "4"]), ("c", &["9"]), ("d", &[])]
        {
            let mut at = &mut root;
            for layer in layers {
                at = at.children.entry((*layer).to_owned()).or_default();
            }
            at.images.push(name.to_owned());
        }
        assert_eq!(
            lines(&root, false),
            [
                "├─ d",
                "├─ 2 layers up to 2",
                "│  ├─ a",
                "│  └─ 2 layers up to 4",
                "│     └─ b",
                "└─ layer 9",
                "   └─ c",
            ]
        );
    }
}
