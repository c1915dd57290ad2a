use std::io::{self, BufWriter, Read, Seek, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::SpooledTempFile;

use crate::{Error, Result};

/// A bucket that grows beyond this goes to disk, so that all of them together hold 32 MB.
const BUCKET_MEMORY: usize = 256 * 1024;
const BUCKETS: usize = 128;
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

impl<T: Serialize + DeserializeOwned> KeyedBuckets<T> {
    /// Buckets on the disk that `output` will be written to.
    pub(crate) fn beside(output: &Path) -> KeyedBuckets<T> {
        let folder = folder_of(output);
        let bucket = || BufWriter::new(tempfile::spooled_tempfile_in(BUCKET_MEMORY, &folder));
        let buckets = std::iter::repeat_with(bucket).take(BUCKETS).collect();
        KeyedBuckets { buckets, folder, rows: PhantomData }
    }

    /// Adds a row; keys should be evenly distributed.
    pub(crate) fn push(&mut self, key: u128, row: &T) -> Result<()> {
        // The shift leaves a number below BUCKETS.
        let bucket = &mut self.buckets[(key >> SHIFT) as usize];
        write_row(bucket, key, row)
            .map_err(|source| Error::Spill { folder: self.folder.clone(), source })
    }

    /// The rows in the order of their keys.
    pub(crate) fn into_ordered(self) -> impl Iterator<Item = Result<T>> {
        let KeyedBuckets { buckets, folder, .. } = self;
        buckets.into_iter().flat_map(move |bucket| {
            let (rows, error) = match read_sorted(bucket) {
                Ok(rows) => (rows, None),
                Err(source) => (Vec::new(), Some(Error::Spill { folder: folder.clone(), source })),
            };
            rows.into_iter().map(|(_, row)| Ok(row)).chain(error.map(Err))
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

/// The key in 16 bytes, the length of the row in 8, the row as JSON.
fn write_row(bucket: &mut impl Write, key: u128, row: &impl Serialize) -> io::Result<()> {
    let json = serde_json::to_vec(row)?;
    bucket.write_all(&key.to_le_bytes())?;
    bucket.write_all(&(json.len() as u64).to_le_bytes())?;
    bucket.write_all(&json)
}

fn read_sorted<T: DeserializeOwned>(
    bucket: BufWriter<SpooledTempFile>,
) -> io::Result<Vec<(u128, T)>> {
    let mut file = bucket.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let mut rest = bytes.as_slice();
    let mut rows = Vec::new();
    while !rest.is_empty() {
        rows.push(read_row(&mut rest)?);
    }
    rows.sort_by_key(|&(key, _)| key);
    Ok(rows)
}

fn read_row<T: DeserializeOwned>(bytes: &mut &[u8]) -> io::Result<(u128, T)> {
    let (mut key, mut len) = ([0; 16], [0; 8]);
    bytes.read_exact(&mut key)?;
    bytes.read_exact(&mut len)?;
    let len = usize::try_from(u64::from_le_bytes(len)).map_err(io::Error::other)?;
    let json = bytes.split_off(..len).ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((u128::from_le_bytes(key), serde_json::from_slice(json)?))
}
