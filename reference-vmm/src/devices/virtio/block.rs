//! `virtio-blk-device` on a raw file (virtio 1.2, 5.2).
//!
//! Requests are done one after the other, in the order in which the guest has made them, by the device's thread: a disk
//! that takes its time, or hangs, holds nothing else up. A piece of a request at a time goes by way of a buffer, so
//! that the guest's memory is only touched while the machine runs. A request that is not done when the machine stops is
//! begun anew when the guest goes on; it goes along with it, as QEMU's do that an error has stopped.

mod request;

use super::chain::Chain;
use super::image_lock;
use super::model::{Access, Model, Task};
use super::queue::{EVENT_IDX, INDIRECT_DESC, NOTIFY_ON_EMPTY, RingError};
use crate::error::{Error, Result};
use qevm_microvm::state::{VirtioDeviceState, VirtioRequest};
use request::{Progress, Step};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;

/// Device number.
const ID: u32 = 2;
/// `VIRTIO_BLK_F_RO`
const READ_ONLY: u64 = 1 << 5;
/// `VIRTIO_BLK_F_CONFIG_WCE`
const CONFIG_WCE: u64 = 1 << 11;
/// What is offered (HostFeatures of 7.2.22, 10.0.13 and 11.1.3).
const FEATURES: u64 = {
    const SEG_MAX: u64 = 1 << 2;
    const GEOMETRY: u64 = 1 << 4;
    const BLK_SIZE: u64 = 1 << 6;
    const SCSI: u64 = 1 << 7;
    const FLUSH: u64 = 1 << 9;
    const TOPOLOGY: u64 = 1 << 10;
    const DISCARD: u64 = 1 << 13;
    const WRITE_ZEROES: u64 = 1 << 14;
    let device = SEG_MAX | GEOMETRY | BLK_SIZE | SCSI | FLUSH | TOPOLOGY | CONFIG_WCE | DISCARD | WRITE_ZEROES;
    device | NOTIFY_ON_EMPTY | INDIRECT_DESC | EVENT_IDX
};
/// QueueNumMax of 11.1.3, and `virtio/ringsize` of 7.2.22.
const QUEUE: u32 = 256;
/// Bytes of the configuration space: up to `write_zeroes_may_unmap` (sections of 7.2 to 11.1).
const CONFIG_LEN: usize = 57;
/// Offset of `writeback` in it.
const WRITEBACK: usize = 32;
const SECTOR: u64 = 512;
/// Largest discard and write of zeroes, in sectors.
const MAX_SECTORS: u32 = 0x003f_ffff;

/// A disk, with the names of QEMU's `-drive` and `-device`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockOptions {
    /// `file`: a raw image, whole sectors of 512 bytes.
    pub file: PathBuf,
    /// `readonly`
    pub readonly: bool,
    /// `serial`: at most 20 bytes count.
    pub serial: String,
}

/// The device.
#[derive(Debug)]
pub struct Block {
    file: Arc<File>,
    options: BlockOptions,
    sectors: u64,
    /// Writes may stay in the host's cache until the guest flushes.
    writeback: bool,
    /// Something was written since the last flush.
    dirty: bool,
    /// What the guest has asked for and was not given back, in order.
    requests: VecDeque<Chain>,
    /// How far the first of them is, once it was looked at.
    progress: Option<Progress>,
    /// What the task under way does.
    step: Option<Step>,
    /// What the task under way is for was forgotten by a reset.
    forgotten: bool,
    /// What was written is to be flushed as soon as nothing else is to be done.
    flush_due: bool,
}

impl Block {
    /// Opens the file.
    ///
    /// # Errors
    /// [`Error::Config`] when it cannot be opened or is no whole number of sectors.
    pub fn open(options: BlockOptions) -> Result<Block> {
        let path = options.file.display().to_string();
        let failed = |cause: io::Error| Error::Config(format!("cannot use the drive {path}: {cause}"));
        let file = OpenOptions::new().read(true).write(!options.readonly).open(&options.file).map_err(failed)?;
        let bytes = (&file).seek(SeekFrom::End(0)).map_err(failed)?;
        if !bytes.is_multiple_of(SECTOR) {
            return Err(Error::Config(format!(
                "the drive {path} has {bytes} bytes: wanted whole sectors of 512 bytes"
            )));
        }
        Ok(Block {
            file: Arc::new(file),
            options,
            sectors: bytes / SECTOR,
            writeback: true,
            dirty: false,
            requests: VecDeque::new(),
            progress: None,
            step: None,
            forgotten: false,
            flush_due: false,
        })
    }

    /// Whether the guest may access these sectors.
    fn has(&self, sector: u64, sectors: u64) -> bool {
        sector.checked_add(sectors).is_some_and(|end| end <= self.sectors)
    }

    /// Forgets all requests. The task that is under way ends for nothing.
    fn forget(&mut self) {
        self.requests.clear();
        self.progress = None;
        self.forgotten = self.step.is_some();
    }
}

impl Model for Block {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        if self.options.readonly { FEATURES | READ_ONLY } else { FEATURES }
    }

    fn queues(&self) -> Vec<u32> {
        vec![QUEUE]
    }

    fn config(&self) -> Vec<u8> {
        const HEADS: u64 = 16;
        const SECTORS_PER_TRACK: u64 = 63;
        let cylinders = (self.sectors / (HEADS * SECTORS_PER_TRACK)).clamp(2, 16383) as u16;
        let mut config = Vec::with_capacity(CONFIG_LEN);
        config.extend(self.sectors.to_le_bytes());
        config.extend(0u32.to_le_bytes()); // size_max
        config.extend((QUEUE - 2).to_le_bytes()); // seg_max
        config.extend(cylinders.to_le_bytes());
        config.extend([HEADS as u8, SECTORS_PER_TRACK as u8]);
        config.extend((SECTOR as u32).to_le_bytes()); // blk_size
        config.extend([0; 8]); // topology
        config.extend([self.writeback.into(), 0]);
        config.extend(1u16.to_le_bytes()); // num_queues
        config.extend(MAX_SECTORS.to_le_bytes()); // max_discard_sectors
        config.extend(1u32.to_le_bytes()); // max_discard_seg
        config.extend(1u32.to_le_bytes()); // discard_sector_alignment
        config.extend(MAX_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        config.extend(1u32.to_le_bytes()); // max_write_zeroes_seg
        config.push(1); // write_zeroes_may_unmap
        config
    }

    fn write_config(&mut self, offset: usize, data: &[u8], features: u64) {
        if features & CONFIG_WCE != 0
            && let Some(byte) = WRITEBACK.checked_sub(offset).and_then(|at| data.get(at))
        {
            self.writeback = *byte != 0;
            self.flush_due |= !self.writeback;
        }
    }

    fn process(&mut self, queue: usize, access: &mut Access<'_>) -> Result<(), RingError> {
        while let Some(chain) = access.pop(queue)? {
            self.requests.push_back(chain);
        }
        Ok(())
    }

    fn drain(&mut self) {
        // The next monitor reads what it wrote.
        self.flush_due = true;
    }

    fn task(&mut self, access: &mut Access<'_>) -> Result<Option<Task>, RingError> {
        self.next_step(access)
    }

    fn done(&mut self, result: io::Result<Vec<u8>>, access: &mut Access<'_>) -> Result<(), RingError> {
        self.step_done(result, Some(access))
    }

    fn give_up(&mut self, result: io::Result<Vec<u8>>) {
        // Without the guest's memory nothing can be wrong with it.
        let _ = self.step_done(result, None);
        self.progress = None;
    }

    fn flush_task(&mut self) -> Option<Task> {
        self.must_flush().then(|| self.flush())
    }

    fn is_idle(&self) -> bool {
        self.requests.is_empty()
    }

    fn must_flush(&self) -> bool {
        self.flush_due && self.dirty
    }

    fn activate(&mut self) -> Result<()> {
        image_lock::take(&self.file, self.options.readonly)
            .map_err(|cause| Error::Config(format!("the drive {}: {cause}", self.options.file.display())))
    }

    fn inactivate(&mut self) {
        image_lock::release(&self.file);
    }

    fn reset(&mut self) {
        self.forget();
        self.writeback = true;
    }

    fn save(&self) -> VirtioDeviceState {
        VirtioDeviceState::Block(self.requests.iter().map(Chain::save).collect())
    }

    fn load(&mut self, state: &VirtioDeviceState) -> Result<(), String> {
        let VirtioDeviceState::Block(requests) = state else { return Err("it is no disk".into()) };
        self.forget();
        self.requests = requests.iter().map(|request: &VirtioRequest| Chain::load(request)).collect();
        Ok(())
    }
}
