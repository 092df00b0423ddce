//! The configuration section: what the source's machine is called and which checks it asks for.

use crate::framing;
use qevm_wire::{Blame, CountedString, Fault, Limits, Located, PageGeometry, Reader, WireError, Writer};

const TARGET_PAGE_BITS: &[u8] = b"configuration/target-page-bits";
const CAPABILITIES: &[u8] = b"configuration/capabilities";
const UUID: &[u8] = b"configuration/uuid";
/// All three subsections have had this version since they exist (2.9, 4.0, 5.0).
const SUBSECTION_VERSION: u32 = 1;

/// What makes a configuration section unreadable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigurationError {
    /// A subsection of a name that no release here writes; its length is not on the wire.
    #[error("unknown configuration subsection '{name}'")]
    UnknownSubsection {
        /// The name found.
        name: CountedString,
    },
    /// A known subsection in a version that no release here writes.
    #[error("version {found} of '{name}', expected {expected}")]
    SubsectionVersion {
        /// The subsection.
        name: CountedString,
        /// The version found.
        found: u32,
        /// The only version known.
        expected: u32,
    },
    /// `target-page-bits` is no page size that RAM records have room for.
    #[error("target page bits {found}, expected {min} to {max}")]
    PageBits {
        /// The value found.
        found: u32,
        /// Smallest usable value.
        min: u8,
        /// Largest usable value.
        max: u8,
    },
}

impl Blame for ConfigurationError {
    fn fault(&self) -> Fault {
        match self {
            ConfigurationError::UnknownSubsection { .. } | ConfigurationError::SubsectionVersion { .. } => {
                Fault::Unsupported
            }
            ConfigurationError::PageBits { .. } => Fault::Malformed,
        }
    }
}

/// The configuration section (`migration.send-configuration`, machine types since 2.4).
///
/// ```
/// use qevm_savevm::configuration::Configuration;
///
/// let configuration = Configuration::new("pc-q35-10.0");
/// assert_eq!(configuration.machine, b"pc-q35-10.0");
/// assert!(!configuration.has_capability("mapped-ram"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Configuration {
    /// The machine type, e.g. `pc-q35-10.0` or `microvm`. A destination compares only as many bytes as were sent.
    pub machine: Vec<u8>,
    /// What follows, in stream order.
    pub subsections: Vec<ConfigurationSubsection>,
}

/// A subsection of the configuration section.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigurationSubsection {
    /// `configuration/target-page-bits`: log2 of the target page size, where that is not the target's minimum.
    TargetPageBits(u32),
    /// `configuration/capabilities`: the enabled ones of those that both sides must agree on (`x-ignore-shared` since
    /// 4.0, `mapped-ram` since 9.0).
    Capabilities(Vec<CountedString>),
    /// `configuration/uuid`: the guest's UUID (capability `validate-uuid`).
    Uuid([u8; 16]),
}

impl Configuration {
    /// A configuration of only a machine type.
    pub fn new(machine: impl AsRef<[u8]>) -> Self {
        Configuration { machine: machine.as_ref().to_vec(), subsections: Vec::new() }
    }

    /// True if capability `name` is listed.
    pub fn has_capability(&self, name: &str) -> bool {
        self.subsections
            .iter()
            .any(|s| matches!(s, ConfigurationSubsection::Capabilities(c) if c.iter().any(|c| c == name)))
    }

    /// The target page size, if the section tells it.
    pub fn page_geometry(&self) -> Option<PageGeometry> {
        self.subsections.iter().find_map(|s| match s {
            ConfigurationSubsection::TargetPageBits(bits) => PageGeometry::from_bits(*bits),
            _ => None,
        })
    }

    /// Reads what follows the type byte. `at_end` says that no more input will come: a section is then
    /// complete where the input ends.
    pub(crate) fn decode<K: From<WireError> + From<ConfigurationError>>(
        reader: &mut Reader<'_, K>,
        limits: &Limits,
        at_end: bool,
    ) -> Result<Self, Located<K>> {
        let length = reader.clone().be32()?;
        reader.within_limit("machine name length", length.into(), limits.machine_name)?;
        reader.be32()?;
        let machine = reader.take(length.into())?.to_vec();
        let mut subsections = Vec::new();
        loop {
            if at_end && reader.is_empty() || reader.clone().u8()? != framing::SUBSECTION {
                return Ok(Configuration { machine, subsections });
            }
            reader.within_limit("configuration subsection count", subsections.len() as u64 + 1, limits.elements)?;
            subsections.push(ConfigurationSubsection::decode(reader, limits)?);
        }
    }

    /// Writes the section, type byte included.
    pub(crate) fn encode<K: From<WireError>>(&self, writer: &mut Writer) -> Result<(), Located<K>> {
        let length = u32::try_from(self.machine.len()).map_err(|_| {
            let found = self.machine.len() as u64;
            Located::new(
                WireError::TooLong { what: "machine name length", found, max: u32::MAX.into() }.into(),
                writer.len() as u64,
            )
        })?;
        writer.u8(framing::CONFIGURATION).be32(length).bytes(&self.machine);
        for subsection in &self.subsections {
            subsection.encode(writer);
        }
        Ok(())
    }
}

impl ConfigurationSubsection {
    fn decode<K: From<WireError> + From<ConfigurationError>>(
        reader: &mut Reader<'_, K>,
        limits: &Limits,
    ) -> Result<Self, Located<K>> {
        reader.u8()?;
        let name_at = reader.offset();
        let name = reader.counted_string("configuration subsection name")?;
        let known = [TARGET_PAGE_BITS, CAPABILITIES, UUID].contains(&name.as_bytes());
        if !known {
            return Err(Located::new(ConfigurationError::UnknownSubsection { name }.into(), name_at));
        }
        let version_at = reader.offset();
        let found = reader.be32()?;
        if found != SUBSECTION_VERSION {
            let expected = SUBSECTION_VERSION;
            return Err(Located::new(
                ConfigurationError::SubsectionVersion { name, found, expected }.into(),
                version_at,
            ));
        }
        match name.as_bytes() {
            TARGET_PAGE_BITS => {
                let at = reader.offset();
                let found = reader.be32()?;
                if PageGeometry::from_bits(found).is_none() {
                    let (min, max) = (PageGeometry::MIN_BITS, PageGeometry::MAX_BITS);
                    return Err(Located::new(ConfigurationError::PageBits { found, min, max }.into(), at));
                }
                Ok(ConfigurationSubsection::TargetPageBits(found))
            }
            CAPABILITIES => {
                let count = reader.clone().be32()?;
                reader.within_limit("capability count", count.into(), limits.capabilities)?;
                reader.be32()?;
                let names = (0..count).map(|_| reader.counted_string("capability name"));
                Ok(ConfigurationSubsection::Capabilities(names.collect::<Result<_, _>>()?))
            }
            _ => Ok(ConfigurationSubsection::Uuid(reader.array()?)),
        }
    }

    fn encode(&self, writer: &mut Writer) {
        let name = match self {
            ConfigurationSubsection::TargetPageBits(_) => TARGET_PAGE_BITS,
            ConfigurationSubsection::Capabilities(_) => CAPABILITIES,
            ConfigurationSubsection::Uuid(_) => UUID,
        };
        writer.u8(framing::SUBSECTION).u8(name.len() as u8).bytes(name).be32(SUBSECTION_VERSION);
        match self {
            ConfigurationSubsection::TargetPageBits(bits) => writer.be32(*bits),
            ConfigurationSubsection::Capabilities(names) => {
                writer.be32(names.len() as u32);
                names.iter().fold(writer, |writer, name| writer.counted_string(name))
            }
            ConfigurationSubsection::Uuid(uuid) => writer.bytes(uuid),
        };
    }
}
