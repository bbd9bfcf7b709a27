//! The single-process model against `transformers` in f32: logits within 1e-4, greedy tokens equal, for each committed
//! checkpoint and for any folder of others named in `CONCLAVE_GOLDEN` (made by tests/golden/generate.py).

mod made_up_gpu;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use conclave_model::{
    checkpoint::Checkpoint,
    device::{Compute, Device, Dtype, Numerics, init_thread},
    oracle::Oracle,
    sampler::argmax,
    wire::Encoding,
};
use safetensors::SafeTensors;

const TOLERANCE: f32 = 1e-4;

fn folders() -> Result<Vec<PathBuf>> {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let root = std::env::var_os("CONCLAVE_GOLDEN").map_or(committed, PathBuf::from);
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(&root).with_context(|| root.display().to_string())? {
        let path = entry?.path();
        if path.join("expected.safetensors").is_file() {
            folders.push(path);
        }
    }
    folders.sort();
    ensure!(folders.len() >= 6 || std::env::var_os("CONCLAVE_GOLDEN").is_some(), "goldens are missing: {folders:?}");
    Ok(folders)
}

struct Expected {
    prompt: Vec<u32>,
    logits: Vec<f32>,
    greedy: Vec<u32>,
}

fn expected(folder: &Path) -> Result<Vec<Expected>> {
    let bytes = std::fs::read(folder.join("expected.safetensors"))?;
    let file = SafeTensors::deserialize(&bytes)?;
    let ids = |name: &str| -> Result<Vec<u32>> {
        let tensor = file.tensor(name)?;
        let ids = tensor.data().as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes));
        ids.map(|id| Ok(u32::try_from(id)?)).collect()
    };
    let mut all = Vec::new();
    for i in 0.. {
        if file.tensor(&format!("prompt_{i}")).is_err() {
            break;
        }
        let logits = file.tensor(&format!("logits_{i}"))?;
        let logits = logits.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        all.push(Expected { prompt: ids(&format!("prompt_{i}"))?, logits, greedy: ids(&format!("greedy_{i}"))? });
    }
    ensure!(!all.is_empty(), "{} holds no prompt", folder.display());
    Ok(all)
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn logits_and_greedy_tokens_equal_the_reference() -> Result<()> {
    init_thread(1);
    for folder in folders()? {
        let name = folder.display();
        let oracle = Oracle::load(&Checkpoint::open(&folder)?, Compute::REFERENCE)?;
        let mut most = 0.0f32;
        for Expected { prompt, logits, greedy } in expected(&folder)? {
            let ours = oracle.forward(&prompt, &mut oracle.cache());
            ensure!(ours.len() == logits.len(), "{name}: {} logits, expected {}", ours.len(), logits.len());
            most = most.max(worst(&ours, &logits));
            ensure!(most <= TOLERANCE, "{name}: prompt of {}: off by {most}", prompt.len());
            ensure!(oracle.generate_greedy(&prompt, greedy.len()) == greedy, "{name}: other greedy tokens");
        }
        println!("{name}: worst logit difference {most:e}");
    }
    Ok(())
}

#[test]
fn chunks_and_single_rows_compute_what_one_pass_computes() -> Result<()> {
    init_thread(1);
    for folder in folders()? {
        let oracle = Oracle::load(&Checkpoint::open(&folder)?, Compute::REFERENCE)?;
        let vocab = oracle.vocab_size();
        for Expected { prompt, logits, .. } in expected(&folder)? {
            for chunk in [1, 7, 40] {
                let mut cache = oracle.cache();
                let ours: Vec<f32> = prompt.chunks(chunk).flat_map(|part| oracle.forward(part, &mut cache)).collect();
                let off = worst(&ours, &logits);
                ensure!(off <= TOLERANCE, "{}: chunks of {chunk}: off by {off}", folder.display());
                ensure!(ours.len() == prompt.len() * vocab);
            }
        }
    }
    Ok(())
}

#[test]
fn reproducible_numerics_give_the_same_bits_in_any_chunk() -> Result<()> {
    init_thread(1);
    same_bits_in_any_chunk(Device::Cpu)
}

fn same_bits_in_any_chunk(device: Device) -> Result<()> {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let compute = Compute { device, dtype, numerics: Numerics::Reproducible };
        for folder in folders()? {
            let oracle = Oracle::load(&Checkpoint::open(&folder)?, compute)?;
            for Expected { prompt, .. } in expected(&folder)? {
                let whole = oracle.forward(&prompt, &mut oracle.cache());
                for chunk in [1, 2, 16, 33] {
                    let mut cache = oracle.cache();
                    let parts = prompt.chunks(chunk).flat_map(|part| oracle.forward(part, &mut cache));
                    let same = parts.zip(&whole).all(|(a, b)| a.to_bits() == b.to_bits());
                    ensure!(same, "{}: {dtype}, chunks of {chunk}: other bits", folder.display());
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_cheaper_format_stays_near_the_reference() -> Result<()> {
    init_thread(1);
    let compute = Compute { dtype: Dtype::Bf16, ..Compute::REFERENCE };
    for folder in folders()? {
        let oracle = Oracle::load(&Checkpoint::open(&folder)?, compute)?;
        let (_, same, rows) = compared(&oracle, &folder, usize::MAX)?;
        // bf16 keeps 8 bits, and one expert chosen otherwise changes a row of a random model: most rows must agree.
        ensure!(same * 2 > rows, "{}: {same} of {rows} rows agree", folder.display());
    }
    Ok(())
}

/// Logits beside the reference's, of prompts that come in chunks of so many rows: the root mean square of the difference as a share of
/// theirs, rows with the same greedy token, rows.
fn compared(oracle: &Oracle, folder: &Path, chunk: usize) -> Result<(f64, usize, usize)> {
    let (mut off, mut all, mut same, mut rows) = (0.0f64, 0.0f64, 0, 0);
    for Expected { prompt, logits, .. } in expected(folder)? {
        let mut cache = oracle.cache();
        let ours: Vec<f32> = prompt.chunks(chunk).flat_map(|part| oracle.forward(part, &mut cache)).collect();
        ensure!(ours.iter().all(|logit| logit.is_finite()));
        for (a, b) in ours.chunks(oracle.vocab_size()).zip(logits.chunks(oracle.vocab_size())) {
            off += a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
            all += b.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>();
            rows += 1;
            same += usize::from(argmax(a) == argmax(b));
        }
    }
    Ok(((off / all).sqrt(), same, rows))
}

/// Tested where there is no GPU too, on one that is made up.
#[test]
fn a_gpu_says_what_the_reference_says() -> Result<()> {
    let device = Device::Cuda(0);
    if let Err(error) = device.open() {
        made_up_gpu::again(error);
        return Ok(());
    }
    init_thread(1);
    for folder in folders()? {
        let name = folder.display();
        for numerics in [Numerics::Fast, Numerics::Reproducible] {
            let compute = Compute { device, numerics, ..Compute::REFERENCE };
            let oracle = Oracle::load(&Checkpoint::open(&folder)?, compute)?;
            let mut most = 0.0f32;
            for Expected { prompt, logits, greedy } in expected(&folder)? {
                for chunk in [1, 40, prompt.len()] {
                    let mut cache = oracle.cache();
                    let ours: Vec<f32> =
                        prompt.chunks(chunk).flat_map(|part| oracle.forward(part, &mut cache)).collect();
                    ensure!(ours.len() == logits.len(), "{name}: {} logits", ours.len());
                    most = most.max(worst(&ours, &logits));
                    ensure!(most <= TOLERANCE, "{name}, {numerics}, chunks of {chunk}: off by {most}");
                }
                ensure!(oracle.generate_greedy(&prompt, greedy.len()) == greedy, "{name}: other greedy tokens");
            }
            println!("{name}, {numerics}: worst logit difference {most:e}");
        }
        let oracle =
            Oracle::load(&Checkpoint::open(&folder)?, Compute { device, dtype: Dtype::Bf16, ..Compute::REFERENCE })?;
        for (how, chunk) in [("at once", usize::MAX), ("row by row", 1)] {
            let (off, same, rows) = compared(&oracle, &folder, chunk)?;
            println!("{name}, bf16, {how}: {:.2} % off, {same}/{rows} rows agree", 100.0 * off);
            ensure!(same * 2 > rows, "{name}, {how}: {same} of {rows} rows agree");
        }
    }
    Ok(())
}

/// Not on one that is made up: its products are those of libtorch's processor half, whose rows may have other bits by where they stand.
#[test]
fn reproducible_numerics_give_the_same_bits_in_any_chunk_on_a_gpu() -> Result<()> {
    let device = Device::Cuda(0);
    if let Err(error) = device.open() {
        println!("not tested without a GPU: {error}");
        return Ok(());
    }
    init_thread(1);
    same_bits_in_any_chunk(device)
}

#[test]
fn what_rows_lose_on_the_wire_is_bounded_and_told() -> Result<()> {
    init_thread(1);
    println!(
        "model: difference of logits, of their size, and rows with the same greedy token: bf16 both ways; fp8 out, bf16 back"
    );
    for folder in folders()? {
        let over = |dispatch, combine| {
            let oracle = Oracle::load(&Checkpoint::open(&folder)?, Compute::REFERENCE)?.over(dispatch, combine);
            compared(&oracle, &folder, usize::MAX)
        };
        let (exact, same, rows) = over(Encoding::F32, Encoding::F32)?;
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        ensure!(exact < 1e-5 && same == rows, "{name}: f32 loses nothing, and differs by {exact:e}");
        let (half, half_same, _) = over(Encoding::Bf16, Encoding::Bf16)?;
        let (eighth, eighth_same, _) = over(Encoding::Fp8Block128, Encoding::Bf16)?;
        println!("{name}: {:.2} % {half_same}/{rows}; {:.2} % {eighth_same}/{rows}", 100.0 * half, 100.0 * eighth);
        // bf16 keeps 8 bits and E4M3 keeps 4, at each of a few layers; a row whose gate falls otherwise differs by far more.
        ensure!(half < 0.1 && eighth < 0.4 && half_same >= eighth_same, "{name}: {half} and {eighth}");
    }
    Ok(())
}
