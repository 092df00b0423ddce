use crate::savevm_vmdesc::check;
use qevm_savevm::vmdesc::{Catalogue, Found};
use qevm_wire::{CountedString, Limits, QemuVersion};

/// The input is an idstr, a zero byte, the section's version, and its body, with what may follow it.
///
/// Whatever is found must fit the body: read with it, the body gives a tree that encodes to the same bytes.
pub fn savevm_catalogue(data: &[u8]) {
    let limits = Limits { elements: 1 << 16, ..Limits::default() };
    let mut parts = data.splitn(2, |b| *b == 0);
    let (Some(idstr), Some([version, body @ ..])) = (parts.next(), parts.next()) else { return };
    let Some(idstr) = CountedString::new(idstr) else { return };
    let (catalogue, version) = (Catalogue::embedded(), u32::from(*version));
    let releases = [QemuVersion::NEWEST, QemuVersion::new(7, 2)];
    if let Found::One(device) = catalogue.describe(&idstr, 0, version, body, &releases) {
        assert_eq!(device.wire_size(), body.len() as u64);
        if let Ok(state) = device.decode(body, 7, &limits) {
            check(&state, body, 7);
        }
    }
}
