//! The image shipped inside the program: one tiny static executable that greets and explains.
//!
//! Nothing is embedded as a binary: the executable is put together here, machine instruction by instruction, and is
//! the same on every build. So are the image's layer, configuration, manifest and their digests.

use crate::archive::make_manifest;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::media;
use crate::model::{ContainerConfig, Descriptor, History, ImageConfig, RootFs};
use crate::reference::Reference;
use crate::store::{Image, NewImage, Store};
use crate::tar::{Entry, Time, Writer};

/// The name the embedded image gets.
pub const HELLO: &str = "hello";

/// When the image says it was made: the same for everybody.
const CREATED: &str = "2026-01-01T00:00:00Z";
const CREATED_SECONDS: i64 = 1_767_225_600;

const MESSAGE: &str = "
Ahoy from Brigantine! This message comes out of a container, so your installation works.

What just happened:
  1. The brig command asked the engine for a container of the \"hello\" image.
  2. The engine carries that image in its own program, so nothing was downloaded.
  3. It gave the container namespaces, a cgroup and a root file system of its own,
     dropped privileges, and started /hello, a program of a few hundred bytes.
  4. What it wrote travelled through the container's monitor to your terminal.

Where to sail next:
  brig image bootstrap debian:bookworm     a real Debian, made from its own packages
  brig run -it debian:bookworm bash        and a shell in it
  brig help                                everything else

";

/// What differs between machines.
struct Machine {
    /// As images name it.
    architecture: &'static str,
    /// ELF's number.
    elf: u16,
    /// Assembles write(1, message, length) and exit(0), the message being at the address given.
    code: fn(message: u64, length: u32) -> Vec<u8>,
    /// Length of that code, which does not depend on its operands.
    code_length: u64,
}

const MACHINES: [Machine; 2] = [
    Machine { architecture: "amd64", elf: 62, code: code_amd64, code_length: 34 },
    Machine { architecture: "arm64", elf: 183, code: code_arm64, code_length: 44 },
];

/// Where the program is loaded.
const BASE: u64 = 0x40_0000;
const ELF_HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;

/// x86-64: system call number in rax, arguments in rdi, rsi, rdx.
fn code_amd64(message: u64, length: u32) -> Vec<u8> {
    const WRITE: u32 = 1;
    const EXIT: u32 = 60;
    let mut code = Vec::new();
    code.push(0xb8); // mov eax, WRITE
    code.extend(WRITE.to_le_bytes());
    code.push(0xbf); // mov edi, 1
    code.extend(1u32.to_le_bytes());
    code.push(0xbe); // mov esi, message (below 4 GiB)
    code.extend((message as u32).to_le_bytes());
    code.push(0xba); // mov edx, length
    code.extend(length.to_le_bytes());
    code.extend([0x0f, 0x05]); // syscall
    code.push(0xb8); // mov eax, EXIT
    code.extend(EXIT.to_le_bytes());
    code.push(0xbf); // mov edi, 0
    code.extend(0u32.to_le_bytes());
    code.extend([0x0f, 0x05]); // syscall
    code
}

/// AArch64: system call number in x8, arguments in x0, x1, x2.
fn code_arm64(message: u64, length: u32) -> Vec<u8> {
    const WRITE: u32 = 64;
    const EXIT: u32 = 93;
    /// movz x<register>, #value, lsl #(16 * half)
    fn movz(register: u32, value: u32, half: u32) -> u32 {
        0xd280_0000 | (half << 21) | ((value & 0xffff) << 5) | register
    }
    /// movk x<register>, #value, lsl #(16 * half)
    fn movk(register: u32, value: u32, half: u32) -> u32 {
        0xf280_0000 | (half << 21) | ((value & 0xffff) << 5) | register
    }
    const SVC: u32 = 0xd400_0001;
    let message = message as u32;
    let code = [
        movz(8, WRITE, 0),
        movz(0, 1, 0),
        movz(1, message, 0),
        movk(1, message >> 16, 1),
        movz(2, length, 0),
        movk(2, length >> 16, 1),
        SVC,
        movz(8, EXIT, 0),
        movz(0, 0, 0),
        SVC,
        // Never reached; keeps what follows apart from the code.
        0,
    ];
    code.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// A static ELF executable of one read-only, executable segment: headers, code, message.
fn executable(machine: &Machine, message: &[u8]) -> Vec<u8> {
    let entry = BASE + ELF_HEADER + PROGRAM_HEADER;
    let code = (machine.code)(entry + machine.code_length, message.len() as u32);
    let size = ELF_HEADER + PROGRAM_HEADER + code.len() as u64 + message.len() as u64;
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF");
    elf.extend([2, 1, 1, 0]); // 64 bits, little endian, version 1, System V
    elf.extend([0; 8]);
    elf.extend(2u16.to_le_bytes()); // an executable
    elf.extend(machine.elf.to_le_bytes());
    elf.extend(1u32.to_le_bytes());
    elf.extend(entry.to_le_bytes());
    elf.extend(ELF_HEADER.to_le_bytes()); // where the program headers are
    elf.extend(0u64.to_le_bytes()); // no section headers
    elf.extend(0u32.to_le_bytes());
    elf.extend((ELF_HEADER as u16).to_le_bytes());
    elf.extend((PROGRAM_HEADER as u16).to_le_bytes());
    elf.extend(1u16.to_le_bytes()); // one program header
    elf.extend([0; 6]);
    elf.extend(1u32.to_le_bytes()); // a segment to load
    elf.extend(5u32.to_le_bytes()); // readable, executable
    elf.extend(0u64.to_le_bytes()); // from the start of the file
    elf.extend(BASE.to_le_bytes());
    elf.extend(BASE.to_le_bytes());
    elf.extend(size.to_le_bytes());
    elf.extend(size.to_le_bytes());
    elf.extend(0x1000u64.to_le_bytes());
    elf.extend(code);
    elf.extend(message);
    elf
}

/// The image's bytes.
struct Hello {
    layer: Vec<u8>,
    config: Vec<u8>,
    manifest: Vec<u8>,
    descriptor: Descriptor,
}

fn hello(machine: &Machine) -> Result<Hello> {
    let program = executable(machine, MESSAGE.as_bytes());
    let mut writer = Writer::new(Vec::new());
    let entry = Entry {
        path: b"hello".to_vec(),
        mode: 0o755,
        mtime: Time { seconds: CREATED_SECONDS, nanos: 0 },
        stored: program.len() as u64,
        size: program.len() as u64,
        ..Entry::default()
    };
    writer.append(&entry, &mut &program[..]).map_err(Error::Output)?;
    let layer = writer.finish().map_err(Error::Output)?;
    let diff_id = Digest::sha256(&layer);
    let config = ImageConfig {
        architecture: machine.architecture.to_owned(),
        os: "linux".to_owned(),
        config: ContainerConfig {
            cmd: Some(vec!["/hello".to_owned()]),
            env: Some(vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()]),
            ..ContainerConfig::default()
        },
        created: Some(CREATED.to_owned()),
        history: vec![History {
            created: Some(CREATED.to_owned()),
            created_by: Some("brigantine: embedded".to_owned()),
            ..History::default()
        }],
        rootfs: RootFs { diff_ids: vec![diff_id.clone()], ..RootFs::default() },
        ..ImageConfig::default()
    };
    let config = serde_json::to_vec(&config)
        .map_err(|source| Error::Json { what: "an image's configuration".to_owned(), source })?;
    let layers = [Descriptor::new(media::OCI_LAYER, diff_id, layer.len() as u64)];
    let (manifest, descriptor) = make_manifest(&Digest::sha256(&config), config.len() as u64, &layers)?;
    Ok(Hello { layer, config, manifest, descriptor })
}

impl Store {
    /// Adds the embedded image under [`HELLO`]; the same bytes and ids on every machine of one architecture.
    pub fn add_embedded_hello(&self) -> Result<Image> {
        let host = crate::Platform::host().architecture;
        let machine = MACHINES
            .iter()
            .find(|machine| machine.architecture == host)
            .ok_or_else(|| Error::Invalid(format!("the embedded image has no program for {host}")))?;
        let lease = self.lease()?;
        let Hello { layer, config, manifest, descriptor } = hello(machine)?;
        let diff_id = self.content().put(&lease, &layer)?;
        self.unpack(&lease, &diff_id, &layer[..])?;
        self.content().put(&lease, &config)?;
        self.content().put_as(&lease, &descriptor.digest, &manifest)?;
        let name = Reference::parse(HELLO)?.or_latest();
        self.add_image(
            &lease,
            NewImage { manifest: descriptor, names: vec![name], parent: None, index: None },
        )
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn code_has_the_length_its_machine_states() {
        for machine in &MACHINES {
            assert_eq!((machine.code)(u64::from(u32::MAX), 1).len() as u64, machine.code_length);
        }
    }

    #[test]
    fn the_executable_runs_here() {
        let host = crate::Platform::host().architecture;
        let machine = MACHINES.iter().find(|machine| machine.architecture == host).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hello");
        std::fs::write(&path, executable(machine, MESSAGE.as_bytes())).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let output = std::process::Command::new(&path).output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8(output.stdout).unwrap(), MESSAGE);
    }

    #[test]
    fn the_image_is_the_same_every_time() {
        for machine in &MACHINES {
            let (first, second) = (hello(machine).unwrap(), hello(machine).unwrap());
            assert_eq!(first.descriptor, second.descriptor);
        }
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let image = store.add_embedded_hello().unwrap();
        let again = store.add_embedded_hello().unwrap();
        assert_eq!(image.id, again.id);
        let lower = store.layer_files(&image).unwrap()[0].open().unwrap();
        let tree = lower.path();
        assert!(std::fs::metadata(tree.join("hello")).unwrap().permissions().mode() & 0o111 != 0);
        assert_eq!(store.resolve("hello").unwrap().config.config.cmd.as_deref().unwrap(), ["/hello"]);
    }
}
