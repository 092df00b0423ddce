//! `virtio-rng-device` with the host's random numbers (virtio 1.2, 5.4; QEMU's default backend `rng-builtin`).

use super::model::{Access, Model};
use super::queue::{ANY_LAYOUT, EVENT_IDX, INDIRECT_DESC, NOTIFY_ON_EMPTY, RingError};
use crate::error::{Error, Result};
use qevm_microvm::state::VirtioDeviceState;
use std::fs::File;
use std::io::{self, Read};

/// Device number.
const ID: u32 = 4;
/// What is offered (HostFeatures of 7.2.22, 10.0.13 and 11.1.3).
const FEATURES: u64 = NOTIFY_ON_EMPTY | ANY_LAYOUT | INDIRECT_DESC | EVENT_IDX;
/// QueueNumMax of 11.1.3, and `virtio/ringsize` of 7.2.22.
const QUEUE: u32 = 8;
/// Most bytes that one request gets; a device may give fewer than it was asked for.
const MOST: u64 = 64 << 10;

const SOURCE: &str = "/dev/urandom";

/// The device.
#[derive(Debug)]
pub struct Rng {
    source: File,
}

impl Rng {
    /// Opens the host's source.
    ///
    /// # Errors
    /// [`Error::Host`] when there is none.
    pub fn open() -> Result<Rng> {
        let source = File::open(SOURCE).map_err(|cause| Error::Host { what: "open /dev/urandom", cause })?;
        Ok(Rng { source })
    }

    fn bytes(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.source.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

impl Model for Rng {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queues(&self) -> Vec<u32> {
        vec![QUEUE]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn process(&mut self, queue: usize, access: &mut Access<'_>) -> Result<(), RingError> {
        while let Some(chain) = access.pop(queue)? {
            let len = chain.writable_len().min(MOST) as usize;
            let bytes = self.bytes(len).unwrap_or_else(|error| {
                tracing::error!(%error, "{SOURCE} gives no random numbers");
                Vec::new()
            });
            let written = chain.write(access.memory, 0, &bytes)?;
            access.push(queue, chain.head, written as u32)?;
        }
        Ok(())
    }

    fn reset(&mut self) {}

    fn save(&self) -> VirtioDeviceState {
        VirtioDeviceState::Rng
    }

    fn load(&mut self, state: &VirtioDeviceState) -> Result<(), String> {
        match state {
            VirtioDeviceState::Rng => Ok(()),
            _ => Err("it is no source of random numbers".into()),
        }
    }
}
