//! Declared device state against what QEMU 5.2, 7.2, 10.0 and 11.1 wrote for `-M microvm`.
//!
//! `data/README.md` tells how the recordings were made.

mod compare;
mod sections;
mod tail;
