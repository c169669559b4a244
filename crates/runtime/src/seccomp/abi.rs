//! The ways in which programs call the kernel of one machine, and the numbers that system calls have in each.

use crate::error::Error;
use crate::spec::Arch;

pub(super) const AUDIT_X86_64: u32 = 0xc000_003e;
pub(super) const AUDIT_I386: u32 = 0x4000_0003;
const AUDIT_AARCH64: u32 = 0xc000_00b7;
const AUDIT_ARM: u32 = 0x4000_0028;
pub(super) const X32_BIT: u32 = 0x4000_0000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Abi {
    X86_64,
    X32,
    X86,
    Aarch64,
    Arm,
}

impl Abi {
    pub fn native() -> Result<Self, Error> {
        if cfg!(target_arch = "x86_64") {
            Ok(Self::X86_64)
        } else if cfg!(target_arch = "aarch64") {
            Ok(Self::Aarch64)
        } else {
            Err(Error::unsupported("seccomp is not built for this architecture"))
        }
    }

    pub fn of(arch: Arch) -> Option<Self> {
        let x86 = cfg!(target_arch = "x86_64");
        match arch {
            Arch::ScmpArchX86_64 if x86 => Some(Self::X86_64),
            Arch::ScmpArchX32 if x86 => Some(Self::X32),
            Arch::ScmpArchX86 if x86 => Some(Self::X86),
            Arch::ScmpArchAarch64 if !x86 => Some(Self::Aarch64),
            Arch::ScmpArchArm if !x86 => Some(Self::Arm),
            _ => None,
        }
    }

    pub fn audit(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => AUDIT_X86_64,
            Self::X86 => AUDIT_I386,
            Self::Aarch64 => AUDIT_AARCH64,
            Self::Arm => AUDIT_ARM,
        }
    }

    /// The number of a system call, `None` if this ABI has none of that name.
    pub fn number(self, name: &str) -> Option<u32> {
        match self {
            Self::X86_64 => name.parse::<syscalls::x86_64::Sysno>().ok().map(|n| n.id() as u32),
            Self::X32 => x32_number(name),
            Self::X86 => name.parse::<syscalls::x86::Sysno>().ok().map(|n| n.id() as u32),
            Self::Aarch64 => name.parse::<syscalls::aarch64::Sysno>().ok().map(|n| n.id() as u32),
            Self::Arm => name.parse::<syscalls::arm::Sysno>().ok().map(|n| n.id() as u32),
        }
    }
}

/// Calls whose x32 entry differs from the 64-bit one: from 512, in the kernel's order.
const X32_OWN: &[&str] = &[
    "rt_sigaction",
    "rt_sigreturn",
    "ioctl",
    "readv",
    "writev",
    "recvfrom",
    "sendmsg",
    "recvmsg",
    "execve",
    "ptrace",
    "rt_sigpending",
    "rt_sigtimedwait",
    "rt_sigqueueinfo",
    "sigaltstack",
    "timer_create",
    "mq_notify",
    "kexec_load",
    "waitid",
    "set_robust_list",
    "get_robust_list",
    "vmsplice",
    "move_pages",
    "preadv",
    "pwritev",
    "rt_tgsigqueueinfo",
    "recvmmsg",
    "sendmmsg",
    "process_vm_readv",
    "process_vm_writev",
    "setsockopt",
    "getsockopt",
    "io_setup",
    "io_submit",
    "execveat",
    "preadv2",
    "pwritev2",
];

fn x32_number(name: &str) -> Option<u32> {
    let number = name.parse::<syscalls::x86_64::Sysno>().ok()?.id() as u32;
    let own = X32_OWN.iter().position(|own| *own == name);
    Some(own.map_or(number, |place| 512 + place as u32) | X32_BIT)
}
