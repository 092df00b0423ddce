//! QEMU's way to write options: `name=value` separated by commas, a doubled comma stands for one.

use anyhow::{Context, bail, ensure};

/// The options of one argument that were not used yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options(Vec<(String, String)>);

impl Options {
    /// Reads them. The first may be a value alone; its name is `implied` then.
    pub(crate) fn parse(text: &str, implied: &str) -> anyhow::Result<Options> {
        let mut options = Vec::new();
        for (i, option) in split(text).into_iter().enumerate() {
            let (name, value) = match option.split_once('=') {
                Some((name, value)) => (name.to_owned(), value.to_owned()),
                None if i == 0 && !option.is_empty() => (implied.to_owned(), option),
                None => bail!("'{option}' is no NAME=VALUE"),
            };
            ensure!(!options.iter().any(|(other, _)| *other == name), "{name} is given twice");
            options.push((name, value));
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

    /// `on` or `off`.
    pub(crate) fn switch(&mut self, name: &str) -> anyhow::Result<Option<bool>> {
        match self.take(name).as_deref() {
            None => Ok(None),
            Some("on") => Ok(Some(true)),
            Some("off") => Ok(Some(false)),
            Some(other) => bail!("{name}={other}: wanted on or off"),
        }
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

/// The parts between single commas.
pub(crate) fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        match char {
            ',' if chars.next_if_eq(&',').is_none() => parts.push(String::new()),
            other => parts.last_mut().expect("never empty").push(other),
        }
    }
    parts
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
        for bad in ["", "a=1,b", "a=1,a=2"] {
            assert!(Options::parse(bad, "x").is_err(), "{bad}");
        }
        assert!(Options::parse("a=maybe", "x").unwrap().switch("a").is_err());
    }
}
