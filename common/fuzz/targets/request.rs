#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| common::hub::fuzz::request(data));
