//! The firewall where the kernel has no nf_tables: chains of the engine's own in the tables that all share, written by
//! `iptables-restore`, in one transaction a change.
//!
//! Invariant: of what others have in the tables nothing is changed but the places of the jumps to our chains. What must not
//! be forwarded is dropped before the host's rules, what may be is accepted after them; so theirs decide about everything
//! that ours let through, and a policy to drop does not cut containers off.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::nftables::Nftables;
use super::rules::{Rule, Writer};
use super::xtables::Programs;
use super::{Change, Contents};
use crate::bridge::BridgeSpec;
use crate::error::Error;
use crate::ports::PublishedPort;
use crate::sysctl;

/// Where looking means to execute a program.
const BETWEEN_LOOKS: Duration = Duration::from_secs(30);

/// How many of our programs are remembered: what the kernel tells of their work is told at once.
const REMEMBERED: usize = 32;

const TABLES: [&str; 4] = ["raw", "filter", "nat", "security"];

#[derive(Debug)]
pub(crate) struct Iptables {
    table: String,
    state: Mutex<Option<Loaded>>,
    /// The last programs of ours that changed something; their process ids are their netlink ports.
    programs: Mutex<VecDeque<u32>>,
}

/// What was loaded, and follows from it.
#[derive(Debug)]
struct Loaded {
    bridges: Vec<BridgeSpec>,
    has_gate: bool,
    families: Vec<Family>,
    /// When it was last looked whether all is there.
    looked: Instant,
}

#[derive(Debug)]
struct Family {
    programs: Programs,
    /// How many rules each chain of ours has.
    counts: BTreeMap<String, usize>,
    /// What the kernel said of its tables right after the last change.
    fingerprint: Option<Vec<Vec<u8>>>,
}

impl Family {
    fn tables(has_gate: bool) -> &'static [&'static str] {
        // The last one is for the gate alone.
        if has_gate { &TABLES } else { &TABLES[..3] }
    }
}

impl Iptables {
    pub fn new(table: String) -> Self {
        Self { table, state: Mutex::default(), programs: Mutex::default() }
    }

    pub fn table(&self) -> &str {
        &self.table
    }

    pub fn is_loaded(&self) -> bool {
        self.lock().is_some()
    }

    /// Whether the programs keep their rules in nf_tables, of whose changes the kernel tells.
    pub fn is_told() -> bool {
        Programs::find(true).is_some_and(|programs| !programs.is_legacy())
    }

    pub fn ports(&self) -> Vec<u32> {
        self.remembered().iter().copied().collect()
    }

    fn remembered(&self) -> MutexGuard<'_, VecDeque<u32>> {
        self.programs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn restore(&self, programs: &Programs, text: &str) -> Result<(), Error> {
        programs.restore(text, |pid| {
            let mut remembered = self.remembered();
            remembered.push_back(pid);
            if remembered.len() > REMEMBERED {
                remembered.pop_front();
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Loaded>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn load(&self, contents: &Contents<'_>) -> Result<(), Error> {
        let mut state = self.lock();
        *state = None;
        let mut families = Vec::new();
        for is_ipv4 in [true, false] {
            if !is_ipv4 && !sysctl::has_ipv6() {
                continue;
            }
            match self.load_family(contents, is_ipv4) {
                Ok(family) => families.push(family),
                // Without the gate it is tried again.
                Err(Error::FirewallProgram { program, reason }) if contents.gate.is_some() => {
                    return Err(Error::FirewallUnavailable {
                        missing: format!("what {program} needs for the gate"),
                        source: io::Error::other(reason),
                    });
                }
                Err(error) if !is_ipv4 && contents.bridges.iter().all(|bridge| bridge.subnet6.is_none()) => {
                    tracing::debug!(%error, "no firewall for IPv6, which no network has");
                }
                Err(error) => return Err(error),
            }
        }
        *state = Some(Loaded {
            bridges: contents.bridges.to_vec(),
            has_gate: contents.gate.is_some(),
            families,
            looked: Instant::now(),
        });
        Ok(())
    }

    fn load_family(&self, contents: &Contents<'_>, is_ipv4: bool) -> Result<Family, Error> {
        let programs = Programs::find(is_ipv4).ok_or_else(|| Error::FirewallUnavailable {
            missing: "iptables-restore (of the package iptables)".to_owned(),
            source: io::ErrorKind::NotFound.into(),
        })?;
        let writer = Writer::new(&self.table, is_ipv4);
        let has_gate = contents.gate.is_some();
        let (saved, rules) = (programs.saved()?, writer.rules(contents));
        let chains = writer.chains(has_gate);
        let mut text = String::new();
        for table in Family::tables(has_gate) {
            let of_table = || chains.iter().filter(|chain| chain.table == *table);
            writeln!(text, "*{table}").ok();
            for chain in of_table() {
                // Emptied if it is there.
                writeln!(text, ":{} - [0:0]", chain.name).ok();
            }
            for line in of_table().flat_map(|chain| jumps(&saved, table, &chain.name)) {
                writeln!(text, "-D {}", line.trim_start_matches("-A ")).ok();
            }
            for rule in rules.iter().filter(|rule| rule.table == *table) {
                write_rule(&mut text, rule, false);
            }
            for chain in of_table() {
                if let Some(jump) = &chain.jump {
                    let place = if jump.is_first { "-I" } else { "-A" };
                    writeln!(text, "{place} {} {}-j {}", jump.from, jump.condition, chain.name).ok();
                }
            }
            text.push_str("COMMIT\n");
        }
        if !has_gate
            && let Some(gone) = Self::removal(&self.table, is_ipv4, &saved, |table| table == "security")
        {
            text.push_str(&gone);
        }
        self.restore(&programs, &text)?;
        let mut counts: BTreeMap<String, usize> =
            chains.iter().map(|chain| (chain.name.clone(), 0)).collect();
        for rule in &rules {
            *counts.entry(rule.chain.clone()).or_default() += 1;
        }
        let fingerprint = programs.fingerprint(Family::tables(has_gate));
        Ok(Family { programs, counts, fingerprint })
    }

    pub fn publish(&self, ports: &[PublishedPort]) -> Result<Change, Error> {
        self.change(ports, false)
    }

    pub fn withdraw(&self, ports: &[PublishedPort]) -> Result<Change, Error> {
        self.change(ports, true)
    }

    fn change(&self, ports: &[PublishedPort], takes_away: bool) -> Result<Change, Error> {
        let mut state = self.lock();
        let Some(loaded) = state.as_mut() else { return Ok(Change::Reload) };
        for family in &mut loaded.families {
            let writer = Writer::new(&self.table, family.programs.is_ipv4);
            let rules = writer.ports(ports, &loaded.bridges, loaded.has_gate);
            if rules.is_empty() {
                continue;
            }
            let mut text = String::new();
            for table in Family::tables(loaded.has_gate) {
                writeln!(text, "*{table}").ok();
                for rule in rules.iter().filter(|rule| rule.table == *table) {
                    write_rule(&mut text, rule, takes_away);
                }
                text.push_str("COMMIT\n");
            }
            let before = family.programs.fingerprint(Family::tables(loaded.has_gate));
            if let Err(error) = self.restore(&family.programs, &text) {
                tracing::warn!(table = self.table, %error, "the firewall's chains are not as they were loaded; loading them again");
                return Ok(Change::Reload);
            }
            for rule in rules {
                let count = family.counts.entry(rule.chain).or_default();
                *count = if takes_away { count.saturating_sub(1) } else { *count + 1 };
            }
            // What somebody did before that is still to be looked at.
            if before == family.fingerprint {
                family.fingerprint = family.programs.fingerprint(Family::tables(loaded.has_gate));
            }
        }
        Ok(Change::Done)
    }

    pub fn unload(&self) -> Result<(), Error> {
        *self.lock() = None;
        for is_ipv4 in [true, false] {
            let Some(programs) = Programs::find(is_ipv4).filter(|_| is_ipv4 || sysctl::has_ipv6()) else {
                continue;
            };
            if let Some(text) = Self::removal(&self.table, is_ipv4, &programs.saved()?, |_| true) {
                self.restore(&programs, &text)?;
            }
        }
        Ok(())
    }

    /// What takes our chains out of the tables that are `wanted`; `None` if there are none.
    fn removal(table: &str, is_ipv4: bool, saved: &str, wanted: impl Fn(&str) -> bool) -> Option<String> {
        let chains = Writer::new(table, is_ipv4).chains(true);
        let mut text = String::new();
        for table in TABLES.into_iter().filter(|table| wanted(table)) {
            let present: Vec<&str> = chains
                .iter()
                .filter(|chain| chain.table == table)
                .map(|chain| chain.name.as_str())
                .filter(|name| is_declared(saved, table, name))
                .collect();
            if present.is_empty() {
                continue;
            }
            writeln!(text, "*{table}").ok();
            for line in present.iter().flat_map(|name| jumps(saved, table, name)) {
                writeln!(text, "-D {}", line.trim_start_matches("-A ")).ok();
            }
            for (order, names) in [("-F", &present), ("-X", &present)] {
                for name in names {
                    writeln!(text, "{order} {name}").ok();
                }
            }
            text.push_str("COMMIT\n");
        }
        (!text.is_empty()).then_some(text)
    }

    /// Whether it pays to look ([`Self::exists`]): what the kernel says of its tables is another than it was, or it does
    /// not say anything and some time has gone by.
    pub fn may_have_changed(&self) -> bool {
        let state = self.lock();
        let Some(loaded) = state.as_ref() else { return true };
        loaded.families.iter().any(|family| match &family.fingerprint {
            Some(known) => {
                family.programs.fingerprint(Family::tables(loaded.has_gate)).as_ref() != Some(known)
            }
            None => loaded.looked.elapsed() > BETWEEN_LOOKS,
        })
    }

    /// Whether all chains have the rules that they were given, and the jumps to them are where they were put.
    pub fn exists(&self) -> Result<bool, Error> {
        let mut state = self.lock();
        let Some(loaded) = state.as_mut() else { return Ok(false) };
        loaded.looked = Instant::now();
        for family in &mut loaded.families {
            let tables = Family::tables(loaded.has_gate);
            let now = family.programs.fingerprint(tables);
            if now.is_some() && now == family.fingerprint {
                continue;
            }
            let saved = family.programs.saved()?;
            for chain in Writer::new(&self.table, family.programs.is_ipv4).chains(loaded.has_gate) {
                let expected = family.counts.get(&chain.name).copied().unwrap_or_default();
                let begin = format!("-A {} ", chain.name);
                let present = lines(&saved, chain.table).filter(|line| line.starts_with(&begin)).count();
                let is_whole = is_declared(&saved, chain.table, &chain.name) && present == expected;
                if !is_whole
                    || !chain.jump.is_none_or(|jump| is_in_place(&saved, chain.table, &chain.name, &jump))
                {
                    return Ok(false);
                }
            }
            family.fingerprint = now;
        }
        Ok(true)
    }

    /// Our chains come before every policy; what nf_tables has beside them is another matter.
    pub fn obstacles(&self) -> Result<Vec<String>, Error> {
        let nftables = Nftables::new(self.table.clone());
        if nftables.answers() { nftables.obstacles() } else { Ok(Vec::new()) }
    }

    pub fn input_policies(&self) -> Result<Vec<String>, Error> {
        let nftables = Nftables::new(self.table.clone());
        let mut policies = if nftables.answers() { nftables.input_policies()? } else { Vec::new() };
        for (is_ipv4, family) in [(true, "ip"), (false, "ip6")] {
            let Some(programs) = Programs::find(is_ipv4).filter(|_| is_ipv4 || sysctl::has_ipv6()) else {
                continue;
            };
            let saved = programs.saved()?;
            let name = format!("{family} filter INPUT");
            if lines(&saved, "filter").any(|line| line.starts_with(":INPUT DROP"))
                && !policies.contains(&name)
            {
                policies.push(name);
            }
        }
        Ok(policies)
    }
}

fn write_rule(text: &mut String, rule: &Rule, takes_away: bool) {
    let order = match (takes_away, rule.is_first) {
        (true, _) => "-D",
        (false, true) => "-I",
        (false, false) => "-A",
    };
    writeln!(text, "{order} {} {}", rule.chain, rule.text).ok();
}

/// The lines of one table of what was saved.
fn lines<'a>(saved: &'a str, table: &str) -> impl Iterator<Item = &'a str> {
    let begin = format!("*{table}");
    saved.lines().skip_while(move |line| *line != begin).skip(1).take_while(|line| *line != "COMMIT")
}

fn is_declared(saved: &str, table: &str, chain: &str) -> bool {
    let begin = format!(":{chain} ");
    lines(saved, table).any(|line| line.starts_with(&begin))
}

/// The rules of built-in chains that lead to a chain of ours.
fn jumps<'a>(saved: &'a str, table: &str, chain: &str) -> impl Iterator<Item = &'a str> {
    let end = format!(" -j {chain}");
    lines(saved, table).filter(move |line| line.ends_with(&end) && !line.starts_with("-A BRIG-"))
}

fn is_in_place(saved: &str, table: &str, chain: &str, jump: &super::rules::Jump) -> bool {
    let (begin, end) = (format!("-A {} ", jump.from), format!(" -j {chain}"));
    let of_builtin: Vec<&str> = lines(saved, table).filter(|line| line.starts_with(&begin)).collect();
    // Another engine's may be before.
    let foreign = of_builtin.iter().position(|line| !line.contains(" -j BRIG-"));
    let place = of_builtin.iter().position(|line| line.ends_with(&end));
    place.is_some_and(|place| !jump.is_first || foreign.is_none_or(|foreign| place < foreign))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::rules::Jump;

    const SAVED: &str = "# Generated\n*nat\n:PREROUTING ACCEPT [0:0]\n:BRIG-brig0-PRE - [0:0]\n\
        -A PREROUTING -m addrtype --dst-type LOCAL -j BRIG-brig0-PRE\nCOMMIT\n\
        *filter\n:FORWARD DROP [0:0]\n:BRIG-brig0-ISO - [0:0]\n-A FORWARD -i eth0 -j ACCEPT\n\
        -A FORWARD -j BRIG-brig0-ISO\nCOMMIT\n";

    #[test]
    fn what_was_saved_is_read_by_table() {
        assert!(
            is_declared(SAVED, "nat", "BRIG-brig0-PRE") && !is_declared(SAVED, "filter", "BRIG-brig0-PRE")
        );
        assert_eq!(
            jumps(SAVED, "nat", "BRIG-brig0-PRE").collect::<Vec<_>>(),
            ["-A PREROUTING -m addrtype --dst-type LOCAL -j BRIG-brig0-PRE"]
        );
        let text = Iptables::removal("brigantine-brig0", true, SAVED, |_| true).unwrap();
        assert!(
            text.contains(
                "-D PREROUTING -m addrtype --dst-type LOCAL -j BRIG-brig0-PRE\n-F BRIG-brig0-PRE\n-X"
            )
        );
        assert!(Iptables::removal("brigantine-other", true, SAVED, |_| true).is_none());
    }

    #[test]
    fn a_jump_that_has_to_be_first_is_missed_behind_others() {
        let jump = |is_first| Jump { from: "FORWARD", is_first, condition: "" };
        assert!(!is_in_place(SAVED, "filter", "BRIG-brig0-ISO", &jump(true)));
        assert!(is_in_place(SAVED, "filter", "BRIG-brig0-ISO", &jump(false)));
    }
}
