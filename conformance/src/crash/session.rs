//! What `crash` prints.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

/// A line of the guest in the kernel's log.
pub(super) const MARK: &str = "qevm was here";
/// Each is answered below a line with its name.
const COMMANDS: [&str; 8] = ["sys", "ps", "bt -a", "foreach bt", "log", "mount", "vm 1", "kmem -i"];
/// Begins the line above an answer.
const ABOVE: &str = "==== ";
/// What `sys` says of the file itself.
const FILE: &str = "    DUMPFILE: ";
/// Where a system call of x86_64 enters the kernel.
const ENTRY: &str = "entry_SYSCALL_64_after_hwframe";

/// The answers to our commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Session {
    /// Before the first command: what it has to say of the dump.
    opening: Vec<String>,
    answers: BTreeMap<String, Vec<String>>,
}

/// What a session has to show, and how much of it there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) release: String,
    pub(super) tasks: usize,
    pub(super) frames: usize,
}

/// A file of commands for `crash`.
pub(super) fn commands() -> String {
    let asked: String = COMMANDS.iter().map(|command| format!("gdb echo {ABOVE}{command}\\n\n{command}\n")).collect();
    format!("{asked}quit\n")
}

impl Session {
    /// Of what was printed to [`commands`].
    ///
    /// # Errors
    /// A command was not answered.
    pub(super) fn read(printed: &str) -> Result<Session> {
        let mut session = Session { opening: Vec::new(), answers: BTreeMap::new() };
        let mut to = &mut session.opening;
        for line in printed.lines() {
            match line.strip_prefix(ABOVE) {
                Some(command) => to = session.answers.entry(command.to_owned()).or_default(),
                // Which file it is, and whether pages may be left out of it.
                None if line.starts_with(FILE) => {}
                None => to.push(line.to_owned()),
            }
        }
        for command in COMMANDS {
            session.answer(command)?;
        }
        Ok(session)
    }

    fn answer(&self, command: &str) -> Result<&[String]> {
        let answer = self.answers.get(command).filter(|lines| !lines.is_empty());
        let answer =
            answer.with_context(|| format!("crash does not answer '{command}': {}", self.opening.join("; ")))?;
        Ok(answer)
    }

    /// How many lines there are.
    pub(super) fn lines(&self) -> usize {
        self.opening.len() + self.answers.values().map(Vec::len).sum::<usize>()
    }

    /// # Errors
    /// The first line that `other` has otherwise.
    pub(super) fn same(&self, other: &Session) -> Result<()> {
        let all = |session: &Session| {
            let answers = session.answers.iter().flat_map(|(command, lines)| {
                lines.iter().map(|line| (command.clone(), line.clone())).collect::<Vec<_>>()
            });
            session.opening.iter().map(|line| (String::new(), line.clone())).chain(answers).collect::<Vec<_>>()
        };
        let (expected, found) = (all(self), all(other));
        for ((command, expected), (_, found)) in expected.iter().zip(&found) {
            ensure!(expected == found, "'{command}' shows {found:?}, and not {expected:?}");
        }
        ensure!(expected.len() == found.len(), "crash prints {} lines, and not {}", found.len(), expected.len());
        Ok(())
    }

    /// What has to be there whatever is compared: the kernel, the guest's processes and what they do.
    ///
    /// # Errors
    /// It is not.
    pub(super) fn shown(&self) -> Result<Shown> {
        let sys = self.answer("sys")?;
        let field = |name: &str| sys.iter().find_map(|line| line.trim_start().strip_prefix(name));
        let release = field("RELEASE: ").context("'sys' names no kernel")?.to_owned();
        ensure!(field("CPUS: ") == Some("2"), "'sys' does not show two CPUs: {sys:?}");
        let ps = self.answer("ps")?;
        for process in ["[swapper/0]", "[swapper/1]", "init", "sleep", "cat", "[kthreadd]"] {
            ensure!(
                ps.iter().any(|line| line.ends_with(&format!("  {process}"))),
                "'ps' does not show {process}: {ps:?}"
            );
        }
        let log = self.answer("log")?;
        ensure!(log.iter().any(|line| line.ends_with(MARK)), "'log' does not end with what the guest wrote");
        let stacks = self.answer("foreach bt")?;
        let sleeps = stack(stacks, "sleep")?;
        for function in ["schedule", "do_nanosleep", "hrtimer_nanosleep", ENTRY] {
            ensure!(sleeps.iter().any(|frame| frame == function), "'sleep' is not in {function}, but in {sleeps:?}");
        }
        let copies = stack(stacks, "cat")?;
        ensure!(copies.iter().any(|frame| frame == ENTRY), "'cat' is not in the kernel, but in {copies:?}");
        let frames = stacks.iter().filter(|line| function(line).is_some()).count();
        Ok(Shown { release, tasks: ps.len() - 1, frames })
    }
}

impl Session {
    /// Whether `log`, as `makedumpfile` has it, is what the command `log` shows.
    ///
    /// # Errors
    /// A line is another.
    pub(super) fn has_log(&self, log: &str) -> Result<()> {
        let shown: Vec<_> = self.answer("log")?.iter().map(|line| text(line)).filter(|line| !line.is_empty()).collect();
        let found: Vec<_> = log.lines().map(text).filter(|line| !line.is_empty()).collect();
        ensure!(
            !shown.is_empty() && shown == found,
            "makedumpfile finds {} lines, and not {}",
            found.len(),
            shown.len()
        );
        Ok(())
    }
}

/// A line of the log without its time, and without who has printed it: `[    4.506068] [      T1] text`. Lines that
/// belong to the one above are indented.
fn text(line: &str) -> &str {
    let mut text = line.trim();
    while let Some((stamp, rest)) = text.strip_prefix('[').and_then(|inside| inside.split_once("] "))
        && stamp.trim().trim_start_matches(['T', 'C']).parse::<f64>().is_ok()
    {
        text = rest.trim();
    }
    text
}

/// The functions on the stack of the first process of that name.
fn stack(stacks: &[String], process: &str) -> Result<Vec<String>> {
    let name = format!("COMMAND: \"{process}\"");
    let mut rest = stacks.iter().skip_while(|line| !line.ends_with(&name));
    rest.next().with_context(|| format!("no stack of '{process}' is shown"))?;
    let own = rest.take_while(|line| !line.starts_with("PID: "));
    Ok(own.filter_map(|line| function(line)).map(str::to_owned).collect())
}

/// The function of a line ` #N [ADDRESS] FUNCTION at ADDRESS`.
fn function(line: &str) -> Option<&str> {
    let (_, rest) = line.trim_start().strip_prefix('#')?.split_once("] ")?;
    rest.split_once(" at ").map(|(function, _)| function)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From crash 8.0.6 with Debian's kernel 6.12, shortened.
    fn printed(function: &str, log: &str) -> String {
        let answers = [
            ("sys", "      KERNEL: vmlinux\n    DUMPFILE: dump  [PARTIAL DUMP]\n        CPUS: 2\n     RELEASE: 6.12.117+deb13-cloud-amd64".to_owned()),
            ("ps", "      PID    PPID  CPU       TASK        ST  %MEM      VSZ      RSS  COMM\n        0       0   0  ffffffff82c10940  RU   0.0        0        0  [swapper/0]\n>       0       0   1  ffff8880042ce100  RU   0.0        0        0  [swapper/1]\n        1       0   1  ffff888004256100  IN   0.6     2304     1644  init\n        2       0   0  ffff8880042548c0  IN   0.0        0        0  [kthreadd]\n      141       1   0  ffff88800516c8c0  IN   0.6     2304     1444  sleep\n>     142       1   0  ffff888005169840  RU   0.6     2304     1512  cat".to_owned()),
            ("bt -a", "PID: 142      TASK: ffff888005169840  CPU: 0    COMMAND: \"cat\"".to_owned()),
            ("foreach bt", format!("PID: 141      TASK: ffff88800516c8c0  CPU: 0    COMMAND: \"sleep\"\n #0 [ffffc900001bf9d8] __schedule at ffffffff81cc2dfa\n #1 [ffffc900001bfa50] schedule at ffffffff81cc3527\n #2 [ffffc900001bfa60] {function} at ffffffff81cc9c9a\n #3 [ffffc900001bfaa0] hrtimer_nanosleep at ffffffff8119c1d1\n #7 [ffffc900001bff50] entry_SYSCALL_64_after_hwframe at ffffffff81e0012f\n    RIP: 00000000004ae3f7  RSP: 00007ffe92af5bc0  RFLAGS: 00000202\n\nPID: 142      TASK: ffff888005169840  CPU: 0    COMMAND: \"cat\"\n #6 [ffffc9000040bf50] entry_SYSCALL_64_after_hwframe at ffffffff81e0012f")),
            ("log", log.to_owned()),
            ("mount", "ffff8880041f7380 ffff88800405a800 rootfs rootfs    /".to_owned()),
            ("vm 1", "PID: 1        TASK: ffff888004256100  CPU: 1    COMMAND: \"init\"".to_owned()),
            ("kmem -i", "    TOTAL MEM    54483     212.8 MB         ----".to_owned()),
        ];
        answers.map(|(command, answer)| format!("{ABOVE}{command}\n{answer}\n")).concat()
    }

    const LOG: &str = "[    0.052000] tsc: slow\n               lpj=\n[    4.879823] qevm was here";

    #[test]
    fn what_has_to_be_shown_is_looked_for() {
        let session = Session::read(&printed("do_nanosleep", LOG)).unwrap();
        let shown = session.shown().unwrap();
        assert_eq!((shown.release.as_str(), shown.tasks, shown.frames), ("6.12.117+deb13-cloud-amd64", 6, 6));
        let without_name = Session::read(&printed("ffffffff81cc9c9a", LOG)).unwrap();
        assert!(without_name.shown().unwrap_err().to_string().contains("do_nanosleep"));
        let without_mark = Session::read(&printed("do_nanosleep", "[    0.052000] tsc: slow")).unwrap();
        assert!(without_mark.shown().unwrap_err().to_string().contains("log"));
        let cut = printed("do_nanosleep", LOG).replace("==== mount", "mount");
        assert!(Session::read(&cut).unwrap_err().to_string().contains("'mount'"));
    }

    #[test]
    fn another_line_is_told_and_the_name_of_the_file_is_not() {
        let text = printed("do_nanosleep", LOG);
        let (one, two) =
            (Session::read(&text).unwrap(), Session::read(&text.replace("dump  [P", "other  [P")).unwrap());
        one.same(&two).unwrap();
        let other = Session::read(&text.replace("212.8", "213.8")).unwrap();
        assert!(one.same(&other).unwrap_err().to_string().contains("213.8"));
        let longer = Session::read(&format!("{text}more\n")).unwrap();
        assert!(one.same(&longer).is_err() && longer.same(&one).is_err());
    }

    #[test]
    fn logs_are_compared_without_their_times() {
        let session = Session::read(&printed("do_nanosleep", LOG)).unwrap();
        let log = "[    0.052000] [      T0] tsc: slow\n                          lpj=\n[    4.879823] [      T1] qevm was here\n";
        session.has_log(log).unwrap();
        assert!(session.has_log(&log.replace("slow", "fast")).is_err());
        assert!(session.has_log("").is_err());
    }
}
