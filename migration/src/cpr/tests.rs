use super::*;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread;

struct Place {
    _folder: tempfile::TempDir,
    address: Address,
    listener: Listener,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let address = Address::Unix(folder.path().join("cpr"));
        Place { listener: Listener::bind(&address).unwrap(), address, _folder: folder }
    }

    /// A caller that is no source, or a bad one.
    fn call(&self) -> UnixStream {
        let Address::Unix(path) = &self.address else { panic!() };
        UnixStream::connect(path).unwrap()
    }
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

fn passed<'f>(name: &str, file: &'f File) -> Passed<BorrowedFd<'f>> {
    Passed { name: name.into(), id: 0, descriptor: file.as_fd() }
}

fn profile() -> Profile {
    Profile::new(QemuVersion::NEWEST, "microvm")
}

fn job() -> Job {
    let job = Job::default();
    job.begin().unwrap();
    job
}

#[test]
fn descriptors_arrive_and_the_source_goes_on_when_the_destination_is_ready() {
    let (place, job, ready) = (Place::new(), job(), std::sync::atomic::AtomicBool::new(false));
    let files = [file(b"ram"), file(b"bios")];
    thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let mut predecessor = Predecessor::wait(&place.listener, &Timeouts::default(), &|| true).unwrap();
            let descriptors = predecessor.take();
            thread::sleep(3 * POLL);
            ready.store(true, std::sync::atomic::Ordering::SeqCst);
            drop(predecessor);
            descriptors
        });
        let descriptors = [passed("microvm.ram", &files[0]), passed("pc.bios", &files[1])];
        Successor::connect(&place.address).unwrap().pass(&descriptors, &job, &profile()).unwrap();
        assert!(ready.load(std::sync::atomic::Ordering::SeqCst), "the source has not waited");
        let found = destination.join().unwrap();
        let read = |passed: Passed<OwnedFd>| {
            let mut content = [0; 8];
            let count = File::from(passed.descriptor).read_at(&mut content, 0).unwrap();
            (passed.name, content[..count].to_vec())
        };
        let found: Vec<_> = found.into_iter().map(read).collect();
        assert_eq!(found, [("microvm.ram".to_owned(), b"ram".to_vec()), ("pc.bios".into(), b"bios".to_vec())]);
    });
}

/// A destination goes on waiting for the right one.
#[test]
fn a_caller_that_passes_nothing_is_dropped() {
    let place = Place::new();
    let other = file(b"x");
    let mut callers = Vec::new();
    let bad: [(&[u8], usize); 6] = [
        (b"", 0),
        (b"QEVM\0\0\0\x03", 0),
        (b"QCPR\0\0\0\x01\x01\0\0\0\x04mem\0\0\0", 0),
        // Named, and not there; there, and not named; one of two.
        (b"QCPR\0\0\0\x01\x01\0\0\0\x04mem\0\0\0\0\0\x20\0", 0),
        (b"QCPR\0\0\0\x01\0", 1),
        (b"QCPR\0\0\0\x01\x01\0\0\0\x04mem\0\0\0\0\0\x20\x01\0\0\0\x02b\0\0\0\0\0\x20\0", 1),
    ];
    for (bytes, count) in bad {
        let caller = place.call();
        let (rights, mut space) = ([other.as_fd()], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
        let mut control = SendAncillaryBuffer::new(&mut space);
        if count > 0 {
            control.push(SendAncillaryMessage::ScmRights(&rights));
        }
        if !bytes.is_empty() {
            sendmsg(&caller, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
        }
        caller.shutdown(std::net::Shutdown::Write).unwrap();
        callers.push(caller);
    }
    // One that sends nothing for too long.
    let silent = place.call();
    thread::scope(|scope| {
        let timeouts = Timeouts { handshake_ms: 100, ..Timeouts::default() };
        let destination = scope.spawn(move || Predecessor::wait(&place.listener, &timeouts, &|| true).unwrap().take());
        let address = &place.address;
        let source = scope.spawn(move || {
            let ram = file(b"ram");
            Successor::connect(address).unwrap().pass(&[passed("mem", &ram)], &job(), &profile())
        });
        let found = destination.join().unwrap();
        assert_eq!((found.len(), found[0].name.as_str()), (1, "mem"));
        source.join().unwrap().unwrap();
    });
    // They were not kept.
    for mut caller in callers.into_iter().chain([silent]) {
        caller.set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(matches!(caller.read(&mut [0]), Ok(0)), "a caller is still connected");
    }
}

#[test]
fn a_wait_can_be_ended() {
    let place = Place::new();
    let ended = Predecessor::wait(&place.listener, &Timeouts::default(), &|| false);
    assert!(matches!(ended, Err(MigrationError::Cancelled)));

    let ram = file(b"ram");
    let (job, successor) = (job(), Successor::connect(&place.address).unwrap());
    thread::scope(|scope| {
        let source = scope.spawn(|| successor.pass(&[passed("mem", &ram)], &job, &profile()));
        let (_accepted, _) = loop {
            if let Some(accepted) = place.listener.try_accept().unwrap() {
                break accepted;
            }
        };
        thread::sleep(3 * POLL);
        assert!(!source.is_finished());
        let since = Instant::now();
        job.cancel().unwrap();
        assert!(matches!(source.join().unwrap(), Err(MigrationError::Cancelled)));
        assert!(since.elapsed() < PATIENCE);
    });
}

#[test]
fn a_destination_that_never_gets_ready_is_given_up() {
    let place = Place::new();
    let job = job();
    let mut parameters = job.parameters();
    parameters.timeouts.idle_ms = 100;
    job.set_parameters(parameters);
    let successor = Successor::connect(&place.address).unwrap();
    let error = successor.pass(&[], &job, &profile()).unwrap_err().to_string();
    assert!(error.contains("has not closed the CPR channel for 0.1 s (x-idle-timeout)"), "{error}");
}

/// Order and texts are QEMU 11.1.3's, but for `exec:`.
#[test]
fn what_does_not_go_with_the_mode_is_refused_in_qemus_words() {
    let address = |text: &str| text.parse::<Address>().unwrap();
    let (unix, tcp, file) = (address("unix:/x"), address("tcp:a:1"), address("file:/x"));
    let refused = |mode, main: &Address, cpr: Option<&Address>, private: &[&str], on: &[(&str, bool)]| {
        let job = Job::default();
        let mut parameters = job.parameters();
        parameters.mode = mode;
        job.set_parameters(parameters);
        job.set_capabilities(job.capabilities().with(on.iter().copied()).unwrap()).unwrap();
        check(main, cpr, &job, private).map_err(|refused| refused.to_string())
    };
    let postcopy = &[("postcopy-ram", true)][..];
    let transfer = |main, cpr, private, on| refused(Mode::CprTransfer, main, cpr, private, on).unwrap_err();
    assert_eq!(transfer(&file, None, &["a"], postcopy), "missing 'cpr' migration channel");
    assert_eq!(transfer(&file, Some(&tcp), &["a"], postcopy), "Migration requires streamable transport (eg unix)");
    assert_eq!(
        transfer(&unix, Some(&tcp), &["a", "b"], postcopy),
        "Memory region b is not compatible with CPR. share=on is required for memory-backend objects, and aux-ram-share=on is required."
    );
    assert_eq!(transfer(&unix, Some(&tcp), &[], postcopy), "Cannot use postcopy with CPR");
    let snapshot = &[("background-snapshot", true)][..];
    assert_eq!(transfer(&unix, Some(&tcp), &[], snapshot), "Cannot use background snapshot with CPR");
    assert_eq!(transfer(&unix, Some(&tcp), &[], &[]), "bad cpr channel address; must be unix");
    assert!(transfer(&address("exec:x"), Some(&unix), &[], &[]).contains("exec"));
    assert_eq!(refused(Mode::CprTransfer, &tcp, Some(&unix), &[], &[]), Ok(()));
    assert_eq!(refused(Mode::Normal, &file, Some(&tcp), &["a"], postcopy), Ok(()));
    assert_eq!(refused(Mode::CprReboot, &file, None, &["a"], &[]), Ok(()));
    let why = refused(Mode::CprReboot, &file, None, &[], postcopy).unwrap_err();
    assert_eq!(why, "Cannot use postcopy with CPR");
}
