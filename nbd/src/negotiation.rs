//! What a server of one export answers to options.

use crate::number::{MAX_READ, export, info, option, reply};
use crate::{ExportQuery, ServerEvent};
use alloc::format;
use alloc::string::String;
use qevm_wire::Writer;

/// What a server has to give: one export, read-only, with the empty name, which clients ask for that say nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Export {
    /// What it is, for people.
    pub description: String,
    /// Its length in bytes.
    pub len: u64,
}

impl Export {
    /// Its [flags](export).
    pub fn flags(&self) -> u16 {
        export::HAS_FLAGS | export::READ_ONLY | export::CAN_MULTI_CONN
    }
}

/// What was agreed so far with one client.
///
/// ```
/// use qevm_nbd::{Export, Negotiation, Outcome, number::option};
/// use qevm_wire::Writer;
///
/// let export = Export { description: "guest.qevm".into(), len: 1 << 20 };
/// let (mut negotiation, mut answer) = (Negotiation::default(), Writer::new());
/// let go = [0, 0, 0, 0, 0, 0];
/// assert_eq!(negotiation.option(&export, option::GO, &go, &mut answer), Outcome::Begin);
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct Negotiation {
    /// The client takes replies in chunks, in which errors have a text and zeroes take no room.
    pub structured: bool,
    /// The client does not want 124 zeroes.
    pub no_zeroes: bool,
}

/// How it goes on after an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// With the next option.
    Continue,
    /// With requests.
    Begin,
    /// Not at all, when the answer was sent.
    Close,
}

impl Negotiation {
    /// Answers an option: appends the answer to `answer`.
    pub fn option(&mut self, export: &Export, option: u32, data: &[u8], answer: &mut Writer) -> Outcome {
        let mut say = |reply, data: &[u8]| ServerEvent::OptionReply { option, reply, data }.encode(answer);
        match option {
            option::EXPORT_NAME if data.is_empty() => {
                answer.be64(export.len).be16(export.flags());
                if !self.no_zeroes {
                    answer.zeroes(124);
                }
                return Outcome::Begin;
            }
            // There is no way to refuse.
            option::EXPORT_NAME => return Outcome::Close,
            option::ABORT => {
                say(reply::ACK, &[]);
                return Outcome::Close;
            }
            option::LIST if data.is_empty() => {
                // The length of the empty name, and a text.
                say(reply::SERVER, &[&[0; 4], export.description.as_bytes()].concat());
                say(reply::ACK, &[]);
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                say(reply::ACK, &[]);
            }
            option::LIST | option::STRUCTURED_REPLY => {
                say(reply::ERR_INVALID, format!("{} bytes of data, expected none", data.len()).as_bytes());
            }
            option::INFO | option::GO => {
                let query = match ExportQuery::parse(data) {
                    Ok(query) => query,
                    Err(error) => {
                        say(reply::ERR_INVALID, format!("{error}").as_bytes());
                        return Outcome::Continue;
                    }
                };
                if !query.name.is_empty() {
                    let name = query.name.escape_ascii();
                    let why = format!("there is no export '{name}': the only one has the empty name");
                    say(reply::ERR_UNKNOWN, why.as_bytes());
                    return Outcome::Continue;
                }
                let mut tell = |info: u16, rest: &[u8]| say(reply::INFO, &[&info.to_be_bytes(), rest].concat());
                tell(info::EXPORT, &[&export.len.to_be_bytes()[..], &export.flags().to_be_bytes()].concat());
                if query.wants(info::NAME) {
                    tell(info::NAME, &[]);
                }
                if query.wants(info::DESCRIPTION) {
                    tell(info::DESCRIPTION, export.description.as_bytes());
                }
                if query.wants(info::BLOCK_SIZE) {
                    tell(info::BLOCK_SIZE, [1, 4096, MAX_READ].map(u32::to_be_bytes).as_flattened());
                }
                say(reply::ACK, &[]);
                if option == option::GO {
                    return Outcome::Begin;
                }
            }
            _ => say(reply::ERR_UNSUP, b"this server only gives the bytes of one file, and knows no TLS"),
        }
        Outcome::Continue
    }
}
