//! One direction of a connection, under virtual time.

use super::Random;
use std::collections::VecDeque;
use std::time::Duration;

/// What goes wrong on a link, at a byte of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// This byte and what follows it never arrives, and the receiver is told of an end.
    Cut(u64),
    /// This byte arrives with these bits inverted.
    Flip(u64, u8),
    /// This byte and what follows it arrives so much later.
    Stall(u64, Duration),
}

/// One direction of a connection: what is sent arrives in order, in pieces and after delays that a seed decides.
#[derive(Debug)]
pub struct Link {
    random: Random,
    fault: Option<Fault>,
    /// Longest delay of a piece.
    delay: Duration,
    under_way: VecDeque<(Duration, Vec<u8>)>,
    in_flight: usize,
    sent: u64,
    last: Duration,
    /// When the receiver is told of the end.
    end: Option<Duration>,
    /// The connection broke: the sender learns of it, too.
    cut: bool,
    /// The receiver has closed.
    refused: bool,
    /// The receiver has closed before it had read everything, which resets the connection.
    reset: bool,
    /// What arrives is dropped unread: the receiver has shut its reading direction down.
    deaf: bool,
}

/// Bytes that a link has room for.
const ROOM: usize = 64 << 10;

impl Link {
    /// A link whose pieces take up to `delay`.
    pub fn new(seed: u64, delay: Duration, fault: Option<Fault>) -> Self {
        Link {
            random: Random::new(seed),
            fault,
            delay,
            under_way: VecDeque::new(),
            in_flight: 0,
            sent: 0,
            last: Duration::ZERO,
            end: None,
            cut: false,
            refused: false,
            reset: false,
            deaf: false,
        }
    }

    /// Whether the sender may send more.
    pub fn has_room(&self) -> bool {
        self.in_flight < ROOM
    }

    /// Sends bytes; says whether the link still stood.
    pub fn send(&mut self, now: Duration, bytes: &[u8]) -> bool {
        let mut rest = if self.refused { &[] } else { bytes };
        while !rest.is_empty() && self.end.is_none() {
            let most = match self.random.below(4) {
                0 => 1 + self.random.below(16),
                1 => 1 + self.random.below(2000),
                _ => 1 + self.random.below(60_000),
            };
            let mut count = rest.len().min(most as usize);
            let delay = Duration::from_micros(1 + self.random.below(self.delay.as_micros() as u64));
            self.last = self.last.max(now + delay);
            let (from, upto) = (self.sent, self.sent + count as u64);
            let mut piece = rest[..count].to_vec();
            match self.fault {
                Some(Fault::Cut(at)) if at < upto => {
                    count = at.saturating_sub(from) as usize;
                    piece.truncate(count);
                    (self.end, self.cut) = (Some(self.last), true);
                }
                Some(Fault::Flip(at, mask)) if (from..upto).contains(&at) => piece[(at - from) as usize] ^= mask,
                Some(Fault::Stall(at, time)) if at < upto => {
                    self.last += time;
                    self.fault = None;
                }
                _ => {}
            }
            self.in_flight += count;
            self.sent += count as u64;
            self.under_way.push_back((self.last, piece));
            rest = &rest[count..];
        }
        self.end.is_none() && !self.refused
    }

    /// The receiver closes: nothing that is sent arrives any more.
    pub fn refuse(&mut self) {
        self.reset |= !self.under_way.is_empty();
        self.refused = true;
        self.under_way.clear();
        self.in_flight = 0;
    }

    /// The receiver reads no more, and does not close: its host takes what comes, and drops it.
    pub fn deafen(&mut self) {
        self.deaf = true;
    }

    /// The sender closes: what was sent arrives, and then the end.
    pub fn close(&mut self, now: Duration) {
        self.last = self.last.max(now);
        self.end.get_or_insert(self.last);
    }

    /// What has arrived by `now`, up to this many bytes.
    pub fn receive(&mut self, now: Duration, most: usize) -> Vec<u8> {
        let mut arrived = Vec::new();
        while let Some((at, piece)) = self.under_way.front_mut() {
            if *at > now || arrived.len() == most {
                break;
            }
            let count = piece.len().min(most - arrived.len());
            arrived.extend(piece.drain(..count));
            if piece.is_empty() {
                self.under_way.pop_front();
            }
        }
        self.in_flight -= arrived.len();
        if self.deaf { Vec::new() } else { arrived }
    }

    /// Bytes that the receiver's host does not have; `None` if it never will.
    pub fn backlog(&self, now: Duration) -> Option<u64> {
        let late = self.under_way.iter().filter(|(at, _)| *at > now);
        (!self.cut && !self.reset).then(|| late.map(|(_, piece)| piece.len() as u64).sum())
    }

    /// Whether the receiver has closed.
    pub fn is_refused(&self) -> bool {
        self.refused
    }

    /// Whether nothing more comes, and all that came was received.
    pub fn has_ended(&self, now: Duration) -> bool {
        self.under_way.is_empty() && self.end.is_some_and(|end| end <= now)
    }

    /// Whether the peer's host has everything that was sent; `None` if it never will.
    pub fn is_acknowledged(&self, now: Duration) -> Option<bool> {
        match self.under_way.back() {
            _ if self.end.is_some() || self.refused => None,
            Some((at, _)) => Some(*at <= now),
            None => Some(true),
        }
    }

    /// When something arrives next.
    pub fn next(&self) -> Option<Duration> {
        self.under_way.front().map(|(at, _)| *at).or(self.end).filter(|_| !self.refused)
    }

    /// Bytes that were sent.
    pub fn sent(&self) -> u64 {
        self.sent
    }
}
