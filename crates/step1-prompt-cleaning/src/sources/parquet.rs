use std::fs::File;
use std::io::BufReader;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use polars::prelude::{
    AnyValue, Column, DataFrame, FileMetadata, FileMetadataRef, ParallelStrategy, ParquetReader,
    SerReader, StringChunked,
};

use super::{RawContent, RawRow, RawRows, Value};
use crate::{Error, Result};

/// No more rows than this are in memory at once; row groups may be as large as the file.
const SLICE: usize = 16 * 1024;

/// A file has no more rows than this for each of its bytes: one with more makes gigabytes of text
/// out of a few bytes.
const MAX_ROWS_PER_BYTE: u64 = 1000;

/// The pages of a file become no more than so many times as large: no compression of texts that
/// people wrote comes near it.
const MAX_INFLATION: u64 = 1000;

/// The rows of a parquet file, slice by slice; columns that are not asked for are not read.
pub(super) fn rows(path: &Path, columns: &[&'static str]) -> Result<RawRows> {
    let reader = SliceReader::open(path, columns)?;
    let total = reader.metadata.num_rows;
    let done = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&done);
    let mut failed = false;
    let slices = reader.slices().into_iter().map_while(move |range| {
        // What comes behind a damaged place would have wrong numbers.
        if failed {
            return None;
        }
        counted.store(range.end, Ordering::Relaxed);
        let slice = reader.read(range);
        failed = slice.is_err();
        Some(slice)
    });
    let rows = slices.flat_map(|slice| {
        let (slice, error) = match slice {
            Ok(slice) => (Some(Arc::new(slice)), None),
            Err(error) => (None, Some(Err(error))),
        };
        let rows = slice.into_iter().flat_map(|slice| {
            slice.range.clone().map(move |row| {
                let content = RawContent::Parquet(Arc::clone(&slice), row - slice.range.start);
                Ok(RawRow { number: row as u64 + 1, content })
            })
        });
        rows.chain(error)
    });
    let share = move || done.load(Ordering::Relaxed) as f64 / total.max(1) as f64;
    Ok(RawRows { rows: Box::new(rows), share: Box::new(share) })
}

/// Some rows of a file.
#[derive(Debug)]
pub(super) struct Slice {
    range: Range<usize>,
    columns: Vec<(&'static str, Cells)>,
}

#[derive(Debug)]
enum Cells {
    Text(StringChunked),
    Other(Column),
}

impl Slice {
    fn new(range: Range<usize>, mut frame: DataFrame) -> Slice {
        frame.rechunk_mut();
        let cells = |column: &Column| match column.str() {
            Ok(texts) => Cells::Text(texts.clone()),
            Err(_) => Cells::Other(column.clone()),
        };
        let columns = frame
            .columns()
            .iter()
            .filter_map(|column| Some((Value::field_name(column.name())?, cells(column))))
            .collect();
        Slice { range, columns }
    }

    pub(super) fn row(&self, index: usize) -> Value {
        let cell = |cells: &Cells| match cells {
            Cells::Text(texts) => {
                texts.get(index).map_or(Value::Null, |text| Value::Text(text.to_owned()))
            }
            Cells::Other(column) => column.get(index).map(value_of).unwrap_or_default(),
        };
        Value::Object(self.columns.iter().map(|(name, cells)| (*name, cell(cells))).collect())
    }

    /// The bytes that the row's texts will take; the same text may be the value of many rows.
    pub(super) fn bytes(&self, index: usize) -> usize {
        let bytes = |cells: &Cells| match cells {
            Cells::Text(texts) => texts.get(index).map_or(0, str::len),
            Cells::Other(_) => 0,
        };
        self.columns.iter().map(|(_, cells)| bytes(cells)).sum()
    }
}

struct SliceReader {
    path: PathBuf,
    columns: Vec<String>,
    metadata: FileMetadataRef,
    /// The same without its row groups.
    bare: FileMetadata,
}

impl SliceReader {
    fn open(path: &Path, columns: &[&'static str]) -> Result<SliceReader> {
        let file = open_file(path)?;
        let bytes =
            file.metadata().map_err(|source| Error::Open { path: path.to_owned(), source })?.len();
        let mut reader = ParquetReader::new(BufReader::new(file));
        let (metadata, found) = guarded(path, || {
            let metadata = reader.get_metadata()?.clone();
            let schema = reader.schema()?;
            Ok((metadata, schema.iter_names().map(ToString::to_string).collect::<Vec<_>>()))
        })?;
        if let Some(column) = columns.iter().find(|column| !found.iter().any(|f| f == *column)) {
            let (path, column) = (path.to_owned(), column.to_string());
            return Err(Error::MissingColumn { path, column, found });
        }
        guarded(path, || Ok(check(&metadata, bytes)))?
            .map_err(|message| Error::DamagedParquet { path: path.to_owned(), message })?;
        let columns = columns.iter().map(|&column| column.to_owned()).collect();
        let mut bare = FileMetadata::clone(&metadata);
        bare.row_groups.clear();
        bare.num_rows = 0;
        Ok(SliceReader { path: path.to_owned(), columns, metadata, bare })
    }

    /// Stretches of rows: small row groups together, large ones in parts.
    fn slices(&self) -> Vec<Range<usize>> {
        let mut slices: Vec<Range<usize>> = Vec::new();
        for group in &self.metadata.row_groups {
            let start = slices.last().map_or(0, |slice| slice.end);
            let end = start + group.num_rows();
            match slices.last_mut() {
                Some(last) if end - last.start <= SLICE => last.end = end,
                _ => slices
                    .extend((start..end).step_by(SLICE).map(|start| start..end.min(start + SLICE))),
            }
        }
        slices
    }

    /// What the footer says of the row groups that hold these rows, as if there were no others, and
    /// the place of the first row in them: without a thread pool, the reader decodes all groups
    /// that it knows of.
    fn groups_of(&self, range: &Range<usize>) -> (FileMetadata, usize) {
        let mut metadata = FileMetadata::clone(&self.bare);
        let (mut start, mut first) = (0, 0);
        for group in &self.metadata.row_groups {
            let end = start + group.num_rows();
            if start < range.end && end > range.start {
                if metadata.row_groups.is_empty() {
                    first = range.start - start;
                }
                metadata.num_rows += group.num_rows();
                metadata.row_groups.push(group.clone());
            }
            start = end;
        }
        (metadata, first)
    }

    fn read(&self, range: Range<usize>) -> Result<Slice> {
        let (metadata, first) = self.groups_of(&range);
        let mut reader = ParquetReader::new(BufReader::new(open_file(&self.path)?));
        reader.set_metadata(Arc::new(metadata));
        let frame = guarded(&self.path, || {
            reader
                .with_columns(Some(self.columns.clone()))
                .with_slice(Some((first, range.len())))
                // On this thread: the other strategies start a pool of their own, and while they
                // work this one can do nothing else.
                .read_parallel(ParallelStrategy::None)
                .finish()
        })?;
        if frame.height() != range.len() {
            let (found, expected) = (frame.height(), range.len());
            let message = format!("{found} rows where its footer says {expected}");
            return Err(Error::DamagedParquet { path: self.path.clone(), message });
        }
        guarded(&self.path, || Ok(Slice::new(range, frame)))
    }
}

fn open_file(path: &Path) -> Result<File> {
    File::open(path).map_err(|source| Error::Open { path: path.to_owned(), source })
}

/// Lets neither errors nor panics of the reader out: it trusts its files.
fn guarded<T>(path: &Path, work: impl FnOnce() -> polars::error::PolarsResult<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|source| Error::Parquet { path: path.to_owned(), source }),
        Err(_) => {
            let message = "the reader gave up on it".to_owned();
            Err(Error::DamagedParquet { path: path.to_owned(), message })
        }
    }
}

/// Whether the footer can be that of a file of so many bytes.
fn check(metadata: &FileMetadata, bytes: u64) -> std::result::Result<(), String> {
    let rows = metadata.num_rows as u64;
    let in_groups = metadata
        .row_groups
        .iter()
        .try_fold(0_usize, |sum, group| sum.checked_add(group.num_rows()))
        .ok_or("its row groups have more rows than can be counted")?;
    if in_groups as u64 != rows {
        return Err(format!("{rows} rows in all, but {in_groups} in its row groups"));
    }
    if rows > bytes.saturating_mul(MAX_ROWS_PER_BYTE) {
        return Err(format!("{rows} rows cannot be in {bytes} bytes"));
    }
    // Without a look at the data: a bomb's chunks all lie in the same place.
    let (mut chunks, mut inflated) = (0_u64, 0_u64);
    for group in &metadata.row_groups {
        for chunk in group.parquet_columns() {
            let range = chunk.byte_range();
            if range.start > range.end || range.end > bytes {
                return Err(format!("a column lies at {range:?}, but the file has {bytes} bytes"));
            }
            chunks = chunks.saturating_add(range.end - range.start);
            let size = u64::try_from(chunk.uncompressed_size());
            inflated = inflated.saturating_add(size.unwrap_or(u64::MAX));
            let flat = chunk.descriptor().descriptor.max_rep_level == 0;
            let values = chunk.num_values();
            if flat && u64::try_from(values) != Ok(group.num_rows() as u64) {
                return Err(format!("{values} values in a column of {} rows", group.num_rows()));
            }
        }
    }
    if chunks > bytes {
        return Err(format!("{chunks} bytes in its columns, but {bytes} in the file"));
    }
    if inflated > bytes.saturating_mul(MAX_INFLATION) {
        return Err(format!("{inflated} bytes out of {bytes} in the file"));
    }
    Ok(())
}

fn value_of(cell: AnyValue<'_>) -> Value {
    match cell {
        AnyValue::Null => Value::Null,
        AnyValue::String(text) => Value::Text(text.to_owned()),
        AnyValue::StringOwned(text) => Value::Text(text.to_string()),
        AnyValue::Boolean(_) => Value::Plain("a boolean"),
        AnyValue::List(elements) => {
            let first = elements.get(0).map(value_of).unwrap_or_default();
            Value::List { first: Box::new(first), len: elements.len() }
        }
        AnyValue::Struct(..) => value_of(cell.into_static()),
        AnyValue::StructOwned(parts) => {
            let (cells, fields) = *parts;
            let named = fields.iter().zip(cells).filter_map(|(field, cell)| {
                Some((Value::field_name(field.name())?, value_of(cell)))
            });
            Value::Object(named.collect())
        }
        _ => Value::Plain("a number or other plain value"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use polars::prelude::ParquetWriter;

    fn written(rows: usize) -> (FileMetadata, u64) {
        let texts: Vec<String> = (0..rows).map(|n| n.to_string()).collect();
        let columns =
            vec![Column::new("id".into(), &texts), Column::new("question".into(), &texts)];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.parquet");
        ParquetWriter::new(File::create(&path).unwrap())
            .finish(&mut DataFrame::new(rows, columns).unwrap())
            .unwrap();
        let reader = SliceReader::open(&path, &["id"]).unwrap();
        (FileMetadata::clone(&reader.metadata), path.metadata().unwrap().len())
    }

    /// As 42.parquet does it: a few pages that thousands of row groups share.
    #[test]
    fn a_bomb_is_refused_by_its_footer() {
        let (mut metadata, bytes) = written(100);
        assert_eq!(check(&metadata, bytes), Ok(()));
        let group = metadata.row_groups[0].clone();
        metadata.row_groups = vec![group; 50];
        metadata.num_rows = 5000;
        let message = check(&metadata, bytes).unwrap_err();
        assert!(message.contains("bytes in its columns"), "{message}");
        metadata.num_rows = usize::MAX;
        assert!(check(&metadata, bytes).unwrap_err().contains("in its row groups"));
    }

    #[test]
    fn more_rows_than_a_file_can_hold_are_refused() {
        let (metadata, bytes) = written(5000);
        assert_eq!(check(&metadata, bytes), Ok(()));
        assert!(check(&metadata, 4).unwrap_err().contains("cannot be in 4 bytes"));
        assert!(check(&metadata, bytes / 2).unwrap_err().contains("a column lies at"));
    }
}
