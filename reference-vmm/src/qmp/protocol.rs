//! The dialogue with one client, apart from the socket: bytes in, replies out.

use qevm_migration::Refused;
use serde_json::{Map, Value, json};

/// Longest request that is read: far above any real one.
const MAX_REQUEST: usize = 1 << 20;

/// A request that cannot be fulfilled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct Failure {
    pub(super) class: &'static str,
    pub(super) desc: String,
}

impl Failure {
    /// QEMU's class for nearly everything.
    pub(super) fn generic(desc: impl Into<String>) -> Self {
        Failure { class: "GenericError", desc: desc.into() }
    }

    pub(super) fn not_found(desc: impl Into<String>) -> Self {
        Failure { class: "CommandNotFound", desc: desc.into() }
    }

    pub(super) fn no_device(desc: impl Into<String>) -> Self {
        Failure { class: "DeviceNotFound", desc: desc.into() }
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Failure {
        Failure::generic(refused.to_string())
    }
}

/// A request as it was sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The command.
    pub execute: String,
    /// Its arguments; empty if there were none.
    pub arguments: Map<String, Value>,
    /// What the reply is to carry.
    pub id: Option<Value>,
}

/// Cuts requests out of what a client sends. Each byte is looked at once, and what is being read is parsed again only
/// when it has doubled, so that a long request costs as much as many short ones.
///
/// ```
/// use reference_vmm::qmp::Requests;
///
/// let mut requests = Requests::default();
/// requests.push(br#"{ "execute": "stop", "id": 1 }{ "exec"#);
/// let request = requests.next().unwrap().unwrap();
/// assert_eq!((request.execute.as_str(), request.id), ("stop", Some(1.into())));
/// assert!(requests.next().is_none());
/// ```
#[derive(Debug, Default)]
pub struct Requests {
    buffer: Vec<u8>,
    /// Bytes of the buffer that were looked at, and where they leave off.
    seen: usize,
    nesting: usize,
    in_string: bool,
    escaped: bool,
    /// Bytes that were parsed in vain, because there is more to come.
    tried: usize,
    /// The rest of a line that is wrong is passed over.
    skipping: bool,
}

impl Requests {
    /// More has come.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Where the value at the beginning of the buffer ends: with its last bracket, or else with its line.
    fn find_end(&mut self) -> Option<usize> {
        while let Some(byte) = self.buffer.get(self.seen) {
            self.seen += 1;
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' => self.nesting += 1,
                b'}' | b']' => {
                    self.nesting = self.nesting.saturating_sub(1);
                    if self.nesting == 0 {
                        return Some(self.seen);
                    }
                }
                b'\n' if self.nesting == 0 => return Some(self.seen),
                _ => {}
            }
        }
        None
    }

    /// Passes over what comes up to the end of the line in which the byte `from` lies.
    fn skip_line(&mut self, from: usize) {
        let end = self.buffer.iter().skip(from).position(|byte| *byte == b'\n');
        self.take(end.map_or(self.buffer.len(), |end| from + end + 1));
        self.skipping = end.is_none();
    }

    /// Takes bytes from the buffer; what follows begins anew.
    fn take(&mut self, bytes: usize) {
        self.buffer.drain(..bytes);
        (self.seen, self.nesting, self.tried) = (0, 0, 0);
        (self.in_string, self.escaped) = (false, false);
    }
}

/// Complete requests, or what is wrong with them (with the id, if there is one). There is one error for a line: the
/// next one is a new beginning. `None`: more has to come.
impl Iterator for Requests {
    type Item = Result<Request, (Failure, Option<Value>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.skipping {
            self.skip_line(0);
        }
        if self.seen == 0 {
            let blank = self.buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            self.buffer.drain(..blank);
        }
        let end = self.find_end();
        let whole = end.unwrap_or(self.buffer.len());
        if end.is_none() && (whole == 0 || whole <= MAX_REQUEST && whole < 2 * self.tried) {
            return None;
        }
        let error = match serde_json::from_slice(&self.buffer[..whole]) {
            Ok(value) => {
                self.take(whole);
                return Some(request(value));
            }
            Err(error) if error.is_eof() && end.is_none() && whole <= MAX_REQUEST => {
                self.tried = whole;
                return None;
            }
            Err(error) if end.is_none() && whole > MAX_REQUEST => {
                // Whatever lines it has, all of them are of this request.
                self.buffer.clear();
                self.skip_line(0);
                if error.is_eof() { format!("a request of more than {MAX_REQUEST} bytes") } else { error.to_string() }
            }
            Err(error) => {
                let lines = self.buffer.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
                let before = lines.take(error.line().saturating_sub(1)).last().map_or(0, |(at, _)| at + 1);
                self.skip_line(before);
                error.to_string()
            }
        };
        Some(Err((Failure::generic(format!("JSON parse error, {error}")), None)))
    }
}

fn request(value: Value) -> Result<Request, (Failure, Option<Value>)> {
    let Value::Object(mut object) = value else {
        return Err((Failure::generic("QMP input must be a JSON object"), None));
    };
    let id = object.remove("id");
    let fail = |desc: String| Err((Failure::generic(desc), id.clone()));
    let (execute, arguments) = (object.remove("execute"), object.remove("arguments"));
    if let Some(name) = object.keys().next() {
        return fail(format!("QMP input member '{name}' is unexpected"));
    }
    let execute = match execute {
        Some(Value::String(name)) => name,
        Some(_) => return fail("QMP input member 'execute' must be a string".into()),
        None => return fail("QMP input lacks member 'execute'".into()),
    };
    match arguments {
        None => Ok(Request { execute, arguments: Map::new(), id }),
        Some(Value::Object(arguments)) => Ok(Request { execute, arguments, id }),
        Some(_) => fail("QMP input member 'arguments' must be an object".into()),
    }
}

/// The reply to a request, which is one line.
pub fn reply(result: Result<Value, Failure>, id: Option<Value>) -> Value {
    let mut reply = match result {
        Ok(value) => json!({ "return": value }),
        Err(Failure { class, desc }) => json!({ "error": { "class": class, "desc": desc } }),
    };
    if let (Some(id), Value::Object(reply)) = (id, &mut reply) {
        reply.insert("id".into(), id);
    }
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(requests: &mut Requests) -> Vec<Result<Request, (Failure, Option<Value>)>> {
        std::iter::from_fn(|| requests.next()).collect()
    }

    #[test]
    fn requests_come_in_any_pieces() {
        let text = b"{\"execute\": \"stop\"}{\"execute\":\r\n\"migrate\", \"arguments\": {\"uri\": \"tcp:a:1\"}, \"id\": 7}\r\n";
        for cut in 0..text.len() {
            let mut requests = Requests::default();
            requests.push(&text[..cut]);
            let mut got = all(&mut requests);
            requests.push(&text[cut..]);
            got.extend(all(&mut requests));
            let got: Vec<_> = got.into_iter().map(Result::unwrap).collect();
            assert_eq!(got[0].execute, "stop");
            assert_eq!((got[1].execute.as_str(), got[1].id.clone()), ("migrate", Some(json!(7))));
            assert_eq!(got[1].arguments["uri"], "tcp:a:1");
            assert_eq!(got.len(), 2);
        }
    }

    #[test]
    fn what_is_no_request_is_refused_and_the_next_one_is_read() {
        let mut requests = Requests::default();
        requests.push(b"[1]\n{\"execute\": 1, \"id\": 2}\n{]\n{\"id\": 3}\n{\"execute\": \"a\", \"x\": 1}\n{\"execute\": \"quit\"}\n");
        let got = all(&mut requests);
        let desc = |i: usize| got[i].as_ref().unwrap_err().0.desc.clone();
        assert_eq!(desc(0), "QMP input must be a JSON object");
        assert_eq!(got[1].as_ref().unwrap_err().1, Some(json!(2)));
        assert!(desc(2).starts_with("JSON parse error"), "{}", desc(2));
        assert_eq!(desc(3), "QMP input lacks member 'execute'");
        assert_eq!(desc(4), "QMP input member 'x' is unexpected");
        assert_eq!(got[5].as_ref().unwrap().execute, "quit");
    }

    #[test]
    fn an_endless_request_is_cut_off() {
        let cases: [(&[u8], &[u8]); 5] =
            [(b"{\"execute\": \"", b"a"), (b"", b"a"), (b"{\"a\": 1", b" "), (b"", b"{\"a\": ["), (b"{]", b"\"")];
        for (first, endless) in cases {
            let mut requests = Requests::default();
            let mut got = Vec::new();
            requests.push(first);
            // As a socket gives it, 3 MiB: QEMU 11.1 has one error for such a line.
            for _ in 0..768 {
                requests.push(&endless.repeat(4096 / endless.len()));
                got.extend(all(&mut requests));
                assert!(requests.buffer.len() <= MAX_REQUEST + 4096);
            }
            requests.push(b"\n{\"execute\": \"stop\"}\n");
            got.extend(all(&mut requests));
            assert_eq!(got.len(), 2, "{endless:?}: {got:?}");
            assert!(got[0].is_err());
            assert_eq!(got[1].as_ref().unwrap().execute, "stop");
        }
    }

    /// Found by the fuzzer: without exact reading of numbers beyond 64 bits, the client does not find its request
    /// again.
    #[test]
    fn an_id_beyond_64_bits_comes_back_as_the_same_number() {
        for id in ["1222222222222222222222222222278", "18446744073709551617", "0.1", "-1e300"] {
            let mut requests = Requests::default();
            requests.push(format!("{{\"execute\": \"stop\", \"id\": {id}}}").as_bytes());
            let line = reply(Ok(json!({})), requests.next().unwrap().unwrap().id).to_string();
            let read: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(read["id"].as_f64(), Some(id.parse().unwrap()), "{line}");
        }
    }

    /// An error is told as soon as it is there, and not when the brackets close.
    #[test]
    fn an_error_does_not_wait() {
        let mut requests = Requests::default();
        requests.push(b"{\"a\" 1\n");
        assert!(matches!(all(&mut requests)[..], [Err(_)]));
        requests.push(b"{\"execute\":\n \"stop\"\n, 5\n");
        assert!(matches!(all(&mut requests)[..], [Err(_)]));
        requests.push(b"{\"execute\": \"}]\\\"{\"}");
        assert_eq!(all(&mut requests)[0].as_ref().unwrap().execute, "}]\"{");
    }

    /// A request of 1 MiB in pieces is not parsed from its beginning with each of them.
    #[test]
    fn a_long_request_is_parsed_as_often_as_it_doubles() {
        let mut requests = Requests::default();
        requests.push(b"{\"execute\": \"stop\", \"arguments\": {\"a\": \"");
        let mut parsed = 0;
        for _ in 0..200 {
            requests.push(&[b'a'; 4096]);
            let before = requests.tried;
            assert!(requests.next().is_none());
            parsed += if requests.tried == before { 0 } else { requests.tried };
        }
        assert!(parsed < 3 * requests.buffer.len(), "{parsed} of {}", requests.buffer.len());
        requests.push(b"\"}}");
        assert_eq!(requests.next().unwrap().unwrap().execute, "stop");
    }
}
