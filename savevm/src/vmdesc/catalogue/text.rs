//! Layouts as a text file: one line for each structure, form and field, parts separated by tabs.
//!
//! ```text
//! releases  5.2  7.2          the releases, named a, b, … below
//! pckbd                       a structure
//! +pckbd_outport              a subsection that can be after its fields
//!   3  s  bc  identify_set=1  a form: version, roles (section, nested, subSection, Inferred), releases, guard
//!     write_cmd  uint8  1     a field: name, type, bytes of one element or -, numbers of elements if not 1, structures
//! ```

use super::{Catalogue, FieldLayout, Inner, Layout, Roles, Structure};
use qevm_wire::QemuVersion;
use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::str::FromStr;

const RELEASES: &str = "releases";

/// A line of a catalogue's text that means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the catalogue means nothing")]
pub struct BadCatalogue {
    /// Number of the line, from 1.
    pub line: usize,
}

impl fmt::Display for Catalogue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(RELEASES)?;
        self.releases.iter().try_for_each(|release| write!(f, "\t{release}"))?;
        f.write_char('\n')?;
        for (name, structure) in &self.structures {
            writeln!(f, "{name}")?;
            structure.subsections.iter().try_for_each(|subsection| writeln!(f, "+{subsection}"))?;
            structure.layouts.iter().try_for_each(|layout| layout.write(f))?;
        }
        Ok(())
    }
}

impl Layout {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Roles { section, nested, subsection } = self.roles;
        let roles = [(section, 's'), (nested, 'n'), (subsection, 'S'), (self.inferred, 'I')];
        let roles: String = roles.iter().filter(|(is, _)| *is).map(|(_, letter)| letter).collect();
        let releases: String =
            (0..8u8).filter(|bit| self.releases >> bit & 1 == 1).map(|bit| char::from(b'a' + bit)).collect();
        write!(f, " {}\t{roles}\t{releases}", self.version)?;
        if let Some((name, set)) = &self.guard {
            write!(f, "\t{name}={}", u8::from(*set))?;
        }
        f.write_char('\n')?;
        self.fields.iter().try_for_each(|field| field.write(f))
    }
}

impl FieldLayout {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = self.size.map_or_else(|| "-".to_owned(), |size| size.to_string());
        write!(f, "  {}\t{}\t{size}", self.name, self.type_name)?;
        let counts: Vec<String> = self.counts.iter().map(u64::to_string).collect();
        let flags = [(self.any_count, '*'), (self.marked, 'm'), (self.nullable, 'n')];
        let flags: String = flags.iter().filter(|(is, _)| *is).map(|(_, letter)| letter).collect();
        let counts = format!("{}{flags}", counts.join(","));
        let nested: Vec<String> =
            self.nested.iter().map(|i| format!("{}@{}#{}", i.name, i.version, i.layout)).collect();
        match (counts.as_str(), nested.is_empty()) {
            ("1", true) => {}
            (counts, true) => write!(f, "\t{counts}")?,
            (counts, false) => write!(f, "\t{counts}\t{}", nested.join("|"))?,
        }
        f.write_char('\n')
    }
}

impl FromStr for Catalogue {
    type Err = BadCatalogue;

    fn from_str(text: &str) -> Result<Self, BadCatalogue> {
        let mut catalogue = Catalogue::default();
        let mut structure: Option<(String, Structure)> = None;
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
            catalogue.line(line, &mut structure).ok_or(BadCatalogue { line: number + 1 })?;
        }
        catalogue.structures.extend(structure);
        Ok(catalogue)
    }
}

impl Catalogue {
    fn line(&mut self, line: &str, structure: &mut Option<(String, Structure)>) -> Option<()> {
        if let Some(releases) = line.strip_prefix(RELEASES).and_then(|rest| rest.strip_prefix('\t')) {
            let releases: Result<Vec<QemuVersion>, _> = releases.split('\t').map(str::parse).collect();
            self.releases = releases.ok().filter(|releases| releases.len() <= u8::BITS as usize)?;
        } else if let Some(field) = line.strip_prefix("  ") {
            structure.as_mut()?.1.layouts.last_mut()?.fields.push(FieldLayout::parse(field)?);
        } else if let Some(layout) = line.strip_prefix(' ') {
            structure.as_mut()?.1.layouts.push(Layout::parse(layout)?);
        } else if let Some(subsection) = line.strip_prefix('+') {
            structure.as_mut()?.1.subsections.insert(subsection.to_owned());
        } else {
            self.structures.extend(structure.replace((line.to_owned(), Structure::default())));
        }
        Some(())
    }
}

impl Layout {
    fn parse(line: &str) -> Option<Self> {
        let mut parts = line.split('\t');
        let version = parts.next()?.parse().ok()?;
        let roles = parts.next()?;
        let bits = |letters: &str| letters.bytes().try_fold(0, |bits, letter| Some(bits | bit(letter)?));
        let bit_set = bits(parts.next()?)?;
        let guard = match parts.next() {
            None => None,
            Some(guard) => guard.split_once('=').map(|(name, set)| (name.to_owned(), set == "1")).map(Some)?,
        };
        let inferred = roles.contains('I');
        let (section, nested, subsection) = (roles.contains('s'), roles.contains('n'), roles.contains('S'));
        let roles = Roles { section, nested, subsection };
        Some(Layout { version, roles, releases: bit_set, inferred, fields: Vec::new(), guard })
    }
}

fn bit(letter: u8) -> Option<u8> {
    let number = letter.checked_sub(b'a').filter(|number| u32::from(*number) < u8::BITS)?;
    Some(1 << number)
}

impl FieldLayout {
    fn parse(line: &str) -> Option<Self> {
        let mut parts = line.split('\t');
        let (name, type_name) = (parts.next()?.to_owned(), parts.next()?.to_owned());
        let size = match parts.next()? {
            "-" => None,
            size => Some(size.parse().ok()?),
        };
        let counts = parts.next().unwrap_or("1");
        let (counts, flags) = counts.split_at(counts.find(['*', 'm', 'n']).unwrap_or(counts.len()));
        let [any_count, marked, nullable] = ['*', 'm', 'n'].map(|flag| flags.contains(flag));
        let counts: Result<BTreeSet<u64>, _> = counts.split(',').map(str::parse).collect();
        let nested = match parts.next() {
            None => BTreeSet::new(),
            Some(nested) => nested.split('|').map(inner).collect::<Option<_>>()?,
        };
        Some(FieldLayout { name, type_name, size, counts: counts.ok()?, any_count, marked, nullable, nested })
    }
}

/// Name and version of a structure, and which of its forms, counted from 0.
fn inner(text: &str) -> Option<Inner> {
    let (name, rest) = text.rsplit_once('@')?;
    let (version, layout) = rest.split_once('#')?;
    Some(Inner { name: name.to_owned(), version: version.parse().ok()?, layout: layout.parse().ok()? })
}
