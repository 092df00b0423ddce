//! Two network namespaces and a link of limited speed between them.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::run;

const PATIENCE: Duration = Duration::from_secs(20);
/// Addresses of the link, for documentation (RFC 5737) and thus nobody's.
const ADDRESSES: [&str; 2] = ["192.0.2.1", "192.0.2.2"];

/// A veth pair between two namespaces, with a token bucket at either end. Removed when dropped.
#[derive(Debug)]
pub struct LimitedLink {
    namespaces: [String; 2],
}

impl LimitedLink {
    /// Makes the link; `megabits` per second in each direction.
    ///
    /// # Errors
    /// `ip` or `tc` are missing, this is not root, or the kernel lacks namespaces, veth or tbf: the error quotes them.
    pub fn new(megabits: u32) -> Result<LimitedLink> {
        let id = std::process::id();
        let link = LimitedLink { namespaces: ["a", "b"].map(|end| format!("qevm-{id}-{end}")) };
        link.set_up(megabits).context(
            "no limited link: this needs root, `ip` and `tc` (iproute2), and a kernel with network namespaces, veth and tbf",
        )?;
        Ok(link)
    }

    fn set_up(&self, megabits: u32) -> Result<()> {
        let [a, b] = &self.namespaces;
        for namespace in &self.namespaces {
            ip(&["netns", "add", namespace])?;
        }
        ip(&["-n", a, "link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", b])?;
        for (namespace, address) in self.namespaces.iter().zip(ADDRESSES) {
            ip(&["-n", namespace, "address", "add", &format!("{address}/24"), "dev", "link0"])?;
            ip(&["-n", namespace, "link", "set", "lo", "up"])?;
            ip(&["-n", namespace, "link", "set", "link0", "up"])?;
            let rate = format!("{megabits}mbit");
            let mut tc = Command::new("tc");
            tc.args(["-n", namespace, "qdisc", "add", "dev", "link0", "root", "tbf", "rate", &rate]);
            run(tc.args(["burst", "256kb", "latency", "50ms"]), PATIENCE)?;
        }
        Ok(())
    }

    /// The namespace of the source.
    pub fn source(&self) -> &str {
        &self.namespaces[0]
    }

    /// The namespace of the destination.
    pub fn destination(&self) -> &str {
        &self.namespaces[1]
    }

    /// The address of the destination.
    pub fn address(&self) -> &'static str {
        ADDRESSES[1]
    }

    /// Bytes that the source has sent over the link so far, with the headers of all packets.
    ///
    /// # Errors
    /// The counter cannot be read.
    pub fn sent(&self) -> Result<u64> {
        let mut counter = Command::new("ip");
        counter.args(["netns", "exec", self.source(), "cat", "/sys/class/net/link0/statistics/tx_bytes"]);
        let text = run(&mut counter, PATIENCE)?;
        text.trim().parse().with_context(|| format!("tx_bytes is {text:?}"))
    }
}

impl Drop for LimitedLink {
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
