//! Placeholder.
pub mod extract;
