//! One file of tensors, of the safetensors format or PyTorch's, read with `pread`. Nothing is mapped: a file that another program
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

use super::{dtype::Dtype, header, tensor_memory::filled, torch_file};
use crate::{
    error::{Error, Result},
    plan::{Shard, Slice},
};

/// One read: large enough for network file systems, small enough to be checked from the cache.
const CHUNK: usize = 4 << 20;

/// A tensor as the header describes it.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) dtype: safetensors::Dtype,
    pub(crate) shape: Vec<i64>,
    /// Where its bytes begin in the file.
    pub(super) begin: u64,
    /// Bytes of its elements.
    pub(crate) len: u64,
    /// Bytes from one row to the next; more than those of a row where the rows are parts of longer
    /// ones.
    pub(super) pitch: u64,
}

impl Entry {
    fn rows(&self) -> u64 {
        self.shape.first().map_or(1, |rows| *rows as u64)
    }

    /// Bytes of a row, which is what one index of the first dimension stands for.
    pub(super) fn row_bytes(&self) -> u64 {
        self.len.checked_div(self.rows()).unwrap_or(0)
    }
}

/// An open file whose description of its tensors is valid, and whose numbers are read when they are asked
/// for.
#[derive(Debug)]
pub struct TensorFile {
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

/// The rows and columns of one rank's part of a tensor.
pub(super) fn block_of(
    name: &str,
    shape: &[i64],
    shard: &Shard,
) -> Result<(Range<i64>, Range<i64>)> {
    let fits = |dim: usize, slice: &Slice| {
        if shape.get(dim) == Some(&slice.full()) {
            return Ok(slice.range());
        }
        Err(Error::ShardMismatch {
            name: name.to_string(),
            dim: dim as i64,
            expected: slice.full(),
            got: shape.to_vec(),
        })
    };
    let [rows, columns] = [0, 1].map(|dim| 0..shape.get(dim).copied().unwrap_or(1));
    Ok(match shard {
        Shard::Replicated => (rows, columns),
        Shard::Rows(slice) => (fits(0, slice)?, columns),
        Shard::Columns(slice) => (rows, fits(1, slice)?),
    })
}

impl TensorFile {
    /// Opens a safetensors file.
    ///
    /// # Errors
    /// [`Error::Io`], and for a header that does not describe the file.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, size) = open_regular(path)?;
        let header = header::read(&file, size, path)?;
        let entries = header::entries(&header.metadata)
            .into_iter()
            .map(|(name, info)| {
                let (begin, end) = info.data_offsets;
                let mut entry = Entry {
                    dtype: info.dtype,
                    shape: info.shape.iter().map(|size| *size as i64).collect(),
                    begin: header.data_start + begin as u64,
                    len: (end - begin) as u64,
                    pitch: 0,
                };
                entry.pitch = entry.row_bytes();
                (name, entry)
            })
            .collect();
        Ok(Self::new(path, file, size, header.hash, entries))
    }

    /// Opens a file that `torch.save` wrote of a dictionary of tensors.
    pub(crate) fn open_torch(path: &Path) -> Result<Self> {
        let (file, size) = open_regular(path)?;
        let tensors = torch_file::read(&file, size, path)?;
        Ok(Self::new(path, file, size, tensors.hash, tensors.entries))
    }

    fn new(
        path: &Path,
        file: File,
        size: u64,
        header_hash: blake3::Hash,
        entries: BTreeMap<String, Entry>,
    ) -> Self {
        let (path, counters) = (path.to_path_buf(), Counters::default());
        Self { path, file, size, header_hash, entries, counters }
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

    /// One rank's part of a tensor, in the stored type.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::ShardMismatch`] for a tensor of another shape,
    /// [`Error::NonFinite`], [`Error::Io`].
    pub fn read_slice(&self, name: &str, shard: &Shard) -> Result<Tensor> {
        let shape = &self.entry(name)?.shape;
        let (rows, columns) = block_of(name, shape, shard)?;
        if shape.len() == 1 {
            return self.read_rows(name, rows);
        }
        self.read_block(name, rows, columns)
    }

    /// Rows of a tensor (its first dimension), in the stored type.
    pub(crate) fn read_rows(&self, name: &str, rows: Range<i64>) -> Result<Tensor> {
        let (entry, dtype) = self.weight(name)?;
        let row_bytes = entry.row_bytes();
        let mut shape = entry.shape.clone();
        if let Some(first) = shape.first_mut() {
            *first = rows.end - rows.start;
        }
        let begin = entry.begin + rows.start as u64 * entry.pitch;
        if entry.pitch != row_bytes {
            return self.read_parts(name, &shape, begin, 0..row_bytes as usize);
        }
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

    /// Some columns (the second dimension) of some rows of a matrix, in the stored type. Whole rows are
    /// read, in chunks: a read per row would be thousands of small ones.
    pub(crate) fn read_block(
        &self,
        name: &str,
        rows: Range<i64>,
        columns: Range<i64>,
    ) -> Result<Tensor> {
        let (entry, dtype) = self.weight(name)?;
        let &[_, all] = entry.shape.as_slice() else {
            return Err(Error::ShardMismatch {
                name: name.to_string(),
                dim: 1,
                expected: columns.end,
                got: entry.shape.clone(),
            });
        };
        if columns == (0..all) {
            return self.read_rows(name, rows);
        }
        let (from, to) =
            (columns.start as usize * dtype.size(), columns.end as usize * dtype.size());
        let begin = entry.begin + rows.start as u64 * entry.pitch;
        let shape = [rows.end - rows.start, columns.end - columns.start];
        self.read_parts(name, &shape, begin, from..to)
    }

    /// The same bytes of some rows, of which the first begins at `begin`.
    fn read_parts(
        &self,
        name: &str,
        shape: &[i64],
        begin: u64,
        part: Range<usize>,
    ) -> Result<Tensor> {
        let (entry, dtype) = self.weight(name)?;
        let (row, pitch) = (entry.row_bytes() as usize, entry.pitch as usize);
        let length = part.end - part.start;
        if length == 0 {
            return filled(shape, dtype.kind(), |_| Ok(()));
        }
        let rows_at_once = (CHUNK / pitch).max(1);
        let mut buffer = vec![0; (rows_at_once - 1) * pitch + row];
        filled(shape, dtype.kind(), |bytes| {
            let (mut read, mut written) = (0, 0);
            for slices in bytes.chunks_mut(rows_at_once * length) {
                // Up to the end of the last row: the file may end there.
                let rows = slices.len() / length;
                let chunk = &mut buffer[..(rows - 1) * pitch + row];
                self.pread(chunk, begin + read)?;
                for (slice, row) in slices.chunks_mut(length).zip(chunk.chunks(pitch)) {
                    slice.copy_from_slice(&row[part.clone()]);
                }
                self.count_copied(slices.len());
                self.check_finite(name, dtype, slices, written)?;
                read += (rows * pitch) as u64;
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

    /// Some of a tensor's bytes as they are, at most up to its end.
    pub(crate) fn read_bytes(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>> {
        let entry = self.entry(name)?;
        let range = range.start.min(entry.len)..range.end.min(entry.len);
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.pread(&mut bytes, entry.begin + range.start)?;
        Ok(bytes)
    }

    /// Some numbers of an f32 tensor, whatever its shape.
    pub(crate) fn read_f32(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>> {
        let bytes = self.read_bytes(name, range.start as u64 * 4..range.end as u64 * 4)?;
        let (numbers, _) = bytes.as_chunks::<4>();
        Ok(numbers.iter().map(|number| f32::from_le_bytes(*number)).collect())
    }

    /// The data type of a weight.
    pub(crate) fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.weight(name)?.1)
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

fn open_regular(path: &Path) -> Result<(File, u64)> {
    let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
    // Opening a named pipe would wait for a writer.
    if !metadata.is_file() {
        return Err(Error::Header { path: path.into(), message: "it is no regular file".into() });
    }
    let file = File::open(path).map_err(Error::io(path))?;
    let size = file.metadata().map_err(Error::io(path))?.len();
    Ok((file, size))
}
