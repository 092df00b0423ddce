//! A guest that is saved, and starts elsewhere from what a page server gives of its image.

use super::endpoint::Running;
use super::env::{Env, account};
use super::{Account, Journey, Link, Load, Stop};
use crate::exec;
use crate::patience::PATIENCE;
use crate::roots::{Root, Suite};
use crate::scenario::Accel;
use anyhow::{Context, Result, ensure};
use qevm::serve::{Limits, Server};
use qevm::socket::{Address, Listener};
use qevm_inspect::bounds::Spool;
use qevm_inspect::rewrite::mapped_file::MappedFile;
use qevm_inspect::stream::Inputs;
use reference_vmm::payload::Transcript;
use serde_json::{Map, json};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(2);
/// Bytes that are compared at a time.
const PIECE: usize = 1 << 20;

/// A guest that comes from a page server. A QEMU gets it as a file, which its own client has copied from the server.
#[derive(Debug, Clone)]
pub struct Served {
    /// Of two stops: who saves the guest, with these capabilities, and who starts it.
    pub journey: Journey,
    /// The server is QEMU's, of a mapped-ram file that its client has copied from ours.
    pub by_qemu: bool,
}

impl Served {
    /// Plays it.
    ///
    /// # Errors
    /// QEMU's client does not get what is served, or the guest does not start, or finds a page that is not as it has
    /// left it.
    pub(super) fn play(&self, env: &Env<'_>) -> Result<Account> {
        let path = env.scratch.join("image");
        let mut here = self.journey.boot(env, &mut |_| ())?;
        let mut there = self.journey.start(env, 1, true)?;
        here.meets(there.stop())?;
        there.meets(here.stop())?;
        here.monitor().set_capabilities(&self.journey.capabilities)?;
        let uri = here.writes_file(&path);
        here.monitor().execute("migrate", json!({ "uri": uri }))?;
        here.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
        exec::finish(&path)?;
        let text = here.end()?;

        let server = PageServer::start(&path, &env.scratch.join("pages")).context("serving the image")?;
        let copy = env.scratch.join("copy");
        let root = env.roots.values().next().context("no QEMU to judge the server")?;
        server.is_read_by(root, &copy)?;
        let socket = env.scratch.join("qemu-nbd");
        let theirs = self.by_qemu.then(|| qemu_nbd(root, &copy, &socket)).transpose()?;
        let (on, uri): (&[_], _) = match there.stop() {
            Stop::Reference if theirs.is_some() => {
                (&["mapped-ram", "postcopy-ram"], format!("nbd+unix:///?socket={}", socket.display()))
            }
            Stop::Reference => (&["mapped-ram", "postcopy-ram"], server.uri.clone()),
            Stop::Qemu(..) => (&["mapped-ram"], format!("file:{}", copy.display())),
        };
        there.monitor().set_capabilities(on)?;
        there.monitor().execute("migrate-incoming", json!({ "uri": uri }))?;
        there.wait_status("running")?;
        self.journey.settle(&mut there)?;
        there.monitor().wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
        Ok(account(Vec::new(), &Transcript::read(&[text.as_slice(), there.end()?.as_slice()])?))
    }
}

/// The page server of `qevm`, until it is dropped.
pub(super) struct PageServer {
    server: Arc<Server>,
    pub(super) uri: String,
    over: Arc<AtomicBool>,
}

impl PageServer {
    /// Serves an image at a socket.
    pub(super) fn start(image: &Path, socket: &Path) -> Result<PageServer> {
        let stopped = |stop: qevm_inspect::failure::Error| anyhow::anyhow!("{stop:?}");
        let mut inputs = Inputs::of_file(image).map_err(stopped)?;
        let file = MappedFile::index(&mut inputs, Spool::unlimited(), &mut |_| ()).map_err(stopped)?;
        let limits = Limits { clients: 16, patience: PATIENCE };
        let server = Server::new(file, image.display().to_string(), limits);
        let listener = Listener::bind(&Address::Unix(socket.to_owned()))?;
        let (uri, over) = (listener.nbd_uri(), Arc::new(AtomicBool::new(false)));
        let (accepting, until) = (server.clone(), over.clone());
        thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                // What it does not take now it takes later.
                let _ = accepting.accept(&listener);
                thread::sleep(POLL);
            }
        });
        Ok(PageServer { server, uri, over })
    }

    /// QEMU's client copies what is served, byte for byte.
    fn is_read_by(&self, root: &Root, copy: &Path) -> Result<()> {
        let mut convert = root.qemu_img();
        convert.args(["convert", "-f", "raw", "-O", "raw", &self.uri]).arg(copy);
        let done = convert.output().context("qemu-img")?;
        ensure!(done.status.success(), "qemu-img: {}", String::from_utf8_lossy(&done.stderr));
        let copied = std::fs::read(copy)?;
        let file = self.server.file();
        // QEMU's sizes are of whole sectors.
        let len = usize::try_from(file.len())?;
        ensure!((len..len + 512).contains(&copied.len()), "qemu-img has copied {} bytes of {len}", copied.len());
        let mut expected = vec![0; PIECE];
        for (number, piece) in copied.chunks(PIECE).enumerate() {
            let expected = &mut expected[..piece.len()];
            file.read_at(expected, (number * PIECE) as u64).map_err(|failure| anyhow::anyhow!("{failure}"))?;
            ensure!(piece == expected, "qemu-img has read other bytes in MiB {number}");
        }
        Ok(())
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// QEMU's own server of a file.
fn qemu_nbd(root: &Root, file: &Path, socket: &Path) -> Result<Running> {
    let mut command = root.qemu_nbd();
    command.args(["--read-only", "--format", "raw", "--persistent", "--shared", "8", "--socket"]).arg(socket).arg(file);
    // It complains of clients that leave.
    command.stderr(Stdio::null());
    let server = Running::new(command.spawn().context("qemu-nbd")?);
    let deadline = Instant::now() + PATIENCE;
    while UnixStream::connect(socket).is_err() {
        ensure!(Instant::now() < deadline, "qemu-nbd does not listen");
        thread::sleep(POLL);
    }
    Ok(server)
}

/// Whose images, and who starts from them.
pub(super) fn all() -> Vec<Served> {
    let [old, middle, new] = [Suite::Bookworm, Suite::Trixie, Suite::Sid].map(|suite| Stop::Qemu(suite, Accel::Kvm));
    let reference = Stop::Reference;
    let rows: [([Stop; 2], &[&'static str], bool); 9] = [
        ([old, reference], &[], false),
        ([old, reference], &[], true),
        ([middle, reference], &[], false),
        ([middle, reference], &["mapped-ram"], false),
        ([new, reference], &[], false),
        ([new, reference], &["mapped-ram"], false),
        ([new, reference], &["mapped-ram"], true),
        ([middle; 2], &[], false),
        ([new; 2], &[], false),
    ];
    let served = |(stops, capabilities, by_qemu): ([Stop; 2], &[&'static str], bool)| {
        let with = if capabilities.is_empty() { "plain" } else { "mapped-ram" };
        let (by, quick) = (if by_qemu { "/qemu-nbd" } else { "" }, stops == [old, reference] && !by_qemu);
        Served {
            journey: Journey {
                name: format!("{}>{}/page-server/{with}{by}", stops[0], stops[1]),
                stops: stops.into(),
                link: Link::File,
                capabilities: capabilities.to_vec(),
                parameters: Map::new(),
                postcopy: None,
                tls: None,
                load: Load::default(),
                quick,
            },
            by_qemu,
        }
    };
    rows.map(served).into()
}
