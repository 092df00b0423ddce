//! QEMU's way to write options: `name=value` separated by commas, a doubled comma stands for one.

use anyhow::{Context, bail, ensure};
use nom::branch::alt;
use nom::bytes::complete::{is_not, tag};
use nom::character::complete::char;
use nom::combinator::map_opt;
use nom::multi::fold_many0;
use nom::sequence::separated_pair;
use nom::{IResult, Parser};

/// The options of one argument that were not used yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options(Vec<(String, String)>);

impl Options {
    /// Reads them. The first may be a value alone; its name is `implied` then.
    pub(crate) fn parse(text: &str, implied: &str) -> anyhow::Result<Options> {
        let options = pairs(text, Some(implied))?;
        for (i, (name, _)) in options.iter().enumerate() {
            ensure!(!options[..i].iter().any(|(other, _)| other == name), "{name} is given twice");
        }
        Ok(Options(options))
    }

    /// The value of an option, which counts as used.
    pub(crate) fn take(&mut self, name: &str) -> Option<String> {
        let at = self.0.iter().position(|(other, _)| other == name)?;
        Some(self.0.remove(at).1)
    }

    /// The same, of an option that has to be there.
    pub(crate) fn need(&mut self, name: &str) -> anyhow::Result<String> {
        self.take(name).filter(|value| !value.is_empty()).with_context(|| format!("{name}= is missing"))
    }

    /// `on` or `off`, in QEMU's words.
    pub(crate) fn switch(&mut self, name: &str) -> anyhow::Result<Option<bool>> {
        self.take(name).map(|value| switch(name, &value)).transpose()
    }

    /// The names of those that were not used.
    pub(crate) fn unused(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// Refuses options that were not used.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        match self.0.first() {
            Some((name, value)) => bail!("{name}={value} is not known"),
            None => Ok(()),
        }
    }
}

/// The value of a switch.
///
/// # Errors
/// The text is that of QEMU 11.1.
pub(crate) fn switch(name: &str, value: &str) -> anyhow::Result<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => bail!("Parameter '{name}' expects 'on' or 'off'"),
    }
}

/// Names and values in their order. The first may be a value alone if there is a name for it.
///
/// # Errors
/// What is no pair, and where.
pub(crate) fn pairs(text: &str, implied: Option<&str>) -> anyhow::Result<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    let mut rest = Some(text);
    while let Some(option) = rest {
        let implied = implied.filter(|_| pairs.is_empty());
        let alone = map_opt(value, |value| implied.filter(|_| !value.is_empty()).map(|name| (name, value)));
        let Ok((end, (name, value))) = alt((separated_pair(is_not("=,"), char('='), value), alone)).parse(option)
        else {
            let (at, option) = (text.len() - option.len(), value(option).map_or(String::new(), |(_, option)| option));
            bail!("'{option}' at byte {at} is no NAME=VALUE");
        };
        pairs.push((name.to_owned(), value));
        rest = end.strip_prefix(',');
    }
    Ok(pairs)
}

/// What comes before a single comma.
fn value(text: &str) -> IResult<&str, String> {
    let part = alt((is_not(","), tag(",,").map(|_| ",")));
    fold_many0(part, String::new, |text, part| text + part).parse(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_written_as_for_qemu() {
        let mut options = Options::parse("virtio-blk-device,drive=d,serial=a,,b,ro=on", "driver").unwrap();
        assert_eq!(options.take("driver").as_deref(), Some("virtio-blk-device"));
        assert_eq!(options.need("serial").unwrap(), "a,b");
        assert_eq!(options.switch("ro").unwrap(), Some(true));
        assert_eq!(options.switch("wo").unwrap(), None);
        assert!(options.need("file").is_err());
        assert!(options.clone().finish().is_err());
        options.take("drive");
        options.finish().unwrap();
        assert!(Options::parse("a=maybe", "x").unwrap().switch("a").is_err());
    }

    #[test]
    fn what_is_no_option_says_where() {
        for (text, why) in [
            ("", "'' at byte 0 is no NAME=VALUE"),
            ("a=1,b", "'b' at byte 4 is no NAME=VALUE"),
            ("a=,,,,b,c,,d,e=1", "'c,d' at byte 8 is no NAME=VALUE"),
            ("a,b=1,", "'' at byte 6 is no NAME=VALUE"),
            ("a,=1", "'=1' at byte 2 is no NAME=VALUE"),
            ("a=1,a=2", "a is given twice"),
        ] {
            assert_eq!(Options::parse(text, "x").unwrap_err().to_string(), why, "{text}");
        }
        assert_eq!(pairs("a", None).unwrap_err().to_string(), "'a' at byte 0 is no NAME=VALUE");
    }
}
