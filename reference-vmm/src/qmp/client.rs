//! The other end of QMP: a client that blocks.

use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The socket failed.
    #[error("QMP: {0}")]
    Io(#[from] io::Error),
    /// The monitor is gone.
    #[error("the monitor closed its QMP socket during {0}")]
    Closed(String),
    /// Something that is no QMP was received.
    #[error("no QMP message: {0}")]
    Malformed(String),
    /// The command was refused.
    #[error("{command}: {desc}")]
    Refused {
        /// The command.
        command: String,
        /// The reason given.
        desc: String,
    },
}

/// A connection to a monitor, past the negotiation of capabilities.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
    /// Events that came before a reply.
    pub events: Vec<Value>,
}

impl Client {
    /// Connects, as soon as there is a listener, but not later than `patience` from now.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn connect(path: &Path, patience: Duration) -> Result<Client, ClientError> {
        let deadline = Instant::now() + patience;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= deadline => return Err(error.into()),
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        };
        stream.set_read_timeout(Some(patience))?;
        let mut client = Client { reader: BufReader::new(stream), events: Vec::new() };
        let greeting = client.message("greeting")?;
        if greeting.get("QMP").is_none() {
            return Err(ClientError::Malformed(greeting.to_string()));
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Runs a command and gives what it returns.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.reader.get_mut().write_all(format!("{request}\r\n").as_bytes())?;
        self.reply(command)
    }

    /// Runs a command that takes a descriptor, such as `getfd`, and sends it along.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn execute_with(
        &mut self,
        command: &str,
        arguments: Value,
        descriptor: &impl AsRawFd,
    ) -> Result<Value, ClientError> {
        let request = json!({ "execute": command, "arguments": arguments }).to_string();
        let sent = self.reader.get_ref().send_with_fd(request.as_bytes(), descriptor.as_raw_fd());
        sent.map_err(io::Error::from)?;
        self.reply(command)
    }

    /// Waits until the monitor is gone, and keeps the events that it sends before.
    ///
    /// # Errors
    /// [`ClientError`]; the monitor may be silent for as long as [`connect`](Client::connect) was patient.
    pub fn wait_for_end(&mut self) -> Result<(), ClientError> {
        loop {
            match self.message("its end") {
                Ok(message) => self.events.push(message),
                Err(ClientError::Closed(_)) => return Ok(()),
                Err(ClientError::Io(error)) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn reply(&mut self, command: &str) -> Result<Value, ClientError> {
        loop {
            let mut message = self.message(command)?;
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = message.get("error") {
                let desc = error["desc"].as_str().unwrap_or_default().to_owned();
                return Err(ClientError::Refused { command: command.to_owned(), desc });
            }
            self.events.push(message);
        }
    }

    fn message(&mut self, during: &str) -> Result<Value, ClientError> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(ClientError::Closed(during.to_owned()));
        }
        serde_json::from_str(&line).map_err(|_| ClientError::Malformed(line))
    }
}
