//! Guests that go before their memory, over connections that are lost meanwhile.

use super::endpoint::Endpoint;
use super::env::{Env, account};
use super::relay::{Break, Place, Relay};
use super::rows::PEERS;
use super::{Account, Departure, Hop, Journey, Link, Load, Stop};
use crate::patience::PATIENCE;
use crate::scenario::Accel;
use anyhow::{Context, Result, bail, ensure};
use reference_vmm::payload::Transcript;
use serde_json::{Map, Value, json};
use std::thread;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(5);
/// `max-postcopy-bandwidth` as long as it is not known that the guest runs at the destination: a page each 100 ms.
const SLOW: u64 = 40_960;
/// How often the connection is lost where that is looked for at many places.
const MANY: usize = 200;

/// A journey of one hop with postcopy, whose connection is lost again and again, and recovered each time.
#[derive(Debug, Clone)]
pub struct Recovery {
    /// Of two stops.
    pub journey: Journey,
    /// Where: the first place is counted from when the guest has gone, the others from the beginning of the connection
    /// before.
    pub breaks: Vec<Break>,
    /// The destination dies after that, and takes the guest along.
    pub dies: bool,
}

impl Recovery {
    /// Plays it.
    ///
    /// # Errors
    /// One end does not wait for a recovery, or it fails, or the guest does not arrive whole.
    pub(super) fn play(&self, env: &Env<'_>) -> Result<Account> {
        let journey = &self.journey;
        let mut here = journey.boot(env, &mut |_| ())?;
        let mut there = journey.start(env, 1, true)?;
        let relay = depart(journey, env, 1, &mut here, &mut there, &self.breaks)?;
        if self.dies {
            here.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "postcopy-active")?;
            drop(there);
            mourn(&mut here, &relay)?;
            let text = here.end()?;
            return Ok(account(Vec::new(), &Transcript::read(&[text.as_slice()])?));
        }
        let hop = arrive(journey, 1, &mut here, &mut there)?;
        let texts = [here.end()?, there.end()?];
        let transcript = Transcript::read(&texts.each_ref().map(Vec::as_slice))?;
        Ok(Account { cuts: self.breaks.len(), ..account(vec![hop], &transcript) })
    }
}

/// The guest goes before its memory, over connections that break at these places, one after the other; the last goes
/// on. The first place is counted from when the guest runs at the destination, until when next to nothing comes in the
/// background.
pub(super) fn depart(
    journey: &Journey,
    env: &Env<'_>,
    hop: usize,
    here: &mut Endpoint,
    there: &mut Endpoint,
    breaks: &[Break],
) -> Result<Relay> {
    let departure = journey.postcopy.context("a recovery is of a postcopy")?;
    journey.prepare(here, there)?;
    let place = |name: String| match journey.link {
        Link::Tcp => Place::free_port(),
        _ => Ok(Place::Path(env.scratch.join(name))),
    };
    let exit = place(format!("exit{hop}"))?;
    let relay = Relay::listen(place(format!("entry{hop}"))?, exit.clone())?;
    there.monitor().execute("migrate-incoming", json!({ "uri": exit.uri() }))?;
    here.monitor().set_parameters(&json!({ "max-postcopy-bandwidth": SLOW }))?;
    here.monitor().execute("migrate", json!({ "uri": relay.entry().uri() }))?;
    departure.start(here)?;
    here.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "postcopy-active")?;
    there.wait_status("running")?;
    for (n, when) in breaks.iter().enumerate() {
        if n == 0 {
            relay.break_at(*when);
        }
        // What comes back is what the guest asks for, which it does as long as the rest does not come.
        let asks = n == 0 && matches!(when, Break::Back(_));
        let parameters = Value::Object(journey.parameters.clone());
        if n == 0 && !asks {
            here.monitor().set_parameters(&parameters)?;
        }
        let context = || format!("connection {n}, broken at {when:?}");
        lose(&relay, n, here, there).with_context(context)?;
        if asks {
            here.monitor().set_parameters(&parameters)?;
        }
        let exit = place(format!("exit{hop}-{n}"))?;
        relay.lead_to(exit.clone());
        wait_again(there, &exit).with_context(context)?;
        if let Some(next) = breaks.get(n + 1) {
            relay.break_at(*next);
        }
        let resume = json!({ "uri": relay.entry().uri(), "resume": true });
        here.monitor().execute("migrate", resume).with_context(context)?;
    }
    Ok(relay)
}

/// All has come over the last connection, and nothing is stale.
pub(super) fn arrive(journey: &Journey, hop: usize, here: &mut Endpoint, there: &mut Endpoint) -> Result<Hop> {
    let done = here.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
    there.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
    let arrived = journey.arrived(here, there, hop, &done)?;
    journey.settle(there)?;
    Ok(arrived)
}

/// Waits until the connection is lost and both ends wait for another.
fn lose(relay: &Relay, n: usize, here: &mut Endpoint, there: &mut Endpoint) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while relay.broken() <= n {
        let migration = here.monitor().migration()?;
        ensure!(migration["status"] != "completed", "all has come before the connection was lost: {migration}");
        ensure!(Instant::now() < deadline, "the connection has nothing to carry: {migration}");
        thread::sleep(POLL);
    }
    for endpoint in [&mut *here, there] {
        let paused = |migration: &Value| migration["status"] == "postcopy-paused";
        endpoint.monitor().wait_migration(PATIENCE, paused)?;
    }
    is_away(here)
}

/// Asserts that the source says where the guest is, and does not run it.
fn is_away(here: &mut Endpoint) -> Result<()> {
    let why = here.monitor().migration()?["error-desc"].as_str().unwrap_or_default().to_string();
    let told = why.contains("the guest is at the destination, or lost if that has ended");
    ensure!(here.stop() != Stop::Reference || told, "it says '{why}'");
    let status = here.monitor().execute("query-status", Value::Null)?;
    ensure!(status["running"] == false, "the guest runs at both ends: {status}");
    Ok(())
}

/// The destination is dead: what is here of the guest is none, and stays so.
fn mourn(here: &mut Endpoint, relay: &Relay) -> Result<()> {
    let paused = |migration: &Value| migration["status"] == "postcopy-paused";
    here.monitor().wait_migration(PATIENCE, paused)?;
    is_away(here)?;
    ensure!(here.monitor().execute("cont", Value::Null).is_err(), "it runs what is left of a guest");
    // No destination is there for the relay to pass anything on to.
    here.monitor().execute("migrate", json!({ "uri": relay.entry().uri(), "resume": true }))?;
    here.monitor().wait_migration(PATIENCE, paused)?;
    ensure!(here.monitor().execute("cont", Value::Null).is_err(), "it runs what is left of a guest");
    Ok(())
}

/// Lets the destination wait for the source there. It may not have noticed that the connection before is lost.
fn wait_again(there: &mut Endpoint, place: &Place) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match there.monitor().execute("migrate-recover", json!({ "uri": place.uri() })) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => bail!(error),
            Err(_) => thread::sleep(POLL),
        }
    }
}

/// This many places in the pages, and `within` what both ends say to each other about those that have come before.
fn places(count: usize, within: bool) -> Vec<Break> {
    let place = |n: usize| {
        let n = n as u64;
        match n % 4 {
            1 if within => Break::Forth(4 + n * 7),
            2 if within => Break::Back(1 + n * 11),
            3 => Break::Forth(4100 + n * 331),
            _ => Break::Forth(40_000 + n * 977),
        }
    };
    (0..count).map(place).collect()
}

/// Each release in both directions, and reference-vmm with itself.
pub(super) fn all() -> Vec<Recovery> {
    let mut parameters = Map::new();
    parameters.insert("max-postcopy-bandwidth".into(), (32 << 20).into());
    let reference = Stop::Reference;
    let peers = PEERS.map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let new = peers[2];
    let ways = peers.into_iter().flat_map(|qemu| [[reference, qemu], [qemu, reference]]).chain([[reference; 2]]);
    let quick_ways = [[reference, new], [reference; 2]];
    let mut all = Vec::new();
    for stops in ways {
        let channels = ["recovery", "recovery+preempt", "recovery+multifd"];
        for (with, count) in channels.into_iter().flat_map(|with| [1, 5, MANY].map(|count| (with, count))) {
            let (preempt, multifd) = (with.ends_with("preempt"), with.ends_with("multifd"));
            // The page channels are of no use once the guest has gone: how often the link breaks then is the same with
            // them and without.
            if multifd && (count > 1 || !stops.iter().all(|stop| [reference, new].contains(stop))) {
                continue;
            }
            // A QEMU to which the preempt channel is lost a second time dies (10.0 and 11.1, with a QEMU at the other
            // end, too).
            if preempt && count > if stops[1] == reference { 5 } else { 1 } {
                continue;
            }
            if count == MANY && !stops.iter().all(|stop| [reference, new].contains(stop)) {
                continue;
            }
            let quick = count == 5 && quick_ways.contains(&stops) && !preempt;
            let journey = Journey {
                name: format!("{}>{}/{with}/{count}", stops[0], stops[1]),
                stops: stops.into(),
                capabilities: ["postcopy-ram", "postcopy-preempt", "multifd"]
                    .into_iter()
                    .zip([true, preempt, multifd])
                    .filter_map(|(name, on)| on.then_some(name))
                    .collect(),
                parameters: parameters.clone(),
                postcopy: Some(Departure::AtOnce),
                load: Load { downtime_limit: 1, ..Load::default() },
                quick,
                ..super::rows::plain()
            };
            // A 7.2 that loses the connection again before it has heard what has come stays in `postcopy-recover` for
            // good.
            let within = !stops.contains(&peers[0]);
            let dies = count == 1 && with == "recovery" && quick_ways.contains(&stops);
            if dies {
                let journey = Journey { name: format!("{}>{}/{with}/death", stops[0], stops[1]), ..journey.clone() };
                all.push(Recovery { journey, breaks: places(count, within), dies });
            }
            if count == 5 && !preempt {
                let name = format!("{}>{}/{with}/tcp/{count}", stops[0], stops[1]);
                let journey = Journey { name, link: Link::Tcp, quick: false, ..journey.clone() };
                all.push(Recovery { journey, breaks: places(count, within), dies: false });
            }
            all.push(Recovery { journey, breaks: places(count, within), dies: false });
        }
    }
    all
}
