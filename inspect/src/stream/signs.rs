//! Signs of the release that wrote a stream, gathered on the way; [`release_guess`](super::release_guess) says which
//! there are.

use qevm_savevm::command::Command;
use qevm_savevm::framing::SectionHeader;
use qevm_wire::QemuVersion;

const OLD_JSON_LAST: QemuVersion = QemuVersion::new(5, 2);
const NEW_JSON_FIRST: QemuVersion = QemuVersion::new(6, 0);

/// Signs of the writer's release, gathered on the way.
#[derive(Debug, Clone, Default)]
pub struct Signs {
    pub(super) oldest: Option<QemuVersion>,
    pub(super) newest: Option<QemuVersion>,
    timer_seen: bool,
    /// The guest was stopped in the way in which SWITCHOVER_START is sent: an END or a package came.
    pub(super) switched_over: bool,
    pub(super) switchover_start: bool,
}

impl Signs {
    pub(super) fn at_least(&mut self, major: u16, minor: u16) {
        let version = QemuVersion::new(major, minor);
        self.oldest = Some(self.oldest.map_or(version, |oldest| oldest.max(version)));
    }

    pub(super) fn at_most(&mut self, major: u16, minor: u16) {
        let version = QemuVersion::new(major, minor);
        self.newest = Some(self.newest.map_or(version, |newest| newest.min(version)));
    }

    pub(super) fn command(&mut self, command: &Command) {
        match command {
            Command::SwitchoverStart => {
                self.switchover_start = true;
                self.at_least(10, 0);
            }
            Command::Packaged { .. } => self.switched_over = true,
            Command::Ping(0x42) => self.at_least(10, 2),
            _ => {}
        }
    }

    pub(super) fn flush(&mut self) {
        self.at_least(8, 1);
    }

    pub(super) fn mapped_ram(&mut self) {
        self.at_least(9, 0);
    }

    pub(super) fn end(&mut self) {
        self.switched_over = true;
    }

    pub(super) fn section(&mut self, header: &SectionHeader) {
        match header.idstr.as_bytes() {
            b"timer" => self.timer_seen = true,
            b"apic" if self.timer_seen => self.at_most(10, 2),
            b"apic" => self.at_least(11, 0),
            b"block" => self.at_most(9, 0),
            b"ioapic" if header.instance_id == 1 => self.at_least(6, 0),
            _ => {}
        }
    }

    pub(super) fn body(&mut self, header: &SectionHeader, body: &[u8]) {
        // `has_vm_was_suspended`, which is in 10.0 and 11.1; in 5.2 and 7.2 the run state is longer, and zero there.
        const FLAG: usize = 4 + 32;
        if header.idstr.as_bytes() == b"globalstate" && body.get(FLAG) == Some(&1) {
            self.at_least(8, 0);
        }
    }

    pub(super) fn description(&mut self, text: &[u8]) {
        if text.starts_with(b"{ ") {
            self.at_most(OLD_JSON_LAST.major, OLD_JSON_LAST.minor);
            return;
        }
        self.at_least(NEW_JSON_FIRST.major, NEW_JSON_FIRST.minor);
        // `configuration` is the first member where it exists.
        let head = &text[..text.len().min(64)];
        match head.windows(15).any(|window| window == b"\"configuration\"") {
            true => self.at_least(10, 0),
            false => self.at_most(9, 2),
        }
    }
}
