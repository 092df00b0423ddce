//! The socket, and the clients on it.

use super::protocol::{Failure, Request, Requests, reply};
use super::{commands, descriptors, queries};
use crate::vmm::{Event, Exit, Vmm};
use parking_lot::Mutex;
use qevm_migration::private;
use serde_json::{Value, json};
use std::fs;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

/// Serves QMP at a UNIX socket, to one client after the other; one that does not read what it is told is dropped after
/// five seconds. When this is dropped, the client is told what has happened, and the socket is removed.
pub struct Server {
    path: PathBuf,
    vmm: Arc<Vmm>,
    speaking: Speaking,
    silent: mpsc::Receiver<()>,
}

/// Those who have something to say to the client hold a copy of the sender, so that its receiver learns when all have
/// said it. There is none any more when the server ends.
#[derive(Clone)]
struct Speaking(Arc<Mutex<Option<mpsc::Sender<()>>>>);

impl Speaking {
    fn begin(&self) -> Option<mpsc::Sender<()>> {
        self.0.lock().clone()
    }

    fn end(&self) {
        *self.0.lock() = None;
    }
}

/// How long the end waits for a client that does not read.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl Server {
    /// Listens at `path` and serves clients in a thread of its own. A socket left behind by a process that is gone is
    /// replaced.
    ///
    /// # Errors
    /// The system's.
    pub fn start(path: &Path, vmm: Arc<Vmm>) -> io::Result<Server> {
        if UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            fs::remove_file(path)?;
        }
        let listener = private::listener(path)?;
        let (sender, silent) = mpsc::channel();
        let speaking = Speaking(Arc::new(Mutex::new(Some(sender))));
        let server = Server { path: path.into(), vmm: vmm.clone(), speaking: speaking.clone(), silent };
        thread::spawn(move || {
            for client in listener.incoming() {
                let client = match client {
                    Ok(client) => client,
                    Err(error) => {
                        // Too many open files, for example: there may be room later.
                        tracing::warn!(%error, "a QMP client cannot be taken");
                        thread::sleep(PAUSE);
                        continue;
                    }
                };
                match serve(&client, &vmm, &speaking) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        tracing::warn!("a QMP client does not read what it is told, and is dropped");
                    }
                    // One that breaks off is its own affair.
                    Err(error) => tracing::debug!(%error, "a QMP client broke off"),
                    Ok(()) => {}
                }
                // Its events end, too.
                let _ = client.shutdown(Shutdown::Both);
                vmm.descriptors().forget_received();
            }
        });
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.vmm.unsubscribe();
        self.speaking.end();
        // Nothing is ever sent: this is the time limit, or all are done.
        let _ = self.silent.recv_timeout(LAST_WORDS);
        // It may have been removed already.
        let _ = fs::remove_file(&self.path);
    }
}

/// How long a client may leave what it is told unread when its socket is full. The next one waits meanwhile.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the reply to `quit` waits for that.
const QUIT_PATIENCE: Duration = Duration::from_millis(300);
/// How long a server without descriptors rests.
const PAUSE: Duration = Duration::from_millis(100);

fn serve(client: &UnixStream, vmm: &Arc<Vmm>, speaking: &Speaking) -> io::Result<()> {
    client.set_write_timeout(Some(PATIENCE))?;
    let writer = Arc::new(Mutex::new(client.try_clone()?));
    send(&writer, &json!({ "QMP": { "version": queries::version(vmm), "capabilities": [] } }))?;
    let mut requests = Requests::default();
    let mut negotiated = false;
    let mut buffer = [0; 4096];
    loop {
        for request in requests.by_ref() {
            let _speaking = speaking.begin();
            let mut quits = false;
            let (result, id) = match request {
                Ok(Request { execute, arguments, id }) => {
                    let result = match (execute.as_str(), negotiated) {
                        ("qmp_capabilities", false) => Ok(json!({})),
                        ("qmp_capabilities", true) => {
                            Err(Failure::not_found("Capabilities negotiation is already complete, command ignored"))
                        }
                        (_, false) => {
                            Err(Failure::not_found("Expecting capabilities negotiation with 'qmp_capabilities'"))
                        }
                        (name, true) => commands::execute(vmm, name, arguments),
                    };
                    if !negotiated && result.is_ok() {
                        negotiated = true;
                        forward_events(vmm.subscribe(), writer.clone(), speaking.begin());
                    }
                    quits = execute == commands::QUIT && result.is_ok();
                    (result, id)
                }
                Err((failure, id)) => (Err(failure), id),
            };
            if quits {
                client.set_write_timeout(Some(QUIT_PATIENCE))?;
            }
            let sent = send(&writer, &reply(result, id));
            if quits {
                vmm.end(Exit::Quit);
            }
            sent?;
        }
        let (count, descriptors) = descriptors::read(client, &mut buffer)?;
        vmm.descriptors().receive(descriptors);
        match count {
            0 => return Ok(()),
            count => requests.push(&buffer[..count]),
        }
    }
}

/// Passes events on until the client is gone or another one has come.
fn forward_events(events: mpsc::Receiver<Event>, writer: Arc<Mutex<UnixStream>>, speaking: Option<mpsc::Sender<()>>) {
    thread::spawn(move || {
        let _speaking = speaking;
        for event in events {
            if send(&writer, &event.to_json()).is_err() {
                // Half a message may be out: nothing more can follow.
                let writer = writer.lock();
                let _ = writer.shutdown(Shutdown::Both);
                return;
            }
        }
    });
}

fn send(writer: &Mutex<UnixStream>, message: &Value) -> io::Result<()> {
    let mut text = message.to_string();
    text.push_str("\r\n");
    writer.lock().write_all(text.as_bytes())
}
