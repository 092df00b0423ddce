//! What a source has to know of its machine and of the settings.

use crate::connections::Reader;
use crate::core::DeviceOptions;
use crate::{Capabilities, PAGE_SIZE};
use qevm_wire::Profile;
use std::time::Duration;

/// How pages travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageRoute {
    /// In the stream.
    Main,
    /// On page channels.
    Channels,
    /// To their places in a file, by the thread that drives this machine.
    File,
    /// To their places in a file, by threads that take them as page channels do.
    FileByThreads,
}

/// What does not change while the source runs.
#[derive(Debug, Clone)]
pub struct SourceOptions {
    /// What the destination's release reads.
    pub profile: Profile,
    /// The capabilities. Those that the caller carries out himself (`multifd`, `mapped-ram`) have to go with `route`.
    pub capabilities: Capabilities,
    /// The machine type, as the configuration section carries it.
    pub machine_type: String,
    /// The guest's UUID, which the stream says with capability `validate-uuid`.
    pub uuid: Option<[u8; 16]>,
    /// Names and lengths in bytes of the RAM blocks.
    pub blocks: Vec<(String, u64)>,
    /// Bytes of a page of the host in each of them; ordinary pages where it says nothing. In postcopy a huge page is
    /// sent as a whole.
    pub host_page_sizes: Vec<u64>,
    /// Which of the blocks are not sent, because the destination has them (capability `x-ignore-shared`, mode
    /// `cpr-transfer`); none where it says nothing.
    pub shared: Vec<bool>,
    /// The devices whose state is sent in parts.
    pub devices: Vec<DeviceOptions>,
    /// How pages travel.
    pub route: PageRoute,
    /// Who takes the stream where there is no return path.
    pub reader: Reader,
    /// How long a destination may take to answer and to give its verdict; `None` for as long as it takes. An operator
    /// may cancel before, and a connection that breaks ends the wait.
    pub patience: Option<Duration>,
}

impl SourceOptions {
    /// Bytes of a page of the host in a RAM block.
    pub(super) fn host_page_size(&self, block: usize) -> u64 {
        self.host_page_sizes.get(block).map_or(PAGE_SIZE, |size| (*size).max(PAGE_SIZE))
    }

    /// Whether a block is not sent.
    pub(super) fn leaves_out(&self, block: usize) -> bool {
        self.shared.get(block).is_some_and(|shared| *shared)
    }

    /// Those of a guest with these blocks (names, and lengths in bytes) and without iterative devices, that goes over
    /// one connection with two directions. A destination has half a minute for each answer.
    pub fn new(profile: Profile, machine_type: &str, blocks: Vec<(String, u64)>) -> Self {
        SourceOptions {
            profile,
            capabilities: Capabilities { return_path: true, ..Capabilities::default() },
            machine_type: machine_type.into(),
            uuid: None,
            blocks,
            host_page_sizes: Vec::new(),
            shared: Vec::new(),
            devices: Vec::new(),
            route: PageRoute::Main,
            reader: Reader::Answers,
            patience: Some(Duration::from_secs(30)),
        }
    }
}
