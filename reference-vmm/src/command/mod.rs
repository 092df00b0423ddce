//! The subcommands.

pub(crate) mod machine;
pub(crate) mod payload;
pub(crate) mod run;
