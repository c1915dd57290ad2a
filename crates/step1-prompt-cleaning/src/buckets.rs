use std::io::{self, BufWriter, Read, Seek, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tempfile::SpooledTempFile;

use crate::{Error, Result};

/// A bucket that grows beyond this goes to disk, so that all of them together hold 36 MB.
const BUCKET_MEMORY: usize = 128 * 1024;
const BUCKETS: usize = 256;
const BUFFER: usize = 16 * 1024;
const SHIFT: u32 = u128::BITS - BUCKETS.ilog2();

/// No more buckets than this are in memory at once, however many threads there are.
const MAX_AT_ONCE: usize = 16;

/// Rows that come in any order and go in the order of their keys, with little memory: by the first
/// bits of the key into buckets, each of which is later sorted alone.
///
/// The buckets are nameless files of the output's folder, which the system removes with the
/// process, however that ends.
pub(crate) struct KeyedBuckets {
    buckets: Vec<BufWriter<SpooledTempFile>>,
    rows: u64,
    folder: PathBuf,
}

/// A row that comes out of a bucket.
pub(crate) struct Entry<T> {
    pub(crate) key: u128,
    /// What was given with it.
    pub(crate) number: u64,
    pub(crate) row: T,
}

/// A row as buckets hold it: encoding it is most of the work, and any thread can do it.
pub(crate) struct Spilled {
    key: u128,
    bytes: Vec<u8>,
}

impl Spilled {
    /// A row with a text of so many bytes; keys should be evenly distributed.
    pub(crate) fn new(key: u128, row: &impl Serialize, text: usize) -> postcard::Result<Spilled> {
        // Beside the text there are a few numbers.
        let bytes = postcard::to_extend(row, Vec::with_capacity(text + 64))?;
        Ok(Spilled { key, bytes })
    }
}

impl KeyedBuckets {
    /// Buckets on the disk that `output` will be written to.
    pub(crate) fn beside(output: &Path) -> KeyedBuckets {
        let folder = folder_of(output);
        let file = || tempfile::spooled_tempfile_in(BUCKET_MEMORY, &folder);
        let bucket = || BufWriter::with_capacity(BUFFER, file());
        let buckets = std::iter::repeat_with(bucket).take(BUCKETS).collect();
        KeyedBuckets { buckets, rows: 0, folder }
    }

    /// How many rows there are.
    pub(crate) fn rows(&self) -> u64 {
        self.rows
    }

    /// Adds a row and its number.
    pub(crate) fn push(&mut self, number: u64, row: postcard::Result<Spilled>) -> Result<()> {
        self.rows += 1;
        row.map_err(io::Error::other)
            .and_then(|row| {
                // The shift leaves a number below BUCKETS.
                write_row(&mut self.buckets[(row.key >> SHIFT) as usize], number, &row)
            })
            .map_err(|source| Error::Spill { folder: self.folder.clone(), source })
    }

    /// Hands `take` what `work` makes of each bucket, in the order of the keys; `work` is done by
    /// all threads. The rows stay in the buckets.
    pub(crate) fn for_each_in_order<R: Send>(
        &mut self,
        work: impl Fn(&Bucket) -> Result<R> + Sync,
        mut take: impl FnMut(R) -> Result<()> + Send,
    ) -> Result<()> {
        let at_once = rayon::current_num_threads().min(MAX_AT_ONCE);
        let folder = &self.folder;
        let make = |file: &mut BufWriter<SpooledTempFile>| {
            let bucket = Bucket::read(file)
                .map_err(|source| Error::Spill { folder: folder.clone(), source })?;
            work(&bucket)
        };
        let mut made = Vec::new();
        for files in self.buckets.chunks_mut(at_once) {
            let (taken, next) = rayon::join(
                || made.into_iter().try_for_each(&mut take),
                || files.par_iter_mut().map(make).collect::<Result<Vec<R>>>(),
            );
            taken?;
            made = next?;
        }
        made.into_iter().try_for_each(take)
    }
}

/// The folder that a file is or will be in.
pub(crate) fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The key in 16 bytes, the number in 8, the length of the row in 8, the row.
fn write_row(bucket: &mut impl Write, number: u64, row: &Spilled) -> io::Result<()> {
    bucket.write_all(&row.key.to_le_bytes())?;
    bucket.write_all(&number.to_le_bytes())?;
    bucket.write_all(&(row.bytes.len() as u64).to_le_bytes())?;
    bucket.write_all(&row.bytes)
}

/// The rows of one bucket.
pub(crate) struct Bucket {
    bytes: Vec<u8>,
    /// In the order of the keys; where each lies.
    rows: Vec<Entry<Range<usize>>>,
}

impl Bucket {
    fn read(bucket: &mut BufWriter<SpooledTempFile>) -> io::Result<Bucket> {
        bucket.flush()?;
        let file = bucket.get_mut();
        let length = file.stream_position()?;
        file.rewind()?;
        let mut bytes = Vec::with_capacity(usize::try_from(length).map_err(io::Error::other)? + 1);
        file.read_to_end(&mut bytes)?;
        let (mut rows, mut at) = (Vec::new(), 0);
        while at < bytes.len() {
            let row = row_at(&bytes, at).ok_or(io::ErrorKind::UnexpectedEof)?;
            at = row.row.end;
            rows.push(row);
        }
        rows.sort_by_key(|entry| entry.key);
        Ok(Bucket { bytes, rows })
    }

    /// The rows in the order of their keys, and those with the same key in the order in which they
    /// came.
    pub(crate) fn rows<'b, T: Deserialize<'b>>(&'b self) -> impl Iterator<Item = Entry<T>> {
        self.rows.iter().map(|Entry { key, number, row }| {
            let row = postcard::from_bytes(&self.bytes[row.clone()]);
            // Nobody else can write to a nameless file.
            Entry { key: *key, number: *number, row: row.expect("a row is read as it was written") }
        })
    }
}

/// The row that begins there.
fn row_at(bytes: &[u8], at: usize) -> Option<Entry<Range<usize>>> {
    let rest = bytes.get(at..)?;
    let (key, rest) = rest.split_first_chunk()?;
    let (number, rest) = rest.split_first_chunk()?;
    let (len, rest) = rest.split_first_chunk()?;
    let start = bytes.len() - rest.len();
    let end = start.checked_add(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
    let row = (end <= bytes.len()).then_some(start..end)?;
    Some(Entry { key: u128::from_le_bytes(*key), number: u64::from_le_bytes(*number), row })
}
