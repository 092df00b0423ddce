//! The source of a postcopy, message by message.

use super::{PAGE, PAGES, RAM};
use crate::{Channel, Socket};
use qevm_returnpath::{Decoder, Event, Message};
use qevm_savevm::StreamWriter;
use qevm_savevm::command::{Command, DiscardRange, PostcopyAdvise, RamDiscard};
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::ram::{BlockId, RamBlock};
use qevm_wire::{CountedString, Driver};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// The source's end.
pub(super) struct Peer {
    pub(super) stream: StreamWriter,
    pub(super) socket: UnixStream,
    pub(super) answers: Driver<UnixStream, Decoder>,
}

pub(super) fn name(text: &str) -> CountedString {
    CountedString::new(text).unwrap()
}

impl Peer {
    pub(super) fn new() -> (Peer, Arc<dyn Channel>) {
        let (here, there) = UnixStream::pair().unwrap();
        let answers = Driver::new(here.try_clone().unwrap(), Decoder::default());
        let there = Arc::new(Socket::adopt(there.into()).unwrap());
        (Peer { stream: StreamWriter::default(), socket: here, answers }, there)
    }

    pub(super) fn flush(&mut self) {
        // What a destination that has failed does not read is lost.
        let _ = self.socket.write_all(&self.stream.take());
    }

    /// The beginning, with these pages, of which some are old.
    pub(super) fn begin(&mut self, pages: &[(u64, u8)], old: &[u64]) {
        let stream = &mut self.stream;
        stream.header(None).unwrap();
        stream.command(Command::OpenReturnPath).unwrap();
        let advise = PostcopyAdvise { page_size_summary: PAGE, target_page_size: PAGE };
        stream.command(Command::PostcopyAdvise(Some(advise))).unwrap();
        let header = SectionHeader { section_id: RAM, idstr: name("ram"), instance_id: 0, version_id: 4 };
        stream.section_start(&header).unwrap();
        stream.ram_setup([RamBlock::new(name("ram"), PAGES * PAGE)]).unwrap();
        stream.eos().unwrap();
        stream.footer().unwrap();
        self.pages(pages);
        let ranges = old.iter().map(|page| DiscardRange { start: page * PAGE, len: PAGE }).collect();
        self.stream.command(Command::RamDiscard(RamDiscard { block: name("ram"), ranges })).unwrap();
    }

    pub(super) fn pages(&mut self, pages: &[(u64, u8)]) {
        self.stream.section_part(RAM).unwrap();
        for (page, content) in pages {
            match content {
                0 => self.stream.zero_page(BlockId(0), page * PAGE).unwrap(),
                content => self.stream.page(BlockId(0), page * PAGE, &[*content; PAGE as usize]).unwrap(),
            }
        }
        self.stream.eos().unwrap();
        self.stream.footer().unwrap();
        self.flush();
    }

    pub(super) fn package(&mut self) {
        let mut package = self.stream.package_writer();
        package.command(Command::PostcopyListen).unwrap();
        let header = SectionHeader { section_id: 2, idstr: name("device"), instance_id: 0, version_id: 1 };
        package.section_full(&header, b"state").unwrap();
        package.command(Command::Ping(3)).unwrap();
        package.command(Command::Ping(0x42)).unwrap();
        package.command(Command::PostcopyRun).unwrap();
        self.stream.package(package.bytes()).unwrap();
        self.stream.command(Command::Ping(4)).unwrap();
        self.flush();
    }

    pub(super) fn end(&mut self) {
        self.stream.section_end(RAM).unwrap();
        self.stream.eos().unwrap();
        self.stream.footer().unwrap();
        self.stream.eof().unwrap();
        self.flush();
    }

    /// The destination's next message; `None` at its end.
    pub(super) fn hear(&mut self) -> Option<Message> {
        loop {
            match self.answers.next().unwrap()? {
                Event::Message(message) => return Some(message),
                _ => continue,
            }
        }
    }

    /// The answer to a PING and the request for a page, which two threads send.
    pub(super) fn hear_both(&mut self, ping: u32, page: u64) {
        let (mut pong, mut request) = (None, None);
        for _ in 0..2 {
            match self.hear() {
                Some(Message::Pong { value }) => pong = Some(value),
                Some(Message::ReqPages { start, .. }) => request = Some(start / PAGE),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((pong, request), (Some(ping), Some(page)));
    }

    pub(super) fn hear_request(&mut self) -> u64 {
        match self.hear() {
            Some(Message::ReqPages { start, len: 4096, .. }) => start / PAGE,
            other => panic!("{other:?}"),
        }
    }
}

impl Peer {
    /// The source on its next connection, which asks what has come. Gives that, too.
    pub(super) fn come_back(&self, socket: UnixStream) -> (Peer, Vec<u8>) {
        let answers = Driver::new(socket.try_clone().unwrap(), Decoder::default());
        let mut peer = Peer { stream: self.stream.recovery(), socket, answers };
        peer.stream.command(Command::RecvBitmap(name("ram"))).unwrap();
        peer.flush();
        assert_eq!(peer.hear(), Some(Message::RecvBitmap { block: name("ram"), len: 8 }));
        let mut bitmap = Vec::new();
        peer.answers.payload().read_to_end(&mut bitmap).unwrap();
        assert_eq!(peer.answers.next().unwrap(), Some(Event::BitmapEnd));
        (peer, bitmap)
    }
}
