//! The house's rules, as far as a machine can read them: who may depend on whom, and what a source file looks like.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

const LONGEST_FILE: usize = 500;
/// Of our own packages, all that each may depend on. The others may use any.
const ALLOWED: [(&str, &[&str]); 6] = [
    ("conclave-proto", &[]),
    ("conclave-model", &[]),
    ("conclave-placement", &["conclave-proto"]),
    ("conclave-runtime", &["conclave-proto"]),
    ("conclave-router", &["conclave-model", "conclave-placement", "conclave-proto", "conclave-runtime"]),
    ("conclave-expert-worker", &["conclave-model", "conclave-placement", "conclave-proto", "conclave-runtime"]),
];
const LIBTORCH_BINDINGS: [&str; 2] = ["tch", "torch-sys"];
const BANNED_FILE_NAMES: [&str; 7] = ["common", "util", "utils", "helper", "helpers", "misc", "manager"];

struct Package {
    folder: PathBuf,
    manifest: String,
    dependencies: BTreeSet<String>,
}

#[test]
fn our_packages_depend_on_each_other_only_downwards() {
    let packages = packages();
    for (name, allowed) in ALLOWED {
        let package = packages.get(name).unwrap_or_else(|| panic!("no package {name} in the workspace"));
        for dependency in package.dependencies.iter().filter(|dependency| packages.contains_key(*dependency)) {
            assert!(allowed.contains(&dependency.as_str()), "{name} must not depend on {dependency}");
        }
    }
}

#[test]
fn only_the_model_depends_on_libtorch() {
    for (name, package) in packages() {
        for binding in LIBTORCH_BINDINGS.iter().filter(|&&binding| package.dependencies.contains(binding)) {
            assert_eq!(name, "conclave-model", "{name} must not depend on {binding}");
        }
    }
}

#[test]
fn every_package_opts_into_the_workspace_lints() {
    for (name, package) in packages() {
        assert!(package.manifest.contains("[lints]\nworkspace = true"), "{name}/Cargo.toml lacks `lints.workspace`");
    }
}

#[test]
fn every_source_file_is_short_and_opens_with_what_it_is() {
    for (file, text) in sources() {
        assert!(text.starts_with("//! "), "{} does not open with a `//!` paragraph", file.display());
        let lines = text.lines().count();
        assert!(lines < LONGEST_FILE, "{} has {lines} lines, {LONGEST_FILE} are too many", file.display());
        let name = file.file_stem().expect("a source file has a name").to_string_lossy().into_owned();
        assert!(!BANNED_FILE_NAMES.contains(&name.as_str()), "{}: a name that says nothing", file.display());
    }
}

#[test]
fn only_the_model_names_libtorch_or_is_unsafe() {
    let model = packages()["conclave-model"].folder.clone();
    // Put together here, so that this file does not contain what it looks for.
    let libtorch = ["tch", "::"].concat();
    let block = ["{", "fn ", "impl ", "extern ", "trait "].map(|after| format!("{} {after}", "unsafe"));
    let lint = format!("{}_code)", "unsafe");
    let banned: Vec<String> = block.into_iter().chain([libtorch, lint]).collect();
    for (file, text) in sources().into_iter().filter(|(file, _)| !file.starts_with(&model)) {
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            let found = banned.iter().find(|word| has_word(line, word));
            assert_eq!(found, None, "{}:{}: this belongs in model/ alone", file.display(), number + 1);
        }
    }
}

/// Whether `word` stands in `line`, not as the end of a longer one.
fn has_word(line: &str, word: &str) -> bool {
    let part_of_word = |before: char| before.is_alphanumeric() || before == '_';
    line.match_indices(word).any(|(at, _)| !line[..at].ends_with(part_of_word))
}

/// The workspace's members by name, as cargo tells them.
fn packages() -> BTreeMap<String, Package> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--no-deps"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata speaks JSON");
    let packages = metadata["packages"].as_array().expect("a list of packages");
    packages.iter().map(|package| (text(&package["name"]), read_package(package))).collect()
}

fn read_package(package: &Value) -> Package {
    let manifest = PathBuf::from(text(&package["manifest_path"]));
    let dependencies = package["dependencies"].as_array().expect("a list of dependencies");
    Package {
        folder: manifest.parent().expect("a manifest lies in a folder").to_owned(),
        manifest: std::fs::read_to_string(&manifest).expect("a manifest can be read"),
        dependencies: dependencies.iter().map(|dependency| text(&dependency["name"])).collect(),
    }
}

fn text(value: &Value) -> String {
    value.as_str().expect("a string").to_owned()
}

/// Every Rust file of every package, build scripts too.
fn sources() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for package in packages().values() {
        walk(&package.folder, &mut found);
    }
    assert!(found.len() > packages().len(), "the walk found the sources");
    found
}

fn walk(folder: &Path, found: &mut Vec<(PathBuf, String)>) {
    for entry in std::fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("a readable folder").path();
        if path.is_dir() {
            walk(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).expect("a readable source file");
            found.push((path, text));
        }
    }
}
