#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| edgecore::stream::fuzz::websocket(data));
