//! Writing one safetensors file, tensor by tensor: the header goes first, so the tensors must be
//! known by then, but none of them in memory.

use std::{
    collections::VecDeque,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use safetensors::tensor::{Metadata, TensorInfo};
use tch::Tensor;

use super::{dtype::Dtype, tensor_memory::with_bytes};
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
}

/// A complete file as a manifest lists it.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) size: u64,
    pub(crate) blake3: String,
}

/// A safetensors file that is being written.
#[derive(Debug)]
pub(crate) struct SafetensorsWriter {
    path: PathBuf,
    file: BufWriter<File>,
    hash: blake3::Hasher,
    size: u64,
    awaited: VecDeque<TensorSpec>,
    /// Elements of the first awaited tensor that are written already.
    done: u64,
}

impl SafetensorsWriter {
    /// Creates `name` in the temporary folder `dir` and writes its header; errors name it as it
    /// will be called in `target`.
    pub(crate) fn create(
        dir: &Path,
        target: &Path,
        name: &str,
        tensors: Vec<TensorSpec>,
    ) -> Result<Self> {
        let path = target.join(name);
        let header = header(&path, &tensors)?;
        let file = File::create_new(dir.join(name)).map_err(Error::io(&path))?;
        let mut writer = Self {
            path,
            file: BufWriter::with_capacity(1 << 20, file),
            hash: blake3::Hasher::new(),
            size: 0,
            awaited: tensors.into(),
            done: 0,
        };
        writer.put(&(header.len() as u64).to_le_bytes())?;
        writer.put(&header)?;
        writer.skip_empty();
        Ok(writer)
    }

    /// Appends rows of the first tensor that is not complete, which must be `name`.
    pub(crate) fn append(&mut self, name: &str, rows: &Tensor) -> Result<()> {
        let Some(tensor) = self.awaited.front() else {
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
        let bad = with_bytes(rows, |bytes| -> Result<_> {
            let bad = dtype.first_non_finite(bytes);
            if bad.is_none() {
                self.put(bytes)?;
            }
            Ok(bad)
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
            self.awaited.pop_front();
            self.done = 0;
            self.skip_empty();
        }
        Ok(())
    }

    /// Whether every tensor has been written.
    pub(crate) fn is_complete(&self) -> bool {
        self.awaited.is_empty()
    }

    /// Ends the file; who publishes its folder makes it durable.
    pub(crate) fn finish(mut self) -> Result<Written> {
        if let Some(tensor) = self.awaited.front() {
            return Err(self.wrong(format!("{} was not written", tensor.name)));
        }
        self.file.flush().map_err(Error::io(&self.path))?;
        Ok(Written { size: self.size, blake3: self.hash.finalize().to_hex().to_string() })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        self.file.write_all(bytes).map_err(Error::io(&self.path))
    }

    /// Tensors without elements need no rows.
    fn skip_empty(&mut self) {
        while self.awaited.front().is_some_and(|tensor| tensor.size() == 0) {
            self.awaited.pop_front();
        }
    }

    fn wrong(&self, message: String) -> Error {
        Error::Write { path: self.path.clone(), message }
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
