//! The decoder and the encoder of the main channel against each other, against broken input, and against what real
//! QEMUs wrote.

mod errors;
mod misuse;
mod optional_words;
mod packages;
mod pump;
mod real;
mod round_trip;
mod streams;
mod writer;
