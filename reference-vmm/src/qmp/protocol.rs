//! The dialogue with one client, apart from the socket: bytes in, replies out.

use serde_json::{Map, Value, json};

/// Longest request that is read: far above any real one.
const MAX_REQUEST: usize = 1 << 20;

/// A request that cannot be fulfilled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
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
}

/// A request as it was sent.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Request {
    pub(super) execute: String,
    pub(super) arguments: Map<String, Value>,
    pub(super) id: Option<Value>,
}

/// Cuts requests out of what a client sends.
#[derive(Debug, Default)]
pub(super) struct Requests {
    buffer: Vec<u8>,
}

impl Requests {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete request, or what is wrong with it (with its id, if it has one).
    pub(super) fn next(&mut self) -> Option<Result<Request, (Failure, Option<Value>)>> {
        let blank = self.buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        self.buffer.drain(..blank);
        let mut values = serde_json::Deserializer::from_slice(&self.buffer).into_iter::<Value>();
        match values.next()? {
            Ok(value) => {
                let used = values.byte_offset();
                self.buffer.drain(..used);
                Some(request(value))
            }
            Err(error) if error.is_eof() && self.buffer.len() <= MAX_REQUEST => None,
            Err(error) => {
                // The next line is a new beginning.
                let line = self.buffer.iter().position(|byte| *byte == b'\n').map_or(self.buffer.len(), |end| end + 1);
                self.buffer.drain(..line);
                Some(Err((Failure::generic(format!("JSON parse error, {error}")), None)))
            }
        }
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

/// The reply to a request.
pub(super) fn reply(result: Result<Value, Failure>, id: Option<Value>) -> Value {
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
        let mut requests = Requests::default();
        requests.push(b"{\"execute\": \"");
        requests.push(&vec![b'a'; MAX_REQUEST]);
        assert!(matches!(requests.next(), Some(Err(_))));
    }
}
