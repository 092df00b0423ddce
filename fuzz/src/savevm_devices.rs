use qevm_devices::{DeviceState, descriptions};
use qevm_savevm::Reader;
use qevm_savevm::vmstate::Context;

const RELEASES: [&str; 4] = ["5.2", "7.2", "10.0", "11.1"];

/// Reads the input as a declared device section: the first byte chooses the section, the second the release and how
/// many versions before the newest.
pub fn savevm_devices(data: &[u8]) {
    let [section, choice, payload @ ..] = data else { return };
    let release = RELEASES[usize::from(choice & 3)].parse().expect("a release");
    let ctx = Context::new(release, "microvm");
    let mut sections = descriptions(&ctx);
    // Those that were declared after the seeds were made come last, so that a seed's first byte keeps its meaning.
    sections.sort_by_key(|section| ["gpex_root", "PCIHost", "PCIBUS"].contains(&&*section.name));
    let schema = &sections[usize::from(*section) % sections.len()];
    let version = schema.version.saturating_sub(u32::from(choice >> 2 & 3));
    let idstr = match &*schema.name {
        name if name.starts_with("virtio-") => format!("virtio-mmio@00000000feb02e00/{name}"),
        "gpex_root" => "0000:00:00.0/gpex_root".to_owned(),
        name => name.to_owned(),
    };
    if let Ok(state) = DeviceState::decode(&idstr, version, payload, &ctx).expect("a declared section") {
        let (bytes, described) = state.encode_described(version, &ctx).expect("what was read can be written");
        assert_eq!(bytes, payload);
        assert_eq!(described.wire_size(), bytes.len() as u64);
    }
    if let Some(Ok(mut state)) = DeviceState::load(&idstr, version, &mut Reader::new(payload), &ctx) {
        // A release may have no place for what an older or newer one sent.
        let _ = state.prepare(&ctx);
    }
}
