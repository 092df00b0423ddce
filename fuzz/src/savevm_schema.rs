use crate::savevm_vmdesc::check;
use qevm_savevm::vmdesc::{Schema, Verdict};
use qevm_wire::{CountedString, Limits};

/// The input is an idstr, a zero byte, a schema, a zero byte, the section's version, and its body.
///
/// Whatever the verdict, the tree must encode to the body; nothing but a unique reading gives fields.
pub fn savevm_schema(data: &[u8]) {
    let limits = Limits { elements: 1 << 16, ..Limits::default() };
    let mut parts = data.splitn(3, |b| *b == 0);
    let (Some(idstr), Some(json), Some([version, body @ ..])) = (parts.next(), parts.next(), parts.next()) else {
        return;
    };
    let Some(idstr) = CountedString::new(idstr) else { return };
    let Ok(schema) = Schema::parse(json, &limits) else { return };
    if let Ok((state, verdict)) = schema.decode(&idstr, u32::from(*version), body, 7, &limits) {
        check(&state, body, 7);
        assert!(verdict == Verdict::Unique || state.opaque_bytes() == body.len() as u64);
    }
}
