//! `--chmod`: modes in octal, or as chmod(1) writes changes of them.

use crate::error::{Result, invalid};

/// A mode asked for by `--chmod`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Chmod {
    Octal(u32),
    Symbolic(Vec<Clause>),
}

/// `ug+rwX`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Clause {
    who: u32,
    op: char,
    bits: u32,
    conditional_x: bool,
}

impl Chmod {
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = || {
            invalid(format!(
                "invalid chmod parameter: '{text}'. it should be octal string and between 0 and 07777"
            ))
        };
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
            let mode = u32::from_str_radix(text, 8).map_err(|_bad| wrong())?;
            return if mode > 0o7777 { Err(wrong()) } else { Ok(Self::Octal(mode)) };
        }
        let mut clauses = Vec::new();
        for clause in text.split(',') {
            let at = clause.find(['+', '-', '=']).ok_or_else(wrong)?;
            let mut who = 0;
            for c in clause[..at].chars() {
                who |= match c {
                    'u' => 0o4700,
                    'g' => 0o2070,
                    'o' => 0o1007,
                    'a' => 0o7777,
                    _ => return Err(wrong()),
                };
            }
            let who = if who == 0 { 0o7777 } else { who };
            let op = clause[at..].chars().next().ok_or_else(wrong)?;
            let (mut bits, mut conditional_x) = (0, false);
            for c in clause[at + 1..].chars() {
                bits |= match c {
                    'r' => 0o444,
                    'w' => 0o222,
                    'x' => 0o111,
                    's' => 0o6000,
                    't' => 0o1000,
                    'X' => {
                        conditional_x = true;
                        0
                    }
                    _ => return Err(wrong()),
                };
            }
            clauses.push(Clause { who, op, bits, conditional_x });
        }
        Ok(Self::Symbolic(clauses))
    }

    pub fn apply(&self, mode: u32, dir: bool) -> u32 {
        match self {
            Self::Octal(mode) => *mode,
            Self::Symbolic(clauses) => clauses.iter().fold(mode, |mode, clause| {
                let mut bits = clause.bits;
                if clause.conditional_x && (dir || mode & 0o111 != 0) {
                    bits |= 0o111;
                }
                bits &= clause.who;
                match clause.op {
                    '+' => mode | bits,
                    '-' => mode & !bits,
                    _ => mode & !(clause.who & 0o777) | bits,
                }
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_octal_and_symbolic() {
        let apply = |text: &str, mode, dir| Chmod::parse(text).unwrap().apply(mode, dir);
        assert_eq!(apply("755", 0o600, false), 0o755);
        assert_eq!(apply("u=rwX,go=rX", 0o600, false), 0o644);
        assert_eq!(apply("u=rwX,go=rX", 0o600, true), 0o755);
        assert_eq!(apply("a+x", 0o644, false), 0o755);
        assert_eq!(apply("+x", 0o644, false), 0o755);
        assert_eq!(apply("go-rwx", 0o777, false), 0o700);
        for bad in ["", "8", "10000", "u", "u+z", "x=r"] {
            assert!(Chmod::parse(bad).is_err(), "{bad}");
        }
    }
}
