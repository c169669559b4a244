//! Builds the tree of a template from its pieces.

use super::Error;
use super::lex::{Piece, Placed, Token, split};

#[derive(Debug, Clone)]
pub enum Node {
    Literal(String),
    Print(Pipeline),
    /// The first arm whose condition holds; `with` also makes its value the dot.
    If {
        arms: Vec<(Pipeline, Vec<Node>)>,
        otherwise: Vec<Node>,
        with: bool,
    },
    Range {
        over: Pipeline,
        body: Vec<Node>,
        otherwise: Vec<Node>,
    },
}

#[derive(Debug, Clone)]
pub struct Pipeline {
    /// Variables that take the value; two of them in `range $k, $v :=`.
    pub declares: Vec<String>,
    pub assigns: bool,
    pub commands: Vec<Vec<Operand>>,
}

#[derive(Debug, Clone)]
pub struct Operand {
    pub base: Base,
    pub fields: Vec<String>,
    /// Column of the operand in its line, for messages.
    pub column: usize,
}

#[derive(Debug, Clone)]
pub enum Base {
    Dot,
    Variable(String),
    Function(String),
    Text(String),
    Int(i64),
    Float(f64),
    Bool(bool),
    Nil,
    Group(Box<Pipeline>),
}

pub const FUNCTIONS: &[&str] = &[
    "and", "or", "not", "eq", "ne", "lt", "le", "gt", "ge", "len", "index", "print", "printf", "println",
    "json", "upper", "lower", "title", "join", "split", "pad", "truncate", "table",
];

pub fn parse(source: &str) -> Result<Vec<Node>, Error> {
    let pieces = split(source)?;
    let last = 1 + source.matches('\n').count();
    let mut parser = Parser { pieces: pieces.into_iter(), variables: vec!["$".to_owned()], line: 1, last };
    match parser.block()? {
        (nodes, Stop::Source) => Ok(nodes),
        (_, Stop::End) => Err(parser.error("unexpected {{end}}")),
        (_, Stop::Else(_)) => Err(parser.error("unexpected {{else}}")),
    }
}

enum Stop {
    Source,
    End,
    /// The tokens behind `else`: empty, or `if …`.
    Else(Vec<Placed>),
}

struct Parser {
    pieces: std::vec::IntoIter<Piece>,
    variables: Vec<String>,
    line: usize,
    last: usize,
}

impl Parser {
    fn error(&self, text: impl Into<String>) -> Error {
        Error::Parse { line: self.line, text: text.into() }
    }

    fn block(&mut self) -> Result<(Vec<Node>, Stop), Error> {
        let scope = self.variables.len();
        let mut nodes = Vec::new();
        let stop = loop {
            let Some(piece) = self.pieces.next() else {
                self.line = self.last;
                break Stop::Source;
            };
            match piece {
                Piece::Literal(text) => nodes.push(Node::Literal(text)),
                Piece::Action { mut tokens, line } => {
                    self.line = line;
                    let keyword = match tokens.first().map(|t| &t.token) {
                        Some(Token::Word(word)) => word.clone(),
                        Some(_) => String::new(),
                        None => return Err(self.error("missing value for command")),
                    };
                    match keyword.as_str() {
                        "end" => break Stop::End,
                        "else" => {
                            tokens.remove(0);
                            break Stop::Else(tokens);
                        }
                        "if" | "with" => {
                            tokens.remove(0);
                            nodes.push(self.conditional(tokens, keyword == "with")?);
                        }
                        "range" => {
                            tokens.remove(0);
                            nodes.push(self.range(&tokens)?);
                        }
                        "define" | "template" | "block" | "break" | "continue" => {
                            return Err(self.error(format!("{{{{{keyword}}}}} is not supported in formats")));
                        }
                        _ => nodes.push(Node::Print(self.pipeline(&tokens)?)),
                    }
                }
            }
        };
        self.variables.truncate(scope);
        Ok((nodes, stop))
    }

    fn conditional(&mut self, mut tokens: Vec<Placed>, with: bool) -> Result<Node, Error> {
        let mut arms = Vec::new();
        let scope = self.variables.len();
        let otherwise = loop {
            let condition = self.pipeline(&tokens)?;
            let (body, stop) = self.block()?;
            arms.push((condition, body));
            match stop {
                Stop::End => break Vec::new(),
                Stop::Source => return Err(self.error("unexpected EOF")),
                Stop::Else(mut next) if next.is_empty() => {
                    next.clear();
                    break self.last_block()?;
                }
                Stop::Else(mut next) => {
                    if !matches!(&next[0].token, Token::Word(word) if word == "if" || word == "with") {
                        return Err(self.error("unexpected tokens in {{else}}"));
                    }
                    next.remove(0);
                    tokens = next;
                }
            }
        };
        self.variables.truncate(scope);
        Ok(Node::If { arms, otherwise, with })
    }

    fn range(&mut self, tokens: &[Placed]) -> Result<Node, Error> {
        let scope = self.variables.len();
        let over = self.pipeline(tokens)?;
        let (body, stop) = self.block()?;
        let otherwise = match stop {
            Stop::End => Vec::new(),
            Stop::Source => return Err(self.error("unexpected EOF")),
            Stop::Else(_) => self.last_block()?,
        };
        self.variables.truncate(scope);
        Ok(Node::Range { over, body, otherwise })
    }

    fn last_block(&mut self) -> Result<Vec<Node>, Error> {
        match self.block()? {
            (nodes, Stop::End) => Ok(nodes),
            (_, Stop::Source) => Err(self.error("unexpected EOF")),
            (_, Stop::Else(_)) => Err(self.error("expected end; found {{else}}")),
        }
    }

    fn pipeline(&mut self, tokens: &[Placed]) -> Result<Pipeline, Error> {
        let (declares, assigns, rest) = match tokens {
            [Placed { token: Token::Variable(a), .. }, Placed { token: Token::Declare, .. }, rest @ ..] => {
                (vec![a.clone()], false, rest)
            }
            [Placed { token: Token::Variable(a), .. }, Placed { token: Token::Assign, .. }, rest @ ..] => {
                (vec![a.clone()], true, rest)
            }
            [
                Placed { token: Token::Variable(a), .. },
                Placed { token: Token::Comma, .. },
                Placed { token: Token::Variable(b), .. },
                Placed { token: Token::Declare, .. },
                rest @ ..,
            ] => (vec![a.clone(), b.clone()], false, rest),
            rest => (Vec::new(), false, rest),
        };
        let mut rest = rest.iter().peekable();
        let commands = self.commands(&mut rest)?;
        if rest.peek().is_some() {
            return Err(self.error("unexpected right paren \")\""));
        }
        if assigns && !self.variables.contains(&declares[0]) {
            return Err(self.error(format!("undefined variable \"{}\"", declares[0])));
        }
        self.variables.extend(declares.iter().cloned());
        Ok(Pipeline { declares, assigns, commands })
    }

    fn commands(
        &self,
        rest: &mut std::iter::Peekable<std::slice::Iter<'_, Placed>>,
    ) -> Result<Vec<Vec<Operand>>, Error> {
        let mut commands = vec![Vec::new()];
        while let Some(placed) = rest.peek().copied() {
            let column = placed.at;
            let last = commands.len() - 1;
            let base = match &placed.token {
                Token::Close => break,
                Token::Pipe => {
                    rest.next();
                    if commands[last].is_empty() {
                        return Err(self.error("missing value for command"));
                    }
                    commands.push(Vec::new());
                    continue;
                }
                Token::Field(..) | Token::Dot => Base::Dot,
                Token::Variable(name) if self.variables.contains(name) => Base::Variable(name.clone()),
                Token::Variable(name) => {
                    return Err(self.error(format!("undefined variable \"{name}\"")));
                }
                Token::Text(text) => Base::Text(text.clone()),
                Token::Int(number) => Base::Int(*number),
                Token::Float(number) => Base::Float(*number),
                Token::Word(word) => match word.as_str() {
                    "true" => Base::Bool(true),
                    "false" => Base::Bool(false),
                    "nil" => Base::Nil,
                    name if FUNCTIONS.contains(&name) => Base::Function(word.clone()),
                    name => return Err(self.error(format!("function \"{name}\" not defined"))),
                },
                Token::Open => {
                    rest.next();
                    let inner = self.commands(rest)?;
                    if !matches!(rest.peek().map(|p| &p.token), Some(Token::Close)) {
                        return Err(self.error("unclosed left paren"));
                    }
                    Base::Group(Box::new(Pipeline { declares: Vec::new(), assigns: false, commands: inner }))
                }
                Token::Declare | Token::Assign | Token::Comma => {
                    return Err(self.error("unexpected token in command"));
                }
            };
            let mut fields = Vec::new();
            if let Token::Field(name, _) = &placed.token {
                fields.push(name.clone());
            }
            rest.next();
            while let Some(Placed { token: Token::Field(name, false), .. }) = rest.peek() {
                fields.push(name.clone());
                rest.next();
            }
            commands[last].push(Operand { base, fields, column });
        }
        if commands.iter().any(Vec::is_empty) {
            return Err(self.error("missing value for command"));
        }
        Ok(commands)
    }
}
