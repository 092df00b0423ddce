//! A proxy that keeps what passes through it: the channel opened first as `main` and `return-path`, the others as
//! `channel-N`.

use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

/// Accepts at `front` for as long as the process lives, and takes everything to `back` and back.
pub(crate) fn start(front: &Path, back: &Path, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let _ = fs::remove_file(front);
    let listener = UnixListener::bind(front).with_context(|| format!("binding {}", front.display()))?;
    let (back, folder) = (back.to_path_buf(), folder.to_path_buf());
    thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let relayed = stream.map_err(Into::into).and_then(|stream| relay(stream, &back, &folder, number));
            if let Err(error) = relayed {
                println!("driver: channel {number} is not recorded: {error:#}");
            }
        }
    });
    Ok(())
}

fn relay(near: UnixStream, back: &Path, folder: &Path, number: usize) -> Result<()> {
    let far = UnixStream::connect(back).with_context(|| format!("connecting to {}", back.display()))?;
    let names = match number {
        0 => ["main".to_owned(), "return-path".to_owned()],
        n => [format!("channel-{n}"), format!("channel-{n}-return")],
    };
    let [there, back] = names.map(|name| folder.join(name));
    copy(near.try_clone()?, far.try_clone()?, there)?;
    copy(far, near, back)
}

fn copy(mut from: UnixStream, mut to: UnixStream, kept: PathBuf) -> Result<()> {
    let mut kept = File::create(&kept).with_context(|| format!("creating {}", kept.display()))?;
    thread::spawn(move || {
        let mut chunk = vec![0; 1 << 18];
        while let Ok(count @ 1..) = from.read(&mut chunk) {
            if kept.write_all(&chunk[..count]).is_err() || to.write_all(&chunk[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    Ok(())
}
