//! Every fuzz target over its seeds and over changed copies of them. What fuzzing finds is added to `fuzz/seeds`, with a
//! test of its own where the reader lives.
//!
//! `FEWSTEP_FUZZ_SECS=300 cargo test -p fewstep-fuzzing` goes on for so long with each target, from other numbers each
//! time.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use fewstep_fuzzing::{Mutations, TARGETS, Target};

/// Copies of a target's seeds that are tried where no time is given.
const COPIES: usize = 3000;

fn seeds(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(name);
    let entries = fs::read_dir(&folder).expect("every target has a folder of seeds");
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("readable").path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).expect("readable")).collect()
}

/// Shows the bytes a target fails on.
fn check((name, target): Target, bytes: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| target(bytes))).is_err() {
        let path = std::env::temp_dir().join(format!("fewstep-{name}.bin"));
        fs::write(&path, bytes).expect("writable");
        panic!("{name} fails on {} (kept in {})", bytes.escape_ascii(), path.display());
    }
}

#[test]
fn no_target_fails_on_its_seeds() {
    for target in TARGETS {
        let seeds = seeds(target.0);
        assert!(seeds.len() >= 3, "{}: found {} seeds, expected a few", target.0, seeds.len());
        seeds.iter().for_each(|seed| check(target, seed));
    }
}

#[test]
fn no_target_fails_on_changed_seeds() {
    let secs = std::env::var("FEWSTEP_FUZZ_SECS").ok().and_then(|text| text.parse().ok());
    for target in TARGETS {
        let seeds = seeds(target.0);
        match secs.map(Duration::from_secs) {
            None => Mutations::new(&seeds, 0).take(COPIES).for_each(|bytes| check(target, &bytes)),
            Some(time) => {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
                let (start, mut mutations) = (Instant::now(), Mutations::new(&seeds, now.as_nanos() as u64));
                let mut tried = 0;
                while start.elapsed() < time {
                    mutations.by_ref().take(100).for_each(|bytes| check(target, &bytes));
                    tried += 100;
                }
                eprintln!("{}: {tried} copies in {} s", target.0, time.as_secs());
            }
        }
    }
}
