//! A way to the destination on which every byte takes a while, in both directions.

use super::scene::Scene;
use super::strangers::at_source;
use crate::network::{Network, PORT};
use anyhow::{Context, Result};
use serde_json::json;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// For each direction.
const DELAY: Duration = Duration::from_millis(300);
/// Bytes that are handed on at once, and how many such pieces are on their way: a long fat link.
const PIECE: usize = 64 << 10;
const PIECES: usize = 1024;

/// The guest goes by the relay.
pub(super) fn happen(scene: &mut Scene<'_>) -> Result<()> {
    let port = relay(&scene.ground.network)?;
    scene.wait_for_guest(serde_json::Value::Null)?;
    let uri = format!("tcp:127.0.0.1:{port}");
    scene.here.monitor().execute("migrate", json!({ "uri": uri }))?;
    scene.until("active")?;
    scene.complete()
}

/// Listens at the source's loopback, and hands the next connections on. Its threads end with them, or with the judge.
fn relay(network: &Network) -> Result<u16> {
    let address = (network.address(), PORT);
    at_source(network, move || {
        let listener = TcpListener::bind(("127.0.0.1", 0)).context("the relay")?;
        let port = listener.local_addr()?.port();
        // It stays in the namespace of this thread.
        thread::spawn(move || {
            for source in listener.incoming().flatten() {
                let Ok(destination) = TcpStream::connect(address) else { continue };
                for (from, to) in [(&source, &destination), (&destination, &source)] {
                    if let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) {
                        pump(from, to);
                    }
                }
            }
        });
        Ok(port)
    })
}

/// Hands bytes on when their time has come. What cannot be written any more is not read any more.
fn pump(mut from: TcpStream, mut to: TcpStream) {
    let (sender, pieces) = mpsc::sync_channel::<(Instant, Vec<u8>)>(PIECES);
    let reader = from.try_clone();
    thread::spawn(move || {
        let mut piece = vec![0; PIECE];
        while let Ok(count) = from.read(&mut piece) {
            let gone = sender.send((Instant::now() + DELAY, piece[..count].to_vec())).is_err();
            if count == 0 || gone {
                break;
            }
        }
    });
    thread::spawn(move || {
        for (due, piece) in pieces {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if piece.is_empty() || to.write_all(&piece).is_err() {
                break;
            }
        }
        // One that is gone is as good as ended.
        let _ = to.shutdown(Shutdown::Write);
        if let Ok(reader) = reader {
            let _ = reader.shutdown(Shutdown::Read);
        }
    });
}
