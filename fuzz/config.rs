//! `config.json`: any bytes whatsoever are a spec or are refused, in one line; and a spec that is taken can be written
//! into a container's record and read again.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match brigantine_runtime::validate(bytes) {
        Ok(spec) => {
            let record = serde_json::to_vec(&spec).expect("a spec can be written");
            let again = brigantine_runtime::validate(&record).expect("what was written can be read");
            assert!(spec == again, "reading it again gives another spec");
        }
        Err(error) => {
            let text = error.to_string();
            assert!(!text.is_empty() && !text.contains('\n'), "{text:?}");
        }
    }
});
