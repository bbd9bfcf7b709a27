//! Good checkpoints: what is loaded is what was written, from the file's own pages, however the files are split.

use crate::fixture::{Draft, Folder};
use conclave_model::checkpoint::{Checkpoint, fp8};
use serde_json::json;
use tch::{Device, Kind};
use tempfile::TempDir;

fn open(folder: &Folder) -> (TempDir, Checkpoint) {
    let dir = TempDir::new().unwrap();
    folder.write(dir.path());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

fn values(tensor: &tch::Tensor) -> Vec<f32> {
    Vec::try_from(tensor.to_kind(Kind::Float).flatten(0, -1)).unwrap()
}

/// The lines of the process's memory map that lie over `path`, as address ranges.
fn mapped_ranges(path: &std::path::Path) -> Vec<std::ops::Range<usize>> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let over = maps.lines().filter(|line| line.ends_with(path.to_str().unwrap()));
    over.map(|line| {
        let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
        usize::from_str_radix(from, 16).unwrap()..usize::from_str_radix(to, 16).unwrap()
    })
    .collect()
}

#[test]
fn every_tensor_is_loaded_as_written() {
    let folder = Folder::small();
    let (_dir, checkpoint) = open(&folder);
    for (name, draft) in &folder.tensors {
        let weight = checkpoint.load(name, &draft.shape).unwrap();
        assert_eq!(values(&weight), draft.values(), "{name}");
        assert_eq!(weight.kind(), Kind::Float);
    }
    assert_eq!(checkpoint.expert_bytes(), 3 * 8 * 4 * 4);
}

#[test]
fn shards_make_no_difference() {
    let folder = Folder::small();
    let (_dir, single) = open(&folder);
    let dir = TempDir::new().unwrap();
    folder.write_sharded(dir.path(), 5);
    let sharded = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(single.identity().unwrap(), sharded.identity().unwrap());
    assert_eq!(single.tensor_bytes(), sharded.tensor_bytes());
    for (name, draft) in &folder.tensors {
        assert_eq!(values(&sharded.load(name, &draft.shape).unwrap()), draft.values(), "{name}");
    }
}

#[test]
fn a_weight_reads_the_files_pages_and_maps_no_more_than_itself() {
    // An odd number of BF16 values before them would misalign what follows, so the writer sorts by dtype; half the
    // tensors are BF16 to see both kinds.
    let mut folder = Folder::v3(512, 64);
    for (_, draft) in folder.tensors.iter_mut().step_by(2) {
        *draft = draft.clone().into_bf16();
    }
    let (dir, checkpoint) = open(&folder);
    let path = dir.path().canonicalize().unwrap().join("model.safetensors");
    assert!(mapped_ranges(&path).is_empty());
    let name = "model.layers.1.mlp.experts.2.down_proj.weight";
    let weight = checkpoint.load(name, &[512, 64]).unwrap();
    let ranges = mapped_ranges(&path);
    let bytes = folder.tensors[name].bytes.len();
    let mapped: usize = ranges.iter().map(std::ops::Range::len).sum();
    assert!(weight.is_mapped() && mapped < bytes + 2 * 4096, "{mapped} bytes are mapped for {bytes}");
    assert!(ranges.iter().any(|range| range.contains(&(weight.data_ptr() as usize))));
    drop(weight);
    assert!(mapped_ranges(&path).is_empty());
}

#[test]
fn a_misaligned_tensor_is_copied() {
    let folder = Folder::small();
    let dir = TempDir::new().unwrap();
    folder.write(dir.path());
    // A header one byte longer moves every tensor off its alignment.
    let path = dir.path().join("model.safetensors");
    let file = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap());
    let (header, data) = file[8..].split_at(length as usize);
    let moved = [&(length + 1).to_le_bytes()[..], header, b" ", data].concat();
    std::fs::write(&path, moved).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    for (name, draft) in &folder.tensors {
        let weight = checkpoint.load(name, &draft.shape).unwrap();
        assert!(!weight.is_mapped());
        assert_eq!(values(&weight), draft.values(), "{name}");
    }
}

#[test]
fn half_precision_stays_half_precision_until_asked() {
    let mut folder = Folder::small();
    let name = "model.layers.0.self_attn.o_proj.weight";
    let draft = folder.tensors[name].clone();
    folder.tensors.insert(name.to_owned(), draft.clone().into_bf16());
    let (_dir, checkpoint) = open(&folder);
    let weight = checkpoint.load(name, &draft.shape).unwrap();
    assert_eq!((weight.kind(), weight.is_mapped()), (Kind::BFloat16, true));
    let same = weight.to(Kind::BFloat16, Device::Cpu);
    assert!(same.is_mapped());
    let wide = same.to(Kind::Float, Device::Cpu);
    assert!(!wide.is_mapped());
    let rounded: Vec<f32> = draft.values().into_iter().map(|value| half::bf16::from_f32(value).to_f32()).collect();
    assert_eq!(values(&wide), rounded);
}

#[test]
fn fp8_of_sizes_that_are_no_multiple_of_a_block() {
    let folder = Folder::v3(259, 131).in_fp8();
    let (_dir, checkpoint) = open(&folder);
    for (name, draft) in &folder.tensors {
        let Some(scales) = folder.tensors.get(&format!("{name}_scale_inv")) else { continue };
        let [rows, cols] = draft.shape[..] else { panic!("{name}") };
        let (scales, scale_cols) = (scales.values(), cols.div_ceil(128));
        let plain: Vec<f32> = (0..rows * cols)
            .map(|i| fp8::decode_e4m3(draft.bytes[i]) * scales[i / cols / 128 * scale_cols + i % cols / 128])
            .collect();
        let weight = checkpoint.load(name, &draft.shape).unwrap();
        assert_eq!((weight.kind(), weight.is_mapped()), (Kind::Float, false));
        assert_eq!(values(&weight), plain, "{name}");
    }
    assert_eq!(checkpoint.expert_bytes(), 3 * 259 * 131 + 3 * 3 * 2 * 4);
}

#[test]
fn a_tied_head_is_the_embedding_even_if_the_file_has_another() {
    let mut folder = Folder::small();
    folder.config["tie_word_embeddings"] = json!(true);
    let (_dir, with_head) = open(&folder);
    let embedding = folder.tensors["model.embed_tokens.weight"].values();
    assert_eq!(values(&with_head.load("lm_head.weight", &[16, 8]).unwrap()), embedding);
    folder.tensors.remove("lm_head.weight");
    let (_dir, without) = open(&folder);
    assert_eq!(values(&without.load("lm_head.weight", &[16, 8]).unwrap()), embedding);
    assert_eq!(with_head.identity().unwrap(), without.identity().unwrap());
}

#[test]
fn a_multi_token_prediction_module_is_one_layer_more_with_experts_of_its_own() {
    let folder = Folder::small_with_mtp();
    let (_dir, checkpoint) = open(&folder);
    let config = checkpoint.config();
    assert_eq!((config.layers(), config.mtp_layer()), (3, Some(2)));
    assert_eq!(config.moe_layers().collect::<Vec<_>>(), [1, 2]);
    let name = "model.layers.2.mlp.experts.3.up_proj.weight";
    assert_eq!(values(&checkpoint.load(name, &[4, 8]).unwrap()), folder.tensors[name].values());
    assert!(checkpoint.load("model.layers.2.eh_proj.weight", &[8, 16]).is_ok());
    // The second embedding and head are not read, and do not count.
    assert!(checkpoint.load("model.layers.2.embed_tokens.weight", &[16, 8]).is_err());
    let mut without_copies = folder;
    without_copies.tensors.retain(|name, _| !name.contains("layers.2.embed") && !name.contains("shared_head.head"));
    let (_dir, lean) = open(&without_copies);
    assert_eq!(lean.identity().unwrap(), checkpoint.identity().unwrap());
    assert_eq!(lean.tensor_bytes(), checkpoint.tensor_bytes());
}

#[test]
fn multi_token_prediction_is_off_where_config_or_files_have_none() {
    let (_dir, plain) = open(&Folder::small());
    let mut unannounced = Folder::small_with_mtp();
    unannounced.config["num_nextn_predict_layers"] = json!(0);
    let (_dir, unannounced) = open(&unannounced);
    // transformers saves no such tensors; a config that was cut to fewer layers leaves whole blocks behind.
    let mut cut = Folder::small_with_mtp();
    cut.tensors.retain(|name, _| !name.contains("layers.2") || name.contains("self_attn") || name.contains("mlp"));
    let (_dir, cut) = open(&cut);
    for (checkpoint, lacks) in [(&plain, false), (&unannounced, false), (&cut, true)] {
        assert_eq!(checkpoint.lacks_mtp(), lacks);
        assert_eq!((checkpoint.config().layers(), checkpoint.config().mtp_layer()), (2, None));
        assert_eq!(checkpoint.identity().unwrap(), plain.identity().unwrap());
    }
}

#[test]
fn a_model_without_query_compression_and_one_with_biases() {
    let mut folder = Folder::small();
    folder.config["q_lora_rank"] = json!(null);
    folder.tensors.retain(|name, _| !name.contains(".q_"));
    for layer in 0..2 {
        folder.add(&format!("model.layers.{layer}.self_attn.q_proj.weight"), &[12, 8]);
    }
    open(&folder);
    folder.config["attention_bias"] = json!(true);
    for layer in 0..2 {
        folder.add(&format!("model.layers.{layer}.self_attn.kv_a_proj_with_mqa.bias"), &[7]);
        folder.add(&format!("model.layers.{layer}.self_attn.o_proj.bias"), &[8]);
    }
    open(&folder);
}

#[test]
fn an_identity_tells_configs_and_weights_apart_but_not_spellings() {
    let folder = Folder::small();
    let identity = |folder: &Folder| open(folder).1.identity().unwrap();
    let original = identity(&folder);
    assert_eq!(original.config_digest.len(), 64);

    let mut respelt = folder.clone();
    respelt.config["rope_parameters"] = json!({"rope_theta": 10000, "rope_type": "default"});
    respelt.config.as_object_mut().unwrap().remove("rope_theta");
    respelt.config["max_position_embeddings"] = json!(128);
    assert_eq!(identity(&respelt), original);

    let mut scaled = folder.clone();
    scaled.config["routed_scaling_factor"] = json!(2.0);
    let scaled = identity(&scaled);
    assert_ne!(scaled.config_digest, original.config_digest);
    assert_eq!(scaled.checkpoint_digest, original.checkpoint_digest);

    let mut retrained = folder;
    retrained.tensors.insert("model.norm.weight".to_owned(), Draft::floats(&[8], 99));
    assert_ne!(identity(&retrained).checkpoint_digest, original.checkpoint_digest);
}

#[test]
fn asking_for_another_shape_or_name_is_an_error() {
    let (_dir, checkpoint) = open(&Folder::small());
    let error = checkpoint.load("model.norm.weight", &[9]).unwrap_err().to_string();
    assert!(error.contains("model.norm.weight") && error.contains("expected [9]"), "{error}");
    assert!(checkpoint.load("model.abnorm.weight", &[8]).is_err());
}
