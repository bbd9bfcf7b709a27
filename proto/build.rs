//! Compiles the `.proto` files of this folder in pure Rust (protox), so that building this crate needs no protoc.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const FILES: [&str; 3] = [
    "conclave/inference/v1/inference.proto",
    "conclave/expert/v1/expert.proto",
    "conclave/placement/v1/placement.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=conclave");
    let descriptors = protox::compile(FILES, ["."])?;
    // Reflection serves these same descriptors.
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
