use std::io::{self, BufWriter, Read, Seek, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::SpooledTempFile;

use crate::{Error, Result};

/// A bucket that grows beyond this goes to disk, so that all of them together hold 36 MB.
const BUCKET_MEMORY: usize = 256 * 1024;
const BUCKETS: usize = 128;
const BUFFER: usize = 32 * 1024;
const SHIFT: u32 = u128::BITS - BUCKETS.ilog2();

/// Rows that come in any order and go in the order of their keys, with little memory: by the first
/// bits of the key into buckets, each of which is later sorted alone.
///
/// The buckets are nameless files of the output's folder, which the system removes with the
/// process, however that ends.
pub(crate) struct KeyedBuckets<T> {
    buckets: Vec<BufWriter<SpooledTempFile>>,
    folder: PathBuf,
    rows: PhantomData<T>,
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
    json: Vec<u8>,
}

impl Spilled {
    /// A row of about so many bytes; keys should be evenly distributed.
    pub(crate) fn new(
        key: u128,
        row: &impl Serialize,
        bytes: usize,
    ) -> serde_json::Result<Spilled> {
        let mut json = Vec::with_capacity(bytes + bytes / 8 + 128);
        serde_json::to_writer(&mut json, row)?;
        Ok(Spilled { key, json })
    }
}

impl<T: Serialize + DeserializeOwned + Send> KeyedBuckets<T> {
    /// Buckets on the disk that `output` will be written to.
    pub(crate) fn beside(output: &Path) -> KeyedBuckets<T> {
        let folder = folder_of(output);
        let file = || tempfile::spooled_tempfile_in(BUCKET_MEMORY, &folder);
        let bucket = || BufWriter::with_capacity(BUFFER, file());
        let buckets = std::iter::repeat_with(bucket).take(BUCKETS).collect();
        KeyedBuckets { buckets, folder, rows: PhantomData }
    }

    /// Adds a row; keys should be evenly distributed.
    pub(crate) fn push(&mut self, key: u128, row: &T) -> Result<()> {
        self.push_spilled(0, Spilled::new(key, row, 0))
    }

    /// Adds a row that was encoded elsewhere, and its number.
    pub(crate) fn push_spilled(
        &mut self,
        number: u64,
        row: serde_json::Result<Spilled>,
    ) -> Result<()> {
        row.map_err(io::Error::from)
            .and_then(|row| {
                // The shift leaves a number below BUCKETS.
                write_row(&mut self.buckets[(row.key >> SHIFT) as usize], number, &row)
            })
            .map_err(|source| Error::Spill { folder: self.folder.clone(), source })
    }

    /// The rows bucket by bucket, each in the order of the keys; rows with the same key are in the
    /// same bucket, in the order in which they came. The rows stay in the buckets.
    pub(crate) fn ordered(&mut self) -> impl Iterator<Item = Result<Vec<Entry<T>>>> {
        let folder = &self.folder;
        self.buckets.iter_mut().map(|bucket| {
            read_sorted(bucket).map_err(|source| Error::Spill { folder: folder.clone(), source })
        })
    }

    /// The rows in the order of their keys.
    pub(crate) fn into_ordered(self) -> impl Iterator<Item = Result<T>> {
        let KeyedBuckets { buckets, folder, .. } = self;
        buckets.into_iter().flat_map(move |mut bucket| {
            let (rows, error) = match read_sorted(&mut bucket) {
                Ok(rows) => (rows, None),
                Err(source) => (Vec::new(), Some(Error::Spill { folder: folder.clone(), source })),
            };
            rows.into_iter().map(|entry| Ok(entry.row)).chain(error.map(Err))
        })
    }
}

/// The folder that a file is or will be in.
pub(crate) fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The key in 16 bytes, the number in 8, the length of the row in 8, the row as JSON.
fn write_row(bucket: &mut impl Write, number: u64, row: &Spilled) -> io::Result<()> {
    bucket.write_all(&row.key.to_le_bytes())?;
    bucket.write_all(&number.to_le_bytes())?;
    bucket.write_all(&(row.json.len() as u64).to_le_bytes())?;
    bucket.write_all(&row.json)
}

fn read_sorted<T: DeserializeOwned + Send>(
    bucket: &mut BufWriter<SpooledTempFile>,
) -> io::Result<Vec<Entry<T>>> {
    bucket.flush()?;
    let file = bucket.get_mut();
    let length = file.stream_position()?;
    file.rewind()?;
    let mut bytes = Vec::with_capacity(usize::try_from(length).map_err(io::Error::other)? + 1);
    file.read_to_end(&mut bytes)?;
    let mut rest = bytes.as_slice();
    let mut rows = Vec::new();
    while !rest.is_empty() {
        rows.push(read_row(&mut rest)?);
    }
    rows.sort_by_key(|entry| entry.key);
    let parse = |Entry { key, number, row }: Entry<&[u8]>| {
        Ok(Entry { key, number, row: serde_json::from_slice(row)? })
    };
    rows.into_par_iter().map(parse).collect()
}

fn read_row<'b>(bytes: &mut &'b [u8]) -> io::Result<Entry<&'b [u8]>> {
    let (mut key, mut number, mut len) = ([0; 16], [0; 8], [0; 8]);
    bytes.read_exact(&mut key)?;
    bytes.read_exact(&mut number)?;
    bytes.read_exact(&mut len)?;
    let len = usize::try_from(u64::from_le_bytes(len)).map_err(io::Error::other)?;
    let row = bytes.split_off(..len).ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok(Entry { key: u128::from_le_bytes(key), number: u64::from_le_bytes(number), row })
}
