//! Guest memory whose pages are filled in when they are touched: Linux' `userfaultfd`.
//!
//! vCPUs touch it in the kernel (`KVM_RUN`), so a descriptor for faults of user mode alone is not enough.

use super::error::words;
use super::{GuestMemory, RamBlock};
use linux_raw_sys::general::{
    UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_THREAD_ID, UFFDIO_REGISTER_MODE_MISSING, uffdio_api, uffdio_copy,
    uffdio_range, uffdio_register, uffdio_zeropage,
};
use parking_lot::Mutex;
use qevm_migration::{GuestError, MissingPages, Touch};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use std::fs::OpenOptions;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

/// The kernel's letter for these calls, and their numbers.
pub(super) const GROUP: u8 = 0xaa;
const API: Opcode = opcode::read_write::<uffdio_api>(GROUP, 0x3f);
const REGISTER: Opcode = opcode::read_write::<uffdio_register>(GROUP, 0);
const UNREGISTER: Opcode = opcode::read::<uffdio_range>(GROUP, 1);
const COPY: Opcode = opcode::read_write::<uffdio_copy>(GROUP, 3);
const ZEROPAGE: Opcode = opcode::read_write::<uffdio_zeropage>(GROUP, 4);
/// Bytes of an event.
const EVENT: usize = 32;

/// Blocks whose pages are missing until they are filled in.
pub(crate) struct Userfault {
    memory: Arc<GuestMemory>,
    pub(super) faults: OwnedFd,
    stop: OwnedFd,
    /// Numbers of the blocks.
    blocks: Mutex<Vec<usize>>,
    /// How many vCPUs there are, and which of them has a thread of this number.
    vcpus: usize,
    vcpu_of: Box<dyn Fn(u32) -> Option<usize> + Send + Sync>,
}

impl Userfault {
    /// Of no block at first.
    pub(crate) fn new(memory: Arc<GuestMemory>) -> Result<Userfault, GuestError> {
        Userfault::with(memory, UFFD_FEATURE_THREAD_ID.into())
    }

    /// The same, where `vcpu_of` tells for a thread of the process which of the vCPUs it is.
    pub(crate) fn with_vcpus(
        self,
        vcpus: usize,
        vcpu_of: impl Fn(u32) -> Option<usize> + Send + Sync + 'static,
    ) -> Userfault {
        Userfault { vcpus, vcpu_of: Box::new(vcpu_of), ..self }
    }

    /// Whether a process may have one here.
    ///
    /// # Errors
    /// The system's words.
    pub(crate) fn is_available() -> Result<(), String> {
        available(UFFD_FEATURE_THREAD_ID).map_err(|error| words(&error))
    }

    /// With these features of the kernel's.
    pub(super) fn with(memory: Arc<GuestMemory>, features: u64) -> Result<Userfault, GuestError> {
        let faults = open().map_err(|error| {
            format!(
                "userfaultfd is not available ({error}): it needs CAP_SYS_PTRACE, sysctl vm.unprivileged_userfaultfd=1, or \
                 access to /dev/userfaultfd"
            )
        })?;
        let mut api = uffdio_api { api: UFFD_API.into(), features, ioctls: 0 };
        call::<API, _>(&faults, &mut api)
            .map_err(|error| format!("userfaultfd of this kernel cannot do that ({error})"))?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Userfault { memory, faults, stop, blocks: Mutex::default(), vcpus: 0, vcpu_of: Box::new(|_| None) })
    }

    pub(super) fn block(&self, number: usize) -> Result<&RamBlock, GuestError> {
        Ok(self.memory.blocks().get(number).ok_or("no such RAM block")?)
    }

    /// Has the kernel tell of faults in a block, of this kind.
    pub(super) fn register(&self, number: usize, mode: u32) -> Result<(), GuestError> {
        let block = self.block(number)?;
        let range = uffdio_range { start: block.host_address() as u64, len: block.max_length() };
        let mut register = uffdio_register { range, mode: mode.into(), ioctls: 0 };
        call::<REGISTER, _>(&self.faults, &mut register).map_err(|error| {
            let name = block.name();
            format!("userfaultfd cannot serve the memory of RAM block '{name}' ({error}): it must be anonymous, memfd, tmpfs or hugetlbfs")
        })?;
        self.blocks.lock().push(number);
        Ok(())
    }

    /// Where `len` bytes at `offset` of a block are in this process.
    pub(super) fn place(&self, number: usize, offset: u64, len: u64) -> Result<uffdio_range, GuestError> {
        let block = self.block(number)?;
        let within = offset.checked_add(len).is_some_and(|end| end <= block.max_length());
        match within && self.blocks.lock().contains(&number) {
            true => Ok(uffdio_range { start: block.host_address() as u64 + offset, len }),
            false => Err(format!("{len} bytes at {offset:#x} of RAM block '{}' are not missing", block.name()).into()),
        }
    }

    /// The block and offset of an address in this process.
    fn find(&self, address: u64) -> Option<(usize, u64)> {
        self.blocks.lock().iter().find_map(|number| {
            let block = self.memory.blocks().get(*number)?;
            let offset = address.checked_sub(block.host_address() as u64)?;
            (offset < block.max_length()).then_some((*number, offset))
        })
    }
}

impl MissingPages for Userfault {
    fn unit(&self, number: usize) -> Result<u64, GuestError> {
        Ok(self.block(number)?.host_page_size())
    }

    fn discard(&self, number: usize, bytes: Range<u64>) -> Result<(), GuestError> {
        Ok(self.block(number)?.discard(bytes)?)
    }

    fn add(&self, number: usize) -> Result<(), GuestError> {
        // From here on, who touches it waits until it is filled in.
        self.register(number, UFFDIO_REGISTER_MODE_MISSING)
    }

    fn wait(&self) -> Result<Option<Touch>, GuestError> {
        loop {
            let mut ready = [PollFd::new(&self.stop, PollFlags::IN), PollFd::new(&self.faults, PollFlags::IN)];
            match poll(&mut ready, None) {
                Err(Errno::INTR) => continue,
                polled => polled?,
            };
            if !ready[0].revents().is_empty() {
                return Ok(None);
            }
            let mut event = [0; EVENT];
            match rustix::io::read(&self.faults, &mut event) {
                // No wait is left.
                Err(Errno::AGAIN | Errno::INTR) => continue,
                read => read?,
            };
            let [kind, ..] = event;
            let address = event[16..24].try_into().map(u64::from_ne_bytes)?;
            let thread = event[24..28].try_into().map(u32::from_ne_bytes)?;
            if u32::from(kind) != UFFD_EVENT_PAGEFAULT {
                return Err(format!("userfaultfd tells of event {kind:#x}, which was not asked for").into());
            }
            let found = self.find(address);
            let (block, offset) =
                found.ok_or_else(|| format!("address {address:#x} is in no RAM block that is missing"))?;
            return Ok(Some(Touch { block, offset, vcpu: (self.vcpu_of)(thread) }));
        }
    }

    fn vcpus(&self) -> usize {
        self.vcpus
    }

    fn fill(&self, number: usize, offset: u64, bytes: &[u8]) -> Result<(), GuestError> {
        let range = self.place(number, offset, bytes.len() as u64)?;
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            let (dst, src, len) = (range.start + done as u64, rest.as_ptr() as u64, rest.len() as u64);
            let mut copy = uffdio_copy { dst, src, len, mode: 0, copy: 0 };
            let copied = call::<COPY, _>(&self.faults, &mut copy);
            done += progress(copied, copy.copy)?;
        }
        Ok(())
    }

    fn fill_zeros(&self, number: usize, offset: u64, len: u64) -> Result<(), GuestError> {
        if self.block(number)?.host_page_size() > super::PAGE_SIZE {
            // There is no huge page of zeros.
            return self.fill(number, offset, &vec![0; len as usize]);
        }
        let range = self.place(number, offset, len)?;
        let mut done = 0;
        while done < len {
            let range = uffdio_range { start: range.start + done, len: len - done };
            let mut zeros = uffdio_zeropage { range, mode: 0, zeropage: 0 };
            let zeroed = call::<ZEROPAGE, _>(&self.faults, &mut zeros);
            done += progress(zeroed, zeros.zeropage)? as u64;
        }
        Ok(())
    }

    fn stop(&self) {
        // One that is full already says the same.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
    }

    fn release(&self) -> Result<(), GuestError> {
        for number in std::mem::take(&mut *self.blocks.lock()) {
            let block = self.block(number)?;
            let mut range = uffdio_range { start: block.host_address() as u64, len: block.max_length() };
            call::<UNREGISTER, _>(&self.faults, &mut range)?;
        }
        Ok(())
    }
}

/// One of the calls above, with its structure.
pub(super) fn call<const CALL: Opcode, T>(faults: &OwnedFd, argument: &mut T) -> rustix::io::Result<()> {
    const { assert!(opcode::read_write::<T>(GROUP, CALL as u8) == CALL || opcode::read::<T>(GROUP, CALL as u8) == CALL) };
    // SAFETY: the structure has the length that the number of the call says. The kernel reads and writes it, and bytes
    // of ours that `fill` gives it to read; the only memory it changes are missing pages of a block that `memory`
    // keeps, which cannot have been seen. Protecting pages of it changes nothing but when others write.
    unsafe { ioctl(faults, Updater::<CALL, T>::new(argument)) }
}

/// Bytes that were filled in: all, or those before other changes of the process' memory came in between.
fn progress(result: rustix::io::Result<()>, done: i64) -> io::Result<usize> {
    match result {
        Ok(()) => Ok(usize::try_from(done).unwrap_or(0)),
        Err(Errno::AGAIN) => Ok(usize::try_from(done).unwrap_or(0)),
        Err(error) => Err(error.into()),
    }
}

/// Whether a process may have one with these features of the kernel's.
pub(super) fn available(features: u32) -> io::Result<()> {
    let mut api = uffdio_api { api: UFFD_API.into(), features: features.into(), ioctls: 0 };
    Ok(call::<API, _>(&open()?, &mut api)?)
}

fn open() -> io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: this makes nothing but a descriptor; what it can do to memory is guarded where it is used.
    match unsafe { userfaultfd(flags) } {
        Err(Errno::PERM) => {}
        opened => return Ok(opened?),
    }
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
    const NEW: libc::c_ulong = opcode::none(GROUP, 0) as libc::c_ulong;
    // SAFETY: the call takes flags and gives a new descriptor, which has no other owner.
    unsafe {
        match libc::ioctl(device.as_fd().as_raw_fd(), NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) {
            -1 => Err(io::Error::last_os_error()),
            descriptor => Ok(OwnedFd::from_raw_fd(descriptor)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{BackendKind, MemoryBackend};
    use std::thread;

    const SIZE: u64 = 4 << 20;

    fn memories() -> Vec<Arc<GuestMemory>> {
        let bios = &[0; 64 << 10];
        let backend = |kind, share| MemoryBackend {
            id: "mem".into(),
            size: SIZE,
            kind,
            share,
            prealloc: true,
            reserve: true,
            merge: false,
            canonical_path: false,
        };
        let memfd = || BackendKind::Memfd { hugetlb: None, seal: true };
        let backends = [backend(BackendKind::Ram, true), backend(memfd(), true)];
        let mut memories = vec![GuestMemory::microvm(SIZE, bios).unwrap()];
        memories.extend(backends.map(|backend| GuestMemory::of(&backend, bios).unwrap()));
        memories.into_iter().map(Arc::new).collect()
    }

    #[test]
    fn a_thread_that_touches_a_page_waits_until_it_is_filled_in() {
        for memory in memories() {
            memory.ram().write(8192, b"old").unwrap();
            let missing = Userfault::new(memory.clone()).unwrap();
            assert_eq!(missing.unit(0).unwrap(), 4096);
            missing.discard(0, 0..SIZE).unwrap();
            missing.add(0).unwrap();
            let (tell, number) = std::sync::mpsc::channel();
            let toucher = thread::spawn({
                let memory = memory.clone();
                move || {
                    tell.send(nix::unistd::gettid().as_raw()).unwrap();
                    let mut found = [[0; 4]; 2];
                    memory.ram().read(8192 + 100, &mut found[0]).unwrap();
                    memory.ram().read(SIZE - 4, &mut found[1]).unwrap();
                    found
                }
            });
            let number = number.recv().unwrap().cast_unsigned();
            let missing = missing.with_vcpus(3, move |tid| (tid == number).then_some(2));
            let Touch { block, offset, vcpu } = missing.wait().unwrap().unwrap();
            assert_eq!((block, offset / 4096, vcpu, missing.vcpus()), (0, 2, Some(2), 3));
            missing.fill(0, 4096, &[[1; 4096], [2; 4096], [3; 4096]].concat()).unwrap();
            // The same page may be told of again.
            let last = SIZE / 4096 - 1;
            let next = std::iter::from_fn(|| missing.wait().unwrap()).find(|touch| touch.offset / 4096 != 2);
            assert_eq!(next.map(|touch| (touch.block, touch.offset / 4096)), Some((0, last)));
            missing.fill_zeros(0, SIZE - 4096, 4096).unwrap();
            assert_eq!(toucher.join().unwrap(), [[2; 4], [0; 4]]);
            // What is there is not filled in again.
            let again = missing.fill(0, 4096, &[9; 4096]).unwrap_err();
            assert!(again.to_string().contains("File exists"), "{again}");
            assert!(missing.fill(0, SIZE, &[9; 4096]).is_err() && missing.fill(1, 0, &[9; 4096]).is_err());
            missing.stop();
            while missing.wait().unwrap().is_some() {}
            missing.release().unwrap();
            assert!(memory.ram().page_is_zero(7).unwrap(), "no thread waits any more");
        }
    }

    #[test]
    fn a_private_copy_of_a_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        std::fs::write(&path, vec![7; SIZE as usize]).unwrap();
        let backend = MemoryBackend {
            id: "mem".into(),
            size: SIZE,
            kind: BackendKind::File { path, offset: 0 },
            share: false,
            prealloc: false,
            reserve: true,
            merge: false,
            canonical_path: false,
        };
        let memory = Arc::new(GuestMemory::of(&backend, &[0; 64 << 10]).unwrap());
        let error = Userfault::new(memory).unwrap().discard(0, 0..SIZE).unwrap_err();
        assert!(error.to_string().contains("private copy of a file"), "{error}");
    }
}
