//! Tests that want a GPU, where there is none: a process with one that is made up. In: a test that found none. Out: whether it passes
//! there. Never here: what a GPU does (`gpu.cpp`, `kernels.cpp`), or how long it takes for that.
//!
//! libtorch is told once and for all which devices there are, and opens the CUDA runtime where there is no GPU too. So the test's own
//! program is run again, for this test alone, with a library before all others that has the functions of NVIDIA's, and tells libtorch
//! of a GPU. Processes that it starts have the same.

#[path = "../gpu_kernels/compiler.rs"]
mod compiler;

use std::{
    env,
    fmt::Display,
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
    thread,
};

const PRELOAD: &str = "LD_PRELOAD";
const NAME: &str = "made-up-gpu";

/// Whether this process has it.
pub fn is_here() -> bool {
    env::var(PRELOAD).is_ok_and(|libraries| libraries.contains(NAME))
}

/// Runs this thread's test again where there is such a GPU. Panics where it does not pass there, and where that has been tried: `why`
/// says what lacks.
pub fn again(why: impl Display) {
    assert!(!is_here(), "no GPU beside a made-up one: {why}");
    let name = thread::current().name().expect("a test's thread has its name").to_owned();
    let itself = env::current_exe().expect("this program");
    let library = library(itself.parent().expect("it is in a folder"));
    let ran = Command::new(itself).args(["--exact", &name, "--nocapture"]).env(PRELOAD, library).output();
    let ran = ran.expect("it can be run");
    let said = [ran.stdout, ran.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(ran.status.success() && said[0].contains("1 passed"), "on a made-up GPU: {}", said.concat());
    println!("on a made-up GPU: {}", said.concat());
}

/// Compiled into `folder` once for all tests.
fn library(folder: &Path) -> PathBuf {
    let sources = fs::canonicalize(concat!(env!("CARGO_MANIFEST_DIR"), "/../model")).expect("its sources");
    let libtorch = option_env!("LIBTORCH").map(str::to_owned).or(env::var("LIBTORCH").ok());
    let libtorch = PathBuf::from(libtorch.expect("LIBTORCH says where libtorch is"));
    // Where the others of libtorch lie, which programs that know nothing of it must find too.
    let libraries = fs::canonicalize(libtorch.join("lib/libtorch_cpu.so")).expect("libtorch is there");
    let libraries = libraries.parent().expect("in a folder");
    let mut compile = compiler::compiler();
    compile.args(["-fvisibility=hidden", "-shared", "-fPIC"]);
    compile.arg("-I").arg(libtorch.join("include")).arg("-I").arg(sources.join("src/gpu"));
    compile.args(["gpu.cpp", "kernels.cpp"].map(|name| sources.join("tests/made_up_gpu").join(name)));
    compile.arg("-L").arg(libraries).args(["-ltorch_cpu", "-lc10"]);
    compile.arg(format!("-Wl,-rpath,{}", libraries.display()));

    let mut hasher = DefaultHasher::new();
    format!("{compile:?}").hash(&mut hasher);
    for part in ["src/gpu", "tests/made_up_gpu", "tests/gpu_kernels"] {
        let mut files: Vec<PathBuf> = listed(&sources.join(part));
        files.sort();
        files.iter().for_each(|file| fs::read(file).expect("a source").hash(&mut hasher));
    }
    let library = folder.join(format!("{NAME}-{:016x}.so", hasher.finish()));
    // Another test may be about it.
    let lock = File::create(folder.join(format!("{NAME}.lock"))).expect("a file to lock");
    lock.lock().expect("a lock");
    if !library.exists() {
        let unfinished = library.with_extension("unfinished");
        compiler::make(compile, &unfinished);
        fs::rename(unfinished, &library).expect("it gets its name");
    }
    library
}

fn listed(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()).collect()
}
