use qevm_savevm::vmdesc::{Description, Node};
use qevm_wire::Limits;

/// The input is a description, a zero byte, and device sections one after the other as the description says.
///
/// Whatever decodes must encode to its bytes, with no byte outside its leaves.
pub fn savevm_vmdesc(data: &[u8]) {
    let limits = Limits { device_section: 1 << 20, elements: 1 << 16, ..Limits::default() };
    let json_len = data.iter().position(|b| *b == 0).unwrap_or(data.len());
    let (json, mut sections) = data.split_at(json_len);
    let _ = Description::find_at_end(data);
    let Ok(description) = Description::parse(json, &limits) else { return };
    sections = sections.get(1..).unwrap_or_default();
    for device in &description.devices {
        let wanted = usize::try_from(device.wire_size()).unwrap_or(usize::MAX);
        let Some((body, rest)) = sections.split_at_checked(wanted) else {
            assert!(device.decode(sections, 0, &limits).is_err(), "decoded fewer bytes than described");
            return;
        };
        sections = rest;
        if let Ok(state) = device.decode(body, 7, &limits) {
            check(&state, body, 7);
        }
    }
}

/// Checks what holds of every tree of a section `body` at `offset`.
pub(crate) fn check(state: &Node, body: &[u8], offset: u64) {
    let mut copy = Vec::new();
    state.encode(&mut copy).expect("names from a stream fit into one");
    assert_eq!(copy, body);
    assert_eq!((state.encoded_len(), state.len), (body.len() as u64, body.len() as u64));
    assert!(state.opaque_bytes() <= state.len);
    let mut next = offset;
    state.leaves(&mut |path, leaf| {
        assert!(leaf.offset >= next, "{path} overlaps the leaf before it");
        next = leaf.offset + leaf.len;
    });
    assert!(next <= offset + body.len() as u64);
}
