//! Checkpoints that are wrong in one way.
//!
//! In: a good folder. Out: a copy with one thing broken. Never here: a changed golden model.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

/// A copy of a checkpoint, to be broken.
#[derive(Debug)]
pub struct Copy {
    /// Where it lies.
    pub folder: PathBuf,
}

impl Copy {
    /// Copies the checkpoint's files (not what the reference made of it) from `from` to `to`.
    pub fn of(from: &Path, to: PathBuf) -> Self {
        fs::create_dir_all(&to).expect("a folder to copy into");
        for entry in fs::read_dir(from).expect("a checkpoint's folder") {
            let entry = entry.expect("a readable folder");
            if entry.path().is_file() && entry.file_name() != "expected.safetensors" {
                fs::copy(entry.path(), to.join(entry.file_name())).expect("a copied file");
            }
        }
        Self { folder: to }
    }

    /// Removes `file`.
    pub fn remove(&self, file: &str) {
        fs::remove_file(self.folder.join(file)).expect("a file to remove");
    }

    /// Cuts the last `bytes` off `file`.
    pub fn truncate(&self, file: &str, bytes: usize) {
        let mut content = self.read(file);
        content.truncate(content.len() - bytes);
        self.write(file, &content);
    }

    /// Lets `file` claim a header of `bytes`.
    pub fn claim_header(&self, file: &str, bytes: u64) {
        let mut content = self.read(file);
        content[..8].copy_from_slice(&bytes.to_le_bytes());
        self.write(file, &content);
    }

    /// Rewrites the header of `file`; the tensors' bytes stay.
    pub fn edit_header(&self, file: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        let (mut header, data) = self.parts(file);
        edit(&mut header);
        let header = serde_json::to_vec(&header).expect("JSON again");
        let length = u64::try_from(header.len()).expect("a small header").to_le_bytes();
        self.write(file, &[&length, header.as_slice(), &data].concat());
    }

    /// Changes every tensor's bytes in `file`; the header stays.
    pub fn scramble(&self, file: &str) {
        let mut content = self.read(file);
        let (_, data) = self.parts(file);
        let start = content.len() - data.len();
        // The lowest bit of each byte: other numbers, of the same size.
        content[start..].iter_mut().for_each(|byte| *byte ^= 1);
        self.write(file, &content);
    }

    /// Rewrites config.json.
    pub fn edit_config(&self, edit: impl FnOnce(&mut Map<String, Value>)) {
        let mut config = serde_json::from_slice(&self.read("config.json")).expect("config.json is an object");
        edit(&mut config);
        self.write("config.json", &serde_json::to_vec_pretty(&config).expect("JSON again"));
    }

    /// The name of the tensor that lies last in `file`.
    pub fn last_tensor(&self, file: &str) -> String {
        let (header, _) = self.parts(file);
        let tensors = header.iter().filter(|(name, _)| *name != "__metadata__");
        let last = tensors.max_by_key(|(_, tensor)| tensor["data_offsets"][1].as_u64());
        last.expect("at least one tensor").0.clone()
    }

    fn parts(&self, file: &str) -> (Map<String, Value>, Vec<u8>) {
        let content = self.read(file);
        let length = u64::from_le_bytes(content[..8].try_into().expect("eight bytes"));
        let start = 8 + usize::try_from(length).expect("a small header");
        (serde_json::from_slice(&content[8..start]).expect("a JSON header"), content[start..].to_vec())
    }

    fn read(&self, file: &str) -> Vec<u8> {
        fs::read(self.folder.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
    }

    fn write(&self, file: &str, content: &[u8]) {
        fs::write(self.folder.join(file), content).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
}
