//! Guests that go to files and commands, and come from there.

use super::*;
use crate::connections::Reader;
use crate::page_file::PageFile;
use crate::pipe::Pipe;
use crate::{Address, BadCapability, LoadError, NoDescriptors};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The page size of the guest.
const PAGE: u64 = 4096;

impl Pair {
    pub(super) fn with(self, capabilities: &[(&str, bool)]) -> Self {
        let on = Capabilities::default().with(capabilities.iter().copied()).unwrap();
        self.job.set_capabilities(on).unwrap();
        self
    }

    fn leave(&self, address: &Address) -> Result<(), MigrationError> {
        self.job.begin().unwrap();
        match Outgoing::open(address, &self.job, &mut NoDescriptors) {
            Ok(connections) => migrate(&*self.source, &connections, &self.job, &self.profile),
            Err(error) => {
                self.job.end(Some(&error));
                Err(error)
            }
        }
    }

    fn arrive(&self, address: &Address) -> Result<Arrival, MigrationError> {
        let job = Job::default();
        job.set_capabilities(self.incoming.unwrap_or(self.job.capabilities())).unwrap();
        job.set_parameters(self.job.parameters());
        job.begin().unwrap();
        let connections = Incoming::open(address, &job, &mut NoDescriptors)?;
        let arrival = receive(&*self.destination, connections, &job, &self.profile)?;
        if arrival.running {
            self.destination.resume().unwrap();
        }
        Ok(arrival)
    }

    pub(super) fn through(&self, address: &Address) -> Outcome {
        let source = self.leave(address);
        let destination = self.arrive(address);
        Outcome { source, destination, statistics: self.job.statistics(), written: 0 }
    }
}

fn file(directory: &Path, offset: u64) -> Address {
    Address::File { path: directory.join("guest"), offset }
}

#[test]
fn a_working_guest_goes_on_from_a_file() {
    let directory = tempfile::tempdir().unwrap();
    for mapped in [false, true] {
        for (multifd, direct) in [(false, false), (mapped, false), (mapped, mapped)] {
            for offset in [0, 0x1234] {
                let path = directory.path().join("guest");
                // What lies in front of the stream stays, and what a longer file had after it goes.
                std::fs::write(&path, [7; 40_000]).unwrap();
                let pair = Pair::new(3000).with(&[("mapped-ram", mapped), ("multifd", multifd)]);
                let mut parameters = pair.job.parameters();
                (parameters.multifd_channels, parameters.direct_io) = (3, direct);
                pair.job.set_parameters(parameters);
                pair.source.pages_per_step.store(40, std::sync::atomic::Ordering::Relaxed);
                let outcome = pair.through(&file(directory.path(), offset));
                pair.assert_moved(&outcome);
                let ram = outcome.statistics.ram;
                assert!(ram.dirty_sync_count >= 2 && ram.duplicate > 900, "{ram:?}");
                if mapped {
                    assert!(ram.normal > 2000, "{ram:?}");
                }
                let mut front = vec![0; offset as usize];
                File::open(&path).unwrap().read_exact_at(&mut front, 0).unwrap();
                assert!(front.iter().all(|byte| *byte == 7));
            }
        }
    }
}

#[test]
fn both_sides_must_have_mapped_ram_on() {
    let directory = tempfile::tempdir().unwrap();
    let address = file(directory.path(), 0);
    for there in [false, true] {
        let mut pair = Pair::new(60).with(&[("mapped-ram", there)]);
        pair.leave(&address).unwrap();
        pair.incoming = Some(Capabilities { mapped_ram: !there, ..pair.job.capabilities() });
        let Err(MigrationError::Load(error)) = pair.arrive(&address) else { panic!() };
        let LoadError::CapabilityDiffers { name: "mapped-ram", here } = error.kind else { panic!("{error}") };
        assert_eq!(here, !there);
    }
}

#[test]
fn a_file_that_was_cut_says_where() {
    let directory = tempfile::tempdir().unwrap();
    let address = file(directory.path(), 0);
    let path = directory.path().join("guest");
    // Each file has its own length: the guest works while it is saved.
    let cuts: [fn(u64) -> u64; 6] = [|_| 0, |_| 3, |_| 100, |whole| whole / 3, |whole| whole / 2, |whole| whole - 30];
    for (mapped, cut) in [false, true].into_iter().flat_map(|mapped| cuts.map(|cut| (mapped, cut))) {
        let pair = Pair::new(600).with(&[("mapped-ram", mapped)]);
        pair.leave(&address).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let whole = file.metadata().unwrap().len();
        file.set_len(cut(whole)).unwrap();
        let Err(MigrationError::Load(error)) = pair.arrive(&address) else { panic!("{} of {whole}", cut(whole)) };
        assert!(error.offset <= whole, "{error}");
        assert!(
            matches!(error.kind, LoadError::Stream(_) | LoadError::MappedRam(_) | LoadError::File { .. }),
            "{error}"
        );
        assert_eq!(qevm_wire::Blame::fault(&error.kind), qevm_wire::Fault::Truncated, "{error}");
        assert!(!pair.destination.is_running());
    }
}

#[test]
fn a_bitmap_of_pages_that_do_not_exist_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let address = file(directory.path(), 0);
    let pair = Pair::new(60).with(&[("mapped-ram", true)]);
    pair.leave(&address).unwrap();
    let path = directory.path().join("guest");
    // The header has the place of the bitmap, which is one word, after the page size.
    let image = std::fs::read(&path).unwrap();
    let page_size = image.windows(8).position(|word| word == PAGE.to_be_bytes()).unwrap();
    let bitmap = u64::from_be_bytes(image[page_size + 8..page_size + 16].try_into().unwrap());
    File::options().write(true).open(&path).unwrap().write_all_at(&[0xff; 8], bitmap).unwrap();
    let Err(MigrationError::Load(error)) = pair.arrive(&address) else { panic!() };
    assert!(matches!(error.kind, LoadError::MappedRam(_)), "{error}");
    assert_eq!(error.offset, bitmap);
    assert!(error.to_string().contains("microvm.ram"), "{error}");
}

#[test]
fn a_full_disk_leaves_the_guest_running() {
    let full = Address::File { path: "/dev/full".into(), offset: 0 };
    for mapped in [false, true] {
        let pair = Pair::new(60).with(&[("mapped-ram", mapped)]);
        let error = pair.leave(&full).unwrap_err();
        let MigrationError::Send { source, .. } = &error else { panic!("{error}") };
        assert_eq!(source.kind(), io::ErrorKind::StorageFull);
        assert!(pair.source.is_running() && !pair.source.is_logging());
        assert_eq!(pair.job.statistics().status, Status::Failed);
    }
}

/// A file that cannot grow beyond `len`.
fn bounded(len: u64) -> File {
    let file = File::from(memfd_create("bounded", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
    file.set_len(len).unwrap();
    fcntl_add_seals(&file, SealFlags::GROW).unwrap();
    file
}

#[test]
fn a_disk_that_fills_up_anywhere_leaves_the_guest_running_and_free_to_go() {
    for (mapped, multifd) in [(false, false), (true, false), (true, true)] {
        let mut ended = 0;
        for len in [PAGE, 1 << 20, (1 << 20) + 40 * PAGE, 2 << 20, (2 << 20) + 4 * PAGE, (2 << 20) + 4 * PAGE + 30] {
            let pair = Pair::new(256).with(&[("mapped-ram", mapped), ("multifd", multifd)]);
            let image = bounded(len);
            let main: Arc<dyn Channel> = Arc::new(Pipe::new(image.try_clone().unwrap().into()).unwrap());
            let place = mapped.then(|| PageFile::new(image, None));
            let connections = Outgoing { reader: Reader::Nobody, file: place, ..main.into() };
            pair.job.begin().unwrap();
            let result = migrate(&*pair.source, &connections, &pair.job, &pair.profile);
            if !mapped && len >= 1 << 20 {
                // There is room for a stream of 170 pages.
                result.unwrap();
                continue;
            }
            assert!(matches!(result, Err(MigrationError::Send { .. })), "{len}: {result:?}");
            assert!(pair.source.is_running() && !pair.source.is_logging(), "{len}");
            ended += 1;
            let directory = tempfile::tempdir().unwrap();
            pair.assert_moved(&pair.through(&file(directory.path(), 0)));
        }
        assert!(ended > 0);
    }
}

#[test]
fn what_cannot_be_opened_is_named() {
    let pair = Pair::new(60).return_path(false);
    let directory = tempfile::tempdir().unwrap();
    let nowhere = file(&directory.path().join("no-such"), 0);
    assert!(matches!(pair.leave(&nowhere), Err(MigrationError::Create { .. })));
    assert!(matches!(pair.arrive(&nowhere), Err(MigrationError::Open { .. })));
    let folder = Address::File { path: directory.path().into(), offset: 0 };
    assert!(matches!(pair.leave(&folder), Err(MigrationError::Create { .. })));
    assert!(matches!(pair.arrive(&folder), Err(MigrationError::Open { .. })));
    let unknown = Address::Fd("x".into());
    assert!(matches!(pair.leave(&unknown), Err(MigrationError::Descriptor(_))));
    let nothing = Address::Exec(vec!["/no/such/program".into()]);
    assert!(matches!(pair.leave(&nothing), Err(MigrationError::Open { .. })));
    assert!(pair.source.is_running());
}

#[test]
fn capabilities_must_go_with_the_transport() {
    let directory = tempfile::tempdir().unwrap();
    let refused = |capability, address: &Address| {
        let pair = Pair::new(60).with(&[(capability, true)]);
        let error = pair.leave(address).unwrap_err();
        let MigrationError::Capability(bad) = error else { panic!("{error}") };
        bad
    };
    let (a_file, command) = (file(directory.path(), 0), "exec:cat".parse().unwrap());
    assert_eq!(refused("return-path", &a_file), BadCapability::OneWay("return-path"));
    for (capability, address) in [
        ("multifd", &a_file),
        ("multifd", &command),
        ("mapped-ram", &command),
        ("mapped-ram", &Address::Fd("x".into())),
    ] {
        assert!(matches!(refused(capability, address), BadCapability::Rejected(_)), "{capability} {address}");
    }
    assert!(!directory.path().join("guest").exists(), "nothing is touched");
}

#[test]
fn a_guest_goes_through_commands() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("guest.gz");
    let pair = Pair::new(600).return_path(false);
    pair.leave(&format!("exec:gzip -1 > {}", path.display()).parse().unwrap()).unwrap();
    let destination = pair.arrive(&format!("exec:gzip -d < {}", path.display()).parse().unwrap());
    let outcome = Outcome { source: Ok(()), destination, statistics: pair.job.statistics(), written: 0 };
    pair.assert_moved(&outcome);
}

#[test]
fn a_command_that_fails_behind_the_end_leaves_the_guest_stopped() {
    let pair = Pair::new(600).return_path(false);
    let result = pair.leave(&"exec:cat > /dev/null; exit 5".parse().unwrap());
    assert!(matches!(result, Err(MigrationError::Unsettled { .. })), "{result:?}");
    assert_eq!(pair.job.statistics().status, Status::Failed);
    // It may run at the destination; the operator knows.
    assert!(!pair.source.is_running());
    // Before that it goes on.
    let pair = Pair::new(600).return_path(false);
    let result = pair.leave(&"exec:head -c 5000 > /dev/null".parse().unwrap());
    assert!(matches!(result, Err(MigrationError::Send { .. })), "{result:?}");
    assert!(pair.source.is_running());
}
