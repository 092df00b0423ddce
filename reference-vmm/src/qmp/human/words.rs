//! What the human monitor is told, and what it says.

use crate::qmp::protocol::Failure;

/// What the human monitor does with a line: prints something, or says why not.
pub(super) type Said = Result<String, String>;

pub(super) fn error(failure: Failure) -> String {
    format!("Error: {}\n", failure.desc)
}

pub(super) fn invalid(value: &str) -> String {
    format!("Error: invalid parameter value: {value}\n")
}

/// The words of a line.
pub(super) struct Words {
    words: std::vec::IntoIter<String>,
    line: String,
    /// Where each word begins in the line.
    starts: Vec<usize>,
    /// Of the command that takes them, as errors tell it.
    name: String,
    /// As `help` is asked about it.
    help: String,
}

impl Words {
    /// Words stand apart by blanks; one in quotes may have blanks.
    pub(super) fn of(line: &str) -> Result<Words, String> {
        let (mut words, mut starts) = (Vec::new(), Vec::new());
        let mut chars = line.char_indices().peekable();
        while let Some((start, first)) = chars.next() {
            if first.is_whitespace() {
                continue;
            }
            starts.push(start);
            let mut word = String::new();
            if first == '"' {
                loop {
                    match chars.next() {
                        None => return Err("unterminated string\n".into()),
                        Some((_, '"')) => break,
                        Some((_, '\\')) => word.extend(chars.next().map(|(_, escaped)| escaped)),
                        Some((_, other)) => word.push(other),
                    }
                }
            } else {
                word.push(first);
                while let Some((_, next)) = chars.next_if(|(_, next)| !next.is_whitespace()) {
                    word.push(next);
                }
            }
            words.push(word);
        }
        Ok(Words { words: words.into_iter(), line: line.into(), starts, name: String::new(), help: String::new() })
    }

    /// The command that takes them, and as `help` is asked about it.
    pub(super) fn taken_by(&mut self, name: &str, help: &str) {
        name.clone_into(&mut self.name);
        help.clone_into(&mut self.help);
    }

    /// Errors tell the command by this name.
    pub(super) fn named(mut self, name: &str) -> Words {
        name.clone_into(&mut self.name);
        self
    }

    pub(super) fn next(&mut self) -> Option<String> {
        self.words.next()
    }

    /// Something wrong with what the command was given.
    fn wrong(&self, what: &str) -> String {
        format!("{}{what}\nTry \"help {}\" for more information\n", self.name, self.help)
    }

    pub(super) fn need(&mut self) -> Result<String, String> {
        self.next().ok_or_else(|| self.wrong(": string expected"))
    }

    /// All that is left of the line, as it is: quotes have no meaning there.
    pub(super) fn rest(&mut self) -> Result<String, String> {
        let next = self.starts.len() - self.words.len();
        let start = self.starts.get(next).ok_or_else(|| self.wrong(": string expected"))?;
        Ok(self.line[*start..].to_owned())
    }

    pub(super) fn switch(&mut self) -> Result<bool, String> {
        match self.next().as_deref() {
            Some("on") => Ok(true),
            Some("off") => Ok(false),
            _ => Err(format!("Expected 'on' or 'off'\nTry \"help {}\" for more information\n", self.help)),
        }
    }

    /// The options in front of the words, of those that are known.
    pub(super) fn options(&mut self, known: &str) -> Result<String, String> {
        let mut found = String::new();
        while let Some(option) = self.words.as_slice().first().and_then(|word| word.strip_prefix('-')) {
            if let Some(unknown) = option.chars().find(|option| !known.contains(*option)) {
                return Err(self.wrong(&format!(": unsupported option -{unknown}")));
            }
            found.push_str(option);
            self.words.next();
        }
        Ok(found)
    }

    pub(super) fn end(&self) -> Result<(), String> {
        match self.words.as_slice() {
            [] => Ok(()),
            _ => Err(self.wrong(": extraneous characters at the end of line")),
        }
    }
}
