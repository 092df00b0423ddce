//! The judge of costs for the commands of `qevm`, as processes.
//!
//! In a program of its own: the kernel counts the memory of the process that starts another to that one's peak, so this
//! one must stay small.

#[path = "../cost/cost.rs"]
mod cost;
#[path = "../cost/generate.rs"]
mod generate;
mod long;
mod program;
