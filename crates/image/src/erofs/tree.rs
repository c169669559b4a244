//! A file system tree in memory: inodes with names for them, as an archive's entries make and replace them.
//!
//! Invariant: every node but those that were replaced is reachable from the root, and a directory has one name.

use std::collections::BTreeMap;

use crate::tar::Time;

/// Index of a node in its tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NodeId(u32);

impl NodeId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Where a file's data are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Data {
    /// First byte in the archive, at a whole block.
    pub start: u64,
    /// Length of the file.
    pub size: u64,
    /// Where in the file the archive's bytes belong, as offset and length, when it is sparse.
    pub sparse: Option<Box<[(u64, u64)]>>,
}

/// What a node is.
#[derive(Debug)]
pub(crate) enum Content {
    Directory { children: BTreeMap<Box<[u8]>, NodeId>, opaque: bool },
    File(Data),
    Symlink(Box<[u8]>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

impl Content {
    /// What hides a name of lower layers.
    pub const WHITEOUT: Self = Self::CharDevice(0, 0);

    pub fn directory() -> Self {
        Self::Directory { children: BTreeMap::new(), opaque: false }
    }
}

/// What a node has beside its content.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attributes {
    /// Permission bits, set-id and sticky bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Time,
    /// By full name; few.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

#[derive(Debug)]
pub(crate) struct Node {
    pub content: Content,
    pub attributes: Attributes,
    /// Names that lead here; of a directory one.
    pub links: u32,
}

/// What became of an insertion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inserted {
    New(NodeId),
    /// Something else had the name and is gone.
    Replaced(NodeId),
}

#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
    /// Bytes of names, link targets and attributes: what bounds the memory beside the number of nodes.
    text: usize,
}

impl Tree {
    pub const ROOT: NodeId = NodeId(0);

    pub fn new() -> Self {
        let attributes = Attributes { mode: 0o755, ..Attributes::default() };
        Self { nodes: vec![Node { content: Content::directory(), attributes, links: 1 }], text: 0 }
    }

    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    /// Nodes made so far, those that were replaced included.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Bytes of names, link targets and attributes kept so far.
    pub fn text(&self) -> usize {
        self.text
    }

    /// The children of a directory; `None` of anything else.
    pub fn children(&self, id: NodeId) -> Option<&BTreeMap<Box<[u8]>, NodeId>> {
        match &self.node(id).content {
            Content::Directory { children, .. } => Some(children),
            _ => None,
        }
    }

    pub fn child(&self, directory: NodeId, name: &[u8]) -> Option<NodeId> {
        self.children(directory)?.get(name).copied()
    }

    pub fn is_directory(&self, id: NodeId) -> bool {
        matches!(self.node(id).content, Content::Directory { .. })
    }

    pub fn is_whiteout(&self, id: NodeId) -> bool {
        matches!(self.node(id).content, Content::CharDevice(0, 0))
    }

    /// Makes a directory hide what lower layers have in it.
    pub fn set_opaque(&mut self, id: NodeId) {
        if let Content::Directory { opaque, .. } = &mut self.node_mut(id).content {
            *opaque = true;
        }
    }

    /// Makes `name` in `directory` lead to a new node, in place of what it led to.
    pub fn insert(
        &mut self,
        directory: NodeId,
        name: &[u8],
        content: Content,
        attributes: Attributes,
    ) -> Inserted {
        self.text += attributes.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
        self.text += match &content {
            Content::Symlink(target) => target.len(),
            Content::File(Data { sparse: Some(map), .. }) => size_of_val(&map[..]),
            _ => 0,
        };
        let id = NodeId(u32::try_from(self.nodes.len()).unwrap_or(u32::MAX));
        self.nodes.push(Node { content, attributes, links: 0 });
        self.link(directory, name, id)
    }

    /// Makes `name` in `directory` one more name of `node`.
    pub fn link(&mut self, directory: NodeId, name: &[u8], node: NodeId) -> Inserted {
        self.node_mut(node).links += 1;
        self.text += name.len();
        let Content::Directory { children, .. } = &mut self.node_mut(directory).content else {
            return Inserted::New(node);
        };
        match children.insert(name.into(), node) {
            None => Inserted::New(node),
            Some(previous) => {
                self.release(previous);
                Inserted::Replaced(node)
            }
        }
    }

    /// Takes one name away; what has none left gives back what it had.
    fn release(&mut self, id: NodeId) {
        let mut waiting = vec![id];
        while let Some(id) = waiting.pop() {
            let node = self.node_mut(id);
            node.links = node.links.saturating_sub(1);
            if node.links == 0
                && let Content::Directory { children, .. } = &mut node.content
            {
                waiting.extend(std::mem::take(children).into_values());
            }
        }
    }
}
