//! The program, run as its users do.

mod bounds;
mod check;
mod colo;
mod cores;
mod damage;
mod kdump;
mod layouts;
mod live;
mod memory;
mod outputs;
mod readme;
mod receive;
mod reported;
mod sample;
mod serve;
mod snapshots;
mod strangers;
mod tls;
mod usage;
mod verify;
mod vfio;
