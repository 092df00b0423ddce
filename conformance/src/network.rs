//! Two network namespaces and a link between them, of limited speed if that is wanted, that the kernel can be told to
//! cut.

use crate::process::run;
use anyhow::{Context, Result, ensure};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);
/// Addresses of the link, for documentation (RFC 5737) and thus not in use.
const ADDRESSES: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
/// Where the destination listens: its namespace is its alone.
pub(crate) const PORT: u16 = 4444;

/// A veth pair between two namespaces. Removed when dropped.
#[derive(Debug)]
pub(crate) struct Network {
    namespaces: [String; 2],
}

/// What the kernel does with the packets of the migration from now on. Nothing is closed: the ends see silence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// It drops all of them.
    Now,
    /// It drops the packet that SHUT begins in, and all that come after it in either direction.
    AtShut,
    /// It drops one of fifty, in either direction.
    Some,
    /// It drops all of the connection that comes from this port of the source.
    Connection(u16),
    /// SHUT goes through; what the source sends after it, its acknowledgement first, is dropped.
    AfterShut,
}

/// A connection of the source.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Connection {
    /// Its port at the source.
    pub(crate) port: u16,
    /// Bytes that the source has sent on it.
    pub(crate) sent: u64,
    /// Bytes that it was answered.
    pub(crate) received: u64,
}

impl Connection {
    /// Reads a line of `ss`.
    fn read(line: &str) -> Option<Connection> {
        let local = line.split_whitespace().nth(2)?;
        let port = local.rsplit_once(':')?.1.parse().ok()?;
        // `ss` leaves out what is zero.
        let bytes = |name: &str| match line.split_whitespace().find_map(|word| word.strip_prefix(name)) {
            Some(bytes) => bytes.parse().ok(),
            None => Some(0),
        };
        Some(Connection { port, sent: bytes("bytes_sent:")?, received: bytes("bytes_received:")? })
    }
}

impl Network {
    /// Makes the link; `megabits` per second in each direction, or as fast as the machine is.
    ///
    /// # Errors
    /// `ip` or `tc` are missing, this is not root, or the kernel lacks namespaces, veth or tbf: the error quotes them.
    pub(crate) fn new(megabits: Option<u32>) -> Result<Network> {
        let id = std::process::id();
        let network = Network { namespaces: ["a", "b"].map(|end| format!("qevm-{id}-{end}")) };
        network.set_up(megabits).context(
            "no link: this needs root, `ip` and `tc` (iproute2), and a kernel with network namespaces, veth and tbf",
        )?;
        Ok(network)
    }

    fn set_up(&self, megabits: Option<u32>) -> Result<()> {
        let [a, b] = &self.namespaces;
        for namespace in &self.namespaces {
            ip(&["netns", "add", namespace])?;
        }
        ip(&["-n", a, "link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", b])?;
        for (namespace, address) in self.namespaces.iter().zip(ADDRESSES) {
            ip(&["-n", namespace, "address", "add", &format!("{address}/24"), "dev", "link0"])?;
            ip(&["-n", namespace, "link", "set", "lo", "up"])?;
            ip(&["-n", namespace, "link", "set", "link0", "up"])?;
            if let Some(megabits) = megabits {
                let rate = format!("{megabits}mbit");
                let mut tc = Command::new("tc");
                tc.args(["-n", namespace, "qdisc", "add", "dev", "link0", "root", "tbf", "rate", &rate]);
                run(tc.args(["burst", "256kb", "latency", "50ms"]), PATIENCE)?;
            }
        }
        Ok(())
    }

    /// The namespace of the source.
    pub(crate) fn source(&self) -> &str {
        &self.namespaces[0]
    }

    /// The namespace of the destination.
    pub(crate) fn destination(&self) -> &str {
        &self.namespaces[1]
    }

    /// The address of the destination.
    pub(crate) fn address(&self) -> &'static str {
        ADDRESSES[1]
    }

    /// Bytes that the source has sent over the link so far, with the headers of all packets.
    ///
    /// # Errors
    /// The counter cannot be read.
    pub(crate) fn sent(&self) -> Result<u64> {
        let mut counter = Command::new("ip");
        counter.args(["netns", "exec", self.source(), "cat", "/sys/class/net/link0/statistics/tx_bytes"]);
        let text = run(&mut counter, PATIENCE)?;
        text.trim().parse().with_context(|| format!("tx_bytes is {text:?}"))
    }

    /// The connections of the source to the destination.
    ///
    /// # Errors
    /// `ss` (iproute2) is missing.
    pub(crate) fn connections(&self) -> Result<Vec<Connection>> {
        let mut ss = Command::new("ip");
        ss.args(["netns", "exec", self.source(), "ss", "-tinHO", "state", "established"]);
        ss.args(["dport", "=", &format!(":{PORT}")]);
        let text = run(&mut ss, PATIENCE)?;
        Ok(text.lines().filter_map(Connection::read).collect())
    }

    /// Lets 1 KiB a second through to the destination, or as much as before.
    ///
    /// # Errors
    /// `tc` (iproute2) or the kernel's tbf are missing.
    pub(crate) fn slow(&self, on: bool) -> Result<()> {
        let mut tc = Command::new("tc");
        tc.args(["-n", self.source(), "qdisc", if on { "replace" } else { "delete" }, "dev", "link0", "root"]);
        if on {
            tc.args(["tbf", "rate", "8kbit", "burst", "2kb", "limit", "64kb"]);
        }
        run(&mut tc, PATIENCE).map(drop)
    }

    /// Cuts the link for migrations, now or as soon as it comes to that.
    ///
    /// # Errors
    /// `nft` (nftables) is missing, or the kernel cannot look into packets (Linux before 6.2): the error quotes it.
    pub(crate) fn cut(&self, cut: Cut) -> Result<()> {
        self.rules(&rules(cut))
    }

    /// Lets packets through again.
    ///
    /// # Errors
    /// As for [`cut`](Self::cut).
    pub(crate) fn mend(&self) -> Result<()> {
        self.rules("")
    }

    /// Replaces the rules of the destination's namespace.
    fn rules(&self, rules: &str) -> Result<()> {
        let mut nft = Command::new("ip");
        nft.args(["netns", "exec", self.destination(), "nft", "-f", "-"]);
        let mut child = nft.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let text = format!("flush ruleset\n{rules}");
        child.stdin.take().context("a pipe was asked for")?.write_all(text.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "the link cannot be cut: this needs `nft` (nftables) and Linux 6.2 or later: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }
}

/// The rules of a cut, in the destination's namespace. SHUT is be16 type 1, be16 length 4, be32 status, and begins a
/// segment: what was sent before it is acknowledged, or sent in segments of its own. A connection is dead for itself:
/// what an earlier one, cut and closed, sends again is none of the next one's business.
fn rules(cut: Cut) -> String {
    let shut = format!("tcp sport {PORT} @ih,0,32 0x00010004 add @dead {{ tcp sport . tcp dport }}");
    let (out, back) = match cut {
        Cut::Now => (format!("tcp sport {PORT} drop"), format!("tcp dport {PORT} drop")),
        Cut::Some => {
            let lost = "numgen random mod 50 0 drop";
            (format!("tcp sport {PORT} {lost}"), format!("tcp dport {PORT} {lost}"))
        }
        Cut::Connection(port) => {
            (format!("tcp sport {PORT} tcp dport {port} drop"), format!("tcp dport {PORT} tcp sport {port} drop"))
        }
        Cut::AtShut => {
            (format!("{shut}\n tcp sport . tcp dport @dead drop"), "tcp dport . tcp sport @dead drop".into())
        }
        Cut::AfterShut => (shut, "tcp dport . tcp sport @dead drop".into()),
    };
    format!(
        "table inet cut {{\n set dead {{ type inet_service . inet_service; flags dynamic; size 16; }}\n \
         chain out {{ type filter hook output priority 0; policy accept;\n {out}\n }}\n \
         chain back {{ type filter hook input priority 0; policy accept;\n {back}\n }}\n}}\n"
    )
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in &self.namespaces {
            // It is not there if setting up failed early.
            let _ = ip(&["netns", "delete", namespace]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    run(Command::new("ip").args(arguments), PATIENCE).map(|_| ())
}
