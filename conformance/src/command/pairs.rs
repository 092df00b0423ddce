//! `qevm-conformance pairs`.

use super::common::{subject, wanted};
use anyhow::Result;
use clap::Args;
use qevm_conformance::trial::pairs::{self, Confusion, Judged};

#[derive(Args)]
pub(crate) struct Pairs {
    /// Only pairs whose line contains this (may be given several times)
    #[arg(long)]
    only: Vec<String>,
    /// Print the pairs and stop
    #[arg(long)]
    list: bool,
    /// Tell every pair, not only those that were foretold wrongly or not at all
    #[arg(long)]
    all: bool,
}

impl Pairs {
    pub(crate) fn run(self) -> Result<bool> {
        let mut pairs = pairs::all();
        pairs.retain(|pair| wanted(&pair.to_string(), &self.only));
        if self.list {
            pairs.iter().for_each(|pair| println!("{pair}"));
            return Ok(true);
        }
        let judged = pairs::run(&pairs, &subject()?, |pair, found| match found {
            Judged::Judged { loads, said, foretold, findings } => {
                let open = *foretold == pairs::Foretold::Undecidable;
                if self.all || open || found.is_wrong() {
                    let word = if found.is_wrong() {
                        "WRONG"
                    } else if open {
                        "open"
                    } else {
                        "right"
                    };
                    println!("{word:<6} {pair}\n       QEMU {}; foretold {foretold:?} {findings}", fate(*loads, said));
                }
            }
            Judged::NotThere if self.all => println!("none   {pair}"),
            Judged::NotThere => {}
        })?;
        let confusion = Confusion::of(&judged);
        println!("{confusion}\n{}", confusion.to_json());
        Ok(confusion.holds())
    }
}

fn fate(loads: bool, said: &str) -> String {
    if loads { "loads it".into() } else { format!("refuses it: {}", said.replace('\n', " ")) }
}
