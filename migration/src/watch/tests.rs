use super::*;
use crate::channel::{read_at_least, write_all};
use crate::{Job, Listener, Socket};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Instant;

/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(60);

fn watch(idle_ms: u64, switchover_ms: u64) -> Arc<Watch> {
    let job = Job::default();
    job.begin().unwrap();
    job.set_timeouts(Timeouts { idle_ms, switchover_ms, ..Timeouts::default() });
    job.waits()
}

fn watched(stream: UnixStream, name: ChannelName, watch: &Arc<Watch>, brings: Brings) -> Watched {
    Watched::new(Arc::new(Socket::Unix(stream)), name, watch, brings, None).unwrap()
}

fn silence(error: &io::Error) -> &Silence {
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    Silence::of(error).unwrap()
}

#[test]
fn a_peer_that_takes_nothing_is_named_with_phase_and_parameter() {
    let watch = watch(600, 0);
    let (here, _there) = UnixStream::pair().unwrap();
    let channel = watched(here, ChannelName::Page(3), &watch, Brings::Answers);
    let error = write_all(&channel, &mut [WriteSlice::bytes(&vec![0; 8 << 20])]).unwrap_err();
    let expected = Silence {
        channel: ChannelName::Page(3),
        awaited: Awaited::Room,
        waited: Some(Duration::from_millis(600)),
        status: Status::Setup,
        parameter: Some("x-idle-timeout"),
    };
    assert_eq!(*silence(&error), expected);
    assert_eq!(error.to_string(), "page channel 3 has taken nothing for 0.6 s in status 'setup' (x-idle-timeout)");
}

#[test]
fn a_peer_that_takes_a_little_now_and_then_is_no_frozen_one() {
    let watch = watch(1500, 0);
    let (here, there) = UnixStream::pair().unwrap();
    let channel = watched(here, ChannelName::Main, &watch, Brings::Answers);
    let reader = thread::spawn(move || {
        // Longer in all than the limit, and far less than has to go before a thread may write again.
        for _ in 0..8 {
            thread::sleep(Duration::from_millis(500));
            read_at_least(&Socket::Unix(there.try_clone().unwrap()), &mut [ReadSlice::bytes(&mut [0; 1024])], 1024)
                .unwrap();
        }
        there
    });
    let start = Instant::now();
    // The kernel counts what is read in writes.
    let error = loop {
        if let Err(error) = write_all(&channel, &mut [WriteSlice::bytes(&[0; 1024])]) {
            break error;
        }
    };
    assert_eq!(silence(&error).awaited, Awaited::Room);
    assert!(start.elapsed() > Duration::from_secs(4), "{:?}", start.elapsed());
    reader.join().unwrap();
}

#[test]
fn a_destination_waits_on_one_channel_as_long_as_another_brings_something() {
    let watch = watch(1000, 0);
    let (page, _other_page) = UnixStream::pair().unwrap();
    let (main, mut other_main) = UnixStream::pair().unwrap();
    let page = watched(page, ChannelName::Page(0), &watch, Brings::Guest);
    let main = watched(main, ChannelName::Main, &watch, Brings::Guest);
    let sender = thread::spawn(move || {
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(300));
            std::io::Write::write_all(&mut other_main, b"x").unwrap();
        }
        other_main
    });
    let reader = thread::spawn(move || read_at_least(&main, &mut [ReadSlice::bytes(&mut [0; 11])], 11).unwrap_err());
    let start = Instant::now();
    let error = read_at_least(&page, &mut [ReadSlice::bytes(&mut [0])], 1).unwrap_err();
    assert!(start.elapsed() > Duration::from_secs(3), "{:?}", start.elapsed());
    assert_eq!((silence(&error).channel, silence(&error).awaited), (ChannelName::Page(0), Awaited::Bytes));
    assert_eq!(silence(&reader.join().unwrap()).channel, ChannelName::Main);
    sender.join().unwrap();
}

#[test]
fn answers_have_no_limit_of_their_own_but_one_that_is_set_for_them() {
    let watch = watch(300, 0);
    let (here, mut there) = UnixStream::pair().unwrap();
    let channel = watched(here, ChannelName::Main, &watch, Brings::Answers);
    let sender = thread::spawn(move || {
        thread::sleep(Duration::from_millis(1200));
        std::io::Write::write_all(&mut there, b"x").unwrap();
        there
    });
    assert_eq!(read_at_least(&channel, &mut [ReadSlice::bytes(&mut [0])], 1).unwrap(), 1);
    let _open = sender.join().unwrap();
    channel.limit_silence(Some(Duration::from_millis(300))).unwrap();
    let error = read_at_least(&channel, &mut [ReadSlice::bytes(&mut [0])], 1).unwrap_err();
    assert_eq!((silence(&error).awaited, silence(&error).parameter), (Awaited::Bytes, None));
}

#[test]
fn a_limit_may_change_during_a_wait() {
    let job = Arc::new(Job::default());
    job.begin().unwrap();
    let (here, _there) = UnixStream::pair().unwrap();
    let channel = watched(here, ChannelName::Main, &job.waits(), Brings::Guest);
    let operator = job.clone();
    let setting = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        operator.set_timeouts(Timeouts { idle_ms: 200, ..Timeouts::default() });
    });
    let start = Instant::now();
    let error = read_at_least(&channel, &mut [ReadSlice::bytes(&mut [0])], 1).unwrap_err();
    assert!(start.elapsed() < LONG, "the default is longer");
    assert_eq!(silence(&error).waited, Some(Duration::from_millis(200)));
    setting.join().unwrap();
}

#[test]
fn a_peer_that_does_not_take_the_rest_and_close_is_not_waited_for() {
    let watch = watch(0, 700);
    let (here, _there) = UnixStream::pair().unwrap();
    let channel = watched(here, ChannelName::Main, &watch, Brings::Answers);
    write_all(&channel, &mut [WriteSlice::bytes(b"the end")]).unwrap();
    let error = channel.settle().unwrap_err();
    assert_eq!((silence(&error).awaited, silence(&error).parameter), (Awaited::End, Some("x-switchover-timeout")));
}

#[test]
fn closing_ends_every_wait() {
    let watch = watch(0, 0);
    for writes in [false, true] {
        let (here, _there) = UnixStream::pair().unwrap();
        let channel = Arc::new(watched(here, ChannelName::Main, &watch, Brings::Guest));
        let waiting = channel.clone();
        let waiter = thread::spawn(move || match writes {
            true => write_all(&*waiting, &mut [WriteSlice::bytes(&vec![0; 8 << 20])]).map(|()| 0),
            false => read_at_least(&*waiting, &mut [ReadSlice::bytes(&mut [0])], 1),
        });
        thread::sleep(Duration::from_millis(400));
        channel.close();
        match waiter.join().unwrap() {
            Ok(read) => assert_eq!((writes, read), (false, 0)),
            Err(error) => assert!(writes && error.kind() == io::ErrorKind::BrokenPipe, "{error}"),
        }
    }
}

#[test]
fn the_system_is_told_of_acknowledgements_unless_the_address_says_how_it_probes() {
    use rustix::net::sockopt::tcp_user_timeout;
    for (options, set, expected) in
        [("", 0, 300_000), (",keep-alive=on", 0, 0), (",keep-alive=on", 7000, 7000), ("", 7000, 7000)]
    {
        let listener = Listener::bind(&format!("tcp:127.0.0.1:0{options}").parse().unwrap()).unwrap();
        let address = listener.address();
        let watch = Arc::new(Watch::default());
        watch.set_timeouts(Timeouts { tcp_user_ms: set, ..Timeouts::default() });
        let socket = Arc::new(Socket::connect_to(address, &Socket::look_up(address).unwrap(), &|| true).unwrap());
        let _watched = Watched::new(socket.clone(), ChannelName::Main, &watch, Brings::Answers, Some(address)).unwrap();
        assert_eq!(tcp_user_timeout(socket.as_fd()).unwrap(), expected, "{options} {set}");
    }
}
