//! What a piece of work took: wall time, processor time, bytes written to disks.
//!
//! Invariant: everything is on the disks before the work begins, and they have nothing left to do (a removal goes on as
//! discards long after it); what the work writes later than it ends counts too.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::meter::Meter;

/// What one task took.
#[derive(Clone, Copy)]
pub struct Figure {
    pub wall: Duration,
    /// Processor time of the engine, its client and its registries; not of the kernel's writeback.
    pub cpu: Duration,
    /// Bytes written to its disks, until everything was on them.
    pub written: u64,
}

impl std::fmt::Display for Figure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (wall, cpu) = (self.wall.as_secs_f64(), self.cpu.as_secs_f64());
        write!(f, "{wall:7.2} s  CPU {cpu:7.2} s  written {:6} MB", self.written / 1_000_000)
    }
}

/// Does the work and tells what it took.
pub fn figure(meter: &Meter, work: impl FnOnce() -> Result<()>) -> Result<Figure> {
    rustix::fs::sync();
    settle()?;
    let before = (meter.cpu()?, written()?);
    let began = Instant::now();
    work()?;
    let wall = began.elapsed();
    let cpu = meter.cpu()?.saturating_sub(before.0);
    rustix::fs::sync();
    Ok(Figure { wall, cpu, written: written()?.saturating_sub(before.1) })
}

/// Waits until the disks have done nothing for a second, half a minute at the most.
fn settle() -> Result<()> {
    let (mut last, mut quiet) = (served()?, 0);
    for _ in 0..120 {
        std::thread::sleep(Duration::from_millis(250));
        let now = served()?;
        quiet = if now == last { quiet + 1 } else { 0 };
        if quiet == 4 {
            break;
        }
        last = now;
    }
    Ok(())
}

/// Writes, discards and flushes completed by all disks, and requests under way.
fn served() -> Result<u64> {
    let numbers = |line: &str| -> u64 {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        // Kernel: Documentation/admin-guide/iostats.rst, fields 5, 9, 12 and 16.
        [7, 11, 14, 18].iter().filter_map(|n| words.get(*n)?.parse::<u64>().ok()).sum()
    };
    Ok(fs::read_to_string("/proc/diskstats")?.lines().map(numbers).sum())
}

/// Processor time spent on anything, from `/proc/stat`.
pub fn busy() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat")?;
    let words = text.lines().next().context("/proc/stat is empty")?.split_ascii_whitespace().skip(1);
    let ticks: Vec<u64> = words.filter_map(|word| word.parse().ok()).collect();
    // Idle and waiting are the fourth and fifth; guests count as user time already.
    let total: u64 =
        ticks.iter().take(8).enumerate().filter(|(n, _)| !matches!(n, 3 | 4)).map(|(_, t)| t).sum();
    Ok(Duration::from_millis(total * 10))
}

/// Bytes written to whole disks, from `/proc/diskstats`.
fn written() -> Result<u64> {
    let mut total = 0;
    for line in BufReader::new(File::open("/proc/diskstats")?).lines() {
        let line = line?;
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let (Some(name), Some(sectors)) = (words.get(2), words.get(9)) else { continue };
        let layered = ["loop", "dm-", "md", "zram"].iter().any(|prefix| name.starts_with(prefix));
        if !layered && Path::new("/sys/block").join(name).exists() {
            total += sectors.parse::<u64>()? * 512;
        }
    }
    Ok(total)
}

/// The median of one of their values; of an even number the upper.
pub fn median(of: &[Figure], value: impl Fn(&Figure) -> f64) -> Option<f64> {
    let mut sorted: Vec<f64> = of.iter().map(value).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}
