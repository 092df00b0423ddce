//! The demo: a running guest visits reference-vmm from a real QEMU and goes home.

use super::rows::channels_of;
use super::{Account, Env, Journey, Link, Load, Moment, Monitor, Stop};
use crate::roots::{Root, Suite};
use crate::scenario::Accel;
use anyhow::{Context, Result};
use reference_vmm::payload::Progress;
use serde_json::{Map, Value, json};
use std::time::{Duration, Instant};

/// What the demo is asked to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// Whose QEMU the guest comes from and returns to.
    pub suite: Suite,
    /// What the guest does meanwhile.
    pub load: Load,
    /// Capabilities of both hops.
    pub capabilities: Vec<&'static str>,
    /// Parameters of both hops.
    pub parameters: Map<String, Value>,
    /// Print nothing but the JSON object.
    pub quiet: bool,
}

impl Default for Options {
    /// A guest that rewrites 64 MiB without a pause visits from the newest QEMU.
    fn default() -> Options {
        Options {
            suite: Suite::Sid,
            load: Load {
                memory: 256,
                payload: "dirty=64M rate=32M hold=16M zero=8M verify=16384 report=50".into(),
                max_bandwidth: 64 << 20,
                downtime_limit: 300,
                ..Load::default()
            },
            capabilities: vec!["multifd", "return-path", "switchover-ack"],
            parameters: channels_of(2, "none"),
            quiet: false,
        }
    }
}

/// Plays it, prints the timeline and gives the JSON object that belongs on the last line; its `result` is `ok` or
/// `failed`.
pub fn run(options: &Options, program: &Monitor) -> Value {
    let mut timeline = Timeline { quiet: options.quiet, start: Instant::now() };
    let played = play(options, program, &mut timeline);
    if let Err(error) = &played {
        timeline.say(&format!("FAILED       {error:#}"));
    }
    object(played)
}

fn play(options: &Options, program: &Monitor, timeline: &mut Timeline) -> Result<Account> {
    let root = Root::install(options.suite).context(
        "a real QEMU is needed, and cannot be installed (`reference-vmm demo` shows two reference-vmm without one)",
    )?;
    let scratch = tempfile::Builder::new().prefix("qevm-demo-").tempdir()?;
    let qemu = Stop::Qemu(options.suite, Accel::Kvm);
    let journey = Journey {
        name: "demo".into(),
        stops: vec![qemu, Stop::Reference, qemu],
        link: Link::Tcp,
        capabilities: options.capabilities.clone(),
        parameters: options.parameters.clone(),
        postcopy: None,
        tls: None,
        load: options.load.clone(),
        quick: false,
    };
    let load = &options.load;
    timeline.say(&format!(
        "guest        {} vCPU, {} MiB of RAM, payload '{}'; boots in QEMU {} under KVM",
        load.cpus,
        load.memory,
        load.payload,
        root.version()
    ));
    let roots = [(options.suite, root)].into();
    let env = Env { roots: &roots, program, scratch: scratch.path(), more: &[] };
    let account = journey.play(&env, |moment| timeline.tell(&moment, options))?;
    timeline.say(&format!(
        "guest        {} pages rewritten or checked on the way, none of them stale; its clock never ran backwards; {} of {} \
         lines it was printing were cut by a switchover and went on where they were",
        account.pages,
        account.cut_lines,
        account.hops.len()
    ));
    Ok(account)
}

struct Timeline {
    quiet: bool,
    start: Instant,
}

impl Timeline {
    fn say(&self, line: &str) {
        if !self.quiet {
            println!("{:8.3} s  {line}", self.start.elapsed().as_secs_f64());
        }
    }

    fn tell(&self, moment: &Moment, options: &Options) {
        match moment {
            Moment::Booted(progress) => self.say(&format!("guest        {}", told(progress))),
            Moment::Leaving { from, to, uri } => {
                self.say(&format!(
                    "migrate      {} to {} over {uri} with {}: at most {} MiB/s, downtime limit {} ms",
                    name(*from),
                    name(*to),
                    options.capabilities.join(", "),
                    options.load.max_bandwidth >> 20,
                    options.load.downtime_limit
                ));
                self.say("round        sent so far   remaining   dirtied");
            }
            Moment::Round(migration) => {
                let number = |key: &str| migration["ram"][key].as_u64().unwrap_or(0);
                self.say(&format!(
                    "{:>5}        {:>8.1} MB {:>8.1} MB {:>6.1} MB/s",
                    number("dirty-sync-count"),
                    number("transferred") as f64 / 1e6,
                    number("remaining") as f64 / 1e6,
                    (number("dirty-pages-rate") * number("page-size")) as f64 / 1e6,
                ));
            }
            Moment::Arrived(hop) => self.say(&format!(
                "arrived      {:.1} MB in {} ms and {} rounds; downtime {:.2} ms, from STOP there to RESUME here",
                hop.bytes as f64 / 1e6,
                hop.total_ms,
                hop.rounds,
                hop.downtime_ms
            )),
            Moment::Settled(progress) => self.say(&format!("guest        {}", told(progress))),
        }
    }
}

fn name(stop: Stop) -> String {
    match stop {
        Stop::Qemu(suite, _) => format!("QEMU {}", suite.series()),
        Stop::Reference => "reference-vmm".into(),
    }
}

fn told(progress: &Progress) -> String {
    let time = Duration::from_millis(progress.ms).as_secs_f64();
    format!(
        "says after {time:.2} s: pass {}, {} pages rewritten, {} checked, {} stale, clock backwards {} times, {} timer interrupts",
        progress.pass, progress.written, progress.checked, progress.stale, progress.tsc_back, progress.ticks
    )
}

/// The figures of the whole way are sums over the hops, but for the downtime, which is the longest.
fn object(played: Result<Account>) -> Value {
    let mut object = Map::new();
    match played {
        Ok(account) => {
            let hops = &account.hops;
            object.insert("result".into(), "ok".into());
            // A transcript with a stale page is an error.
            object.insert("stale_pages".into(), 0.into());
            object.insert("rounds".into(), hops.iter().map(|hop| hop.rounds).sum::<u64>().into());
            object.insert("bytes".into(), hops.iter().map(|hop| hop.bytes).sum::<u64>().into());
            object.insert("downtime_ms".into(), hops.iter().map(|hop| hop.downtime_ms).fold(0.0, f64::max).into());
            object.insert("total_ms".into(), hops.iter().map(|hop| hop.total_ms).sum::<u64>().into());
            object.insert("pages_checked".into(), account.pages.into());
            object.insert("passes".into(), account.passes.into());
            object.insert("hops".into(), json!(hops));
        }
        Err(error) => {
            object.insert("result".into(), "failed".into());
            for key in ["stale_pages", "rounds", "bytes", "downtime_ms", "total_ms"] {
                object.insert(key.into(), Value::Null);
            }
            object.insert("error".into(), format!("{error:#}").into());
        }
    }
    object.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::Hop;

    #[test]
    fn the_last_line_always_has_the_keys_that_programs_read() {
        let hop = |downtime_ms| Hop {
            from: "11.1".into(),
            to: "ref".into(),
            downtime_ms,
            total_ms: 10,
            bytes: 100,
            rounds: 3,
        };
        let account = Account { hops: vec![hop(2.5), hop(1.0)], pages: 7, passes: 2, cut_lines: 1, cuts: 0 };
        let good = object(Ok(account));
        assert_eq!((&good["result"], &good["rounds"], &good["bytes"]), (&json!("ok"), &json!(6), &json!(200)));
        assert_eq!((&good["downtime_ms"], &good["total_ms"]), (&json!(2.5), &json!(20)));
        assert_eq!(good["hops"].as_array().map(Vec::len), Some(2));
        let bad = object(Err(anyhow::anyhow!("the guest found 3 stale pages")));
        assert_eq!(bad["result"], "failed");
        for key in ["stale_pages", "rounds", "bytes", "downtime_ms", "total_ms"] {
            assert!(good[key].is_number() && bad[key].is_null(), "{key}");
        }
    }
}
