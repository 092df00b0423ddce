//! The subcommands.

pub(crate) mod demo;
pub(crate) mod machine;
pub(crate) mod payload;
pub(crate) mod run;
