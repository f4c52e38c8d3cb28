//! Tells the program which commit it was built from, where its sources are a git checkout.
//!
//! Runs again when a source changes, not at every commit: a commit of other files leaves the program what it is. So the
//! commit is the one that was checked out when the sources were last built, `+` behind it where they differed from it.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The workspace's root, seen from this package, where build scripts run.
const ROOT: &str = "../..";

fn main() {
    println!("cargo:rerun-if-env-changed=FEWSTEP_COMMIT");
    let sources = sources();
    for path in &sources {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    let given = std::env::var("FEWSTEP_COMMIT").ok().filter(|commit| !commit.is_empty());
    if let Some(commit) = given.or_else(|| commit(&sources)) {
        println!("cargo:rustc-env=FEWSTEP_COMMIT={commit}");
    }
}

/// What the program is made of.
fn sources() -> Vec<PathBuf> {
    let root = Path::new(ROOT);
    let packages = std::fs::read_dir(root.join("crates")).into_iter().flatten().flatten();
    let built = packages.filter(|package| package.file_name() != "testkit");
    let mut sources: Vec<PathBuf> = built.map(|package| package.path().join("src")).collect();
    sources.extend(
        ["apps/fewstep/src", "apps/fewstep/build.rs", "Cargo.toml", "Cargo.lock"].map(|name| root.join(name)),
    );
    sources.retain(|path| path.exists());
    sources.sort();
    sources
}

fn commit(sources: &[PathBuf]) -> Option<String> {
    // Sources without a repository of their own may lie in a foreign one.
    let top = git(&["rev-parse", "--show-toplevel"], &[])?;
    if std::fs::canonicalize(top).ok()? != std::fs::canonicalize(ROOT).ok()? {
        return None;
    }
    let commit = git(&["rev-parse", "--short=12", "HEAD"], &[])?;
    let changed = !git(&["status", "--porcelain", "--"], sources)?.is_empty();
    Some(if changed { format!("{commit}+") } else { commit })
}

fn git(args: &[&str], paths: &[PathBuf]) -> Option<String> {
    let output = Command::new("git").args(args).args(paths).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
