//! Many migrations whose guest goes before its memory, each of which loses its connection once, at a place of its own.

use super::env::{Env, account};
use super::relay::Break;
use super::rows::{PEERS, plain};
use super::{Account, Departure, Journey, Load, Stop, recovery};
use crate::scenario::Accel;
use anyhow::{Context, Result};
use reference_vmm::payload::Transcript;
use serde_json::Map;

/// One guest that is migrated again and again.
#[derive(Debug, Clone)]
pub struct Cuts {
    /// Each hop is a migration that is cut.
    pub journey: Journey,
}

/// Where a migration is cut, counted from when its guest runs at the destination. Some 12 MB of content come after
/// that, from the destination some requests. Until the cut is armed the guest fetches what it can.
fn place(hop: usize, hops: usize) -> Break {
    const CONTENT: u64 = 4_500_000;
    let (n, of) = (hop as u64, hops as u64);
    match n % 8 {
        0 => Break::Back(1 + n),
        // No multiple of anything that a stream consists of.
        _ => Break::Forth(n * CONTENT / of + n % 7),
    }
}

impl Cuts {
    /// Plays it.
    ///
    /// # Errors
    /// A migration is not recovered, or the guest does not arrive whole.
    pub(super) fn play(&self, env: &Env<'_>) -> Result<Account> {
        let journey = &self.journey;
        let hops = journey.stops.len() - 1;
        let (mut texts, mut done) = (Vec::with_capacity(hops + 1), Vec::with_capacity(hops));
        let mut here = journey.boot(env, &mut |_| ())?;
        for hop in 1..=hops {
            let when = place(hop, hops);
            let context = || format!("migration {hop}, cut at {when:?}");
            let mut there = journey.start(env, hop, true)?;
            let relay = recovery::depart(journey, env, hop, &mut here, &mut there, &[when]).with_context(context)?;
            done.push(recovery::arrive(journey, hop, &mut here, &mut there).with_context(context)?);
            drop(relay);
            texts.push(std::mem::replace(&mut here, there).end()?);
        }
        texts.push(here.end()?);
        let transcript = Transcript::read(&texts.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
        Ok(Account { cuts: hops, ..account(done, &transcript) })
    }
}

/// Between two reference-vmm, and out to and in from 11.1.
pub(super) fn all() -> Vec<Cuts> {
    let new = Stop::Qemu(PEERS[2], Accel::Kvm);
    let reference = Stop::Reference;
    [("ref>ref", [reference; 2], 200), ("ref>11.1>ref", [reference, new], 40)]
        .map(|(way, stops, count)| {
            let mut parameters = Map::new();
            parameters.insert("max-postcopy-bandwidth".into(), (32 << 20).into());
            let load = Load {
                memory: 32,
                payload: "dirty=8M rate=16M hold=4M zero=1M verify=16384 report=20".into(),
                // Next to all of it comes after the guest.
                max_bandwidth: 1 << 20,
                downtime_limit: 1,
                ..Load::default()
            };
            let journey = Journey {
                name: format!("{way}/cuts/{count}"),
                stops: stops.into_iter().cycle().take(count + 1).collect(),
                capabilities: vec!["postcopy-ram"],
                parameters,
                postcopy: Some(Departure::AtOnce),
                load,
                ..plain()
            };
            Cuts { journey }
        })
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_migration_is_cut_at_a_place_of_its_own() {
        let places: BTreeSet<_> = (1..=200).map(|hop| format!("{:?}", place(hop, 200))).collect();
        assert_eq!(places.len(), 200);
    }
}
