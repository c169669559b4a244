//! `brig update`.

use bollard_stubs::models::ContainerUpdateBody;

use crate::args::{Command, Flag, Matches, Operands, runs};
use crate::commands::{container_path, for_each};
use crate::context::Context;
use crate::fault::{Fault, Outcome};
use crate::output;
use crate::parse::{container, limits};

pub static COMMAND: Command = Command {
    name: "update",
    usage: "[OPTIONS] CONTAINER [CONTAINER...]",
    about: "Change the limits of one or more containers",
    flags: &[
        Flag::one("blkio-weight", "uint16", "Relative block IO weight, 10 to 1000, or 0 for none"),
        Flag::one("cpu-period", "int", "Length of the CPU scheduler's period, in microseconds"),
        Flag::one("cpu-quota", "int", "CPU time per period, in microseconds"),
        Flag::one("cpu-rt-period", "int", "Length of the real-time scheduler's period, in microseconds"),
        Flag::one("cpu-rt-runtime", "int", "Real-time CPU time per period, in microseconds"),
        Flag::one("cpu-shares", "int", "Relative CPU weight").short('c'),
        Flag::one("cpus", "decimal", "Number of CPUs, fractions allowed"),
        Flag::text("cpuset-cpus", "CPUs to run on (0-3, 0,1)"),
        Flag::text("cpuset-mems", "Memory nodes to use (0-3, 0,1)"),
        Flag::one("memory", "bytes", "Memory limit").short('m'),
        Flag::one("memory-reservation", "bytes", "Memory to keep when the host runs short"),
        Flag::one("memory-swap", "bytes", "Limit of memory and swap together, -1 for none"),
        Flag::one("pids-limit", "int", "Greatest number of processes, -1 for no limit"),
        Flag::text("restart", "When to start the container again after it ended"),
    ],
    operands: Operands::AtLeast(1),
    run: runs!(run),
    ..Command::EMPTY
};

async fn run(context: &Context, matches: Matches) -> Outcome {
    let owned = |flag: &str| matches.optional(flag).map(str::to_owned);
    let body = ContainerUpdateBody {
        blkio_weight: matches.int("blkio-weight")?.and_then(|weight| u16::try_from(weight).ok()),
        cpu_period: matches.int("cpu-period")?,
        cpu_quota: matches.int("cpu-quota")?,
        cpu_realtime_period: matches.int("cpu-rt-period")?,
        cpu_realtime_runtime: matches.int("cpu-rt-runtime")?,
        cpu_shares: matches.int("cpu-shares")?,
        nano_cpus: match matches.optional("cpus") {
            Some(text) => Some(limits::cpus(text).map_err(|why| matches.invalid("cpus", text, &why))?),
            None => None,
        },
        cpuset_cpus: owned("cpuset-cpus"),
        cpuset_mems: owned("cpuset-mems"),
        memory: matches.bytes("memory")?,
        memory_reservation: matches.bytes("memory-reservation")?,
        memory_swap: matches.bytes("memory-swap")?,
        pids_limit: matches.int("pids-limit")?,
        restart_policy: match matches.optional("restart") {
            Some(text) => Some(container::restart_policy(text).map_err(Fault::Said)?),
            None => None,
        },
        ..ContainerUpdateBody::default()
    };
    if body == ContainerUpdateBody::default() {
        return Err(Fault::said("you must provide one or more flags when using this command"));
    }
    for_each(matches.operands(), async |name| {
        let answer =
            context.client.post(container_path(name, "/update")).json(&body)?.send().await?.value().await?;
        for warning in answer.at("Warnings").list() {
            output::error_line(warning.text());
        }
        Ok(())
    })
    .await
}
