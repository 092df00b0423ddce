//! Builds the payload guest from `payload/` with binutils: `as`, then `ld` to a flat 64 KiB image.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const IMAGE_LEN: u64 = 64 << 10;

fn main() {
    let source = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("payload");
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it"));
    println!("cargo:rerun-if-changed={}", source.display());
    println!("cargo:rerun-if-env-changed=AS");
    println!("cargo:rerun-if-env-changed=LD");

    let object = out.join("payload.o");
    let image = out.join("payload.bin");
    run(tool("AS", "as").current_dir(&source).args(["--64", "-o"]).arg(&object).arg("payload.S"));
    run(tool("LD", "ld")
        .current_dir(&source)
        .args(["-m", "elf_x86_64", "-T", "payload.ld", "--oformat", "binary", "-o"])
        .arg(&image)
        .arg(&object));
    let len = fs::metadata(&image).expect("ld wrote the image").len();
    assert_eq!(len, IMAGE_LEN, "the payload image must have exactly 64 KiB");
}

fn tool(variable: &str, default: &str) -> Command {
    Command::new(env::var(variable).unwrap_or_else(|_| default.to_owned()))
}

fn run(command: &mut Command) {
    let shown = format!("{command:?}");
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{shown} failed: {status}"),
        Err(error) => panic!("cannot run {shown}: {error}; install binutils (on Debian: apt-get install binutils)"),
    }
}
