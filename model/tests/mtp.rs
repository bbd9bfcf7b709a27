//! Multi-token prediction in one process against the reference (tests/golden/generate.py): the drafts' logits within 1e-4,
//! and greedy decoding that is helped by them and draws what it draws without.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use conclave_model::{
    Hidden,
    checkpoint::Checkpoint,
    device::{Compute, Dtype, Numerics, init_thread},
    oracle::Oracle,
    sampler::argmax,
};
use safetensors::SafeTensors;

const TOLERANCE: f32 = 1e-4;

/// One prompt and what followed it, with the drafts along both.
struct Case {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    /// Row i is about token i + 2.
    drafts: Vec<f32>,
}

impl Case {
    /// All tokens.
    fn text(&self) -> Vec<u32> {
        [self.prompt.clone(), self.greedy.clone()].concat()
    }
}

/// Every golden with a draft module: the committed ones, or those in `CONCLAVE_GOLDEN`.
fn goldens() -> Result<Vec<(PathBuf, Vec<Case>)>> {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let root = std::env::var_os("CONCLAVE_GOLDEN").map_or(committed, PathBuf::from);
    let mut goldens = Vec::new();
    for entry in std::fs::read_dir(&root).with_context(|| root.display().to_string())? {
        let folder = entry?.path();
        let Ok(bytes) = std::fs::read(folder.join("expected.safetensors")) else { continue };
        let file = SafeTensors::deserialize(&bytes)?;
        let ids = |name: String| -> Result<Vec<u32>> {
            let tensor = file.tensor(&name)?;
            tensor.data().as_chunks().0.iter().map(|bytes| Ok(u32::try_from(i64::from_le_bytes(*bytes))?)).collect()
        };
        let mut cases = Vec::new();
        while let Ok(drafts) = file.tensor(&format!("mtp_logits_{}", cases.len())) {
            let (prompt, greedy) = (ids(format!("prompt_{}", cases.len()))?, ids(format!("greedy_{}", cases.len()))?);
            let drafts = drafts.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            cases.push(Case { prompt, greedy, drafts });
        }
        if !cases.is_empty() {
            goldens.push((folder, cases));
        }
    }
    ensure!(!goldens.is_empty(), "no golden with a draft module in {}", root.display());
    Ok(goldens)
}

/// The drafts' logits along `text`, computed in chunks of `rows`.
fn drafts(oracle: &Oracle, text: &[u32], rows: usize) -> Result<Vec<f32>> {
    let (mut main, mut behind) = (oracle.cache(), oracle.cache());
    let mut all = Vec::new();
    for start in (0..text.len() - 1).step_by(rows) {
        let end = (start + rows).min(text.len() - 1);
        let (_, hidden) = oracle.forward_and_hidden(&text[start..end], &mut main);
        all.extend(oracle.draft(&hidden, &text[start + 1..=end], &mut behind).context("there is a draft module")?);
    }
    Ok(all)
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn drafts_equal_the_reference_in_one_pass_and_in_chunks() -> Result<()> {
    init_thread(1);
    for (folder, cases) in goldens()? {
        let oracle = Oracle::load(&Checkpoint::open(&folder)?, Compute::REFERENCE)?;
        let mut most = 0.0f32;
        for case in cases {
            let text = case.text();
            for rows in [text.len(), 40, 7, 1] {
                let ours = drafts(&oracle, &text, rows)?;
                ensure!(ours.len() == case.drafts.len(), "{} logits, expected {}", ours.len(), case.drafts.len());
                most = most.max(worst(&ours, &case.drafts));
                ensure!(most <= TOLERANCE, "{}: chunks of {rows}: off by {most}", folder.display());
            }
        }
        println!("{}: worst logit difference {most:e}", folder.display());
    }
    Ok(())
}

#[test]
fn reproducible_drafts_have_the_same_bits_in_any_chunk() -> Result<()> {
    init_thread(1);
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let compute = Compute { numerics: Numerics::Reproducible, dtype, ..Compute::REFERENCE };
        for (folder, cases) in goldens()? {
            let oracle = Oracle::load(&Checkpoint::open(&folder)?, compute)?;
            for text in cases.iter().map(Case::text) {
                let whole = drafts(&oracle, &text, text.len())?;
                for rows in [1, 2, 33] {
                    let parts = drafts(&oracle, &text, rows)?;
                    let same = parts.iter().zip(&whole).all(|(a, b)| a.to_bits() == b.to_bits());
                    ensure!(same, "{}: {dtype}, chunks of {rows}: other bits", folder.display());
                }
            }
        }
    }
    Ok(())
}

/// How often a draft was right.
#[derive(Debug, Default)]
struct Tally {
    drafted: usize,
    accepted: usize,
    passes: usize,
}

/// Greedy decoding of `count` tokens in which each pass also checks one drafted token: the plain form of what an engine
/// does with many sequences. A rejected draft's row leaves the model's cache again, and never reaches the module's.
fn speculate(oracle: &Oracle, prompt: &[u32], count: usize, tally: &mut Tally) -> Result<Vec<u32>> {
    let (mut main, mut behind) = (oracle.cache(), oracle.cache());
    let mut drawn = Vec::new();
    let (mut pass, mut draft) = (prompt.to_vec(), None);
    loop {
        let (logits, hidden) = oracle.forward_and_hidden(&pass, &mut main);
        tally.passes += 1;
        let best: Vec<u32> = logits.chunks(oracle.vocab_size()).map(argmax).collect();
        // A drafted token is the pass's last; the row before it says whether it may stay.
        let mut kept = pass.len();
        if let Some(draft) = draft {
            tally.drafted += 1;
            kept -= 1;
            drawn.push(best[kept - 1]);
            if best[kept - 1] == draft {
                tally.accepted += 1;
                kept += 1;
                drawn.push(best[kept - 1]);
            }
        } else {
            drawn.push(best[kept - 1]);
        }
        if drawn.len() >= count {
            drawn.truncate(count);
            return Ok(drawn);
        }
        main.truncate(main.len() - (pass.len() - kept));
        let last = best[kept - 1];
        let next: Vec<u32> = pass[1..kept].iter().copied().chain([last]).collect();
        let hidden: Hidden = hidden.at(&(0..kept).collect::<Vec<_>>());
        let guesses = oracle.draft(&hidden, &next, &mut behind).context("there is a draft module")?;
        let guess = argmax(&guesses[guesses.len() - oracle.vocab_size()..]);
        (pass, draft) = (vec![last, guess], Some(guess));
    }
}

#[test]
fn speculative_decoding_draws_the_same_tokens_in_fewer_passes() -> Result<()> {
    init_thread(1);
    for (folder, cases) in goldens()? {
        let oracle = Oracle::load(&Checkpoint::open(&folder)?, Compute::REFERENCE)?;
        let mut tally = Tally::default();
        let mut tokens = 0;
        for case in &cases {
            let drawn = speculate(&oracle, &case.prompt, case.greedy.len(), &mut tally)?;
            ensure!(drawn == case.greedy, "{}: {drawn:?} instead of {:?}", folder.display(), case.greedy);
            tokens += drawn.len();
        }
        println!("{}: {tokens} tokens, {tally:?}", folder.display());
        // The goldens are made so that both happen.
        ensure!(0 < tally.accepted && tally.accepted < tally.drafted, "{tally:?}");
        ensure!(tally.passes < tokens, "{tally:?}");
    }
    Ok(())
}

#[test]
fn without_the_modules_tensors_there_is_no_draft() -> Result<()> {
    init_thread(1);
    // Its config.json, written by transformers, speaks of a module.
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v3");
    let checkpoint = Checkpoint::open(&folder)?;
    ensure!(checkpoint.lacks_mtp() && checkpoint.config().mtp_layer().is_none());
    let oracle = Oracle::load(&checkpoint, Compute::REFERENCE)?;
    let (_, hidden) = oracle.forward_and_hidden(&[5], &mut oracle.cache());
    ensure!(oracle.draft(&hidden, &[6], &mut oracle.cache()).is_none());
    Ok(())
}
