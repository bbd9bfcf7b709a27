//! Each way a checkpoint can be broken gets its one clear error, naming the file and the tensor, and nothing is opened.

use std::fs;
use std::path::Path;

use crate::fixture::{Draft, Folder};
use conclave_model::checkpoint::{Checkpoint, Error};
use safetensors::tensor::Dtype;
use serde_json::json;
use tempfile::TempDir;

const EXPERT: &str = "model.layers.1.mlp.experts.3.up_proj.weight";

fn refused(dir: &Path) -> Error {
    Checkpoint::open(dir).expect_err("this checkpoint is broken")
}

/// The error of a folder changed before it was written.
fn spoilt(change: impl FnOnce(&mut Folder)) -> Error {
    let dir = TempDir::new().unwrap();
    let mut folder = Folder::small();
    change(&mut folder);
    folder.write(dir.path());
    refused(dir.path())
}

#[track_caller]
fn says(error: &Error, parts: &[&str]) {
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "{message}\nshould mention {part}");
    }
}

#[test]
fn a_missing_shard() {
    let dir = TempDir::new().unwrap();
    Folder::small().write_sharded(dir.path(), 3);
    fs::remove_file(dir.path().join("model-00002-of-00003.safetensors")).unwrap();
    let error = refused(dir.path());
    assert!(matches!(error, Error::MissingShard { .. }));
    says(&error, &["model-00002-of-00003.safetensors", "missing", "model.embed_tokens.weight"]);
}

#[test]
fn a_multi_token_prediction_module_that_is_not_whole() {
    let eh_proj = "model.layers.2.eh_proj.weight";
    let expert = "model.layers.2.mlp.experts.3.up_proj.weight";
    for missing in ["model.layers.2.shared_head.norm.weight", "model.layers.2.self_attn.o_proj.weight", eh_proj, expert]
    {
        let error = spoilt(|folder| {
            *folder = Folder::small_with_mtp();
            folder.tensors.remove(missing);
        });
        says(&error, &["model.safetensors", missing, "missing"]);
    }
    let error = spoilt(|folder| {
        *folder = Folder::small_with_mtp();
        folder.add(eh_proj, &[8, 8]);
    });
    assert!(matches!(error, Error::WrongShape { .. }));
    says(&error, &[eh_proj, "[8, 8]", "[8, 16]"]);
}

#[test]
fn a_truncated_file() {
    let dir = TempDir::new().unwrap();
    Folder::small().write(dir.path());
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for (keep, part) in
        [(whole.len() - 1, "tensor model."), (header + 1, "tensor "), (header - 1, "the header"), (3, "the header")]
    {
        fs::write(&path, &whole[..keep]).unwrap();
        let error = refused(dir.path());
        assert!(matches!(error, Error::Truncated { actual, .. } if actual == keep as u64), "{error}");
        says(&error, &["model.safetensors", "truncated", part]);
    }
}

#[test]
fn a_truncated_shard() {
    let dir = TempDir::new().unwrap();
    Folder::small().write_sharded(dir.path(), 2);
    let path = dir.path().join("model-00001-of-00002.safetensors");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    says(&refused(dir.path()), &["model-00001-of-00002.safetensors", "truncated"]);
}

#[test]
fn a_header_that_is_too_large() {
    let dir = TempDir::new().unwrap();
    Folder::small().write(dir.path());
    let path = dir.path().join("model.safetensors");
    for length in [(32 << 20) + 1, u64::MAX] {
        let mut file = length.to_le_bytes().to_vec();
        file.extend([b' '; 100]);
        fs::write(&path, file).unwrap();
        let error = refused(dir.path());
        assert!(matches!(error, Error::HeaderTooLarge { bytes, .. } if bytes == length));
        says(&error, &["model.safetensors", "header", "limit is 33554432"]);
    }
}

#[test]
fn a_header_that_is_no_header() {
    let dir = TempDir::new().unwrap();
    Folder::small().write(dir.path());
    let path = dir.path().join("model.safetensors");
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!("{{\"x\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":{offsets}}}}}")
    };
    let headers = [
        "not json".to_owned(),
        "{\"x\": 1}".to_owned(),
        entry("F32", "[2]", "[0, 4]"),
        entry("F32", "[2]", "[4, 12]"),
        entry("F32", "[18446744073709551615, 2]", "[0, 8]"),
        entry("F99", "[2]", "[0, 8]"),
        "[".repeat(100_000),
    ];
    for header in headers {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.extend([0; 8]);
        fs::write(&path, file).unwrap();
        let error = refused(dir.path());
        assert!(matches!(error, Error::BadHeader { .. }), "{error}");
        says(&error, &["model.safetensors", "bad safetensors header"]);
    }
}

#[test]
fn sizes_near_the_end_of_u64_do_not_wrap_around() {
    let dir = TempDir::new().unwrap();
    Folder::small().write(dir.path());
    let size = (1u64 << 61) - 1;
    let entries: Vec<String> = (0..8)
        .map(|i| {
            format!(
                "\"{i}\":{{\"dtype\":\"U8\",\"shape\":[{size}],\"data_offsets\":[{},{}]}}",
                i * size,
                (i + 1) * size
            )
        })
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    fs::write(dir.path().join("model.safetensors"), file).unwrap();
    let error = refused(dir.path());
    assert!(matches!(error, Error::Truncated { .. }), "{error}");
}

#[test]
fn bytes_after_the_last_tensor() {
    let dir = TempDir::new().unwrap();
    Folder::small().write(dir.path());
    let path = dir.path().join("model.safetensors");
    let mut file = fs::read(&path).unwrap();
    file.extend([0; 5]);
    fs::write(&path, file).unwrap();
    says(&refused(dir.path()), &["model.safetensors", "5 bytes after the last tensor"]);
}

#[test]
fn a_git_lfs_pointer() {
    let dir = TempDir::new().unwrap();
    Folder::small().write(dir.path());
    fs::write(dir.path().join("model.safetensors"), "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        .unwrap();
    says(&refused(dir.path()), &["model.safetensors", "Git LFS pointer"]);
}

#[test]
fn a_wrong_shape() {
    let error = spoilt(|folder| folder.add(EXPERT, &[8, 4]));
    assert!(matches!(error, Error::WrongShape { .. }));
    says(&error, &["model.safetensors", EXPERT, "[8, 4]", "expected [4, 8]"]);
}

#[test]
fn a_wrong_dtype() {
    let as_integers = |folder: &mut Folder, name: &str| folder.tensors.get_mut(name).unwrap().dtype = Dtype::I32;
    let error = spoilt(|folder| as_integers(folder, "model.layers.0.self_attn.o_proj.weight"));
    assert!(matches!(error, Error::WrongDtype { .. }));
    says(&error, &["model.safetensors", "model.layers.0.self_attn.o_proj.weight", "I32", "F32, BF16 or F16"]);
}

#[test]
fn fp8_weights_that_the_config_says_nothing_of() {
    let error = spoilt(|folder| {
        *folder = Folder::small().in_fp8();
        folder.config.as_object_mut().unwrap().remove("quantization_config");
    });
    assert!(matches!(error, Error::WrongDtype { .. }));
    says(&error, &["F8_E4M3", "expected F32, BF16 or F16"]);
}

#[test]
fn an_fp8_norm() {
    let error = spoilt(|folder| {
        *folder = Folder::small().in_fp8();
        folder
            .tensors
            .insert("model.norm.weight".to_owned(), Draft { dtype: Dtype::F8_E4M3, shape: vec![8], bytes: vec![0; 8] });
    });
    says(&error, &["model.norm.weight", "F8_E4M3", "expected F32, BF16 or F16"]);
}

#[test]
fn fp8_scales_that_are_missing_or_wrong() {
    let scale = format!("{EXPERT}_scale_inv");
    let with_scale = |change: &dyn Fn(&mut Folder)| {
        spoilt(|folder| {
            *folder = Folder::small().in_fp8();
            change(folder);
        })
    };
    let missing = with_scale(&|folder| drop(folder.tensors.remove(&scale)));
    assert!(matches!(missing, Error::MissingExpert { layer: 1, expert: 3, .. }));
    says(&missing, &["model.safetensors", &scale]);
    says(&with_scale(&|folder| folder.add(&scale, &[1, 2])), &[&scale, "[1, 2]", "expected [1, 1]"]);
    let coded = with_scale(&|folder| folder.tensors.get_mut(&scale).unwrap().dtype = Dtype::I32);
    says(&coded, &[&scale, "I32", "expected F32 or BF16"]);
}

#[test]
fn a_missing_expert() {
    let error = spoilt(|folder| drop(folder.tensors.remove(EXPERT)));
    assert!(matches!(error, Error::MissingExpert { layer: 1, expert: 3, .. }));
    says(&error, &["model.safetensors", "expert 3 of layer 1", EXPERT]);
}

#[test]
fn a_missing_expert_of_a_sharded_checkpoint() {
    let dir = TempDir::new().unwrap();
    let mut folder = Folder::small();
    folder.tensors.remove(EXPERT);
    folder.write_sharded(dir.path(), 2);
    says(&refused(dir.path()), &["model.safetensors.index.json", "expert 3 of layer 1", EXPERT]);
}

#[test]
fn any_other_missing_tensor() {
    for name in Folder::small().tensors.keys().filter(|name| !name.contains(".experts.")) {
        let error = spoilt(|folder| drop(folder.tensors.remove(name)));
        assert!(matches!(error, Error::MissingTensor { .. }), "{error}");
        says(&error, &["model.safetensors", name]);
    }
}

#[test]
fn a_tensor_that_the_index_promises_and_the_shard_lacks() {
    let dir = TempDir::new().unwrap();
    let folder = Folder::small();
    folder.write_sharded(dir.path(), 2);
    let index_path = dir.path().join("model.safetensors.index.json");
    let mut index: serde_json::Value = serde_json::from_str(&fs::read_to_string(&index_path).unwrap()).unwrap();
    index["weight_map"]["surplus.weight"] = json!("model-00002-of-00002.safetensors");
    fs::write(&index_path, index.to_string()).unwrap();
    says(&refused(dir.path()), &["model-00002-of-00002.safetensors", "surplus.weight is missing"]);
}

#[test]
fn an_index_that_points_out_of_the_folder() {
    let dir = TempDir::new().unwrap();
    Folder::small().write_sharded(dir.path(), 1);
    for place in ["../model.safetensors", "/etc/passwd", "..", "", "sub/model.safetensors"] {
        let index = json!({"weight_map": {"model.norm.weight": place}});
        fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        let error = refused(dir.path());
        assert!(matches!(error, Error::BadIndex { .. }), "{error}");
        says(&error, &["model.safetensors.index.json", "model.norm.weight"]);
    }
}

#[test]
fn an_index_that_is_no_index() {
    let dir = TempDir::new().unwrap();
    Folder::small().write_sharded(dir.path(), 1);
    for index in ["", "[]", "{\"weight_map\": []}", "{\"weight_map\": {\"a\": 1}}"] {
        fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        says(&refused(dir.path()), &["model.safetensors.index.json"]);
    }
}

#[test]
fn a_folder_with_pickled_weights_only() {
    let dir = TempDir::new().unwrap();
    Folder::small().write(dir.path());
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    says(&refused(dir.path()), &["no model.safetensors"]);
    fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    says(&refused(dir.path()), &["no model.safetensors", "pytorch_model.bin is not read"]);
}

#[test]
fn a_config_that_cannot_be_served() {
    for (key, value, part) in [
        ("model_type", json!("llama"), "model_type \"llama\" is not supported"),
        ("quantization_config", json!({"quant_method": "gptq"}), "quantization_config.quant_method = gptq"),
        ("num_experts_per_tok", json!(0), "num_experts_per_tok is 0, out of range: 1 to 4"),
    ] {
        let error = spoilt(|folder| folder.config[key] = value);
        assert!(matches!(error, Error::Config(_)));
        says(&error, &["config.json", part]);
    }
    says(&refused(Path::new("/nowhere")), &["/nowhere/config.json"]);
}
