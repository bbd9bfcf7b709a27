//! C++ for tests: the compiler that libtorch's bindings are compiled by. In: what to compile. Out: it is, or the test ends with what the
//! compiler said. Never here: what the program is.

use std::{env, path::Path, process::Command};

/// As the kernels' sources want it; it may come with arguments of its own.
pub fn compiler() -> Command {
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let mut words = compiler.split_whitespace();
    let mut compile = Command::new(words.next().expect("a compiler"));
    compile.args(words).args(["-std=c++17", "-O2", "-fno-strict-aliasing"]);
    compile
}

/// Has `compile` make `file`.
pub fn make(mut compile: Command, file: &Path) {
    let compiled = compile.arg("-o").arg(file).output();
    let compiled = compiled.unwrap_or_else(|error| panic!("{compile:?}: {error}"));
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
}
