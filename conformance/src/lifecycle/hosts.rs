//! What the hosts of a migration lack: room, memory, a disk of one's own.

use super::scene::{PATIENCE, Scene};
use super::strangers;
use crate::process::run;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

/// Byte of an image whose lock says that no other process may write (seen in `/proc/locks` of QEMU 11.1).
const WRITE_REFUSED: i64 = 201;

/// Gives a process a file system in memory that holds little, or nothing. A process in a network namespace of `ip netns
/// exec` has mounts of its own, and what is mounted later elsewhere does not show there.
fn mount(pid: u32, at: &Path, options: &str) -> Result<()> {
    fs::create_dir_all(at)?;
    let mut mount = Command::new("nsenter");
    mount.args(["--target", &pid.to_string(), "--mount", "--", "mount", "-t", "tmpfs", "-o", options, "qevm"]);
    run(mount.arg(at), PATIENCE).context("this needs root").map(drop)
}

/// Goes to a file that cannot be written, or not to its end; then to the destination.
pub(super) fn file_that_cannot_be_written(scene: &mut Scene<'_>, options: &str) -> Result<()> {
    let folder = scene.scratch.join("full");
    mount(scene.here.monitor().pid(), &folder, options)?;
    let uri = format!("file:{}", folder.join("guest").display());
    // A release may say so at once, or when it is at it.
    if scene.here.monitor().execute("migrate", json!({ "uri": uri })).is_ok() {
        scene.let_go()?;
        scene.until_ended("failed")?;
    }
    let status = scene.here.monitor().execute("query-status", Value::Null)?;
    ensure!(status["running"] == true, "the guest does not go on: {status}");
    scene.begin()?;
    scene.complete()
}

/// The destination gets nothing more of its host's memory when it waits, and page channels need some.
pub(super) fn no_memory(scene: &mut Scene<'_>) -> Result<()> {
    scene.wait_for_guest(Value::Null)?;
    strangers::limit_memory(scene.there.monitor().pid())?;
    scene.leave()?;
    scene.let_go()?;
    scene.until_ended("failed")
}

/// Another process uses the image at the destination's host; when it has gone, the guest can go there.
pub(super) fn disk_in_use(scene: &mut Scene<'_>) -> Result<()> {
    // With an image of its own: at one host there is one of which the source has the lock.
    scene.another_destination(1)?;
    let image = scene.scratch.join("destination1/disk.raw");
    let intruder = OpenOptions::new().read(true).open(&image).with_context(|| image.display().to_string())?;
    lock(&intruder, WRITE_REFUSED)?;
    scene.wait_for_guest(Value::Null)?;
    scene.leave()?;
    scene.let_go()?;
    scene.until_ended("failed")?;
    drop(intruder);
    let status = scene.here.monitor().execute("query-status", Value::Null)?;
    ensure!(status["running"] == true, "the guest does not go on: {status}");
    share(scene.scratch, "destination2")?;
    scene.another_destination(2)?;
    scene.begin()?;
    scene.complete()
}

/// A folder in which the image is the source's.
fn share(scratch: &Path, folder: &str) -> Result<()> {
    let folder = scratch.join(folder);
    fs::create_dir_all(&folder)?;
    Ok(symlink(scratch.join("disk.raw"), folder.join("disk.raw"))?)
}

/// Locks a byte for reading, for as long as the file is open.
fn lock(file: &File, byte: i64) -> Result<()> {
    let lock = nix::libc::flock {
        l_type: nix::libc::F_RDLCK as i16,
        l_whence: nix::libc::SEEK_SET as i16,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).context("locking the image")?;
    Ok(())
}
