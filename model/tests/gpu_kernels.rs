//! The GPU's kernels where there is no GPU. Their sources are compiled for the processor, with plain words for what only a GPU has an
//! instruction for, and their threads run one after the other (`gpu_kernels/emulated.h`). What they compute is compared with
//! the formula, and a row among others with the same row alone. On a GPU `gpu.rs` and tests beside the code do it for good.

// Fibers are the C library's.
#![cfg(target_os = "linux")]

#[path = "gpu_kernels/compiler.rs"]
mod compiler;

use std::path::Path;
use std::process::Command;

/// Compiles `gpu_kernels/<name>.cpp`, and runs it.
fn holds(name: &str) {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("gpu-kernels-{name}"));
    let mut compile = compiler::compiler();
    compile.arg("-I").arg(here.join("src/gpu")).arg(here.join("tests/gpu_kernels").join(name).with_extension("cpp"));
    compiler::make(compile, &program);
    let ran = Command::new(&program).output().expect("what was just compiled can be run");
    print!("{}", String::from_utf8_lossy(&ran.stdout));
    assert!(ran.status.success(), "{}: {}", ran.status, String::from_utf8_lossy(&ran.stderr));
}

#[test]
fn attention_is_the_formula_and_every_row_has_its_own_bits() {
    holds("attention");
}

#[test]
fn experts_are_the_formula_and_every_row_has_its_own_bits() {
    holds("experts");
}
