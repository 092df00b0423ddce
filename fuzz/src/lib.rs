//! What each fuzz target does with its input, as plain functions, so that `cargo test` can replay the committed seeds
//! without libFuzzer. A target passes if nothing panics, hangs or allocates beyond its limits, and if whatever decodes
//! encodes to the same bytes again.

mod parts;

mod cli_walk;
mod migration_lines;
mod multifd_channel;
mod multifd_device_state;
mod multifd_page_area;
mod nbd_client;
mod nbd_server;
mod qmp_input;
mod returnpath_decoder;
mod savevm_catalogue;
mod savevm_check;
mod savevm_container;
mod savevm_cpr;
mod savevm_decoder;
mod savevm_devices;
mod savevm_mapped_ram;
mod savevm_preempt;
mod savevm_schema;
mod savevm_vmdesc;
mod savevm_xbzrle;
mod wire_reader;

pub use cli_walk::cli_walk;
pub use migration_lines::migration_lines;
pub use multifd_channel::multifd_channel;
pub use multifd_device_state::multifd_device_state;
pub use multifd_page_area::multifd_page_area;
pub use nbd_client::nbd_client;
pub use nbd_server::nbd_server;
pub use qmp_input::qmp_input;
pub use returnpath_decoder::returnpath_decoder;
pub use savevm_catalogue::savevm_catalogue;
pub use savevm_check::savevm_check;
pub use savevm_container::savevm_container;
pub use savevm_cpr::savevm_cpr;
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
    ("cli_walk", cli_walk),
    ("migration_lines", migration_lines),
    ("multifd_channel", multifd_channel),
    ("multifd_device_state", multifd_device_state),
    ("multifd_page_area", multifd_page_area),
    ("nbd_client", nbd_client),
    ("nbd_server", nbd_server),
    ("qmp_input", qmp_input),
    ("returnpath_decoder", returnpath_decoder),
    ("savevm_catalogue", savevm_catalogue),
    ("savevm_check", savevm_check),
    ("savevm_container", savevm_container),
    ("savevm_cpr", savevm_cpr),
    ("savevm_decoder", savevm_decoder),
    ("savevm_devices", savevm_devices),
    ("savevm_mapped_ram", savevm_mapped_ram),
    ("savevm_preempt", savevm_preempt),
    ("savevm_schema", savevm_schema),
    ("savevm_vmdesc", savevm_vmdesc),
    ("savevm_xbzrle", savevm_xbzrle),
    ("wire_reader", wire_reader),
];

/// The program of a target: libFuzzer's where it is built by `cargo fuzz`, otherwise one that replays the files it is
/// given, which needs neither libFuzzer nor its C++ compiler.
#[macro_export]
macro_rules! entry {
    ($target:ident) => {
        #[cfg(fuzzing)]
        libfuzzer_sys::fuzz_target!(|data: &[u8]| $crate::$target(data));

        #[cfg(not(fuzzing))]
        fn main() -> std::io::Result<()> {
            std::env::args_os().skip(1).try_for_each(|path| std::fs::read(path).map(|data| $crate::$target(&data)))
        }
    };
}
