//! Device rules: v1 files, or one eBPF program on v2.

use std::fs::File;
use std::os::fd::AsFd;

use brigantine_sys::bpf::{self, Instruction};

use super::{Cgroup, write_lines};
use crate::error::Error;
use crate::spec::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};

const READ: u32 = 2;
const WRITE: u32 = 4;
const MKNOD: u32 = 1;

/// A rule in the kernel's terms; `None` is any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// 1 block, 2 character.
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

impl Rule {
    fn is_of_same_devices(&self, other: &Self) -> bool {
        (self.kind, self.major, self.minor) == (other.kind, other.major, other.minor)
    }

    /// Whether some access to some device is in both.
    fn overlaps(&self, other: &Self) -> bool {
        let meet = |a: Option<u32>, b: Option<u32>| a.is_none() || b.is_none() || a == b;
        meet(self.kind, other.kind)
            && meet(self.major, other.major)
            && meet(self.minor, other.minor)
            && self.access & other.access != 0
    }
}

/// What every container may use besides what its spec says (as runc): making any node, and the
/// devices that are in every `/dev`.
const ALWAYS: &[Rule] = &[
    Rule { allow: true, kind: Some(2), major: None, minor: None, access: MKNOD },
    Rule { allow: true, kind: Some(1), major: None, minor: None, access: MKNOD },
    always(1, 3),
    always(1, 8),
    always(1, 7),
    always(5, 0),
    always(1, 5),
    always(1, 9),
    Rule { allow: true, kind: Some(2), major: Some(136), minor: None, access: READ | WRITE | MKNOD },
    always(5, 2),
];

const fn always(major: u32, minor: u32) -> Rule {
    Rule { allow: true, kind: Some(2), major: Some(major), minor: Some(minor), access: READ | WRITE | MKNOD }
}

/// Whether the rules can be understood.
pub(super) fn check(resources: &LinuxResources) -> Result<(), Error> {
    compile(&rules(resources)?);
    Ok(())
}

/// The rules with those of every container, without what has no effect; none if the description has none.
fn rules(resources: &LinuxResources) -> Result<Vec<Rule>, Error> {
    let Some(devices) = resources.devices().as_ref().filter(|d| !d.is_empty()) else { return Ok(Vec::new()) };
    let rules = devices.iter().map(rule).collect::<Result<Vec<_>, _>>()?;
    Ok(effective(rules.into_iter().chain(ALWAYS.iter().copied()).collect()))
}

/// Without what has no effect: what comes before a rule for everything, and what says the same as that one and takes
/// nothing back.
fn effective(mut rules: Vec<Rule>) -> Vec<Rule> {
    let Some(last) = rules.iter().rposition(|r| r.kind.is_none()) else { return rules };
    rules.drain(..last);
    let mut kept: Vec<Rule> = Vec::with_capacity(rules.len());
    for rule in rules {
        let same = kept.first().is_some_and(|all| all.allow == rule.allow);
        if !same || kept.iter().any(|k| k.allow != rule.allow && k.overlaps(&rule)) {
            kept.push(rule);
        }
    }
    kept
}

/// Version 1 keeps a list of exceptions from one rule for everything, and takes back only what was put there in the same
/// words: a part of an earlier permission would silently stay.
fn check_v1(rules: &[Rule]) -> Result<(), Error> {
    for (at, rule) in rules.iter().enumerate().filter(|(_, r)| !r.allow && r.kind.is_some()) {
        let partly =
            |k: &&Rule| k.allow && k.kind.is_some() && k.overlaps(rule) && !k.is_of_same_devices(rule);
        if let Some(wider) = rules[..at].iter().find(partly) {
            return Err(Error::unsupported(format!(
                "device rule \"deny {}\" takes back a part of \"allow {}\", which cgroup v1 cannot do",
                v1_line(rule),
                v1_line(wider)
            )));
        }
    }
    Ok(())
}

pub(super) fn apply(group: &Cgroup, resources: &LinuxResources) -> Result<(), Error> {
    let rules = rules(resources)?;
    if rules.is_empty() {
        return Ok(());
    }
    if let Some(dir) = group.v1_dir("devices") {
        check_v1(&rules)?;
        // One rule a write, but one file for all rules in a row of a kind.
        for same in rules.chunk_by(|a, b| a.allow == b.allow) {
            let allow = same.first().is_some_and(|r| r.allow);
            let file = dir.join(if allow { "devices.allow" } else { "devices.deny" });
            write_lines(&file, same.iter().map(v1_line))?;
        }
        return Ok(());
    }
    let Some(dir) = group.v2_dir().filter(|_| group.is_unified()) else {
        return Err(Error::unsupported("device rules are given, but no devices cgroup is mounted"));
    };
    if let [Rule { allow: true, kind: None, .. }] = rules[..] {
        return Ok(());
    }
    let what = |step: &str| format!("{step} the device rules of cgroup {}", dir.display());
    let program = bpf::load_device_program(&compile(&rules)).map_err(|e| Error::os(what("loading"), e))?;
    let target = File::open(dir).map_err(|e| Error::os(what("attaching"), e))?;
    bpf::attach_device_program(target.as_fd(), program.as_fd()).map_err(|e| Error::os(what("attaching"), e))
}

fn rule(device: &LinuxDeviceCgroup) -> Result<Rule, Error> {
    let kind = match device.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(1),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(2),
        Some(LinuxDeviceType::P) => return Err(Error::invalid("a device rule for a FIFO makes no sense")),
    };
    let number = |n: Option<i64>| match n {
        None | Some(-1) => Ok(None),
        Some(n) => u32::try_from(n)
            .map(Some)
            .map_err(|_unused| Error::invalid(format!("device number {n} is out of range"))),
    };
    let mut access = 0;
    for letter in device.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            // As a type has it.
            'a' => READ | WRITE | MKNOD,
            other => return Err(Error::invalid(format!("device access {other:?} is not one of r, w, m"))),
        };
    }
    let (major, minor) = (number(device.major())?, number(device.minor())?);
    if kind.is_none() {
        return Ok(Rule {
            allow: device.allow(),
            kind,
            major: None,
            minor: None,
            access: READ | WRITE | MKNOD,
        });
    }
    Ok(Rule { allow: device.allow(), kind, major, minor, access })
}

fn v1_line(rule: &Rule) -> String {
    let kind = match rule.kind {
        None => return "a".to_owned(),
        Some(1) => 'b',
        Some(_) => 'c',
    };
    let number = |n: Option<u32>| n.map_or_else(|| "*".to_owned(), |n| n.to_string());
    let mut access = String::new();
    for (bit, letter) in [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')] {
        if rule.access & bit != 0 {
            access.push(letter);
        }
    }
    format!("{kind} {}:{} {access}", number(rule.major), number(rule.minor))
}

/// eBPF opcodes used here.
mod op {
    pub const LOAD_WORD: u8 = 0x61;
    pub const AND: u8 = 0x54;
    pub const AND_REGISTER: u8 = 0x5c;
    pub const SHIFT_RIGHT: u8 = 0x74;
    pub const MOVE: u8 = 0xb4;
    pub const MOVE_REGISTER: u8 = 0xbc;
    pub const JUMP_IF_NOT: u8 = 0x55;
    pub const JUMP_IF_EQUAL: u8 = 0x15;
    pub const JUMP_IF_NOT_REGISTER: u8 = 0x5d;
    pub const EXIT: u8 = 0x95;
}

/// r2 = kind, r3 = wanted access, r4 = major, r5 = minor; rules from the last to the first, for
/// the last that matches decides. No match: allowed, as in a group without rules.
fn compile(rules: &[Rule]) -> Vec<Instruction> {
    let i = |code, dst: u8, src: u8, offset, immediate| Instruction {
        code,
        registers: src << 4 | dst,
        offset,
        immediate,
    };
    let mut code = vec![
        i(op::LOAD_WORD, 2, 1, 0, 0),
        i(op::MOVE_REGISTER, 3, 2, 0, 0),
        i(op::AND, 2, 0, 0, 0xffff),
        i(op::SHIFT_RIGHT, 3, 0, 0, 16),
        i(op::LOAD_WORD, 4, 1, 4, 0),
        i(op::LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        // Each test jumps over the rest of its rule; the distance is filled in when it is known.
        let mut block: Vec<(Instruction, bool)> = Vec::new();
        if let Some(kind) = rule.kind {
            block.push((i(op::JUMP_IF_NOT, 2, 0, 0, kind as i32), true));
        }
        if rule.access != READ | WRITE | MKNOD {
            block.push((i(op::MOVE_REGISTER, 1, 3, 0, 0), false));
            if rule.allow {
                // Everything wanted must be in the rule.
                block.push((i(op::AND, 1, 0, 0, rule.access as i32), false));
                block.push((i(op::JUMP_IF_NOT_REGISTER, 1, 3, 0, 0), true));
            } else {
                block.push((i(op::MOVE, 0, 0, 0, rule.access as i32), false));
                block.push((i(op::AND_REGISTER, 1, 0, 0, 0), false));
                block.push((i(op::JUMP_IF_EQUAL, 1, 0, 0, 0), true));
            }
        }
        for (register, number) in [(4, rule.major), (5, rule.minor)] {
            if let Some(number) = number {
                block.push((i(op::JUMP_IF_NOT, register, 0, 0, number as i32), true));
            }
        }
        block.push((i(op::MOVE, 0, 0, 0, i32::from(rule.allow)), false));
        block.push((i(op::EXIT, 0, 0, 0, 0), false));
        let length = block.len();
        for (at, (mut instruction, jumps)) in block.into_iter().enumerate() {
            if jumps {
                instruction.offset = (length - at - 1) as i16;
            }
            code.push(instruction);
        }
        if rule.kind.is_none() {
            return code;
        }
    }
    code.push(i(op::MOVE, 0, 0, 0, 1));
    code.push(i(op::EXIT, 0, 0, 0, 0));
    code
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Just enough of the machine to run what `compile` makes.
    #[expect(clippy::many_single_char_names, reason = "registers have short names")]
    fn run(code: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut r = [0_u64; 11];
        let mut at = 0;
        loop {
            let c = code[at];
            let (d, s) = ((c.registers & 15) as usize, (c.registers >> 4) as usize);
            let k = c.immediate as u32;
            at += 1;
            let mut jump = |yes: bool| {
                if yes {
                    at = at.checked_add_signed(c.offset.into()).unwrap();
                }
            };
            match c.code {
                op::LOAD_WORD => r[d] = context[c.offset as usize / 4].into(),
                op::AND => r[d] = u64::from(r[d] as u32 & k),
                op::AND_REGISTER => r[d] = u64::from(r[d] as u32 & r[s] as u32),
                op::SHIFT_RIGHT => r[d] = u64::from(r[d] as u32 >> k),
                op::MOVE => r[d] = k.into(),
                op::MOVE_REGISTER => r[d] = u64::from(r[s] as u32),
                op::JUMP_IF_NOT => jump(r[d] != u64::from(k)),
                op::JUMP_IF_EQUAL => jump(r[d] == u64::from(k)),
                op::JUMP_IF_NOT_REGISTER => jump(r[d] != r[s]),
                op::EXIT => return r[0] != 0,
                other => panic!("opcode {other:#x}"),
            }
        }
    }

    #[test]
    fn the_program_decides_like_the_rules() {
        let deny = Rule { allow: false, kind: None, major: None, minor: None, access: READ | WRITE | MKNOD };
        let mut rules = vec![deny];
        rules.extend(ALWAYS);
        rules.push(Rule { allow: false, kind: Some(2), major: Some(136), minor: Some(7), access: WRITE });
        let code = compile(&rules);
        assert!(run(&code, 2, READ | WRITE, 1, 3));
        assert!(run(&code, 1, MKNOD, 8, 0));
        assert!(!run(&code, 1, READ, 8, 0));
        assert!(!run(&code, 2, READ | MKNOD, 10, 200));
        assert!(run(&code, 2, READ, 136, 7));
        assert!(!run(&code, 2, READ | WRITE, 136, 7));
    }

    /// What the rules mean, said plainly: the last one that speaks of the access decides.
    fn decides(rules: &[Rule], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let fits = |r: &&Rule| {
            r.kind.is_none_or(|k| k == kind)
                && r.major.is_none_or(|n| n == major)
                && r.minor.is_none_or(|n| n == minor)
                && if r.allow { access & !r.access == 0 } else { access & r.access != 0 }
        };
        rules.iter().rev().find(fits).is_none_or(|r| r.allow)
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let number = || prop::option::of(0_u32..3);
        let of_a_kind = (any::<bool>(), 1_u32..3, number(), number(), 1_u32..8);
        let of_a_kind = of_a_kind.prop_map(|(allow, kind, major, minor, access)| Rule {
            allow,
            kind: Some(kind),
            major,
            minor,
            access,
        });
        let whole = any::<bool>().prop_map(|allow| Rule {
            allow,
            kind: None,
            major: None,
            minor: None,
            access: READ | WRITE | MKNOD,
        });
        prop_oneof![9 => of_a_kind, 1 => whole]
    }

    proptest! {
        #[test]
        fn any_rules_decide_as_they_say(
            rules in prop::collection::vec(any_rule(), 0..12),
            kind in 1_u32..3, access in 1_u32..8, major in 0_u32..4, minor in 0_u32..4,
        ) {
            let code = compile(&rules);
            prop_assert_eq!(run(&code, kind, access, major, minor), decides(&rules, kind, access, major, minor));
        }

        #[test]
        fn what_is_left_out_had_no_effect(
            asked in prop::collection::vec(any_rule(), 1..12),
            kind in 1_u32..3, access in 1_u32..8, major in 0_u32..4, minor in 0_u32..4,
        ) {
            let all: Vec<Rule> = asked.iter().chain(ALWAYS).copied().collect();
            let before = decides(&all, kind, access, major, minor);
            prop_assert_eq!(run(&compile(&effective(all)), kind, access, major, minor), before);
        }
    }

    #[test]
    fn what_is_taken_back_is_not_left_out() {
        let deny = Rule { allow: false, kind: None, major: None, minor: None, access: READ | WRITE | MKNOD };
        let disks = Rule { allow: true, kind: Some(1), ..deny };
        let disk = Rule { allow: false, kind: Some(1), major: Some(8), minor: Some(0), access: READ | WRITE };
        let rules = effective(vec![deny, disks, disk]);
        assert_eq!(rules, [deny, disks, disk]);
        assert!(!run(&compile(&rules), 1, READ, 8, 0) && run(&compile(&rules), 1, READ, 8, 1));
        let error = check_v1(&rules).unwrap_err().to_string();
        assert!(error.contains("\"deny b 8:0 rw\" takes back a part of \"allow b *:* rwm\""), "{error}");
        // The very same can be taken back, and what nothing allows need not be.
        assert!(check_v1(&[deny, disks, Rule { allow: false, ..disks }]).is_ok());
        assert_eq!(effective(vec![deny, disk, disks]), [deny, disks]);
    }

    #[test]
    fn v1_lines() {
        assert_eq!(v1_line(&ALWAYS[0]), "c *:* m");
        assert_eq!(v1_line(&ALWAYS[2]), "c 1:3 rwm");
    }
}
