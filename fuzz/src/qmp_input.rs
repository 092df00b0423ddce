use reference_vmm::qmp::{Requests, check_arguments, reply};
use serde_json::{Value, json};

/// The first byte is the length of the pieces in which a client sends the rest.
///
/// Every request must be answered in one line of JSON, with the id that it had; what is left of the input must not be
/// taken for more requests than it can be.
pub fn qmp_input(data: &[u8]) {
    let [piece, text @ ..] = data else { return };
    let (mut requests, mut count) = (Requests::default(), 0);
    for piece in text.chunks(usize::from(*piece) + 1) {
        requests.push(piece);
        for request in requests.by_ref() {
            count += 1;
            assert!(count <= text.len(), "requests out of nothing");
            let (result, id) = match request {
                Ok(request) => (check_arguments(&request).map(|()| json!({})), request.id),
                Err((failure, id)) => (Err(failure), id),
            };
            let line = reply(result, id.clone()).to_string();
            assert!(!line.contains('\n'), "{line}");
            let read: Value = serde_json::from_str(&line).expect("a reply is JSON");
            assert_eq!(read.get("id"), id.as_ref());
            assert!(read.get("return").is_some() != read.get("error").is_some(), "{line}");
        }
    }
}
