//! What each fuzz target does with its input, as plain functions, so that `cargo test` can replay the committed seeds
//! without libFuzzer. A target passes if nothing panics, hangs or allocates beyond its limits, and if whatever decodes
//! encodes to the same bytes again.

mod multifd_channel;
mod returnpath_decoder;
mod savevm_catalogue;
mod savevm_container;
mod savevm_decoder;
mod savevm_devices;
mod savevm_mapped_ram;
mod savevm_preempt;
mod savevm_schema;
mod savevm_vmdesc;
mod savevm_xbzrle;
mod wire_reader;

pub use multifd_channel::multifd_channel;
pub use returnpath_decoder::returnpath_decoder;
pub use savevm_catalogue::savevm_catalogue;
pub use savevm_container::savevm_container;
pub use savevm_decoder::savevm_decoder;
pub use savevm_devices::savevm_devices;
pub use savevm_mapped_ram::savevm_mapped_ram;
pub use savevm_preempt::savevm_preempt;
pub use savevm_schema::savevm_schema;
pub use savevm_vmdesc::savevm_vmdesc;
pub use savevm_xbzrle::savevm_xbzrle;
pub use wire_reader::wire_reader;

/// A fuzz target: takes an input, panics if a promise is broken.
pub type Target = fn(&[u8]);

/// Every target by its name, for the replay of the seeds.
pub const TARGETS: &[(&str, Target)] = &[
    ("multifd_channel", multifd_channel),
    ("returnpath_decoder", returnpath_decoder),
    ("savevm_catalogue", savevm_catalogue),
    ("savevm_container", savevm_container),
    ("savevm_decoder", savevm_decoder),
    ("savevm_devices", savevm_devices),
    ("savevm_mapped_ram", savevm_mapped_ram),
    ("savevm_preempt", savevm_preempt),
    ("savevm_schema", savevm_schema),
    ("savevm_vmdesc", savevm_vmdesc),
    ("savevm_xbzrle", savevm_xbzrle),
    ("wire_reader", wire_reader),
];
