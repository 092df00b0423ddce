//! What one recording is made of: a row of the table.

use crate::payload::Dirtying;
use crate::roots::Suite;
use serde_json::{Map, Value};

/// How the guest's processors run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// Emulation.
    Tcg,
    /// The host's KVM; the scenario is skipped where `/dev/kvm` cannot be opened.
    Kvm,
}

/// What the guest does before and while it migrates.
#[derive(Debug, Clone, Copy)]
pub enum Guest {
    /// Runs the machine's firmware for a second, then is stopped.
    Firmware,
    /// Runs the machine's firmware and migrates while running.
    FirmwareLive,
    /// Dirties memory for ever while it migrates; as firmware for `-bios`.
    Dirtying(Dirtying),
    /// Boots Linux, loads the drivers of its devices, uses them, then is stopped. The first serial port is Linux's.
    Linux,
    /// Has no processor that does anything.
    Idle,
}

/// Where the stream goes and what happens on the way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Route {
    /// `exec:cat > FILE`: known to every release.
    Exec,
    /// `file:FILE`, with an offset (bytes).
    File {
        /// The stream starts here.
        offset: u64,
    },
    /// A UNIX socket that only listens.
    Unix,
    /// A TCP socket that only listens.
    Tcp,
    /// `qevm receive` on a UNIX socket: the only route on which qevm takes part in the recording.
    ReceiveUnix,
    /// `qevm receive` on a TCP port.
    ReceiveTcp,
    /// Through a proxy into a second QEMU of the same release.
    Peer,
    /// As [`Route::Peer`], switching to postcopy after the given number of bitmap synchronisations.
    Postcopy,
    /// As [`Route::Postcopy`], cut in the middle and recovered.
    PostcopyRecovery,
    /// `savevm` into a qcow2 image.
    Savevm,
}

/// One recording.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Unique: `QEMU release/machine/what is special`.
    pub name: String,
    /// The suite whose QEMU is the source (and the destination where there is one).
    pub suite: Suite,
    /// The value of `-M` without accelerator.
    pub machine: String,
    /// The accelerator.
    pub accel: Accel,
    /// Guest RAM, MiB.
    pub memory: u32,
    /// Further arguments; `{dir}` is the scratch folder with `disk.raw`, `disk.qcow2` and `ram.bin`.
    pub arguments: Vec<String>,
    /// The guest.
    pub guest: Guest,
    /// Capabilities that are switched on.
    pub capabilities: Vec<&'static str>,
    /// Migration parameters.
    pub parameters: Map<String, Value>,
    /// QMP commands before the migration.
    pub prepare: Vec<(&'static str, Value)>,
    /// Extra arguments of `migrate`.
    pub migrate: Map<String, Value>,
    /// The route.
    pub route: Route,
    /// For guests that dirty memory: how many bitmap synchronisations there must be at least.
    pub rounds: u64,
    /// Whether real QEMU is given back what qevm makes of the recording.
    pub reload: bool,
    /// Part of the quick subset.
    pub quick: bool,
}

impl Scenario {
    /// A firmware guest with 32 MiB, stopped, written by `exec:`.
    pub fn new(suite: Suite, machine: &str, what: &str) -> Scenario {
        Scenario {
            name: format!("{}/{machine}/{what}", suite.series()),
            suite,
            machine: machine.into(),
            accel: Accel::Tcg,
            memory: 32,
            arguments: Vec::new(),
            guest: Guest::Firmware,
            capabilities: Vec::new(),
            parameters: Map::new(),
            prepare: Vec::new(),
            migrate: Map::new(),
            route: Route::Exec,
            rounds: 0,
            reload: true,
            quick: false,
        }
    }

    /// Adds arguments, separated by blanks.
    pub fn with(mut self, arguments: &str) -> Scenario {
        self.arguments.extend(arguments.split_whitespace().map(String::from));
        self
    }

    /// Switches capabilities on, separated by blanks.
    pub fn caps(mut self, names: &'static str) -> Scenario {
        self.capabilities.extend(names.split_whitespace());
        self
    }

    /// Sets a migration parameter.
    pub fn parameter(mut self, name: &str, value: impl Into<Value>) -> Scenario {
        self.parameters.insert(name.into(), value.into());
        self
    }

    /// Runs a QMP command before the migration.
    pub fn before(mut self, command: &'static str, arguments: Value) -> Scenario {
        self.prepare.push((command, arguments));
        self
    }

    /// Adds an argument to `migrate`.
    pub fn migrate_with(mut self, name: &str, value: impl Into<Value>) -> Scenario {
        self.migrate.insert(name.into(), value.into());
        self
    }

    /// Sets the route.
    pub fn by(mut self, route: Route) -> Scenario {
        self.route = route;
        self
    }

    /// Sets the guest.
    pub fn guest(mut self, guest: Guest) -> Scenario {
        self.guest = guest;
        self
    }

    /// A guest that dirties `pages` pages from 4 MiB on, migrating with at least `rounds` bitmap synchronisations.
    pub fn dirtying(mut self, pages: u32, delay: u32, rounds: u64) -> Scenario {
        self.guest = Guest::Dirtying(Dirtying { base: 0x40_0000, pages, delay });
        self.rounds = rounds;
        self
    }

    /// Sets guest RAM, MiB.
    pub fn memory(mut self, mib: u32) -> Scenario {
        self.memory = mib;
        self
    }

    /// Runs under KVM.
    pub fn kvm(mut self) -> Scenario {
        self.accel = Accel::Kvm;
        self
    }

    /// Does not give the stream back to QEMU: QEMU itself loads its own stream with another RAM here.
    pub fn not_reloaded(mut self) -> Scenario {
        self.reload = false;
        self
    }

    /// Puts the row into the quick subset.
    pub fn quick(mut self) -> Scenario {
        self.quick = true;
        self
    }

    /// The name as a folder: slashes become dashes.
    pub fn folder(&self) -> String {
        self.name.replace(['/', ','], "-")
    }
}
