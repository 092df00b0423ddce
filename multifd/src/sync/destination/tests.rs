use super::*;

fn per_round(channels: u8) -> SyncBarrier {
    SyncBarrier::new(channels, Some(FlushMode::PerRound))
}

#[test]
fn no_channel_goes_on_before_all_are_there() {
    let mut barrier = per_round(3);
    assert_eq!(barrier.channel_sync(2), Ok(Progress::Wait));
    assert_eq!(barrier.waiting(), Waiting::Main(vec![2]));
    assert_eq!(barrier.channel_sync(0), Ok(Progress::Wait));
    assert_eq!(barrier.main_flush(), Ok(Progress::Wait));
    assert!(barrier.main_waits() && barrier.channel_waits(0) && !barrier.channel_waits(1) && barrier.channel_waits(2));
    assert_eq!(barrier.waiting(), Waiting::Channels(vec![1]));
    assert_eq!(barrier.channel_sync(1), Ok(Progress::Released));
    assert_eq!((barrier.completed(), barrier.waiting()), (1, Waiting::Nobody));
    assert_eq!(barrier.main_eos(), Ok(Progress::Continue));
    assert_eq!(barrier.main_end(), Ok(()));
    assert_eq!(barrier.channel_end(1), Ok(()));
}

#[test]
fn the_main_channel_can_be_the_last_one() {
    let mut barrier = SyncBarrier::new(1, Some(FlushMode::PerSection));
    assert_eq!(barrier.channel_sync(0), Ok(Progress::Wait));
    assert_eq!(barrier.main_eos(), Ok(Progress::Released));
}

#[test]
fn the_setup_section_tells_the_mode() {
    let mut barrier = SyncBarrier::new(1, None);
    assert_eq!(barrier.channel_sync(0), Ok(Progress::Wait));
    assert_eq!(barrier.main_flush(), Ok(Progress::Released));
    assert_eq!(barrier.main_eos(), Ok(Progress::Continue));
    assert_eq!(barrier.mode(), Some(FlushMode::PerRound));
    let mut barrier = SyncBarrier::new(1, None);
    assert_eq!(barrier.channel_sync(0), Ok(Progress::Wait));
    assert_eq!(barrier.main_eos(), Ok(Progress::Released));
    assert_eq!(barrier.mode(), Some(FlushMode::PerSection));
}

#[test]
fn a_source_of_the_other_mode_is_named_at_setup() {
    let (round, section) = (FlushMode::PerRound, FlushMode::PerSection);
    assert_eq!(per_round(1).main_eos(), Err(SyncError::Mode { found: section, expected: round }));
    let error = SyncBarrier::new(1, Some(section)).main_flush();
    assert_eq!(error, Err(SyncError::Mode { found: round, expected: section }));
}

#[test]
fn too_few_sync_packets_are_named() {
    let mut barrier = per_round(2);
    assert_eq!(barrier.main_flush(), Ok(Progress::Wait));
    let error = Err(SyncError::MissingSync { channel: 1, number: 0 });
    assert_eq!(barrier.channel_end(1), error);
    // A channel that waits for the others learns of it, too.
    assert_eq!(barrier.channel_sync(0).map(|_| ()), error);
    assert_eq!(barrier.healthy(), error);

    let mut barrier = per_round(2);
    barrier.channel_end(0).unwrap();
    assert_eq!(barrier.main_flush(), Err(SyncError::MissingSync { channel: 0, number: 0 }));
}

#[test]
fn too_many_sync_packets_are_named() {
    let mut barrier = per_round(2);
    assert_eq!(barrier.channel_sync(1), Ok(Progress::Wait));
    assert_eq!(barrier.main_end(), Err(SyncError::ExtraSync { channel: 1, number: 0 }));
    let mut barrier = per_round(2);
    barrier.main_end().unwrap();
    assert_eq!(barrier.channel_sync(0), Err(SyncError::ExtraSync { channel: 0, number: 0 }));
}

#[test]
fn a_channel_that_comes_late_catches_up() {
    let mut barrier = SyncBarrier::new(0, None);
    barrier.join(2).unwrap();
    for _ in 0..2 {
        assert_eq!(barrier.main_flush(), Ok(Progress::Wait));
        assert_eq!(barrier.channel_sync(2), Ok(Progress::Released));
    }
    assert_eq!(barrier.channel_sync(1), Err(SyncError::UnknownChannel { found: 1, channels: 3 }));
    assert_eq!(barrier.channel_end(0), Err(SyncError::UnknownChannel { found: 0, channels: 3 }));
    // Two synchronisations were complete without it; the third waits for it.
    barrier.join(0).unwrap();
    assert_eq!(barrier.channel_sync(2), Ok(Progress::Wait));
    assert_eq!(barrier.main_flush(), Ok(Progress::Wait));
    assert_eq!(barrier.waiting(), Waiting::Channels(vec![0]));
    for _ in 0..2 {
        assert_eq!(barrier.channel_sync(0), Ok(Progress::Continue));
    }
    assert_eq!(barrier.channel_sync(0), Ok(Progress::Released));
    assert_eq!(barrier.completed(), 3);
    // One that comes at the end is asked for what it has to bring, and no more.
    barrier.main_end().unwrap();
    barrier.join(1).unwrap();
    let mut cut = barrier.clone();
    for _ in 0..3 {
        assert_eq!(barrier.waiting(), Waiting::Channels(vec![1]));
        assert_eq!(barrier.channel_sync(1), Ok(Progress::Continue));
    }
    assert_eq!(barrier.waiting(), Waiting::Nobody);
    assert_eq!(barrier.channel_sync(1), Err(SyncError::ExtraSync { channel: 1, number: 3 }));
    assert_eq!(cut.channel_sync(1), Ok(Progress::Continue));
    assert_eq!(cut.channel_end(1), Err(SyncError::MissingSync { channel: 1, number: 1 }));
    let mut counted = per_round(1);
    assert!(matches!(counted.join(0), Err(SyncError::Order { .. })));
    assert_eq!(per_round(1).join(255), Err(SyncError::UnknownChannel { found: 255, channels: 255 }));
}

#[test]
fn a_silent_peer_is_named_by_a_reader_that_has_waited_enough() {
    let mut barrier = per_round(3);
    assert_eq!(barrier.channel_sync(1), Ok(Progress::Wait));
    assert_eq!(barrier.main_flush(), Ok(Progress::Wait));
    let error = barrier.timed_out();
    assert_eq!(error, SyncError::TimedOut { waiting: Waiting::Channels(vec![0, 2]) });
    assert_eq!(barrier.healthy(), Err(error));
}

#[test]
fn a_reader_that_goes_on_although_it_had_to_wait_is_refused() {
    let mut barrier = per_round(2);
    assert_eq!(barrier.channel_sync(0), Ok(Progress::Wait));
    assert!(matches!(barrier.channel_sync(0), Err(SyncError::Order { .. })));
    let mut barrier = per_round(2);
    assert_eq!(barrier.main_flush(), Ok(Progress::Wait));
    assert!(matches!(barrier.clone().main_flush(), Err(SyncError::Order { .. })));
    assert!(matches!(barrier.clone().main_eos(), Err(SyncError::Order { .. })));
    assert!(matches!(barrier.main_end(), Err(SyncError::Order { .. })));
    let mut barrier = per_round(2);
    barrier.main_end().unwrap();
    assert_eq!(barrier.main_eos(), Ok(Progress::Continue));
    assert!(matches!(barrier.main_flush(), Err(SyncError::AfterEnd { .. })));
    let mut barrier = per_round(2);
    barrier.channel_end(1).unwrap();
    assert!(matches!(barrier.channel_sync(1), Err(SyncError::Order { .. })));
    assert_eq!(per_round(2).channel_sync(2), Err(SyncError::UnknownChannel { found: 2, channels: 2 }));
    assert_eq!(per_round(2).channel_end(9), Err(SyncError::UnknownChannel { found: 9, channels: 2 }));
}
