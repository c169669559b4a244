//! Verdicts to instructions.

use brigantine_sys::seccomp::Instruction;

use super::abi::{AUDIT_X86_64, Abi, X32_BIT};
use super::{
    AND, JUMP_EQUAL, JUMP_GREATER, JUMP_GREATER_EQUAL, LOAD, RET_ERRNO, RET_KILL_PROCESS, RETURN, Table,
    Test, Verdict,
};
use crate::error::Error;
use crate::spec::LinuxSeccompOperator;

const OFFSET_NUMBER: u32 = 0;

const OFFSET_ARCH: u32 = 4;

/// Code is made backwards, so that every jump's target is already there.
#[derive(Debug, Default)]
struct Assembler {
    /// Last instruction first.
    reversed: Vec<Instruction>,
    /// Where each action is returned last.
    returns: Vec<(u32, Label)>,
}

/// A place in the code, counted from its end.
type Label = usize;

impl Assembler {
    fn push(&mut self, code: u16, k: u32) -> Label {
        self.reversed.push(Instruction { code, jt: 0, jf: 0, k });
        self.reversed.len()
    }

    fn ret(&mut self, action: u32) -> Label {
        let label = self.push(RETURN, action);
        match self.returns.iter_mut().find(|(known, _)| *known == action) {
            Some((_, last)) => *last = label,
            None => self.returns.push((action, label)),
        }
        label
    }

    /// A return near enough to be jumped to from an instruction pushed soon.
    fn ret_near(&mut self, action: u32) -> Label {
        match self.returns.iter().find(|(known, _)| *known == action) {
            Some((_, label)) if self.reversed.len() - label < 120 => *label,
            _ => self.ret(action),
        }
    }

    /// A conditional jump. Too far a target is reached through an unconditional jump put here.
    fn jump(&mut self, code: u16, k: u32, yes: Label, no: Label) -> Label {
        let yes = self.reach(yes);
        let no = self.reach(no);
        let here = self.reversed.len();
        let distance = |label: Label| (here - label) as u8;
        self.reversed.push(Instruction { code, jt: distance(yes), jf: distance(no), k });
        self.reversed.len()
    }

    fn reach(&mut self, label: Label) -> Label {
        const JUMP_ALWAYS: u16 = 0x05;
        let here = self.reversed.len();
        // Room for the other trampoline that may come in between.
        if here - label <= 253 {
            return label;
        }
        if let Some(Instruction { code: RETURN, k, .. }) = self.reversed.get(label - 1).copied() {
            return self.ret(k);
        }
        self.push(JUMP_ALWAYS, (here - label) as u32)
    }
}

pub(super) fn assemble(tables: &[Table], default: u32) -> Result<Vec<(u16, u8, u8, u32)>, Error> {
    let mut out = Assembler::default();
    // An unknown architecture gets what seccomp(2) advises: it must not slip by.
    let stray = out.ret(RET_KILL_PROCESS);
    let mut blocks: Vec<(u32, Label)> = Vec::new();
    let mut x32_block = None;
    for (abi, table, beyond) in tables.iter().rev() {
        let tree = search(&mut out, table, *beyond, default);
        if *abi == Abi::X32 {
            x32_block = Some(tree);
        } else {
            blocks.push((abi.audit(), tree));
        }
    }
    // x86-64 and x32 share their architecture; the number tells them apart.
    for (audit, entry) in &mut blocks {
        if *audit == AUDIT_X86_64 {
            let other = x32_block.unwrap_or_else(|| out.ret_near(RET_ERRNO | libc::ENOSYS as u32));
            *entry = out.jump(JUMP_GREATER_EQUAL, X32_BIT, other, *entry);
        }
        *entry = {
            let next = *entry;
            let load = out.push(LOAD, OFFSET_NUMBER);
            let at = out.reversed.len();
            // The load falls through to the code pushed just before it only if that is adjacent.
            if at == next + 1 { load } else { trampoline_load(&mut out, next) }
        };
    }
    let mut chain = stray;
    for (audit, entry) in &blocks {
        chain = out.jump(JUMP_EQUAL, *audit, *entry, chain);
    }
    out.push(LOAD, OFFSET_ARCH);
    if out.reversed.len() > 4096 {
        return Err(Error::invalid(format!(
            "the seccomp filter is too long: {} instructions",
            out.reversed.len()
        )));
    }
    Ok(out.reversed.into_iter().rev().map(|i| (i.code, i.jt, i.jf, i.k)).collect())
}

/// Replaces the load just pushed by one followed by a jump to `next`.
fn trampoline_load(out: &mut Assembler, next: Label) -> Label {
    const JUMP_ALWAYS: u16 = 0x05;
    out.reversed.pop();
    let here = out.reversed.len();
    out.push(JUMP_ALWAYS, (here - next) as u32);
    out.push(LOAD, OFFSET_NUMBER)
}

/// Leaves: maximal runs of numbers with one verdict, including the default's gaps.
fn search(out: &mut Assembler, table: &[(u32, Verdict)], beyond: Option<u32>, default: u32) -> Label {
    let plain = |action| Verdict { clauses: Vec::new(), otherwise: action };
    let (default, unknown) = (plain(default), plain(RET_ERRNO | libc::ENOSYS as u32));
    let mut leaves: Vec<(u32, &Verdict)> = Vec::with_capacity(table.len());
    let told = table.iter().flat_map(|(n, v)| [(*n, v), (n + 1, &default)]);
    for (from, verdict) in std::iter::once((0, &default)).chain(told).chain(beyond.map(|n| (n, &unknown))) {
        if leaves.last().is_some_and(|(start, _)| *start == from) {
            leaves.pop();
        }
        if leaves.last().is_none_or(|(_, last)| *last != verdict) {
            leaves.push((from, verdict));
        }
    }
    tree(out, &leaves)
}

fn tree(out: &mut Assembler, leaves: &[(u32, &Verdict)]) -> Label {
    match leaves {
        [] => out.ret(RET_KILL_PROCESS),
        [(_, verdict)] => leaf(out, verdict),
        _ => {
            let middle = leaves.len() / 2;
            let high = tree(out, &leaves[middle..]);
            let low = tree(out, &leaves[..middle]);
            out.jump(JUMP_GREATER_EQUAL, leaves[middle].0, high, low)
        }
    }
}

fn leaf(out: &mut Assembler, verdict: &Verdict) -> Label {
    if verdict.clauses.is_empty() {
        return out.ret_near(verdict.otherwise);
    }
    let mut next = out.ret_near(verdict.otherwise);
    for (tests, action) in verdict.clauses.iter().rev() {
        let mut then = out.ret_near(*action);
        for test in tests.iter().rev() {
            then = self::condition(out, *test, then, next);
        }
        next = then;
    }
    next
}

/// A test on a 64-bit argument in two 32-bit halves.
fn condition(out: &mut Assembler, test: Test, yes: Label, no: Label) -> Label {
    let low_offset = 16 + u32::from(test.index) * 8;
    let (low_offset, high_offset) = if cfg!(target_endian = "little") {
        (low_offset, low_offset + 4)
    } else {
        (low_offset + 4, low_offset)
    };
    let halves = |v: u64| ((v >> 32) as u32, v as u32);
    let (high, low) = halves(test.value);
    use LinuxSeccompOperator as O;
    let ordered = |out: &mut Assembler, code: u16, yes: Label, no: Label| {
        out.jump(code, low, yes, no);
        let below = out.push(LOAD, low_offset);
        let equal = out.jump(JUMP_EQUAL, high, below, no);
        out.jump(JUMP_GREATER, high, yes, equal);
        out.push(LOAD, high_offset)
    };
    match test.op {
        O::ScmpCmpEq | O::ScmpCmpNe => {
            let (yes, no) = if test.op == O::ScmpCmpEq { (yes, no) } else { (no, yes) };
            out.jump(JUMP_EQUAL, low, yes, no);
            let below = out.push(LOAD, low_offset);
            out.jump(JUMP_EQUAL, high, below, no);
            out.push(LOAD, high_offset)
        }
        O::ScmpCmpGt => ordered(out, JUMP_GREATER, yes, no),
        O::ScmpCmpGe => ordered(out, JUMP_GREATER_EQUAL, yes, no),
        O::ScmpCmpLe => ordered(out, JUMP_GREATER, no, yes),
        O::ScmpCmpLt => ordered(out, JUMP_GREATER_EQUAL, no, yes),
        O::ScmpCmpMaskedEq => {
            // `value` is the mask, `valueTwo` what must remain.
            let (want_high, want_low) = halves(test.second);
            out.jump(JUMP_EQUAL, want_low, yes, no);
            out.push(AND, low);
            let below = out.push(LOAD, low_offset);
            out.jump(JUMP_EQUAL, want_high, below, no);
            out.push(AND, high);
            out.push(LOAD, high_offset)
        }
    }
}
