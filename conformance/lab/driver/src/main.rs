//! `driver PLAN`: runs the plan in the file, and prints a report of each migration as one line.

use anyhow::{Context, Result};
use std::process::ExitCode;

fn main() -> ExitCode {
    match report() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("driver: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn report() -> Result<()> {
    let path = std::env::args_os().nth(1).context("usage: driver PLAN")?;
    let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let plan = serde_json::from_slice(&text).with_context(|| format!("the plan {}", path.display()))?;
    for report in qevm_lab::run(&plan)? {
        println!("{}{}", qevm_lab::Report::MARK, serde_json::to_string(&report)?);
    }
    Ok(())
}
