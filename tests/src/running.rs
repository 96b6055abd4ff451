//! A program that runs while a test looks at it: what it writes is read as it comes.
//!
//! Owns: the process and two threads that read its outputs into memory. Dropping it kills it.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bed::lock;
use crate::wait::{self, wait_every};

/// Between two looks at what it wrote: what is timed by it is seconds long.
const LOOK: Duration = Duration::from_millis(10);

type Written = Arc<Mutex<Vec<u8>>>;

pub struct Running {
    child: Child,
    input: Option<ChildStdin>,
    out: Written,
    err: Written,
    readers: Vec<JoinHandle<()>>,
    line: String,
}

/// How a program ended, and all it wrote.
#[derive(Debug, Clone)]
pub struct Ended {
    pub stdout: Vec<u8>,
    pub stderr: String,
    /// Its exit code; -1 when a signal ended it.
    pub code: i32,
}

impl Ended {
    /// Its standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Fails with all it said unless its exit code is 0.
    pub fn ok(self) -> Result<Ended> {
        ensure!(self.code == 0, "ended with {self}");
        Ok(self)
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = &self.stdout[..self.stdout.len().min(2000)];
        let shown = String::from_utf8_lossy(shown);
        write!(out, "{}: {shown}{}", self.code, self.stderr)
    }
}

impl Running {
    pub fn start(command: &mut Command) -> Result<Running> {
        let line = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {line}"))?;
        let (out, err) = (Written::default(), Written::default());
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            readers.push(read_into(pipe, &out)?);
        }
        if let Some(pipe) = child.stderr.take() {
            readers.push(read_into(pipe, &err)?);
        }
        Ok(Running {
            input: child.stdin.take(),
            child,
            out,
            err,
            readers,
            line,
        })
    }

    /// Writes to its standard input, which stays open.
    pub fn say(&mut self, text: &str) -> Result<()> {
        let pipe = self
            .input
            .as_mut()
            .context("its standard input is closed")?;
        Ok(pipe.write_all(text.as_bytes())?)
    }

    /// Writes all of `bytes` from a thread of its own, since it may answer before it has read them,
    /// and then closes its standard input.
    pub fn feed(&mut self, bytes: Vec<u8>) -> Result<()> {
        let mut pipe = self.input.take().context("its standard input is closed")?;
        // One that ends early breaks the pipe, which its exit code tells better.
        let work = move || drop(pipe.write_all(&bytes));
        self.readers.push(
            std::thread::Builder::new()
                .name("feed".into())
                .spawn(work)?,
        );
        Ok(())
    }

    pub fn close_input(&mut self) {
        self.input = None;
    }

    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&lock(&self.out)).into_owned()
    }

    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&lock(&self.err)).into_owned()
    }

    /// Bytes of standard output so far.
    pub fn written(&self) -> usize {
        lock(&self.out).len()
    }

    /// Waits until its standard output has `text`, and gives all of it.
    pub fn sees(&mut self, text: &str, limit: Duration) -> Result<String> {
        wait_every(&format!("{text:?} of {}", self.line), limit, LOOK, || {
            let said = self.stdout();
            if said.contains(text) {
                return Ok(said);
            }
            self.ensure_running()?;
            Err(anyhow!("{said:?} {}", self.stderr()))
        })
    }

    /// Fails for good when it has ended.
    pub fn ensure_running(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let told = format!("{} ended ({status}): {}", self.line, self.stderr());
            return Err(wait::Ended(told).into());
        }
        Ok(())
    }

    /// Waits for its end.
    pub fn end(&mut self, limit: Duration) -> Result<Ended> {
        let status = wait_every(&format!("end of {}", self.line), limit, LOOK, || {
            let status = self.child.try_wait()?;
            status.ok_or_else(|| anyhow!("{:?} {}", tail(&self.stdout()), self.stderr()))
        })?;
        self.input = None;
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        Ok(self.ended(status))
    }

    fn ended(&self, status: ExitStatus) -> Ended {
        Ended {
            stdout: lock(&self.out).clone(),
            stderr: self.stderr(),
            code: status.code().unwrap_or(-1),
        }
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Ctrl-C.
    pub fn interrupt(&self) {
        let _ = kill(Pid::from_raw(self.pid()), Signal::SIGINT);
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

fn tail(text: &str) -> &str {
    let from = text.len().saturating_sub(500);
    let from = (from..text.len()).find(|at| text.is_char_boundary(*at));
    &text[from.unwrap_or_default()..]
}

fn read_into(mut pipe: impl Read + Send + 'static, to: &Written) -> Result<JoinHandle<()>> {
    let to = to.clone();
    let work = move || {
        let mut buffer = vec![0; 65_536];
        while let Ok(size @ 1..) = pipe.read(&mut buffer) {
            lock(&to).extend_from_slice(&buffer[..size]);
        }
    };
    Ok(std::thread::Builder::new()
        .name("read".into())
        .spawn(work)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn what_a_program_writes_is_seen_while_it_runs() {
        let mut cat = Running::start(&mut Command::new("cat")).expect("starts");
        cat.say("one\n").expect("it reads");
        cat.sees("one", SOON).expect("it answers");
        cat.close_input();
        let ended = cat.end(SOON).expect("ends").ok().expect("well");
        assert_eq!(ended.stdout, b"one\n");
    }

    #[test]
    fn more_than_any_pipe_holds_goes_through_in_both_directions() {
        let mut cat = Running::start(&mut Command::new("cat")).expect("starts");
        let bytes = vec![7; 4 << 20];
        cat.feed(bytes.clone()).expect("a thread");
        assert!(cat.end(SOON).expect("ends").stdout == bytes);
    }

    #[test]
    fn one_that_has_ended_is_not_waited_for() {
        let mut end = Running::start(Command::new("sh").args(["-c", "echo why >&2; exit 3"]))
            .expect("starts");
        assert_eq!(end.end(SOON).expect("ends").code, 3);
        let told = end.sees("never", SOON).expect_err("it is gone");
        assert!(format!("{told:#}").contains("why"), "{told:#}");
    }
}
