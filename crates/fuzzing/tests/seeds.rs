//! Every fuzz target over its seeds. What fuzzing finds is added to `fuzz/seeds`, with a test of its own where the reader
//! lives.

use std::fs;
use std::path::Path;

use fewstep_fuzzing::TARGETS;

#[test]
fn no_target_fails_on_its_seeds() {
    for (name, target) in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(name);
        let mut seeds = 0;
        for entry in fs::read_dir(&folder).expect("every target has a folder of seeds") {
            let path = entry.expect("readable").path();
            eprintln!("{}", path.display()); // shown with a failure
            target(&fs::read(&path).expect("readable"));
            seeds += 1;
        }
        assert!(seeds >= 3, "{name}: found {seeds} seeds, expected a few");
    }
}
