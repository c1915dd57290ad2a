//! Writing one safetensors file, tensor by tensor: the header goes first, so the tensors must be
//! known by then, but none of them in memory.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufWriter, Write},
    ops::Range,
    path::{Path, PathBuf},
};

use safetensors::tensor::{Metadata, TensorInfo};
use tch::Tensor;

use super::{dtype::Dtype, tensor_memory::with_bytes, tensors::blocks};
use crate::error::{Error, Result};

/// A tensor that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// The type that it is stored in.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<i64>,
}

impl TensorSpec {
    /// Bytes of its elements.
    pub fn size(&self) -> u64 {
        self.shape.iter().product::<i64>() as u64 * self.dtype.size() as u64
    }

    /// All rows in blocks of about `max_bytes`, each a multiple of `unit` rows.
    pub(crate) fn blocks(&self, unit: i64, max_bytes: usize) -> impl Iterator<Item = Range<i64>> {
        let rows = self.shape.first().copied().unwrap_or(1);
        blocks(rows, self.size().checked_div(rows as u64).unwrap_or(0), unit, max_bytes)
    }
}

/// A complete file as a manifest lists it.
#[derive(Debug)]
pub struct Written {
    /// Its bytes.
    pub size: u64,
    /// Their hash, in hexadecimal digits.
    pub blake3: String,
}

/// A file whose bytes are hashed on their way to the disk.
#[derive(Debug)]
pub(super) struct HashedFile {
    file: BufWriter<File>,
    hash: blake3::Hasher,
    size: u64,
}

impl HashedFile {
    /// Creates a file; errors name it as it will be called, `target`.
    pub(super) fn create(path: &Path, target: &Path) -> Result<Self> {
        let file = File::create_new(path).map_err(Error::io(target))?;
        let file = BufWriter::with_capacity(1 << 20, file);
        Ok(Self { file, hash: blake3::Hasher::new(), size: 0 })
    }

    pub(super) fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        self.file.write_all(bytes)
    }

    pub(super) fn finish(mut self, target: &Path) -> Result<Written> {
        self.file.flush().map_err(Error::io(target))?;
        Ok(Written { size: self.size, blake3: self.hash.finalize().to_hex().to_string() })
    }
}

/// The tensors that a file still waits for, in their order.
#[derive(Debug)]
pub(super) struct Awaited {
    path: PathBuf,
    tensors: VecDeque<TensorSpec>,
    /// Elements of the first one that are written already.
    done: u64,
    /// All tensors of the file.
    count: usize,
}

impl Awaited {
    pub(super) fn new(path: &Path, tensors: Vec<TensorSpec>) -> Self {
        let count = tensors.len();
        let mut awaited = Self { path: path.into(), tensors: tensors.into(), done: 0, count };
        awaited.skip_empty();
        awaited
    }

    /// Gives `put` the bytes of rows of the first tensor, which must be `name`.
    pub(super) fn accept(
        &mut self,
        name: &str,
        rows: &Tensor,
        put: impl FnOnce(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let Some(tensor) = self.tensors.front() else {
            return Err(self.wrong(format!("{name} comes after the last tensor")));
        };
        let (dtype, kind) = (tensor.dtype, rows.f_kind()?);
        let missing = tensor.size() / dtype.size() as u64 - self.done;
        let is_rows = match (rows.size().split_first(), tensor.shape.split_first()) {
            (Some((_, got)), Some((_, expected))) => got == expected,
            (got, expected) => got.is_none() && expected.is_none(),
        };
        if tensor.name != name || kind != dtype.kind() || !is_rows || rows.numel() as u64 > missing
        {
            let message = format!(
                "expected rows of {} {dtype} {:?}, got {name} {kind:?} {:?}",
                tensor.name,
                tensor.shape,
                rows.size()
            );
            return Err(self.wrong(message));
        }
        let bad = with_bytes(rows, |bytes| match dtype.first_non_finite(bytes) {
            None => put(bytes).map(|()| None),
            bad => Ok(bad),
        })??;
        if let Some((at, value)) = bad {
            return Err(Error::NonFinite {
                path: self.path.clone(),
                name: name.to_string(),
                element: self.done + at as u64,
                value,
            });
        }
        self.done += rows.numel() as u64;
        if rows.numel() as u64 == missing {
            self.tensors.pop_front();
            self.done = 0;
            self.skip_empty();
        }
        Ok(())
    }

    /// Whether every tensor has been written.
    pub(super) fn is_complete(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Tensors up to the one that is written now.
    pub(super) fn begun(&self) -> usize {
        self.count - self.tensors.len().saturating_sub(1)
    }

    /// Fails if a tensor is missing.
    pub(super) fn finish(&self) -> Result<()> {
        match self.tensors.front() {
            Some(tensor) => Err(self.wrong(format!("{} was not written", tensor.name))),
            None => Ok(()),
        }
    }

    /// Tensors without elements need no rows.
    fn skip_empty(&mut self) {
        while self.tensors.front().is_some_and(|tensor| tensor.size() == 0) {
            self.tensors.pop_front();
        }
    }

    fn wrong(&self, message: String) -> Error {
        Error::Write { path: self.path.clone(), message }
    }
}

/// A safetensors file that is being written, tensor by tensor, in the order that was announced.
#[derive(Debug)]
pub struct SafetensorsWriter {
    path: PathBuf,
    file: HashedFile,
    awaited: Awaited,
}

impl SafetensorsWriter {
    /// Creates `name` in the temporary folder `dir` and writes its header; errors name it as it
    /// will be called in `target`.
    ///
    /// # Errors
    /// [`Error::Io`], such as a file of that name; [`Error::Write`] for tensors that no header holds.
    pub fn create(dir: &Path, target: &Path, name: &str, tensors: Vec<TensorSpec>) -> Result<Self> {
        let path = target.join(name);
        let header = header(&path, &tensors)?;
        let mut file = HashedFile::create(&dir.join(name), &path)?;
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(Error::io(&path))?;
        file.write_all(&header).map_err(Error::io(&path))?;
        let awaited = Awaited::new(&path, tensors);
        Ok(Self { path, file, awaited })
    }

    /// Appends rows of the first tensor that is not complete, which must be `name`.
    ///
    /// # Errors
    /// [`Error::Write`] for another tensor, data type or shape; [`Error::NonFinite`]; [`Error::Io`].
    pub fn append(&mut self, name: &str, rows: &Tensor) -> Result<()> {
        let (file, path) = (&mut self.file, &self.path);
        self.awaited.accept(name, rows, |bytes| file.write_all(bytes).map_err(Error::io(path)))
    }

    /// Whether every tensor has been written.
    pub(crate) fn is_complete(&self) -> bool {
        self.awaited.is_complete()
    }

    /// Ends the file; who publishes its folder makes it durable.
    ///
    /// # Errors
    /// [`Error::Write`] if a tensor is missing, [`Error::Io`].
    pub fn finish(self) -> Result<Written> {
        self.awaited.finish()?;
        self.file.finish(&self.path)
    }
}

/// The header's bytes, padded to a multiple of 8 so that the tensors behind it are aligned.
fn header(path: &Path, tensors: &[TensorSpec]) -> Result<Vec<u8>> {
    let wrong = |message| Error::Write { path: path.to_path_buf(), message };
    let mut end = 0;
    let infos = tensors
        .iter()
        .map(|tensor| {
            let start = end;
            end += tensor.size() as usize;
            let info = TensorInfo {
                dtype: tensor.dtype.to_safetensors(),
                shape: tensor.shape.iter().map(|size| *size as usize).collect(),
                data_offsets: (start, end),
            };
            (tensor.name.clone(), info)
        })
        .collect();
    // transformers refuses files that do not say which framework's layout they have.
    let format = [("format".to_string(), "pt".to_string())].into_iter().collect();
    let metadata = Metadata::new(Some(format), infos).map_err(|e| wrong(e.to_string()))?;
    let mut bytes = serde_json::to_vec(&metadata).map_err(|e| wrong(e.to_string()))?;
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    Ok(bytes)
}
