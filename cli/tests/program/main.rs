//! The program, run as its users do.

mod damage;
mod sample;
mod usage;
mod verify;
