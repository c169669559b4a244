//! Seccomp: an OCI filter description compiled to a BPF program, once, for many containers.
//!
//! Layout: architecture, then per architecture a balanced binary search over system call numbers
//! (ranges with the same action are one leaf), then the argument tests of those that have them.

mod abi;
mod assemble;
mod kept;
mod late;

use brigantine_sys::seccomp::{Instruction, flag};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::plan::Filter;
use crate::spec::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};

use abi::Abi;
use assemble::assemble;
pub use late::LateSeccomp;
pub(crate) use late::program;

/// A compiled filter with its load flags. Plain data: cache it by the spec it came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    code: Vec<(u16, u8, u8, u32)>,
    flags: u32,
}

impl Program {
    pub(crate) fn instructions(&self) -> Vec<Instruction> {
        self.code.iter().map(|&(code, jt, jf, k)| Instruction { code, jt, jf, k }).collect()
    }

    pub(crate) fn into_filter(self) -> (Filter, u32) {
        (Filter::Compiled(self.instructions()), self.flags)
    }

    /// `SECCOMP_FILTER_FLAG_…` bits, as seccomp(2) takes them.
    pub fn flags(&self) -> u32 {
        self.flags
    }

    /// Instructions (the kernel takes at most 4096).
    pub fn len(&self) -> usize {
        self.code.len()
    }

    pub fn is_empty(&self) -> bool {
        self.code.is_empty()
    }

    /// What [`Self::to_bytes`] gives, of as many instructions as the kernel takes.
    pub(crate) fn from_bytes(bytes: &[u8], flags: u32) -> Option<Self> {
        let (whole, []) = bytes.as_chunks::<8>() else { return None };
        let code = whole.iter().map(|&[c0, c1, jt, jf, k0, k1, k2, k3]| {
            (u16::from_ne_bytes([c0, c1]), jt, jf, u32::from_ne_bytes([k0, k1, k2, k3]))
        });
        (1..=brigantine_sys::seccomp::MOST)
            .contains(&whole.len())
            .then(|| Self { code: code.collect(), flags })
    }

    /// The program as `struct sock_filter` bytes in this machine's byte order.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.code.len() * 8);
        for (code, jt, jf, k) in &self.code {
            bytes.extend(code.to_ne_bytes());
            bytes.extend([*jt, *jf]);
            bytes.extend(k.to_ne_bytes());
        }
        bytes
    }
}

const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_KILL_THREAD: u32 = 0;
const RET_TRAP: u32 = 0x0003_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_USER_NOTIF: u32 = 0x7fc0_0000;
const RET_TRACE: u32 = 0x7ff0_0000;
const RET_LOG: u32 = 0x7ffc_0000;
const RET_ALLOW: u32 = 0x7fff_0000;

const LOAD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_EQUAL: u16 = 0x35;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;

/// One argument test on 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Test {
    index: u8,
    op: LinuxSeccompOperator,
    value: u64,
    second: u64,
}

/// What happens for one number: the first clause whose tests all hold, else `otherwise`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verdict {
    clauses: Vec<(Vec<Test>, u32)>,
    otherwise: u32,
}

/// The load flags of what `filter` compiles to; `None` if it would let everything through anyway.
pub(crate) fn flags(filter: &LinuxSeccomp) -> Result<Option<u32>, Error> {
    let listener = check_notification(filter)?;
    let default = action(filter.default_action(), filter.default_errno_ret())?;
    // Without a word on flags, programs keep their speed: what this flag allows is what the kernel allows processes
    // without a filter, and what runc does.
    let mut flags = if filter.flags().is_none() { flag::SPEC_ALLOW } else { 0 };
    for word in filter.flags().iter().flatten() {
        flags |= match word {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => flag::LOG,
            // The process has one thread.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => flag::SPEC_ALLOW,
            // Of no meaning without a listener, and refused by the kernel then.
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv if listener => flag::WAIT_KILLABLE_RECV,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
        };
    }
    if listener {
        flags |= flag::NEW_LISTENER;
    }
    if default == RET_ALLOW
        && filter.syscalls().as_ref().is_none_or(Vec::is_empty)
        && flags & !flag::SPEC_ALLOW == 0
    {
        return Ok(None);
    }
    Ok(Some(flags))
}

/// Compiles `filter`; `None` if it would let everything through anyway.
pub fn compile(filter: &LinuxSeccomp) -> Result<Option<Program>, Error> {
    let Some(flags) = flags(filter)? else { return Ok(None) };
    let default = action(filter.default_action(), filter.default_errno_ret())?;
    let mut arches: Vec<Abi> = vec![Abi::native()?];
    for arch in filter.architectures().iter().flatten() {
        // Architectures that this machine cannot execute need no code.
        if let Some(abi) = Abi::of(*arch)
            && !arches.contains(&abi)
        {
            arches.push(abi);
        }
    }
    let rules = rules(filter)?;
    let tables: Vec<_> = arches.iter().map(|abi| table(&rules, *abi, default)).collect();
    Ok(Some(Program { code: assemble(&tables, default)?, flags }))
}

/// An architecture's verdicts by number, ascending, and the first number that the filter's author cannot have known.
type Table = (Abi, Vec<(u32, Verdict)>, Option<u32>);

/// Whether what is not mentioned is refused.
fn stern(default: u32) -> bool {
    !matches!(default, RET_ALLOW | RET_LOG | RET_USER_NOTIF)
}

/// Whether any rule asks its listener.
pub(crate) fn notifies(filter: &LinuxSeccomp) -> bool {
    filter.syscalls().iter().flatten().any(|rule| rule.action() == LinuxSeccompAction::ScmpActNotify)
}

/// Whether the filter has a listener; one that can never work is refused.
fn check_notification(filter: &LinuxSeccomp) -> Result<bool, Error> {
    if filter.default_action() == LinuxSeccompAction::ScmpActNotify {
        // The listener must first get its descriptor, and the program be executed.
        return Err(Error::invalid("SCMP_ACT_NOTIFY cannot be used as default action"));
    }
    if !notifies(filter) {
        return Ok(false);
    }
    if filter.listener_path().as_ref().is_none_or(|p| p.as_os_str().is_empty()) {
        return Err(Error::invalid("SCMP_ACT_NOTIFY is given without a listenerPath"));
    }
    let asks = |rule: &crate::spec::LinuxSyscall| {
        rule.action() == LinuxSeccompAction::ScmpActNotify && rule.names().iter().any(|n| n == "write")
    };
    if filter.syscalls().iter().flatten().any(asks) {
        return Err(Error::invalid(
            "SCMP_ACT_NOTIFY cannot be used for the write syscall: the listener gets its descriptor by it",
        ));
    }
    Ok(true)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32, Error> {
    use LinuxSeccompAction as A;
    let data = |default: u32| {
        let value = errno.unwrap_or(default);
        if value > 0xffff {
            Err(Error::invalid(format!("seccomp errnoRet {value} is too large")))
        } else {
            Ok(value)
        }
    };
    Ok(match action {
        A::ScmpActKill | A::ScmpActKillThread => RET_KILL_THREAD,
        A::ScmpActKillProcess => RET_KILL_PROCESS,
        A::ScmpActTrap => RET_TRAP,
        A::ScmpActErrno => RET_ERRNO | data(libc::EPERM as u32)?,
        A::ScmpActTrace => RET_TRACE | data(libc::EPERM as u32)?,
        A::ScmpActLog => RET_LOG,
        A::ScmpActAllow => RET_ALLOW,
        A::ScmpActNotify => RET_USER_NOTIF,
    })
}

/// A rule of the filter, understood once for all architectures.
struct Rule<'a> {
    names: &'a [String],
    tests: Vec<Test>,
    action: u32,
    /// Two tests are on one argument: they are alternatives, as libseccomp's users expect.
    alternatives: bool,
}

fn rules(filter: &LinuxSeccomp) -> Result<Vec<Rule<'_>>, Error> {
    let understood = |rule| {
        let rule: &crate::spec::LinuxSyscall = rule;
        let args = rule.args().as_deref().unwrap_or_default();
        let tests = args.iter().map(test).collect::<Result<Vec<_>, _>>()?;
        let mut seen = [false; 6];
        let alternatives = tests.iter().any(|t| std::mem::replace(&mut seen[usize::from(t.index)], true));
        Ok(Rule {
            names: rule.names(),
            tests,
            action: action(rule.action(), rule.errno_ret())?,
            alternatives,
        })
    };
    filter.syscalls().iter().flatten().map(understood).collect()
}

/// Names the ABI does not have are skipped: a profile is written for many kernels.
fn table(rules: &[Rule<'_>], abi: Abi, default: u32) -> Table {
    let mut numbered: Vec<(u32, &Rule<'_>)> = Vec::with_capacity(512);
    for rule in rules {
        numbered.extend(rule.names.iter().filter_map(|name| Some((abi.number(name)?, rule))));
    }
    // Rules for one number stay in the filter's order.
    numbered.sort_by_key(|(number, _)| *number);
    let same = numbered.chunk_by(|(a, _), (b, _)| a == b);
    let verdicts = same.filter_map(|same| Some((same.first()?.0, verdict(same, default))));
    let told = verdicts.filter(|(_, v)| v.otherwise != default || !v.clauses.is_empty()).collect();
    // A call newer than the newest that the filter's author knew of is one that this kernel does not have: programs then do
    // with an older one, which they would not for any other error.
    let beyond = numbered.last().filter(|_| stern(default)).map(|(last, _)| last + 1);
    (abi, told, beyond)
}

/// What the rules for one number come to.
fn verdict(rules: &[(u32, &Rule<'_>)], default: u32) -> Verdict {
    let mut verdict = Verdict { clauses: Vec::new(), otherwise: default };
    for (_, rule) in rules {
        if rule.tests.is_empty() {
            // The first rule without conditions settles it.
            if verdict.otherwise == default {
                verdict.otherwise = rule.action;
            }
        } else if rule.alternatives {
            verdict.clauses.extend(rule.tests.iter().map(|t| (vec![*t], rule.action)));
        } else {
            verdict.clauses.push((rule.tests.clone(), rule.action));
        }
    }
    // What is settled without conditions is not made stricter or laxer by the same verdict.
    let otherwise = verdict.otherwise;
    while verdict.clauses.last().is_some_and(|(_, action)| *action == otherwise) {
        verdict.clauses.pop();
    }
    verdict
}

fn test(arg: &LinuxSeccompArg) -> Result<Test, Error> {
    let index = u8::try_from(arg.index()).ok().filter(|i| *i < 6);
    let index =
        index.ok_or_else(|| Error::invalid(format!("seccomp argument {} is not 0 to 5", arg.index())))?;
    Ok(Test { index, op: arg.op(), value: arg.value(), second: arg.value_two().unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::abi::{AUDIT_I386, AUDIT_X86_64, X32_BIT};
    use super::*;
    use proptest::prelude::*;

    /// Just enough of the machine to run what `compile` makes.
    fn run(program: &Program, arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let mut data = [0_u8; 64];
        data[0..4].copy_from_slice(&number.to_ne_bytes());
        data[4..8].copy_from_slice(&arch.to_ne_bytes());
        for (i, arg) in args.iter().enumerate() {
            data[16 + i * 8..24 + i * 8].copy_from_slice(&arg.to_ne_bytes());
        }
        let (mut at, mut a) = (0, 0_u32);
        loop {
            let (code, jt, jf, k) = program.code[at];
            at += 1;
            let mut branch = |yes: bool| at += usize::from(if yes { jt } else { jf });
            match code {
                LOAD => a = u32::from_ne_bytes(data[k as usize..k as usize + 4].try_into().unwrap()),
                AND => a &= k,
                JUMP_EQUAL => branch(a == k),
                JUMP_GREATER => branch(a > k),
                JUMP_GREATER_EQUAL => branch(a >= k),
                0x05 => at += k as usize,
                RETURN => return k,
                other => panic!("opcode {other:#x}"),
            }
        }
    }

    fn filter(json: serde_json::Value) -> Program {
        compile(&serde_json::from_value(json).unwrap()).unwrap().unwrap()
    }

    fn number(name: &str) -> u32 {
        Abi::native().unwrap().number(name).unwrap()
    }

    fn native() -> u32 {
        Abi::native().unwrap().audit()
    }

    #[test]
    fn names_get_their_action_and_others_the_default() {
        let p = filter(serde_json::json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["read", "write", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["mkdirat"], "action": "SCMP_ACT_KILL_PROCESS"},
        ]}));
        assert_eq!(run(&p, native(), number("read"), [0; 6]), RET_ALLOW);
        assert_eq!(run(&p, native(), number("mkdirat"), [0; 6]), RET_KILL_PROCESS);
        assert_eq!(run(&p, native(), number("close"), [0; 6]), RET_ERRNO + 38);
        assert_eq!(run(&p, native(), 9999, [0; 6]), RET_ERRNO + 38);
        assert_eq!(run(&p, 0x1234, number("read"), [0; 6]), RET_KILL_PROCESS);
        if cfg!(target_arch = "x86_64") {
            assert_eq!(run(&p, AUDIT_I386, 3, [0; 6]), RET_ALLOW);
            assert_eq!(run(&p, AUDIT_X86_64, X32_BIT, [0; 6]), RET_ALLOW);
            assert_eq!(run(&p, AUDIT_X86_64, X32_BIT + 59, [0; 6]), RET_ERRNO + 38);
        }
    }

    #[test]
    fn calls_from_after_the_filters_time_do_not_exist() {
        let with = |action: &str| {
            filter(serde_json::json!({
                "defaultAction": action, "syscalls": [
                    {"names": ["read", "clone3"], "action": "SCMP_ACT_ALLOW"},
                    {"names": ["openat2"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]}))
        };
        let p = with("SCMP_ACT_ERRNO");
        let newest = number("openat2");
        assert_eq!(run(&p, native(), newest, [0; 6]), RET_ERRNO | 1);
        assert_eq!(run(&p, native(), newest - 5, [0; 6]), RET_ERRNO | 1);
        for later in [newest + 1, newest + 1000] {
            assert_eq!(run(&p, native(), later, [0; 6]), RET_ERRNO | libc::ENOSYS as u32);
        }
        let kill = with("SCMP_ACT_KILL_PROCESS");
        assert_eq!(run(&kill, native(), newest + 1, [0; 6]), RET_ERRNO | libc::ENOSYS as u32);
        // Nobody asked for calls to be refused.
        assert_eq!(run(&with("SCMP_ACT_LOG"), native(), newest + 1, [0; 6]), RET_LOG);
    }

    #[test]
    fn an_abi_that_is_not_listed_is_shut() {
        let p = filter(serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdirat"], "action": "SCMP_ACT_ERRNO"}]}));
        assert_eq!(run(&p, native(), number("read"), [0; 6]), RET_ALLOW);
        if cfg!(target_arch = "x86_64") {
            assert_eq!(run(&p, AUDIT_X86_64, X32_BIT | 1, [0; 6]) >> 16, RET_ERRNO >> 16);
            assert_eq!(run(&p, AUDIT_I386, 3, [0; 6]), RET_KILL_PROCESS);
        }
    }

    fn holds(op: &str, arg: u64, value: u64, second: u64) -> bool {
        match op {
            "SCMP_CMP_NE" => arg != value,
            "SCMP_CMP_LT" => arg < value,
            "SCMP_CMP_LE" => arg <= value,
            "SCMP_CMP_EQ" => arg == value,
            "SCMP_CMP_GE" => arg >= value,
            "SCMP_CMP_GT" => arg > value,
            _ => arg & value == second,
        }
    }

    fn word() -> impl Strategy<Value = u64> {
        prop_oneof![
            any::<u64>(),
            0_u64..4,
            Just(u64::MAX),
            Just(1 << 32),
            (0_u64..3).prop_map(|n| n << 32 | 1)
        ]
    }

    const NAMES: [&str; 6] = ["read", "write", "personality", "mkdirat", "execveat", "uname"];

    const ACTIONS: [(&str, u32); 5] = [
        ("SCMP_ACT_ERRNO", RET_ERRNO | 1),
        ("SCMP_ACT_ALLOW", RET_ALLOW),
        ("SCMP_ACT_KILL_PROCESS", RET_KILL_PROCESS),
        ("SCMP_ACT_LOG", RET_LOG),
        ("SCMP_ACT_TRAP", RET_TRAP),
    ];

    /// A rule as a test has it: names and action by their places, tests of arguments.
    #[derive(Debug, Clone)]
    struct RuleText {
        names: Vec<usize>,
        action: usize,
        tests: Vec<(usize, &'static str, u64, u64)>,
    }

    impl RuleText {
        fn json(&self) -> serde_json::Value {
            let names: Vec<_> = self.names.iter().map(|n| NAMES[*n]).collect();
            let test = |(index, op, value, second): &(usize, &str, u64, u64)| serde_json::json!({"index": index, "op": op, "value": value, "valueTwo": second});
            let tests: Vec<_> = self.tests.iter().map(test).collect();
            serde_json::json!({"names": names, "action": ACTIONS[self.action].0, "args": tests})
        }
    }

    fn any_rule() -> impl Strategy<Value = RuleText> {
        let op = prop::sample::select(vec![
            "SCMP_CMP_NE",
            "SCMP_CMP_LT",
            "SCMP_CMP_LE",
            "SCMP_CMP_EQ",
            "SCMP_CMP_GE",
            "SCMP_CMP_GT",
            "SCMP_CMP_MASKED_EQ",
        ]);
        let tests = prop::collection::vec((0_usize..3, op, word(), word()), 0..4);
        let names = prop::collection::vec(0..NAMES.len(), 1..4);
        (names, 0..ACTIONS.len(), tests).prop_map(|(names, action, tests)| RuleText { names, action, tests })
    }

    /// What the rules mean, said plainly: conditions come before what holds without any, each in the filter's order; a
    /// filter that refuses what it does not mention does not know of calls newer than its newest.
    fn meaning(rules: &[RuleText], default: u32, name: &str, args: [u64; 6]) -> u32 {
        let newest = rules.iter().flat_map(|r| &r.names).map(|n| number(NAMES[*n])).max();
        let refuses = ![RET_ALLOW, RET_LOG, RET_USER_NOTIF].contains(&default);
        if refuses && newest.is_some_and(|newest| number(name) > newest) {
            return RET_ERRNO | libc::ENOSYS as u32;
        }
        let of_name = || rules.iter().filter(|r| r.names.iter().any(|n| NAMES[*n] == name));
        let conditional = of_name().filter(|r| !r.tests.is_empty()).find(|rule| {
            let mut indices: Vec<_> = rule.tests.iter().map(|t| t.0).collect();
            indices.sort_unstable();
            let twice = indices.windows(2).any(|w| w[0] == w[1]);
            let mut each =
                rule.tests.iter().map(|(index, op, value, second)| holds(op, args[*index], *value, *second));
            if twice { each.any(|yes| yes) } else { each.all(|yes| yes) }
        });
        let plain = || of_name().find(|r| r.tests.is_empty() && ACTIONS[r.action].1 != default);
        conditional.or_else(plain).map_or(default, |r| ACTIONS[r.action].1)
    }

    proptest! {
        #[test]
        fn arguments_are_compared_as_64_bits(
            op in prop_oneof![Just("SCMP_CMP_NE"), Just("SCMP_CMP_LT"), Just("SCMP_CMP_LE"), Just("SCMP_CMP_EQ"),
                Just("SCMP_CMP_GE"), Just("SCMP_CMP_GT"), Just("SCMP_CMP_MASKED_EQ")],
            arg in word(), value in word(), second in word(), index in 0_usize..6,
        ) {
            let p = filter(serde_json::json!({
                "defaultAction": "SCMP_ACT_ERRNO",
                "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": index, "value": value, "valueTwo": second, "op": op}]}]}));
            let mut args = [0; 6];
            args[index] = arg;
            let allowed = run(&p, native(), number("read"), args) == RET_ALLOW;
            prop_assert_eq!(allowed, holds(op, arg, value, second));
        }

        #[test]
        fn a_filter_does_what_its_rules_say(
            rules in prop::collection::vec(any_rule(), 0..10),
            default in 0..ACTIONS.len(),
            probes in prop::collection::vec((0..NAMES.len(), prop::array::uniform6(word())), 1..20),
            all_abis: bool,
        ) {
            let abis: &[&str] = if all_abis { &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"] } else { &[] };
            let description = serde_json::json!({
                "defaultAction": ACTIONS[default].0, "architectures": abis,
                "syscalls": rules.iter().map(RuleText::json).collect::<Vec<_>>()});
            let compiled = compile(&serde_json::from_value(description).unwrap()).unwrap();
            for (name, args) in probes {
                let wanted = meaning(&rules, ACTIONS[default].1, NAMES[name], args);
                // No filter at all lets everything through.
                let found = compiled.as_ref().map_or(RET_ALLOW, |p| run(p, native(), number(NAMES[name]), args));
                prop_assert_eq!(found, wanted, "{} {:?}", NAMES[name], args);
            }
        }

        #[test]
        fn any_set_of_calls_is_found(numbers in proptest::collection::btree_set(0_u32..460, 0..300), probe in 0_u32..470) {
            let verdict = Verdict { clauses: vec![(vec![Test { index: 0, op: LinuxSeccompOperator::ScmpCmpEq, value: 7, second: 0 }], RET_TRAP)], otherwise: RET_ALLOW };
            let table: Vec<_> = numbers.iter().map(|n| (*n, verdict.clone())).collect();
            let code = assemble(&[(Abi::native().unwrap(), table, None)], RET_ERRNO).unwrap();
            let p = Program { code, flags: 0 };
            let known = numbers.contains(&probe);
            prop_assert_eq!(run(&p, native(), probe, [0; 6]), if known { RET_ALLOW } else { RET_ERRNO });
            prop_assert_eq!(run(&p, native(), probe, [7; 6]), if known { RET_TRAP } else { RET_ERRNO });
        }
    }
}
