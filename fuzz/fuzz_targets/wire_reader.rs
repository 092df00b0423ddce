#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| qevm_fuzz::wire_reader(data));
