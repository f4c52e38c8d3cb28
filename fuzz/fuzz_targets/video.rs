#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fewstep_fuzzing::video(bytes));
