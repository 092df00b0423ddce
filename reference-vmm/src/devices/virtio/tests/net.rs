//! The network card.

use super::serial::{Ring, start};
use super::*;
use crate::devices::{Netdev, NetdevOptions};
use std::os::unix::net::UnixDatagram;

const MRG_RXBUF: u32 = 1 << 15;
const GUEST_ANNOUNCE: u32 = 1 << 21;
const BROADCAST: [u8; 6] = [0xff; 6];

/// A card on datagrams, and the other end.
fn card() -> (Harness, UnixDatagram, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let (local, remote) = (folder.path().join("card"), folder.path().join("wire"));
    let wire = UnixDatagram::bind(&remote).unwrap();
    let netdev = Netdev::open(&NetdevOptions::Dgram { local: local.clone(), remote }).unwrap();
    let harness = Harness::new(Box::new(Net::new(netdev, None, 1)));
    wire.connect(local).unwrap();
    wire.set_nonblocking(true).unwrap();
    (harness, wire, folder)
}

fn frame(to: [u8; 6], len: usize) -> Vec<u8> {
    (0..len).map(|i| to.get(i).copied().unwrap_or(i as u8)).collect()
}

/// What a thread would do when something has come.
fn pump(harness: &mut Harness) {
    let interest = harness.transport.interest().unwrap();
    harness.transport.pump(&interest);
}

#[test]
fn registers_of_a_card_are_those_of_qemu() {
    let (mut harness, _wire, _folder) = card();
    assert_eq!((harness.read(8), harness.read(0x10)), (1, 0x39bf_8064));
    for (queue, max) in [(0, 256), (1, 256), (2, 64), (3, 0)] {
        harness.write(0x30, queue);
        assert_eq!(harness.read(0x34), max);
    }
    // QEMU's second card.
    assert_eq!(
        (harness.read(0x100), harness.read(0x104), harness.read(0x108)),
        (0x1200_5452, 0x0001_5734, 0xffff_ffff)
    );
}

#[test]
fn frames_are_sent_and_received() {
    for (features, header) in [(0, 10), (MRG_RXBUF, 12)] {
        let (mut harness, wire, _folder) = card();
        harness.transport.resume().unwrap();
        let (receive, transmit) = (Ring(0), Ring(1));
        start(&mut harness, features, &[receive, transmit]);
        let out = frame(BROADCAST, 60);
        transmit.send(&mut harness, 0, &[vec![0; header], out.clone()].concat());
        let mut bytes = [0; 200];
        assert_eq!(wire.recv(&mut bytes).unwrap(), 60);
        assert_eq!(bytes[..60], out);
        assert_eq!(transmit.used(&harness), 1);
        // One that comes before the guest has room waits.
        let long = frame(BROADCAST, 150);
        wire.send(&long).unwrap();
        pump(&mut harness);
        receive.offer(&mut harness, 0, 100, WRITE);
        if features == 0 {
            // It does not fit, and no other buffer may be added to.
            assert_eq!(receive.used(&harness), 0);
            let short = frame(BROADCAST, 80);
            wire.send(&short).unwrap();
            pump(&mut harness);
            assert_eq!(receive.received(&harness, 0), [vec![0; 10], short].concat());
        } else {
            assert_eq!(receive.used(&harness), 0, "half a frame is no frame");
            receive.offer(&mut harness, 1, 100, WRITE);
            let whole = [receive.received(&harness, 0), receive.received(&harness, 1)].concat();
            assert_eq!(whole, [&[0; 10][..], &[2, 0], &long].concat());
        }
        assert!(!harness.broken());
    }
}

#[test]
fn a_wire_that_is_full_takes_the_frame_later() {
    let (mut harness, wire, _folder) = card();
    harness.transport.resume().unwrap();
    let transmit = Ring(1);
    start(&mut harness, 0, &[transmit]);
    let waits = |harness: &Harness| match harness.transport.save().device {
        VirtioDeviceState::Net(state) => state.transmit_waits,
        other => panic!("it is a card: {other:?}"),
    };
    // The same descriptor again and again, as long as the other end does not read.
    harness.memory.write(transmit.buffer(0), &[&[0; 10][..], &frame(BROADCAST, 60)].concat()).unwrap();
    harness.descriptor_at(transmit.desc(), transmit.buffer(0), 70, 0, 0);
    let avail = transmit.desc() + 16 * u64::from(NUM);
    let mut sent = 0;
    while !waits(&harness) {
        sent += 1;
        assert!(sent < 60_000, "the wire is never full");
        harness.memory.write(avail + 2, &(sent as u16).to_le_bytes()).unwrap();
        harness.write(0x50, 1);
    }
    assert_eq!(transmit.used(&harness), sent as u16 - 1);
    let mut bytes = [0; 200];
    (1..sent).for_each(|_| assert_eq!(wire.recv(&mut bytes).unwrap(), 60));
    pump(&mut harness);
    assert_eq!((transmit.used(&harness), waits(&harness)), (sent as u16, false));
    assert_eq!(wire.recv(&mut bytes).unwrap(), 60);
    assert!(wire.recv(&mut bytes).is_err(), "a frame was sent twice");
}

#[test]
fn commands_are_answered() {
    let (mut harness, _wire, _folder) = card();
    harness.transport.resume().unwrap();
    let control = Ring(2);
    start(&mut harness, GUEST_ANNOUNCE, &[control]);
    let mut number = 0;
    let mut command = |harness: &mut Harness, bytes: &[u8]| {
        // Two descriptors, of which the first tells the command and the second takes the answer.
        let avail = control.desc() + 16 * u64::from(NUM);
        harness.memory.write(control.buffer(0), bytes).unwrap();
        harness.memory.write(control.buffer(1), &[0xff]).unwrap();
        harness.descriptor_at(control.desc(), control.buffer(0), bytes.len() as u32, NEXT, 1);
        harness.descriptor_at(control.desc() + 16, control.buffer(1), 1, WRITE, 0);
        number += 1;
        harness.memory.write(avail + 2, &(number as u16).to_le_bytes()).unwrap();
        harness.write(0x50, 2);
        let mut answer = [0];
        harness.memory.read(control.buffer(1), &mut answer).unwrap();
        answer[0]
    };
    assert_eq!(command(&mut harness, &[0, 0, 0]), 0);
    assert_eq!(command(&mut harness, &[1, 1, 2, 4, 6, 8, 10, 12]), 0);
    assert_eq!(command(&mut harness, &[1, 1, 2]), 1);
    assert_eq!(command(&mut harness, &[9, 9, 2]), 1);
    assert_eq!(harness.read(0x100), u32::from_le_bytes([2, 4, 6, 8]));
    // A guest that arrives is asked to announce itself, and says when it has.
    let state = harness.transport.save();
    harness.write(0x64, 3);
    harness.transport.load(&state).unwrap();
    harness.transport.resume().unwrap();
    assert_eq!((harness.read(0x60) & 2, harness.read(0x104) >> 16), (2, 3));
    assert_eq!(command(&mut harness, &[3, 0]), 0);
    assert_eq!(harness.read(0x104) >> 16, 1);
    // A command without an answer.
    harness.descriptor_at(control.desc(), control.buffer(0), 2, 0, 0);
    assert!(!harness.broken());
    command(&mut harness, &[0]);
    assert!(harness.broken());
}

#[test]
fn hostile_frames_break_the_card_and_nothing_else() {
    let hostile: [fn(&Harness, Ring); 3] = [
        |harness, ring| harness.descriptor_at(ring.desc(), ring.buffer(0), 9, 0, 0),
        |harness, ring| harness.descriptor_at(ring.desc(), ring.buffer(0), 60, WRITE, 0),
        |harness, ring| harness.descriptor_at(ring.desc(), u64::MAX - 5, 60, 0, 0),
    ];
    for lay_out in hostile {
        let (mut harness, _wire, _folder) = card();
        harness.transport.resume().unwrap();
        start(&mut harness, 0, &[Ring(1)]);
        Ring(1).lay(&harness, 0, 60, 0);
        lay_out(&harness, Ring(1));
        harness.write(0x50, 1);
        assert!(harness.broken());
    }
    // A frame of a megabyte is dropped.
    let (mut harness, wire, _folder) = card();
    harness.transport.resume().unwrap();
    start(&mut harness, 0, &[Ring(1)]);
    Ring(1).lay(&harness, 0, 60, 0);
    harness.descriptor_at(Ring(1).desc(), 0x10_0000, 1 << 19, 0, 0);
    harness.write(0x50, 1);
    assert_eq!((Ring(1).used(&harness), harness.broken(), wire.recv(&mut [0; 100]).is_err()), (1, false, true));
    // Receive buffers that cannot be written.
    let (mut harness, wire, _folder) = card();
    harness.transport.resume().unwrap();
    start(&mut harness, 0, &[Ring(0)]);
    Ring(0).offer(&mut harness, 0, 60, 0);
    wire.send(&frame(BROADCAST, 60)).unwrap();
    pump(&mut harness);
    assert!(harness.broken());
}

#[test]
fn a_stream_carries_frames_with_their_length() {
    use std::io::Read;
    use std::os::unix::net::UnixListener;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stream");
    let listener = UnixListener::bind(&path).unwrap();
    let mut netdev = Netdev::open(&NetdevOptions::Stream { path, server: false }).unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    assert!(netdev.send(b"frame"));
    let mut bytes = [0; 9];
    peer.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"\0\0\0\x05frame");
    let mut into = [0; 100];
    peer.write_all(b"\0\0\0\x03abc\0\0\0\x02d").unwrap();
    assert_eq!((netdev.receive(&mut into), &into[..3]), (3, &b"abc"[..]));
    assert_eq!(netdev.receive(&mut into), 0);
    peer.write_all(b"e").unwrap();
    assert_eq!((netdev.receive(&mut into), &into[..2]), (2, &b"de"[..]));
    peer.write_all(&[0xff; 8]).unwrap();
    assert_eq!(netdev.receive(&mut into), 0);
    netdev.settle(&[]);
    assert!(netdev.interest(true, true).is_empty() && netdev.send(b"into the void"));
}
