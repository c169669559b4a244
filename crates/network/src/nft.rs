//! The vocabulary of nf_tables over nfnetlink that the firewall needs: transactions, tables, chains, sets and
//! maps with elements, and the expressions of its rules. Numbers are those of linux/netfilter/nf_tables.h;
//! data type numbers are the ones `nft` prints sets by.

use crate::ports::Protocol;
use crate::wire::{Attributes, Messages, NLM_F_APPEND, NLM_F_CREATE, attribute, text};

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = 0x0a00;
const GET_TABLE: u16 = 0x0a01;
const DELETE_TABLE: u16 = 0x0a02;
const NEW_CHAIN: u16 = 0x0a03;
const NEW_RULE: u16 = 0x0a06;
const NEW_SET: u16 = 0x0a09;
const NEW_ELEMENTS: u16 = 0x0a0c;
const DELETE_ELEMENTS: u16 = 0x0a0e;

pub(crate) const FAMILY_INET: u8 = 1;
pub(crate) const IPV4: u8 = 2;
pub(crate) const IPV6: u8 = 10;

const LIST_ELEMENT: u16 = 1;
const SET_IS_MAP: u32 = 8;

/// Where a base chain hangs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hook {
    /// `filter` or `nat`.
    pub kind: &'static str,
    pub number: u32,
    pub priority: i32,
}

pub(crate) const PREROUTING: u32 = 0;
pub(crate) const INPUT: u32 = 1;
pub(crate) const FORWARD: u32 = 2;
pub(crate) const OUTPUT: u32 = 3;
pub(crate) const POSTROUTING: u32 = 4;

/// Parts of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    Ipv4,
    Ipv6,
    Protocol,
    Port,
    Interface,
}

impl Field {
    fn number(self) -> u32 {
        match self {
            Self::Ipv4 => 7,
            Self::Ipv6 => 8,
            Self::Protocol => 12,
            Self::Port => 13,
            Self::Interface => 41,
        }
    }

    /// In a register: padded to four bytes.
    fn size(self) -> u32 {
        match self {
            Self::Ipv4 | Self::Protocol | Self::Port => 4,
            Self::Ipv6 | Self::Interface => 16,
        }
    }
}

fn type_of(fields: &[Field]) -> u32 {
    fields.iter().fold(0, |number, field| number << 6 | field.number())
}

fn size_of(fields: &[Field]) -> u32 {
    match fields {
        // A single field is not padded.
        [Field::Protocol] => 1,
        [Field::Port] => 2,
        _ => fields.iter().map(|field| field.size()).sum(),
    }
}

/// A set, or a map if it has a value.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Set {
    pub name: &'static str,
    pub key: &'static [Field],
    pub value: &'static [Field],
}

/// Key, and value if the set is a map.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Element {
    pub key: Vec<u8>,
    pub value: Vec<u8>,
}

/// A transaction on one table of family inet.
#[derive(Debug)]
pub(crate) struct Transaction<'a> {
    family: u8,
    table: &'a str,
    messages: Messages,
    sets: u32,
}

/// As `nft` writes families.
pub(crate) fn family_name(family: u8) -> &'static str {
    match family {
        FAMILY_INET => "inet",
        IPV4 => "ip",
        IPV6 => "ip6",
        _ => "other",
    }
}

/// `struct nfgenmsg`.
fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

impl<'a> Transaction<'a> {
    pub fn new(table: &'a str) -> Self {
        let mut messages = Messages::new();
        messages.push("begin an nf_tables transaction", BATCH_BEGIN, 0, &header(0, SUBSYSTEM), |_| {});
        Self { family: FAMILY_INET, table, messages, sets: 0 }
    }

    /// Goes on with another table.
    pub fn on(&mut self, family: u8, table: &'a str) {
        (self.family, self.table) = (family, table);
    }

    pub fn finish(mut self) -> Messages {
        self.messages.push("commit an nf_tables transaction", BATCH_END, 0, &header(0, SUBSYSTEM), |_| {});
        self.messages
    }

    fn push(&mut self, what: String, kind: u16, flags: u16, fill: impl FnOnce(&mut Attributes<'_>, &'a str)) {
        let table = self.table;
        self.messages.push(what, kind, flags, &header(self.family, 0), |body| fill(body, table));
    }

    /// Makes the table if it is not there.
    pub fn add_table(&mut self) {
        self.push(
            format!("create nf_tables table {} {}", family_name(self.family), self.table),
            NEW_TABLE,
            NLM_F_CREATE,
            |body, table| {
                body.text(1, table).be32(2, 0);
            },
        );
    }

    pub fn delete_table(&mut self) {
        let what = format!("delete nf_tables table {} {}", family_name(self.family), self.table);
        self.push(what, DELETE_TABLE, 0, |body, table| {
            body.text(1, table);
        });
    }

    pub fn add_chain(&mut self, name: &str, hook: Option<Hook>) {
        let what = match hook {
            Some(hook) => format!("create {} chain {name} (nft_chain_nat, nf_conntrack)", hook.kind),
            None => format!("create chain {name}"),
        };
        self.push(what, NEW_CHAIN, NLM_F_CREATE, |body, table| {
            body.text(1, table).text(3, name);
            if let Some(hook) = hook {
                body.nest(4, |nest| {
                    nest.be32(1, hook.number).be32(2, hook.priority as u32);
                });
                body.be32(5, libc::NF_ACCEPT as u32).text(7, hook.kind);
            }
        });
    }

    pub fn add_set(&mut self, set: &Set) {
        self.sets += 1;
        let id = self.sets;
        self.push(format!("create set {}", set.name), NEW_SET, NLM_F_CREATE, |body, table| {
            let flags = if set.value.is_empty() { 0 } else { SET_IS_MAP };
            body.text(1, table)
                .text(2, set.name)
                .be32(3, flags)
                .be32(4, type_of(set.key))
                .be32(5, size_of(set.key))
                .be32(10, id);
            if !set.value.is_empty() {
                body.be32(6, type_of(set.value)).be32(7, size_of(set.value));
            }
        });
    }

    pub fn add_elements(&mut self, set: &Set, elements: &[Element]) {
        self.elements("add elements to", NEW_ELEMENTS, NLM_F_CREATE, set, elements, true);
    }

    pub fn delete_elements(&mut self, set: &Set, elements: &[Element]) {
        self.elements("delete elements from", DELETE_ELEMENTS, 0, set, elements, false);
    }

    fn elements(
        &mut self,
        verb: &str,
        kind: u16,
        flags: u16,
        set: &Set,
        elements: &[Element],
        with_value: bool,
    ) {
        // An attribute cannot be longer than 64 KiB.
        for some in elements.chunks(400) {
            self.push(format!("{verb} set {}", set.name), kind, flags, |body, table| {
                body.text(1, table).text(2, set.name).nest(3, |list| {
                    for element in some {
                        list.nest(LIST_ELEMENT, |nest| {
                            nest.nest(1, |data| {
                                data.bytes(1, &element.key);
                            });
                            if with_value && !element.value.is_empty() {
                                nest.nest(2, |data| {
                                    data.bytes(1, &element.value);
                                });
                            }
                        });
                    }
                });
            });
        }
    }

    /// Appends a rule; `what` says what it is for.
    pub fn add_rule(&mut self, chain: &str, what: &str, expressions: &[Expression]) {
        self.push(
            format!("add the rule for {what}"),
            NEW_RULE,
            NLM_F_CREATE | NLM_F_APPEND,
            |body, table| {
                body.text(1, table).text(2, chain).nest(4, |list| {
                    for expression in expressions {
                        expression.append(list);
                    }
                });
            },
        );
    }
}

/// Asks whether the table exists: refused with ENOENT if not.
pub(crate) fn get_table(table: &str) -> Messages {
    let mut messages = Messages::new();
    let what = format!("look up nf_tables table inet {table}");
    messages.push(what, GET_TABLE, 0, &header(FAMILY_INET, 0), |body| {
        body.text(1, table);
    });
    messages
}

/// A chain of anybody's that refuses what none of its rules accept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DroppingChain {
    pub family: u8,
    pub table: String,
    pub name: String,
}

/// Type and header of the request for all chains.
pub(crate) const ALL_CHAINS: (u16, [u8; 4]) = (0x0a04, [0; 4]);

/// Whose chains end with a rule that rejects what its zones do not accept, whatever their policy.
pub(crate) const FIREWALLD: &str = "firewalld";

/// Reads a chain; `None` if it is not at `hook` or does not refuse by default.
pub(crate) fn dropping_chain(payload: &[u8], hook: u32) -> Option<DroppingChain> {
    let be32 = |value: &[u8]| value.try_into().map(u32::from_be_bytes).ok();
    let body = payload.get(4..)?;
    let number = attribute(attribute(body, 4)?, 1).and_then(be32)?;
    let policy = attribute(body, 5).and_then(be32)?;
    let (table, name) = (text(attribute(body, 1)?), text(attribute(body, 3)?));
    let refuses = policy == libc::NF_DROP as u32 || (table == FIREWALLD && name.starts_with("filter_"));
    (number == hook && refuses).then_some(DroppingChain { family: *payload.first()?, table, name })
}

/// Registers of four bytes; wider fields take several.
pub(crate) type Register = u32;
pub(crate) const R0: Register = 8;

/// Up to 16 constant bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes {
    bytes: [u8; 16],
    length: usize,
}

impl Bytes {
    pub fn new(value: &[u8]) -> Self {
        let mut bytes = [0; 16];
        let length = value.len().min(16);
        bytes[..length].copy_from_slice(&value[..length]);
        Self { bytes, length }
    }

    fn get(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// Which port of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortOf {
    Source,
    Destination,
}

impl PortOf {
    /// Where it is in the headers of tcp, udp and sctp alike.
    fn offset(self) -> u32 {
        match self {
            Self::Source => 0,
            Self::Destination => 2,
        }
    }
}

/// One step of a rule. Comparisons end the rule when they do not hold.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expression {
    /// `meta nfproto`.
    IsFamily(u8),
    LoadInputInterface(Register),
    LoadOutputInterface(Register),
    LoadProtocol(Register),
    /// From the network header.
    LoadNetwork {
        offset: u32,
        length: u32,
        register: Register,
    },
    /// Of tcp, udp and sctp alike.
    LoadDestinationPort(Register),
    LoadPort(PortOf, Register),
    /// Writes a register over a packet's port and mends the checksum. Of tcp and udp only.
    WritePort {
        whose: PortOf,
        protocol: Protocol,
        register: Register,
    },
    /// One of the states' bits is set in the connection's.
    HasState(u32),
    /// One of these bits is set in the connection's status.
    HasStatus(u32),
    /// The destination is an address of this host.
    IsLocalDestination,
    Equals {
        register: Register,
        value: u8,
        mask: Option<u8>,
    },
    /// The register begins with these bytes.
    Is {
        register: Register,
        value: Bytes,
    },
    /// Puts a constant into a register.
    Load {
        register: Register,
        value: Bytes,
    },
    IsMark(u32),
    SetMark(u32),
    In(&'static Set),
    NotIn(&'static Set),
    /// Sends a copy out of an interface to a neighbour; the packet itself goes on.
    Duplicate {
        address: Register,
        device: Register,
    },
    /// Replaces the key in R0 by the map's value.
    Map(&'static Set),
    /// To address and port as a map left them.
    DestinationNat {
        family: u8,
        address: Register,
        port: Register,
    },
    Masquerade,
    Accept,
    Drop,
    Jump(&'static str),
}

/// Headers that offsets are counted from (`NFT_PAYLOAD_…`).
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;
/// `NFT_PAYLOAD_CSUM_INET`.
const INTERNET_CHECKSUM: u32 = 1;

impl Expression {
    fn append(&self, list: &mut Attributes<'_>) {
        match *self {
            Self::IsFamily(family) => {
                meta(list, 15, R0);
                compare(list, R0, true, &[family]);
            }
            Self::LoadInputInterface(register) => meta(list, 6, register),
            Self::LoadOutputInterface(register) => meta(list, 7, register),
            Self::LoadProtocol(register) => meta(list, 16, register),
            Self::LoadNetwork { offset, length, register } => {
                payload(list, NETWORK, offset, length, register);
            }
            Self::LoadDestinationPort(register) => {
                Self::LoadPort(PortOf::Destination, register).append(list);
            }
            Self::LoadPort(whose, register) => payload(list, TRANSPORT, whose.offset(), 2, register),
            Self::WritePort { whose, protocol, register } => step(list, "payload", |data| {
                let checksum = if protocol == Protocol::Tcp { 16 } else { 6 };
                data.be32(5, register).be32(2, TRANSPORT).be32(3, whose.offset()).be32(4, 2);
                data.be32(6, INTERNET_CHECKSUM).be32(7, checksum);
            }),
            Self::HasState(bits) => conntrack_bits(list, 0, bits),
            Self::HasStatus(bits) => conntrack_bits(list, 2, bits),
            Self::IsLocalDestination => {
                step(list, "fib", |data| {
                    data.be32(1, R0).be32(2, 3).be32(3, 2);
                });
                compare(list, R0, true, &u32::from(libc::RTN_LOCAL).to_ne_bytes());
            }
            Self::Equals { register, value, mask } => {
                if let Some(mask) = mask {
                    bitwise(list, register, &[mask]);
                }
                compare(list, register, true, &[value]);
            }
            Self::Is { register, value } => compare(list, register, true, value.get()),
            Self::Load { register, value } => load(list, register, value.get()),
            Self::IsMark(mark) => {
                meta(list, 3, R0);
                compare(list, R0, true, &mark.to_ne_bytes());
            }
            Self::SetMark(mark) => {
                load(list, R0, &mark.to_ne_bytes());
                step(list, "meta", |data| {
                    data.be32(2, 3).be32(3, R0);
                });
            }
            Self::NotIn(set) => step(list, "lookup", |data| {
                data.text(1, set.name).be32(2, R0).be32(5, 1);
            }),
            Self::Duplicate { address, device } => step(list, "dup", |data| {
                data.be32(1, address).be32(2, device);
            }),
            Self::In(set) => step(list, "lookup", |data| {
                data.text(1, set.name).be32(2, R0);
            }),
            Self::Map(set) => step(list, "lookup", |data| {
                data.text(1, set.name).be32(2, R0).be32(3, R0);
            }),
            Self::DestinationNat { family, address, port } => step(list, "nat", |data| {
                data.be32(1, 1).be32(2, u32::from(family)).be32(3, address).be32(5, port);
            }),
            Self::Masquerade => step(list, "masq", |_| {}),
            Self::Accept => verdict(list, libc::NF_ACCEPT, None),
            Self::Drop => verdict(list, libc::NF_DROP, None),
            // NFT_JUMP
            Self::Jump(chain) => verdict(list, -3, Some(chain)),
        }
    }
}

fn step(list: &mut Attributes<'_>, name: &str, fill: impl FnOnce(&mut Attributes<'_>)) {
    list.nest(LIST_ELEMENT, |expression| {
        expression.text(1, name).nest(2, fill);
    });
}

fn meta(list: &mut Attributes<'_>, key: u32, register: Register) {
    step(list, "meta", |data| {
        data.be32(1, register).be32(2, key);
    });
}

fn load(list: &mut Attributes<'_>, register: Register, value: &[u8]) {
    step(list, "immediate", |data| {
        data.be32(1, register).nest(2, |nest| {
            nest.bytes(1, value);
        });
    });
}

fn payload(list: &mut Attributes<'_>, base: u32, offset: u32, length: u32, register: Register) {
    step(list, "payload", |data| {
        data.be32(1, register).be32(2, base).be32(3, offset).be32(4, length);
    });
}

fn compare(list: &mut Attributes<'_>, register: Register, equal: bool, value: &[u8]) {
    step(list, "cmp", |data| {
        data.be32(1, register).be32(2, u32::from(!equal)).nest(3, |nest| {
            nest.bytes(1, value);
        });
    });
}

fn bitwise(list: &mut Attributes<'_>, register: Register, mask: &[u8]) {
    step(list, "bitwise", |data| {
        data.be32(1, register)
            .be32(2, register)
            .be32(3, mask.len() as u32)
            .nest(4, |nest| {
                nest.bytes(1, mask);
            })
            .nest(5, |nest| {
                nest.bytes(1, &vec![0; mask.len()]);
            });
    });
}

fn conntrack_bits(list: &mut Attributes<'_>, key: u32, bits: u32) {
    step(list, "ct", |data| {
        data.be32(1, R0).be32(2, key);
    });
    bitwise(list, R0, &bits.to_ne_bytes());
    compare(list, R0, false, &[0; 4]);
}

fn verdict(list: &mut Attributes<'_>, code: i32, chain: Option<&str>) {
    step(list, "immediate", |data| {
        data.be32(1, 0).nest(2, |nest| {
            nest.nest(2, |verdict| {
                verdict.be32(1, code as u32);
                if let Some(chain) = chain {
                    verdict.text(2, chain);
                }
            });
        });
    });
}
