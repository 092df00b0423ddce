//! `reference-vmm watch`.

mod picture;

use self::picture::{Sample, Watched};
use anyhow::Context;
use reference_vmm::qmp::{Client, ClientError};
use serde_json::{Value, json};
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

/// Show a running migration of a reference-vmm or of a QEMU.
#[derive(clap::Args)]
#[command(after_long_help = "\
Example:

  reference-vmm watch /run/guest.qmp
      what is left, how fast it shrinks, and what keeps the migration from ending; from the QMP socket of the source

A monitor talks to one QMP client at a time, so that this needs a socket of its own (QEMU: another -qmp). On a terminal the picture is drawn anew twice a
second; elsewhere each one is a line. Ends with 0 when the migration has completed, and with 1 when it has failed or was cancelled.")]
pub(crate) struct Watch {
    /// The monitor's QMP socket: PATH or unix:PATH
    #[arg(value_name = "QMP-SOCKET", value_parser = parse_socket)]
    socket: PathBuf,
    /// Milliseconds between two looks
    #[arg(long, value_name = "MS", default_value_t = 500, value_parser = clap::value_parser!(u64).range(20..=60_000))]
    interval: u64,
}

fn parse_socket(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:").unwrap_or(text) {
        "" => Err("expected PATH or unix:PATH".into()),
        path => Ok(path.into()),
    }
}

/// How long a monitor may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

impl Watch {
    pub(crate) fn execute(self) -> anyhow::Result<ExitCode> {
        let name = self.socket.display();
        let client = Client::connect(&self.socket, PATIENCE);
        let mut client =
            client.with_context(|| format!("cannot watch the monitor at {name}: is another client there?"))?;
        let (mut watched, began) = (Watched::default(), Instant::now());
        let (mut output, terminal) = (io::stdout(), io::stdout().is_terminal());
        let mut drawn = 0;
        loop {
            let told = match look(&mut client) {
                Err(ClientError::Closed(_)) => anyhow::bail!("the monitor at {name} has ended"),
                told => told?,
            };
            watched.add(Sample::new(began.elapsed(), &told.0, &told.1));
            let lines = watched.picture();
            if terminal {
                // Over the picture before.
                if drawn > 0 {
                    write!(output, "\x1b[{drawn}A\x1b[J")?;
                }
                lines.iter().try_for_each(|line| writeln!(output, "{line}"))?;
                drawn = lines.len();
            } else {
                // Without the columns.
                let words: Vec<_> = lines.iter().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
                writeln!(output, "{}", words.join("; "))?;
            }
            output.flush()?;
            if let Some(completed) = watched.ended() {
                return Ok(if completed { ExitCode::SUCCESS } else { ExitCode::FAILURE });
            }
            thread::sleep(Duration::from_millis(self.interval));
        }
    }
}

/// What the monitor says of its migration, and its parameters.
fn look(client: &mut Client) -> Result<(Value, Value), ClientError> {
    let migration = client.execute("query-migrate", json!({}))?;
    let parameters = client.execute("query-migrate-parameters", json!({}))?;
    client.events.clear();
    Ok((migration, parameters))
}
