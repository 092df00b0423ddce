//! `driver PLAN`: runs the plan in the file, and prints the report as one line.

use std::process::ExitCode;

use anyhow::{Context, Result};

fn main() -> ExitCode {
    match report() {
        Ok(line) => {
            println!("{}{line}", qevm_lab::Report::MARK);
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("driver: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn report() -> Result<String> {
    let path = std::env::args_os().nth(1).context("usage: driver PLAN")?;
    let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let plan = serde_json::from_slice(&text).with_context(|| format!("the plan {}", path.display()))?;
    Ok(serde_json::to_string(&qevm_lab::run(&plan)?)?)
}
