//! A file mode creation mask of one thread's own.

use rustix::fs::Mode;
use rustix::thread::UnshareFlags;

/// Gives the calling thread its own working directory, root and umask, and sets that umask to 0, so that files it
/// makes have exactly the mode asked for. The rest of the process keeps its umask. Meant for a thread made for this.
pub fn clear_for_this_thread() -> rustix::io::Result<()> {
    // SAFETY: FS unshares the working directory, root and umask only; no file descriptor table is affected.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
    rustix::process::umask(Mode::empty());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_threads_keep_their_umask() {
        let before = rustix::process::umask(Mode::from_raw_mode(0o022));
        std::thread::spawn(|| {
            clear_for_this_thread().unwrap();
            assert_eq!(rustix::process::umask(Mode::empty()), Mode::empty());
        })
        .join()
        .unwrap();
        assert_eq!(rustix::process::umask(before), Mode::from_raw_mode(0o022));
    }
}
