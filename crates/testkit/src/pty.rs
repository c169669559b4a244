//! A program on a terminal of its own, as a person would sit before it.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::Duration,
};

use rustix::{
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

/// A child with a controlling terminal whose other end the test holds.
#[derive(Debug)]
pub struct Terminal {
    master: OwnedFd,
    child: Child,
    label: String,
    seen: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Terminal {
    /// Runs `command` on a new terminal of 24 rows and 80 columns.
    #[track_caller]
    pub fn spawn(command: Command) -> Self {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("posix_openpt");
        grantpt(&master).expect("grantpt");
        unlockpt(&master).expect("unlockpt");
        let name = ptsname(&master, Vec::new()).expect("ptsname");
        let path = name.to_str().expect("a pty's path is ASCII").to_owned();
        let open = || File::options().read(true).write(true).open(&path).expect("the terminal's other end");
        // setsid gives the child its session and makes its standard input the controlling terminal.
        let mut wrapped = Command::new("setsid");
        wrapped.args(["--ctty", "--wait"]).arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(key, value),
                None => wrapped.env_remove(key),
            };
        }
        let slave = open();
        tcsetwinsize(slave.as_fd(), Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 })
            .expect("TIOCSWINSZ");
        let label = format!("{wrapped:?}");
        let child =
            wrapped.stdin(Stdio::from(slave)).stdout(Stdio::from(open())).stderr(Stdio::from(open())).spawn();
        let child = child.unwrap_or_else(|e| panic!("cannot run {label}: {e}"));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (mut from, into) = (File::from(master.try_clone().expect("dup")), Arc::clone(&seen));
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // EIO is how a terminal says that its last user is gone.
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                into.lock().expect("no panic while held").extend_from_slice(&buffer[..n]);
            }
        });
        Self { master, child, label, seen, reader }
    }

    /// Types.
    #[track_caller]
    pub fn send(&self, bytes: impl AsRef<[u8]>) {
        let mut keys = File::from(self.master.try_clone().expect("dup"));
        keys.write_all(bytes.as_ref()).expect("typing");
    }

    /// Everything shown so far.
    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().expect("no panic while held")).into_owned()
    }

    /// Waits until `text` is on the screen.
    #[track_caller]
    pub fn expect(&self, text: &str) {
        let found = crate::until(crate::wait::PATIENCE, || self.shown().contains(text).then_some(()));
        assert!(found.is_some(), "{} never showed {text:?}, only: {:?}", self.label, self.shown());
    }

    /// Changes the window's size; the foreground program gets SIGWINCH.
    #[track_caller]
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(self.master.as_fd(), size).expect("TIOCSWINSZ");
    }

    /// The PID of the program on the terminal.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the program's end, and for its last words.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        match crate::until(crate::wait::PATIENCE, || self.child.try_wait().transpose()) {
            Some(status) => {
                // Somebody in the background may keep the terminal for longer: that is nobody's failure.
                crate::until(Duration::from_secs(2), || self.reader.is_finished().then_some(()));
                status.expect("waiting for a child")
            }
            None => panic!("{} does not end; it showed {:?}", self.label, self.shown()),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Ended already in a test that passed.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_sees_the_terminal_and_its_new_size() {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "trap 'stty size; exit 7' WINCH; tty >/dev/null && stty size; while :; do sleep 0.05; done",
        ]);
        let mut terminal = Terminal::spawn(command);
        terminal.expect("24 80");
        terminal.resize(50, 132);
        terminal.expect("50 132");
        assert_eq!(terminal.wait().code(), Some(7));
    }
}
