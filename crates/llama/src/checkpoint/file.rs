//! One safetensors file, read with `pread`. Nothing is mapped: a file that another program
//! truncates under a map would end the process with a signal.

use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use tch::Tensor;

use super::{dtype::Dtype, header, tensor_memory::filled};
use crate::error::{Error, Result};

/// One read: large enough for network file systems, small enough to be checked from the cache.
const CHUNK: usize = 4 << 20;

/// A tensor as the header describes it.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) dtype: safetensors::Dtype,
    pub(crate) shape: Vec<i64>,
    /// Where its bytes begin in the file.
    begin: u64,
    pub(crate) len: u64,
}

/// An open safetensors file with a valid header.
#[derive(Debug)]
pub(crate) struct SafetensorsFile {
    path: PathBuf,
    file: File,
    size: u64,
    header_hash: blake3::Hash,
    entries: BTreeMap<String, Entry>,
    counters: Counters,
}

/// What [`ReadCounters`] is taken from.
#[derive(Debug, Default)]
struct Counters {
    reads: AtomicU64,
    bytes_read: AtomicU64,
    bytes_copied: AtomicU64,
}

/// What was read of the tensors of a checkpoint since it was opened.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct ReadCounters {
    /// Calls of `pread`.
    pub reads: u64,
    /// Bytes that they gave.
    pub bytes_read: u64,
    /// Bytes that became part of a tensor: less, where a rank takes its columns out of whole rows.
    pub bytes_copied: u64,
}

impl ReadCounters {
    /// The sum over two files.
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            reads: self.reads + other.reads,
            bytes_read: self.bytes_read + other.bytes_read,
            bytes_copied: self.bytes_copied + other.bytes_copied,
        }
    }
}

impl SafetensorsFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
        // Opening a named pipe would wait for a writer.
        if !metadata.is_file() {
            return Err(Error::Header {
                path: path.into(),
                message: "it is no regular file".into(),
            });
        }
        let file = File::open(path).map_err(Error::io(path))?;
        let size = file.metadata().map_err(Error::io(path))?.len();
        let header = header::read(&file, size, path)?;
        let entries = header::entries(&header.metadata)
            .into_iter()
            .map(|(name, info)| {
                let (begin, end) = info.data_offsets;
                let entry = Entry {
                    dtype: info.dtype,
                    shape: info.shape.iter().map(|size| *size as i64).collect(),
                    begin: header.data_start + begin as u64,
                    len: (end - begin) as u64,
                };
                (name, entry)
            })
            .collect();
        Ok(Self {
            path: path.to_path_buf(),
            file,
            size,
            header_hash: header.hash,
            entries,
            counters: Counters::default(),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn header_hash(&self) -> &blake3::Hash {
        &self.header_hash
    }

    pub(crate) fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }

    pub(crate) fn counters(&self) -> ReadCounters {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ReadCounters {
            reads: value(&self.counters.reads),
            bytes_read: value(&self.counters.bytes_read),
            bytes_copied: value(&self.counters.bytes_copied),
        }
    }

    fn count_copied(&self, bytes: usize) {
        self.counters.bytes_copied.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries
            .get(name)
            .ok_or_else(|| Error::NoSuchTensor { path: self.path.clone(), name: name.to_string() })
    }

    /// Rows of a tensor (its first dimension), in the stored type.
    pub(crate) fn read_rows(&self, name: &str, rows: Range<i64>) -> Result<Tensor> {
        let (entry, dtype) = self.weight(name)?;
        let all = entry.shape.first().copied().unwrap_or(1);
        let row_bytes = if all == 0 { 0 } else { entry.len / all as u64 };
        let mut shape = entry.shape.clone();
        if let Some(first) = shape.first_mut() {
            *first = rows.end - rows.start;
        }
        let begin = entry.begin + rows.start as u64 * row_bytes;
        filled(&shape, dtype.kind(), |bytes| {
            let mut done = 0;
            for chunk in bytes.chunks_mut(CHUNK) {
                self.pread(chunk, begin + done)?;
                self.count_copied(chunk.len());
                self.check_finite(name, dtype, chunk, done)?;
                done += chunk.len() as u64;
            }
            Ok(())
        })
    }

    /// Columns of a matrix (its second dimension), in the stored type. Whole rows are read, in
    /// chunks: a read per row would be thousands of small ones.
    pub(crate) fn read_columns(&self, name: &str, columns: Range<i64>) -> Result<Tensor> {
        let (entry, dtype) = self.weight(name)?;
        let &[rows, all] = entry.shape.as_slice() else {
            return Err(Error::ShardMismatch {
                name: name.to_string(),
                dim: 1,
                expected: columns.end,
                got: entry.shape.clone(),
            });
        };
        let row_bytes = all as usize * dtype.size();
        let (from, to) =
            (columns.start as usize * dtype.size(), columns.end as usize * dtype.size());
        let shape = [rows, columns.end - columns.start];
        if row_bytes == 0 || to == from {
            return filled(&shape, dtype.kind(), |_| Ok(()));
        }
        let mut buffer = vec![0; CHUNK.div_ceil(row_bytes) * row_bytes];
        filled(&shape, dtype.kind(), |bytes| {
            let (mut read, mut written) = (0, 0);
            for slices in bytes.chunks_mut(buffer.len() / row_bytes * (to - from)) {
                let chunk = &mut buffer[..slices.len() / (to - from) * row_bytes];
                self.pread(chunk, entry.begin + read)?;
                for (slice, row) in slices.chunks_mut(to - from).zip(chunk.chunks(row_bytes)) {
                    slice.copy_from_slice(&row[from..to]);
                }
                self.count_copied(slices.len());
                self.check_finite(name, dtype, slices, written)?;
                read += chunk.len() as u64;
                written += slices.len() as u64;
            }
            Ok(())
        })
    }

    /// The first bytes of a tensor, at most `max`.
    pub(crate) fn read_head(&self, entry: &Entry, max: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; entry.len.min(max as u64) as usize];
        self.pread(&mut bytes, entry.begin)?;
        Ok(bytes)
    }

    fn weight(&self, name: &str) -> Result<(&Entry, Dtype)> {
        let entry = self.entry(name)?;
        let dtype = Dtype::of_safetensors(entry.dtype).ok_or_else(|| Error::Header {
            path: self.path.clone(),
            message: format!("tensor {name} is {}, not F32, F16 or BF16", entry.dtype),
        })?;
        Ok((entry, dtype))
    }

    fn pread(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        self.file.read_exact_at(bytes, at).map_err(|source| match source.kind() {
            // The header was right when the file was opened: someone cut it since.
            std::io::ErrorKind::UnexpectedEof => Error::Truncated {
                path: self.path.clone(),
                expected: self.size,
                got: self.file.metadata().map_or(0, |metadata| metadata.len()),
            },
            _ => Error::Io { path: self.path.clone(), source },
        })?;
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        self.counters.bytes_read.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// A NaN in one weight makes every output NaN, far from its cause: it is named here, where the
    /// bytes are still in the cache.
    fn check_finite(&self, name: &str, dtype: Dtype, bytes: &[u8], offset: u64) -> Result<()> {
        match dtype.first_non_finite(bytes) {
            None => Ok(()),
            Some((at, value)) => Err(Error::NonFinite {
                path: self.path.clone(),
                name: name.to_string(),
                element: offset / dtype.size() as u64 + at as u64,
                value,
            }),
        }
    }
}
