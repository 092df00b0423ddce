//! Section `globalstate`: the run state the source was in.

use qevm_savevm::vmstate::{Context, Unused, VarBuffer, VmState, VmStateError};

/// Bytes of the name in releases before 8.2, and since.
const RUNSTATE_LEN_BEFORE_8_2: usize = 100;
const RUNSTATE_LEN: usize = 32;

/// The run state, section `globalstate` version 1: 104 bytes in all releases, in two layouts.
/// (`docs/format/microvm-devices.md`, globalstate)
///
/// ```
/// use qevm_devices::globalstate::GlobalState;
/// use qevm_savevm::vmstate::{self, Context};
/// use qevm_wire::QemuVersion;
///
/// let ctx = Context::new(QemuVersion::new(7, 2), "microvm");
/// let state = GlobalState::new("running", &ctx).unwrap();
/// assert_eq!(vmstate::encode(&state, &ctx)?.len(), 104);
/// assert_eq!(state.name(), Some("running"));
/// # Ok::<(), qevm_savevm::Error>(())
/// ```
#[derive(VmState, Debug, Clone, Default, PartialEq, Eq)]
#[vmstate(name = "globalstate", version = 1, post_load = GlobalState::check_name)]
pub struct GlobalState {
    /// Length of the name with its NUL.
    pub size: u32,
    /// The name, NUL-padded: 100 bytes before 8.2, 32 since.
    #[vmstate(len = if ctx.profile.globalstate_suspended { RUNSTATE_LEN } else { RUNSTATE_LEN_BEFORE_8_2 })]
    pub runstate: VarBuffer,
    /// `vm_was_suspended` means something (since 8.2).
    #[vmstate(released = ctx.profile.globalstate_suspended)]
    pub has_vm_was_suspended: Option<u8>,
    /// The guest was suspended when it was stopped (since 8.2).
    #[vmstate(released = ctx.profile.globalstate_suspended)]
    pub vm_was_suspended: Option<u8>,
    /// The rest of the name's former place.
    #[vmstate(type = "buffer", released = ctx.profile.globalstate_suspended)]
    pub unused: Option<Unused<66>>,
}

impl GlobalState {
    /// The section for run state `name`, e.g. `running` or `paused`; `None` if the name is too long.
    pub fn new(name: &str, ctx: &Context) -> Option<Self> {
        let newer = ctx.profile.globalstate_suspended;
        let mut runstate = vec![0; if newer { RUNSTATE_LEN } else { RUNSTATE_LEN_BEFORE_8_2 }];
        if name.len() >= runstate.len() || name.contains('\0') {
            return None;
        }
        runstate[..name.len()].copy_from_slice(name.as_bytes());
        Some(GlobalState {
            size: name.len() as u32 + 1,
            runstate: VarBuffer(runstate),
            // As every stream of these releases has it.
            has_vm_was_suspended: newer.then_some(1),
            vm_was_suspended: newer.then_some(0),
            unused: newer.then(Unused::default),
        })
    }

    /// The run state's name; `None` if it has no end or is no text.
    pub fn name(&self) -> Option<&str> {
        let end = self.runstate.iter().position(|&byte| byte == 0)?;
        std::str::from_utf8(&self.runstate[..end]).ok()
    }

    fn check_name(&mut self, _: u32, _: &Context) -> Result<(), VmStateError> {
        if self.name().is_none_or(str::is_empty) {
            let found = self.size.into();
            return Err(VmStateError::Refused { what: "length of the run state's name", found, expected: "a name" });
        }
        Ok(())
    }
}
