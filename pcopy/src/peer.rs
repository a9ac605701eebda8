//! The receiver's command of a two-way copy: started, ended, and heard out.
//!
//! It runs in a process group of its own, so that it can be ended with all it started, and so that Ctrl-C reaches the
//! copy first, which then tells the receiver. A program in such a group cannot ask anything at the terminal: it would be
//! stopped without a word. So until the receiver has answered it has the terminal in the foreground, as under a shell, if
//! this program had it: ssh can ask for a host key or a password ([`Terminal`]).
//!
//! What it says on its standard error is passed on, and the last of it kept for the message of a failure. Nobody waits
//! for a reader of that: what is not taken in time is dropped.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use ploop_core::{Error, ErrorKind, Result};

use crate::pass;
use crate::terminal::Terminal;
use crate::transport::Link;
use crate::wire::printable;

/// How long a receiver's command may take to end after a copy that is in place, before it is ended.
const END_AFTER_SUCCESS: Duration = Duration::from_secs(10);
/// How long it may take to end by itself after a failure: it may be about to say why.
const END_AFTER_FAILURE: Duration = Duration::from_millis(500);
/// How long it may take to obey before it is killed.
const OBEY: Duration = Duration::from_secs(10);
/// How long to wait for the rest of what an ended command has said: what it started may keep that open.
const REST: Duration = Duration::from_millis(200);
/// What is kept of its words, in bytes, and of that, what is shown, in lines.
const WORDS_BYTES: usize = 4096;
const WORDS_LINES: usize = 3;
/// Pieces of its words that may wait to be passed on.
const WORDS_QUEUE: usize = 64;

/// A receiver's command, started for a two-way copy.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    ended: bool,
    words: Words,
    terminal: Option<Terminal>,
}

/// How a receiver's command has ended.
#[derive(Clone, Debug)]
pub struct PeerEnd {
    /// Its status; `None` when it did not end by itself.
    pub status: Option<ExitStatus>,
    /// The last lines that it said on its standard error, free of control characters.
    pub last_words: String,
    /// Somebody at the terminal ended it before it answered.
    pub is_interrupted: bool,
}

impl Peer {
    /// Starts `command` (words separated by blanks; quotes and backslashes as in a shell, nothing else of a shell)
    /// with both ends of a link, and lets it ask at the terminal until [`answered`](Self::answered).
    /// `pass_on`: whether what it says on its standard error comes out on ours.
    pub fn spawn(command: &str, pass_on: bool) -> Result<(Link, Self)> {
        let words = split_command(command)?;
        let (program, arguments) = words.split_first().ok_or_else(|| {
            Error::new(ErrorKind::Parameter, "the receiver's command is empty")
                .advise("for example: --to 'ssh HOST ploop copy -d FILE'")
        })?;
        let mut command = Command::new(program);
        command.args(arguments);
        let (link, mut peer) = Self::start(&mut command, pass_on)?;
        peer.terminal = Terminal::give_to(peer.group());
        Ok((link, peer))
    }

    /// Starts a program that asks nothing with both ends of a link.
    pub fn start(command: &mut Command, pass_on: bool) -> Result<(Link, Self)> {
        let program = command.get_program().to_string_lossy().into_owned();
        let failed = |error| {
            Error::io(ErrorKind::System, format!("start the receiver's command \"{program}\""), error)
                .advise("see whether the program exists and can be run")
        };
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let link = Link {
            input: child.stdout.take().map(OwnedFd::from),
            output: child.stdin.take().map(OwnedFd::from),
        };
        let stderr = child.stderr.take();
        let mut peer = Self { child, ended: false, words: Words::default(), terminal: None };
        if let Some(stderr) = stderr {
            peer.words = Words::hear(stderr, pass_on)?;
        }
        Ok((link, peer))
    }

    fn group(&self) -> Pid {
        // A number of a process that does not fit is none; 0 would be our own group.
        Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX))
    }

    /// The receiver has answered: it has nothing to ask any more, and the terminal is ours again.
    pub fn answered(&self) {
        if let Some(terminal) = &self.terminal {
            terminal.take_back();
        }
    }

    /// Waits until the command ends after a copy that is in place; ends it and what it started when it does not within
    /// ten seconds. Drop or use up the link first: the command ends when its input does.
    pub fn finish(mut self) -> Result<PeerEnd> {
        let status = self.wait(END_AFTER_SUCCESS)?;
        Ok(self.heard_out(status))
    }

    /// Ends the command and what it started after a failure, having given it a moment to end by itself.
    pub fn give_up(mut self) -> Result<PeerEnd> {
        let status = self.wait(END_AFTER_FAILURE)?;
        Ok(self.heard_out(status))
    }

    fn heard_out(mut self, status: Option<ExitStatus>) -> PeerEnd {
        let was_asking = self.terminal.take().is_some_and(|terminal| terminal.take_back());
        self.end_group();
        const BY_INTERRUPT: i32 = 128 + Signal::SIGINT as i32;
        let by_interrupt = status.is_some_and(|status| {
            status.signal() == Some(Signal::SIGINT as i32) || status.code() == Some(BY_INTERRUPT)
        });
        PeerEnd { status, last_words: self.words.last(), is_interrupted: was_asking && by_interrupt }
    }

    /// Its status, if it ends within that time.
    fn wait(&mut self, time: Duration) -> Result<Option<ExitStatus>> {
        let waiting = |error| Error::io(ErrorKind::System, "wait for the receiver's command", error);
        let end = Instant::now() + time;
        loop {
            if let Some(status) = self.child.try_wait().map_err(waiting)? {
                self.ended = true;
                return Ok(Some(status));
            }
            if Instant::now() >= end {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it and what it started: politely first, so that a receiver removes what it has made.
    fn end_group(&mut self) {
        let group = self.group();
        // They may have ended meanwhile: then there is nothing to end.
        let _ = killpg(group, Signal::SIGTERM);
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        // One that was stopped must run to obey.
        let _ = killpg(group, Signal::SIGCONT);
        if !matches!(self.wait(OBEY), Ok(Some(_))) {
            let _ = killpg(group, Signal::SIGKILL);
            // What hangs in the kernel ends when it can; nobody waits for that.
            let _ = self.wait(OBEY);
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if !self.ended {
            self.answered();
            self.end_group();
        }
    }
}

/// What the command says on its standard error.
#[derive(Debug, Default)]
struct Words {
    last: Arc<Mutex<VecDeque<u8>>>,
    /// Closed when it can say nothing more.
    ended: Mutex<Option<Receiver<()>>>,
}

impl Words {
    fn hear(mut stderr: ChildStderr, pass_on: bool) -> Result<Self> {
        let last = Arc::new(Mutex::new(VecDeque::new()));
        let (heard, (ending, ended)) = (Arc::clone(&last), mpsc::channel::<()>());
        let (queue, said) = mpsc::sync_channel::<Vec<u8>>(WORDS_QUEUE);
        if pass_on {
            pass::spawn("peer-words-out", move || {
                while let Ok(piece) = said.recv() {
                    // There is nowhere to tell that nobody reads it.
                    let _ = io::stderr().write_all(&piece);
                }
            })?;
        } else {
            drop(said);
        }
        pass::spawn("peer-words", move || {
            let _ending = ending;
            let mut buffer = [0; 1024];
            loop {
                let piece = match stderr.read(&mut buffer) {
                    Ok(0) => return,
                    Ok(count) => &buffer[..count],
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => return,
                };
                let mut last = heard.lock().unwrap_or_else(PoisonError::into_inner);
                last.extend(piece);
                let too_much = last.len().saturating_sub(WORDS_BYTES);
                last.drain(..too_much);
                drop(last);
                // Full: nobody reads ours, and nobody waits for that.
                let _ = queue.try_send(shown(piece));
            }
        })?;
        Ok(Self { last, ended: Mutex::new(Some(ended)) })
    }

    /// The last lines.
    fn last(&self) -> String {
        if let Some(ended) = &*self.ended.lock().unwrap_or_else(PoisonError::into_inner) {
            // It ends by being closed; nothing is ever sent.
            let _ = ended.recv_timeout(REST);
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(last.make_contiguous()).into_owned();
        let mut lines: Vec<_> =
            text.lines().map(str::trim).filter(|line| !line.is_empty()).rev().take(WORDS_LINES).collect();
        lines.reverse();
        lines.iter().map(|line| printable(line.as_bytes())).collect::<Vec<_>>().join("; ")
    }
}

/// What comes from afar, without what could command our terminal.
fn shown(piece: &[u8]) -> Vec<u8> {
    let is_shown = |byte: u8| matches!(byte, b'\n' | b'\t' | b'\r' | b' '..=b'~' | 0x80..);
    piece.iter().map(|&byte| if is_shown(byte) { byte } else { b'?' }).collect()
}

/// Words of a command: blanks separate, quotes and backslashes keep together. What a shell would do more with is
/// refused, so that nobody expects it.
fn split_command(command: &str) -> Result<Vec<String>> {
    let wrong = |what: &str| {
        Error::new(ErrorKind::Parameter, format!("the receiver's command has {what}"))
            .advise("no shell reads it; where one is needed, write: sh -c '…'")
    };
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut letters = command.chars();
    while let Some(letter) = letters.next() {
        match (quote, letter) {
            (Some(open), _) if letter == open => quote = None,
            (Some('\''), _) => word.get_or_insert_default().push(letter),
            (_, '\\') => {
                let next = letters.next().ok_or_else(|| wrong("a backslash at its end"))?;
                word.get_or_insert_default().push(next);
            }
            (Some(_), '$' | '`') => return Err(wrong("an expansion")),
            (Some(_), _) => word.get_or_insert_default().push(letter),
            (None, '\'' | '"') => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            (None, _) if letter.is_whitespace() => words.extend(word.take()),
            (None, '|' | '&' | ';' | '<' | '>' | '(' | ')' | '$' | '`' | '*' | '?') => {
                return Err(wrong(&format!("\"{letter}\" outside quotes")));
            }
            (None, _) => word.get_or_insert_default().push(letter),
        }
    }
    if quote.is_some() {
        return Err(wrong("a quote that does not end"));
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::{Patience, Transport};

    fn patience() -> Patience {
        Patience { stall: Duration::from_secs(300), cancels: Vec::new() }
    }

    #[test]
    fn commands_are_words_and_no_shell_script() {
        let words = |command| split_command(command).unwrap();
        assert_eq!(
            words("ssh  host ploop copy -d '/a b/c'"),
            ["ssh", "host", "ploop", "copy", "-d", "/a b/c"]
        );
        assert_eq!(words(r#"sh -c "a \" b" '' x\ y"#), ["sh", "-c", "a \" b", "", "x y"]);
        for refused in ["a | b", "a > b", "a $HOME", "a; b", "a 'b", "a \"$b\"", "a \\"] {
            assert_eq!(split_command(refused).unwrap_err().kind(), ErrorKind::Parameter, "{refused}");
        }
    }

    #[test]
    fn a_peer_is_spawned_and_ends() {
        let (link, peer) = Peer::spawn("cat", false).unwrap();
        let mut writer = Transport::writer(link.output.unwrap(), patience()).unwrap();
        let mut reader = Transport::reader(link.input.unwrap(), patience()).unwrap();
        writer.write_all(b"hello").unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        assert!(peer.finish().unwrap().status.unwrap().success());
        assert_eq!(Peer::spawn("/nonexistent/program", false).unwrap_err().kind(), ErrorKind::System);
    }

    #[test]
    fn a_peer_that_stays_is_ended_with_what_it_started_and_heard_out() {
        for command in [
            "sh -c 'echo one >&2; echo \"the last \\033[2J word\" >&2; sleep 1000 & sleep 1000'",
            // It stands still: nothing but a signal that cannot be waited for helps without waking it.
            "sh -c 'echo one >&2; echo \"the last \\033[2J word\" >&2; kill -STOP $$'",
        ] {
            let begun = Instant::now();
            let (link, peer) = Peer::spawn(command, false).unwrap();
            let group = peer.group();
            while peer.words.last.lock().unwrap().len() < 10 {
                std::thread::sleep(Duration::from_millis(2));
            }
            let end = peer.give_up().unwrap();
            assert!(end.status.is_none(), "{command}");
            assert_eq!(end.last_words, "one; the last ?[2J word", "{command}");
            assert!(begun.elapsed() < OBEY, "{command}: {:?}", begun.elapsed());
            drop(link);
            let is_gone = (0..30_000).any(|_| {
                std::thread::sleep(Duration::from_millis(10));
                killpg(group, None).is_err()
            });
            assert!(is_gone, "{command}");
        }
    }

    #[test]
    fn words_that_nobody_takes_are_dropped_and_the_last_are_kept() {
        let command = "sh -c 'i=0; while [ $i -lt 3000 ]; do echo a line of many words >&2; i=$((i+1)); done; echo end >&2'";
        let (_link, peer) = Peer::spawn(command, false).unwrap();
        let end = peer.finish().unwrap();
        assert!(end.status.unwrap().success());
        assert!(end.last_words.ends_with("; end"), "{}", end.last_words);
    }
}
