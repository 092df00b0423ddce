//! How a migration is set up: capabilities, parameters and transport, what QEMU says to them, and what qevm says.

use crate::launch::Qemu;
use crate::qmp::QmpError;
use anyhow::Result;
use qevm_multifd::rules::Parameters;
use qevm_wire::capability::{self, Context, Rejection};
use qevm_wire::profile::ZeroPageDetection;
use qevm_wire::{Capabilities, Capability, Profile, QemuVersion};
use serde_json::{Map, Value, json};

/// Where the stream goes or comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// `unix:PATH`.
    Unix,
    /// `tcp:127.0.0.1:PORT`.
    Tcp,
    /// `exec:cat`.
    Exec,
    /// `file:PATH` (8.2).
    File,
}

impl Transport {
    /// Its name in rows.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Unix => "unix",
            Transport::Tcp => "tcp",
            Transport::Exec => "exec",
            Transport::File => "file",
        }
    }

    /// Several connections can be made.
    pub fn is_socket(self) -> bool {
        matches!(self, Transport::Unix | Transport::Tcp)
    }
}

/// `file:` exists since 8.2.
const FILE_SINCE: QemuVersion = QemuVersion::new(8, 2);

/// One way to set a migration up. The default is plain over a UNIX socket.
#[derive(Debug, Clone)]
pub struct Setup {
    /// What is switched on.
    pub capabilities: Vec<&'static str>,
    /// `multifd-channels`.
    pub channels: u32,
    /// `multifd-compression`.
    pub compression: &'static str,
    /// `zero-page-detection`; the default of the machine type if it is left out.
    pub zero_page: Option<&'static str>,
    /// A level parameter and its value.
    pub level: Option<(&'static str, u32)>,
    /// The transport.
    pub transport: Transport,
}

impl Default for Setup {
    fn default() -> Self {
        let (capabilities, channels, zero_page, level) = (Vec::new(), 2, None, None);
        Setup { capabilities, channels, compression: "none", zero_page, level, transport: Transport::Unix }
    }
}

/// A refusal, and whether its words are QEMU's own, so that they can be compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The reason.
    pub reason: String,
    /// QEMU gives the same reason word by word.
    pub quoted: bool,
}

impl Setup {
    /// Plain with these capabilities, separated by blanks.
    pub fn with(capabilities: &'static str) -> Setup {
        Setup { capabilities: capabilities.split_whitespace().collect(), ..Setup::default() }
    }

    /// multifd with this many channels and this compression.
    pub fn multifd(channels: u32, compression: &'static str) -> Setup {
        Setup { channels, compression, ..Setup::with("multifd") }
    }

    /// Over this transport.
    pub fn over(mut self, transport: Transport) -> Setup {
        self.transport = transport;
        self
    }

    /// With this `zero-page-detection`.
    pub fn zero_page(mut self, mode: &'static str) -> Setup {
        self.zero_page = Some(mode);
        self
    }

    /// With this level.
    pub fn level(mut self, name: &'static str, value: u32) -> Setup {
        self.level = Some((name, value));
        self
    }

    /// With this capability, too.
    pub fn and(mut self, capability: &'static str) -> Setup {
        self.capabilities.push(capability);
        self
    }

    /// Whether a capability is on.
    pub fn has(&self, capability: &str) -> bool {
        self.capabilities.contains(&capability)
    }

    /// What is special about it, for a row's name.
    pub fn name(&self) -> String {
        let mut name = self.transport.name().to_string();
        let mut others: Vec<&str> = self.capabilities.iter().copied().filter(|c| *c != "multifd").collect();
        others.sort_unstable();
        for capability in others {
            name.push('-');
            name.push_str(capability);
        }
        if self.has("multifd") {
            name.push_str(&format!("-{}x{}", self.compression, self.channels));
        } else if self.compression != "none" {
            name.push_str(&format!("-no-multifd-{}", self.compression));
        }
        if let Some((level, value)) = self.level {
            name.push_str(&format!("-{level}={value}"));
        }
        if let Some(mode) = self.zero_page {
            name.push_str(&format!("-zero-{mode}"));
        }
        name
    }

    /// What qevm says a release does with it.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn verdict(&self, qemu: QemuVersion) -> Result<(), Verdict> {
        let named = |name: &&str| name.parse::<Capability>().expect("the table names QEMU's capabilities");
        let on: Capabilities = self.capabilities.iter().map(named).collect();
        let mut context = Context::new(qemu);
        let refused = |rejection: Rejection| {
            let quoted = !matches!(rejection, Rejection::Missing { .. });
            Verdict { reason: rejection.to_string(), quoted }
        };
        // What depends on the transport comes last: there may be no such transport at all.
        capability::check(on, &context).map_err(refused)?;
        if self.transport == Transport::File && qemu < FILE_SINCE {
            return Err(Verdict { reason: "Parameter 'uri' expects a valid migration protocol".into(), quoted: true });
        }
        context.compressed = self.compression != "none";
        context.seekable = self.transport == Transport::File;
        context.multi_channel = self.transport.is_socket();
        capability::check(on, &context).map_err(refused)?;
        let mut parameters = Parameters {
            channels: self.channels,
            compression: self.compression.parse().expect("the table names QEMU's methods"),
            zero_page_detection: self.zero_page.map(|mode| match mode {
                "none" => ZeroPageDetection::None,
                "legacy" => ZeroPageDetection::Legacy,
                _ => ZeroPageDetection::Multifd,
            }),
            ..Parameters::default()
        };
        match self.level {
            Some(("multifd-zlib-level", value)) => parameters.zlib_level = value,
            Some(("multifd-zstd-level", value)) => parameters.zstd_level = value,
            _ => {}
        }
        parameters.check(qemu).map_err(|error| Verdict { reason: error.to_string(), quoted: false })
    }

    /// Sets a QEMU up, from whatever it was set to before. The inner error is QEMU's refusal.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub fn apply(&self, qemu: &mut Qemu, profile: &Profile) -> Result<Result<(), String>> {
        // Nothing that was on before may be in the way of the parameters.
        let release = profile.qemu;
        let known = Capability::ALL.iter().filter(|c| c.exists_in(release) && **c != Capability::DirtyLimit);
        let off: Vec<Value> = known.map(|c| json!({ "capability": c.name(), "state": false })).collect();
        qemu.execute("migrate-set-capabilities", json!({ "capabilities": off }))?;
        qemu.set_parameters(&self.defaults(profile))?;
        let on: Vec<Value> =
            self.capabilities.iter().map(|name| json!({ "capability": name, "state": true })).collect();
        if !on.is_empty()
            && let Err(refusal) =
                refusal(qemu.execute("migrate-set-capabilities", json!({ "capabilities": on })).map(drop))?
        {
            return Ok(Err(refusal));
        }
        refusal(qemu.set_parameters(&Value::Object(self.parameters())))
    }

    fn parameters(&self) -> Map<String, Value> {
        let mut parameters = Map::new();
        let mut set = |name: &str, value: Value| drop(parameters.insert(name.into(), value));
        if self.has("multifd") || self.channels != 2 {
            set("multifd-channels", self.channels.into());
        }
        if self.compression != "none" {
            set("multifd-compression", self.compression.into());
        }
        if let Some(mode) = self.zero_page {
            set("zero-page-detection", mode.into());
        }
        if let Some((name, value)) = self.level {
            set(name, value.into());
        }
        parameters
    }

    fn defaults(&self, profile: &Profile) -> Value {
        let mut parameters = json!({
            "multifd-channels": 2, "multifd-compression": "none", "multifd-zlib-level": 1, "multifd-zstd-level": 1,
        });
        if profile.qemu >= QemuVersion::new(9, 0) {
            parameters["zero-page-detection"] = match profile.zero_page_detection {
                ZeroPageDetection::Multifd => "multifd".into(),
                _ => "legacy".into(),
            };
        }
        parameters
    }
}

/// Parts a refusal, which is an answer, from what is none.
pub(super) fn refusal<T>(result: Result<T>) -> Result<Result<T, String>> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(error) => match error.downcast_ref::<QmpError>() {
            Some(QmpError::Refused { description, .. }) => Ok(Err(description.clone())),
            _ => Err(error),
        },
    }
}
