use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    path::{Path, PathBuf},
};

use dromedary_files::{AtomicDir, FileEntry, Manifest};
use serde_json::json;
use tch::Tensor;

use super::{
    index::{INDEX, SINGLE},
    output::{SafetensorsWriter, TensorSpec, Written},
};
use crate::error::{Error, Result};

/// What belongs to a model beside its weights, where it is there.
const COMPANIONS: [&str; 12] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE.txt",
];

/// The companions that are the same whatever the layout of the weights.
pub(crate) const TOKENIZER_FILES: &[&str] = COMPANIONS.as_slice().split_at(2).1;

/// The largest file that Hugging Face's tools write without being told.
pub const DEFAULT_MAX_SHARD_SIZE: u64 = 5_000_000_000;

/// Writes a checkpoint folder tensor by tensor, holding none of them.
///
/// The folder appears under its name when [`CheckpointWriter::finish`] has written everything;
/// until then it is a temporary sibling, which a dropped writer removes.
#[derive(Debug)]
pub struct CheckpointWriter {
    folder: FolderWriter,
    order: Vec<TensorSpec>,
    /// Files to come: name and tensors.
    shards: VecDeque<(String, Vec<TensorSpec>)>,
    open: Option<(String, SafetensorsWriter)>,
    index: Option<serde_json::Value>,
}

impl CheckpointWriter {
    /// Begins a folder for these tensors. Files are cut so that none holds more than
    /// `max_shard_size` bytes of tensors, except for a tensor that is larger by itself.
    ///
    /// # Errors
    /// The folder exists already, or its parent cannot be written.
    pub fn create(
        output: impl AsRef<Path>,
        mut tensors: Vec<TensorSpec>,
        max_shard_size: u64,
    ) -> Result<Self> {
        put_in_order(&mut tensors);
        Self::create_in_order(output.as_ref(), tensors, max_shard_size)
    }

    /// As [`CheckpointWriter::create`], and an older folder is there until
    /// [`CheckpointWriter::finish`] puts the new one in its place.
    ///
    /// # Errors
    /// The output is a file, or its parent cannot be written.
    pub fn replace_existing(
        output: impl AsRef<Path>,
        mut tensors: Vec<TensorSpec>,
        max_shard_size: u64,
    ) -> Result<Self> {
        put_in_order(&mut tensors);
        let folder = FolderWriter::of(output.as_ref(), AtomicDir::replace_existing(&output)?);
        Ok(Self::in_order(folder, tensors, max_shard_size))
    }

    /// As [`CheckpointWriter::create`], for tensors in an order that keeps their elements aligned.
    pub(crate) fn create_in_order(
        output: &Path,
        tensors: Vec<TensorSpec>,
        max_shard_size: u64,
    ) -> Result<Self> {
        Ok(Self::in_order(FolderWriter::create(output)?, tensors, max_shard_size))
    }

    fn in_order(folder: FolderWriter, tensors: Vec<TensorSpec>, max_shard_size: u64) -> Self {
        let shards = cut(&tensors, max_shard_size);
        let count = shards.len();
        let names = (1..=count).map(|number| match count {
            1 => SINGLE.to_string(),
            _ => format!("model-{number:05}-of-{count:05}.safetensors"),
        });
        let shards: VecDeque<_> = names.zip(shards).collect();
        let index = (count > 1).then(|| index_of(&shards));
        Self { folder, order: tensors, shards, open: None, index }
    }

    /// The tensors in the order in which they must be written.
    pub fn order(&self) -> &[TensorSpec] {
        &self.order
    }

    /// Writes the next rows (or all of them) of the next tensor of [`CheckpointWriter::order`].
    ///
    /// # Errors
    /// [`Error::Write`] for another tensor, data type or shape; [`Error::NonFinite`]; [`Error::Io`]
    /// such as a full disk.
    pub fn append(&mut self, name: &str, rows: &Tensor) -> Result<()> {
        let mut shard = match self.open.take() {
            Some(shard) => shard,
            None => self.next_shard(name)?,
        };
        shard.1.append(name, rows)?;
        if shard.1.is_complete() {
            self.close(shard)?;
        } else {
            self.open = Some(shard);
        }
        Ok(())
    }

    /// Adds a small file, such as `config.json`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add_file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.folder.add_file(name, bytes)
    }

    /// Copies configuration, tokenizer and licence of the checkpoint in `dir`, as far as they are
    /// there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn copy_companions(&mut self, dir: &Path) -> Result<()> {
        self.folder.copy_companions(dir, &COMPANIONS)
    }

    /// Copies a tokenizer: a file, or what there is of one and the licence in a folder.
    pub(crate) fn copy_tokenizer(&mut self, path: &Path) -> Result<()> {
        if path.is_dir() {
            return self.folder.copy_companions(path, TOKENIZER_FILES);
        }
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let parent = path.parent().unwrap_or(Path::new("."));
        self.folder.copy_companions(parent, &[name])
    }

    /// Writes index and manifest and gives the folder its name.
    ///
    /// # Errors
    /// [`Error::Write`] if a tensor is missing, [`Error::Io`], [`Error::Files`].
    pub fn finish(self) -> Result<()> {
        self.finish_checked(|_| Ok(()))
    }

    /// As [`CheckpointWriter::finish`]; `check` sees the folder before it gets its name, and decides
    /// whether it does.
    pub(crate) fn finish_checked<R>(mut self, check: impl FnOnce(&Path) -> Result<R>) -> Result<R> {
        if let Some((_, shard)) = self.open.take() {
            shard.finish()?; // fails: it awaits a tensor
        }
        if let Some((file, _)) = self.shards.front() {
            let message = format!("{file} was not written");
            return Err(Error::Write { path: self.folder.output, message });
        }
        if let Some(index) = self.index.take() {
            self.add_file(INDEX, format!("{index:#}\n").as_bytes())?;
        }
        self.folder.finish_checked(check)
    }

    fn next_shard(&mut self, name: &str) -> Result<(String, SafetensorsWriter)> {
        let (file, tensors) = self.shards.pop_front().ok_or_else(|| Error::Write {
            path: self.folder.output.clone(),
            message: format!("{name} comes after the last tensor"),
        })?;
        let (dir, output) = self.folder.paths();
        let writer = SafetensorsWriter::create(dir, output, &file, tensors)?;
        Ok((file, writer))
    }

    fn close(&mut self, (file, writer): (String, SafetensorsWriter)) -> Result<()> {
        self.folder.add_written(file, writer.finish()?);
        Ok(())
    }
}

/// A folder that is being written, with the entries of its manifest.
#[derive(Debug)]
pub(crate) struct FolderWriter {
    output: PathBuf,
    dir: AtomicDir,
    files: BTreeMap<String, FileEntry>,
}

impl FolderWriter {
    pub(crate) fn create(output: &Path) -> Result<Self> {
        Ok(Self::of(output, AtomicDir::create(output)?))
    }

    fn of(output: &Path, dir: AtomicDir) -> Self {
        Self { output: output.to_path_buf(), dir, files: BTreeMap::new() }
    }

    /// The temporary folder, and the one that it will be.
    pub(crate) fn paths(&self) -> (&Path, &Path) {
        (self.dir.path(), &self.output)
    }

    pub(crate) fn add_file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        fs::write(self.dir.path().join(name), bytes).map_err(Error::io(self.output.join(name)))?;
        let blake3 = blake3::hash(bytes).to_hex().to_string();
        self.add_written(name.to_string(), Written { size: bytes.len() as u64, blake3 });
        Ok(())
    }

    /// Enters a file that is in the temporary folder.
    pub(crate) fn add_written(&mut self, name: String, written: Written) {
        let Written { size, blake3 } = written;
        self.files.insert(name, FileEntry { size, blake3 });
    }

    /// Copies those of the named files that are in `dir`.
    pub(crate) fn copy_companions(&mut self, dir: &Path, names: &[&str]) -> Result<()> {
        for name in names {
            let path = dir.join(name);
            if path.is_file() {
                let bytes = fs::read(&path).map_err(Error::io(&path))?;
                self.add_file(name, &bytes)?;
            }
        }
        Ok(())
    }

    /// Writes the manifest, lets `check` look at the folder, and gives it its name.
    pub(crate) fn finish_checked<R>(self, check: impl FnOnce(&Path) -> Result<R>) -> Result<R> {
        let path = self.dir.path().to_path_buf();
        let sealed = self.dir.seal(&Manifest { files: self.files })?;
        let checked = check(&path)?;
        sealed.publish()?;
        Ok(checked)
    }
}

/// The order in which tensors are written: wider types first, so that every tensor begins at a
/// multiple of its element's size.
pub(crate) fn put_in_order(tensors: &mut [TensorSpec]) {
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.size()));
}

/// Runs of tensors that fit into a file each.
fn cut(tensors: &[TensorSpec], max_shard_size: u64) -> Vec<Vec<TensorSpec>> {
    let mut shards: Vec<Vec<TensorSpec>> = Vec::new();
    let mut room = 0;
    for tensor in tensors {
        match shards.last_mut() {
            Some(shard) if tensor.size() <= room => {
                shard.push(tensor.clone());
                room -= tensor.size();
            }
            _ => {
                shards.push(vec![tensor.clone()]);
                room = max_shard_size.saturating_sub(tensor.size());
            }
        }
    }
    shards
}

fn index_of(shards: &VecDeque<(String, Vec<TensorSpec>)>) -> serde_json::Value {
    let placed = shards.iter().flat_map(|(file, tensors)| tensors.iter().map(move |t| (t, file)));
    let total_size: u64 = placed.clone().map(|(tensor, _)| tensor.size()).sum();
    let weight_map: BTreeMap<_, _> = placed.map(|(tensor, file)| (&tensor.name, file)).collect();
    json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map })
}
