//! The judge of costs: whatever comes in, memory and work must be worth what was sent.
//!
//! With n bytes of input (after decompression): at most 64 MiB + 8 n bytes of memory, and steps (calls of decoders,
//! allocations, bytes moved) at most 2.2 times as many for an input twice as long. Judged are all seeds, the hostile
//! streams and ten thousand generated inputs in this process; `commands` runs some through every command of `qevm`. All
//! of it is the same in each run.

mod cost;
mod drivers;
mod families;
mod generate;
mod in_process;
mod planted;
