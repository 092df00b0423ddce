//! `reference-vmm demo`.

mod guest;
mod report;

use super::machine::parse_memory;
use anyhow::{Context, ensure};
use guest::Guest;
use reference_vmm::machine::open_kvm;
use reference_vmm::payload::Transcript;
use report::Report;
use serde_json::{Value, json};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Migrate a running guest from one monitor process to another, and show what happens.
#[derive(clap::Args)]
#[command(after_long_help = "\
Boots the payload guest, which rewrites its memory without a pause and checks each page before it does, and migrates it live
to a second process over a link of limited bandwidth. The result is ok if the guest went on without a gap in its output,
found no stale page in further complete passes, and ran on one side only.

The last line on standard output is one JSON object. downtime_ms is the gap that the guest's users see: from the first vCPU
stopped at the source to all vCPUs started at the destination, by the host's monotonic clock; source_downtime_ms is what QEMU
calls downtime: until the source knows that the destination has everything.")]
pub(crate) struct Demo {
    /// Print nothing but the JSON object
    #[arg(long)]
    json: bool,
    /// RAM of the guest
    #[arg(long, short, value_name = "SIZE", default_value = "256M", value_parser = parse_memory)]
    memory: u64,
    /// Number of vCPUs, 1 to 64; four of them work
    #[arg(long, value_name = "N", default_value_t = 1)]
    smp: usize,
    /// Accelerator of both monitors, e.g. kvm,dirty-ring-size=4096
    #[arg(long, value_name = "ACCEL", default_value = "kvm")]
    accel: String,
    /// Memory that the guest rewrites over and over
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_memory)]
    dirty: u64,
    /// Bytes that the guest rewrites in a second
    #[arg(long, value_name = "SIZE", default_value = "32M", value_parser = parse_memory)]
    rate: u64,
    /// max-bandwidth: bytes that the migration may send in a second
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_memory)]
    max_bandwidth: u64,
    /// downtime-limit in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 300)]
    downtime_limit: u64,
    /// Migrate over a UNIX socket instead of TCP
    #[arg(long)]
    unix: bool,
    /// Give up if the migration takes longer than this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
}

/// Complete passes of the guest before the migration, so that all of the memory has been rewritten, and after it.
/// The passes under way do not count.
const PASSES_BEFORE: u64 = 1;
const PASSES_AFTER: u64 = 2;
/// How often progress is looked at.
const POLL: Duration = Duration::from_millis(10);

impl Demo {
    pub(crate) fn execute(self) -> anyhow::Result<ExitCode> {
        // Said once, here, rather than by two processes.
        open_kvm(Path::new("/dev/kvm"))?;
        let mut report = Report::new(self.json);
        let result = self.migrate(&mut report);
        if let Err(error) = &result {
            report.say(&format!("FAILED: {error:#}"));
        }
        let object = report.finish(result.as_ref().err().map(|error| format!("{error:#}")));
        println!("{object}");
        Ok(if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn migrate(&self, report: &mut Report) -> anyhow::Result<()> {
        let patience = Duration::from_secs(self.timeout);
        let directory = tempfile::tempdir().context("cannot make a directory for the sockets")?;
        let payload = format!("dirty={} rate={} hold=16M zero=8M verify=16384 report=50", self.dirty, self.rate);
        let incoming = match self.unix {
            true => format!("unix:{}", directory.path().join("migration").display()),
            false => "tcp:127.0.0.1:0".to_owned(),
        };
        let start = |name, incoming| {
            let (memory, cpus, accel) = (self.memory, self.smp, self.accel.as_str());
            Guest::start(name, directory.path(), memory, cpus, accel, &payload, incoming, patience)
        };
        let mut source = start("source", None)?;
        let mut destination = start("destination", Some(incoming.as_str()))?;
        let uri = destination.incoming_uri()?;

        let mib = |bytes: u64| bytes >> 20;
        report.say(&format!(
            "source       runs the payload guest: {} vCPU, {} MiB of RAM, rewriting {} MiB at {} MiB/s",
            self.smp,
            mib(self.memory),
            mib(self.dirty),
            mib(self.rate)
        ));
        report.say(&format!("destination  waits at {uri}"));
        let before = source.wait_for_passes(PASSES_BEFORE, patience)?;
        report
            .say(&format!("guest        has rewritten its memory {} times, {} stale pages", before.pass, before.stale));
        ensure!(before.stale == 0, "the guest found stale pages before the migration");

        let capabilities = json!([
            { "capability": "return-path", "state": true },
            { "capability": "events", "state": true },
        ]);
        source.qmp("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
        let parameters = json!({ "max-bandwidth": self.max_bandwidth, "downtime-limit": self.downtime_limit });
        source.qmp("migrate-set-parameters", parameters)?;
        report.say(&format!(
            "migrate      {uri}, at most {} MiB/s, downtime limit {} ms",
            mib(self.max_bandwidth),
            self.downtime_limit
        ));
        report.rounds_header();
        source.qmp("migrate", json!({ "uri": uri }))?;
        let migration = self.wait_for_migration(&mut source, report, patience)?;
        report.migrated(&migration);

        let after = destination.wait_for_healthy_passes(&before, PASSES_AFTER, self.smp, patience)?;
        self.check_one_side(&mut source, &mut destination)?;
        let stopped = source.qmp("x-query-handover", json!({}))?["stopped-at"].as_u64();
        let started = destination.qmp("x-query-handover", json!({}))?["started-at"].as_u64();
        let (stopped, started) = stopped.zip(started).context("the monitors do not say when the guest was paused")?;
        ensure!(started > stopped, "the guest was started at the destination before it was stopped at the source");
        report.downtime(Duration::from_nanos(started - stopped), &migration);

        let source_text = source.quit()?;
        let destination_text = destination.quit()?;
        let transcript = Transcript::read(&[&source_text, &destination_text])?;
        report.verdict(&before, &after, &transcript);
        Ok(())
    }

    /// Shows the rounds as they are finished.
    fn wait_for_migration(&self, source: &mut Guest, report: &mut Report, patience: Duration) -> anyhow::Result<Value> {
        let start = Instant::now();
        loop {
            let migration = source.qmp("query-migrate", json!({}))?;
            let rounds = source.qmp("x-query-rounds", json!({}))?;
            report.rounds(rounds.as_array().map_or(&[], Vec::as_slice));
            match migration["status"].as_str() {
                Some("completed") => return Ok(migration),
                Some("failed" | "cancelled") => {
                    anyhow::bail!(
                        "the migration failed: {}",
                        migration["error-desc"].as_str().unwrap_or("no reason given")
                    )
                }
                _ => {}
            }
            if start.elapsed() > patience {
                source.qmp("migrate_cancel", json!({}))?;
                anyhow::bail!("the migration did not finish within {} s", patience.as_secs());
            }
            std::thread::sleep(POLL);
        }
    }

    /// The source is paused and prints nothing more.
    fn check_one_side(&self, source: &mut Guest, destination: &mut Guest) -> anyhow::Result<()> {
        let printed = source.text()?.len();
        let status = |guest: &mut Guest| guest.qmp("query-status", json!({}));
        let (here, there) = (status(source)?, status(destination)?);
        ensure!(here["status"] == "postmigrate" && here["running"] == false, "the source says it is {here}");
        ensure!(there["status"] == "running", "the destination says it is {there}");
        std::thread::sleep(Duration::from_millis(200));
        ensure!(source.text()?.len() == printed, "the guest still prints at the source");
        Ok(())
    }
}
