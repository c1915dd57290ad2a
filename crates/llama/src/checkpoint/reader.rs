use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use tch::Tensor;

use super::{
    dtype::Dtype,
    file::{Entry, ReadCounters, SafetensorsFile},
    index::open_files,
    output::TensorSpec,
    tensors::{HEAD, is_derived, tensor_shapes},
};
use crate::{
    config::LlamaConfig,
    error::{Error, Result, TensorProblems},
    plan::{Shard, Slice},
};

/// Bytes of each tensor that go into the fingerprint.
const FINGERPRINT_BYTES: usize = 4096;

/// A checkpoint folder whose tensors are exactly those of its configuration.
///
/// Opening it checks names, shapes, data types, file sizes and the index, and reads no weight.
/// Reading a weight checks that it is finite.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: LlamaConfig,
    files: Vec<SafetensorsFile>,
    /// The model's tensors in the order of the forward pass, with the file that holds each.
    tensors: Vec<(String, usize)>,
    file_of: BTreeMap<String, usize>,
}

impl Checkpoint {
    /// Opens a folder with `config.json` and `model.safetensors`, or
    /// `model.safetensors.index.json` and the files that it names.
    ///
    /// # Errors
    /// Everything that is not as it should be: [`Error::WrongTensors`] lists all missing,
    /// unexpected and misshapen tensors and those of other data types; damaged, truncated and
    /// hostile files and contradictions between index and files are named.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        if !dir.is_dir() {
            let message =
                if dir.exists() { "it is not a folder" } else { "there is no such folder" };
            return Err(Error::NoCheckpoint { path: dir.into(), message: message.into() });
        }
        let config = LlamaConfig::open(dir)?;
        let files = open_files(dir)?;
        let expected = tensor_shapes(&config);
        let file_of = place(dir, &config, &files, &expected)?;
        let tensors = expected
            .into_iter()
            .map(|(name, _)| {
                let file = file_of[&name];
                (name, file)
            })
            .collect();
        Ok(Self { dir: dir.to_path_buf(), config, files, tensors, file_of })
    }

    /// The model's configuration.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model's tensors, in the order of the forward pass. A head that is tied to the
    /// embedding is not among them, whether it is stored or not.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|(name, _)| name.as_str())
    }

    /// The model's tensors as they are stored, in the order of [`Checkpoint::names`].
    ///
    /// # Errors
    /// None for a checkpoint that was opened.
    pub fn specs(&self) -> Result<Vec<TensorSpec>> {
        self.names()
            .map(|name| {
                let (dtype, shape) = (self.dtype_of(name)?, self.shape(name)?.to_vec());
                Ok(TensorSpec { name: name.to_string(), dtype, shape })
            })
            .collect()
    }

    /// The shape of a tensor.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn shape(&self, name: &str) -> Result<&[i64]> {
        Ok(&self.entry(name)?.1.shape)
    }

    /// The data type that a tensor is stored in.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn dtype_of(&self, name: &str) -> Result<Dtype> {
        let (file, entry) = self.entry(name)?;
        Dtype::of_safetensors(entry.dtype).ok_or_else(|| Error::Header {
            path: file.path().to_path_buf(),
            message: format!("tensor {name} is {}", entry.dtype),
        })
    }

    /// The data type that most parameters are stored in.
    pub fn dtype(&self) -> Dtype {
        let mut elements = BTreeMap::new();
        for (name, _) in &self.tensors {
            if let (Ok(dtype), Ok(shape)) = (self.dtype_of(name), self.shape(name)) {
                *elements.entry(dtype).or_insert(0) += shape.iter().product::<i64>();
            }
        }
        elements.into_iter().max_by_key(|(_, count)| *count).map_or(Dtype::F32, |(dtype, _)| dtype)
    }

    /// Reads a whole tensor, in the data type that it is stored in.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::NonFinite`], [`Error::Io`], [`Error::Torch`].
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let (file, entry) = self.entry(name)?;
        file.read_rows(name, 0..entry.shape[0])
    }

    /// Reads one rank's part of a tensor. Ranges of rows are read alone; for ranges of columns the
    /// whole tensor is read, in chunks, and the columns are copied out of them.
    ///
    /// # Errors
    /// As [`Checkpoint::read`], and [`Error::ShardMismatch`] for the plan of another model.
    pub fn read_slice(&self, name: &str, shard: &Shard) -> Result<Tensor> {
        let (file, entry) = self.entry(name)?;
        let fits = |dim: usize, slice: &Slice| {
            if entry.shape.get(dim) == Some(&slice.full()) {
                return Ok(slice.range());
            }
            Err(Error::ShardMismatch {
                name: name.to_string(),
                dim: dim as i64,
                expected: slice.full(),
                got: entry.shape.clone(),
            })
        };
        match shard {
            Shard::Replicated => self.read(name),
            Shard::Rows(slice) => file.read_rows(name, fits(0, slice)?),
            Shard::Columns(slice) => file.read_columns(name, fits(1, slice)?),
        }
    }

    /// A tensor in blocks of rows of about `max_bytes`, one row at least: for tools that must not
    /// hold a whole one.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`]; each block as [`Checkpoint::read`].
    pub fn read_blocks<'a>(
        &'a self,
        name: &'a str,
        max_bytes: usize,
    ) -> Result<impl Iterator<Item = Result<(Range<i64>, Tensor)>> + 'a> {
        let (file, entry) = self.entry(name)?;
        let rows = entry.shape[0];
        let row_bytes = (entry.len / rows.max(1) as u64).max(1);
        let step = (max_bytes as u64 / row_bytes).max(1) as usize;
        Ok((0..rows).step_by(step).map(move |start| {
            let range = start..rows.min(start + step as i64);
            Ok((range.clone(), file.read_rows(name, range)?))
        }))
    }

    /// What was read of the tensors of all files since they were opened.
    pub fn counters(&self) -> ReadCounters {
        self.files
            .iter()
            .map(SafetensorsFile::counters)
            .fold(ReadCounters::default(), ReadCounters::plus)
    }

    /// Bytes of the files, headers included.
    pub fn bytes_stored(&self) -> u64 {
        self.files.iter().map(SafetensorsFile::size).sum()
    }

    /// The safetensors files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(SafetensorsFile::path)
    }

    /// A hash that tells checkpoints apart without reading them: of the configuration, the
    /// tokenizer, every header, every file's size and the first 4 kB of every tensor.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = blake3::Hasher::new();
        for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"] {
            let path = self.dir.join(name);
            if path.exists() {
                let bytes = fs::read(&path).map_err(Error::io(&path))?;
                hash.update(name.as_bytes()).update(&(bytes.len() as u64).to_le_bytes());
                hash.update(&bytes);
            }
        }
        for file in &self.files {
            hash.update(file.header_hash().as_bytes()).update(&file.size().to_le_bytes());
            for entry in file.entries().values() {
                hash.update(&file.read_head(entry, FINGERPRINT_BYTES)?);
            }
        }
        Ok(hash.finalize().to_hex().to_string())
    }

    fn entry(&self, name: &str) -> Result<(&SafetensorsFile, &Entry)> {
        let no_such = || Error::NoSuchTensor { path: self.dir.clone(), name: name.to_string() };
        let file = &self.files[*self.file_of.get(name).ok_or_else(no_such)?];
        Ok((file, file.entry(name)?))
    }
}

/// Finds the file of every tensor, and collects what differs from the configuration.
fn place(
    dir: &Path,
    config: &LlamaConfig,
    files: &[SafetensorsFile],
    expected: &[(String, Vec<i64>)],
) -> Result<BTreeMap<String, usize>> {
    let mut problems = TensorProblems::default();
    let mut file_of = BTreeMap::new();
    for (name, shape) in expected {
        let found = files.iter().position(|file| file.entries().contains_key(name));
        let Some(number) = found else {
            problems.missing.push(name.clone());
            continue;
        };
        compare(name, shape, files[number].entry(name)?, &mut problems);
        file_of.insert(name.clone(), number);
    }
    let known: BTreeSet<&String> = expected.iter().map(|(name, _)| name).collect();
    for (name, entry) in files.iter().flat_map(SafetensorsFile::entries) {
        if known.contains(name) || is_derived(name) {
            continue;
        }
        if name == HEAD && config.tie_word_embeddings {
            compare(name, &[config.vocab_size, config.hidden_size], entry, &mut problems);
            tracing::warn!(
                "{}: {HEAD} is stored, but tie_word_embeddings says that the embedding is the \
                 head: it is not used",
                dir.display()
            );
            continue;
        }
        problems.unexpected.push(name.clone());
    }
    if problems.is_empty() {
        Ok(file_of)
    } else {
        Err(Error::WrongTensors { path: dir.to_path_buf(), problems })
    }
}

fn compare(name: &str, shape: &[i64], entry: &Entry, problems: &mut TensorProblems) {
    if entry.shape != shape {
        problems.misshapen.push(format!("{name} (expected {shape:?}, got {:?})", entry.shape));
    }
    if Dtype::of_safetensors(entry.dtype).is_none() {
        problems.wrong_dtype.push(format!("{name} ({})", entry.dtype));
    }
}
