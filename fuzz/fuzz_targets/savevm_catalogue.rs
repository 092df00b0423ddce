#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| qevm_fuzz::savevm_catalogue(data));
