//! A tokenizer for the golden models, which have none.
//!
//! In: nothing. Out: a byte-level `tokenizer.json` that fits their 160 logits. Never here: a trained vocabulary.

use std::{fs, path::Path};

use serde_json::{Map, Value, json};

/// Single bytes beyond ASCII: enough for é, ü and €.
const BYTES: [u8; 6] = [0xc3, 0xa9, 0xbc, 0xe2, 0x82, 0xac];
/// Several characters at once, as real vocabularies have them; some begin in one part of JSON and end in another.
const WORDS: [&str; 16] =
    ["{\"", "\":", "\": ", "\",", ", \"", "\"}", "[]", "},", "true", "null", "  ", "12", "007", "yes", "no", "the "];

/// Writes a tokenizer into a golden model's folder. Ids 0 to 2 are special (the golden configs end answers with 1 and, in
/// some, 2); the last ids of the model have no token.
pub fn write_tokenizer(folder: &Path) {
    let letters = (0x20..0x7f).chain([b'\n', b'\t', b'\r']).chain(BYTES).map(|byte| vec![byte]);
    let tokens = letters.chain(WORDS.map(|word| word.as_bytes().to_vec()));
    let vocab: Map<String, Value> =
        (3u32..).zip(tokens).map(|(id, bytes)| (bytes.into_iter().map(spelling).collect(), json!(id))).collect();
    let special = |(id, content): (u32, &str)| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    let added = [(0, "<bos>"), (1, "<eos>"), (2, "<end>")].map(special);
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added,
        "normalizer": null, "pre_tokenizer": byte_level, "decoder": byte_level, "post_processor": null,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [],
        },
    });
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).expect("a file in the model's folder");
}

/// A byte as byte-level vocabularies spell it (GPT-2's table).
fn spelling(byte: u8) -> char {
    let visible = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if visible(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&other| !visible(other)).count();
    char::from_u32(0x100 + before as u32).expect("far below the surrogates")
}
