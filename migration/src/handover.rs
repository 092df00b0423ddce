//! Who runs the guest when the connection breaks in the very last moment.
//!
//! A destination of QEMU's runs the guest as soon as it has loaded everything, and tells the source by SHUT on the
//! return path. If that message is lost, the source cannot know. Between two monitors of this kind there is therefore
//! one more step, made of messages that QEMU's destination takes for ordinary pings:
//!
//! 1. The source announces the step: PING with [`ANNOUNCE`], after the PING 1 that opens the return path.
//!    The destination answers with PONG [`AGREED`] instead of the value, which a QEMU would send back.
//! 2. The destination loads everything, reports SHUT 0, and waits.
//! 3. The source has its verdict, will never run the guest again, and sends PING with [`CONFIRM`] after the end of the
//!    stream. Only then does the destination run the guest.
//!
//! ```text
//!  source                                      destination
//!    │ PING 1, PING ANNOUNCE ───────────────────▶ │
//!    │ ◀──────────────────── PONG 1, PONG AGREED  │
//!    │ memory, devices, end of the stream ──────▶ │  loads everything
//!    │ ◀────────────────────────────────  SHUT 0  │  waits; does not run the guest
//!  cannot resume                                  │
//!  any more                                       │
//!    │ PING CONFIRM ────────────────────────────▶ │  runs the guest
//!
//!  lost before SHUT 0 arrives:  the source resumes, the destination gives up
//!  lost after it:               paused at both ends; an operator says `cont` at the destination
//! ```
//!
//! So the guest never runs on both sides, wherever the connection breaks: as long as SHUT has not arrived, the source
//! resumes and the destination gives up. What remains is the loss of the confirmation itself, after which the guest
//! runs on neither side until the operator says `cont` at the destination, which has everything.
//!
//! A source of QEMU's announces nothing, and the destination then runs the guest as QEMU's would.
//!
//! A destination of QEMU's agrees to nothing. It gets the end of the stream only when it has answered one more PING,
//! [`LOADED`], which stands after the last device: until then it does not run the guest for certain, whether it is
//! slow, stopped, dead or cut off, and the source may resume. After the end only the destination's word counts: SHUT 0
//! completes the migration, another SHUT makes the source resume, and if none arrives (the link is dead, the connection
//! was reset, or the migration cancelled) the source cannot know. The guest then stays paused there, and the
//! operator decides.

use qevm_savevm::command::Command;
use qevm_savevm::{Encoder, Event};
use qevm_wire::Writer;

/// Value of the PING that announces the step: "QEH" and a number.
pub(crate) const ANNOUNCE: u32 = 0x5145_4801;
/// Value of the PONG that answers the announcement.
pub(crate) const AGREED: u32 = 0x5145_4803;
/// Value of the PING after the last device, for a destination that has not agreed.
pub(crate) const LOADED: u32 = 0x5145_4804;
/// Value of the PING after the devices' initial data.
pub(crate) const INITIAL_DATA: u32 = 0x5145_4805;
/// Value of the PING that confirms the handover.
pub(crate) const CONFIRM: u32 = 0x5145_4802;

/// The bytes of the confirmation.
pub(crate) fn confirmation() -> Result<Vec<u8>, qevm_savevm::Error> {
    let mut writer = Writer::new();
    Encoder::default().encode(&Event::Command(Command::Ping(CONFIRM)), &mut writer)?;
    Ok(writer.into_bytes())
}
