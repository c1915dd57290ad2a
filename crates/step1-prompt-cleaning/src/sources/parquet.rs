use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::ops::Range;
use std::path::{Path, PathBuf};

use polars::prelude::{AnyValue, Column, DataFrame, ParallelStrategy, ParquetReader, SerReader};

use super::{Row, Rows, Value};
use crate::{Error, Result};

/// No more rows than this are in memory at once; row groups may be as large as the file.
const SLICE: usize = 16 * 1024;

/// The rows of a parquet file, slice by slice; columns that are not asked for are not read.
pub(super) fn rows(path: &Path, columns: &[&'static str]) -> Result<Rows> {
    let reader = SliceReader::open(path, columns)?;
    let slices = reader.slices()?.into_iter();
    let rows = slices.flat_map(move |slice| {
        let (rows, error) = match reader.read(slice.clone()) {
            Ok(frame) => (frame_rows(&frame, slice), None),
            Err(error) => (Vec::new(), Some(error)),
        };
        rows.into_iter().map(Ok).chain(error.map(Err))
    });
    Ok(Box::new(rows))
}

struct SliceReader {
    path: PathBuf,
    columns: Vec<String>,
}

impl SliceReader {
    fn open(path: &Path, columns: &[&'static str]) -> Result<SliceReader> {
        let columns = columns.iter().map(|&column| column.to_owned()).collect();
        let reader = SliceReader { path: path.to_owned(), columns };
        let schema = reader.parquet()?.schema().map_err(|source| reader.error(source))?;
        for column in &reader.columns {
            if !schema.contains(column) {
                return Err(Error::MissingColumn {
                    path: reader.path,
                    column: column.clone(),
                    found: schema.iter_names().map(ToString::to_string).collect(),
                });
            }
        }
        Ok(reader)
    }

    fn parquet(&self) -> Result<ParquetReader<BufReader<File>>> {
        let file = File::open(&self.path)
            .map_err(|source| Error::Open { path: self.path.clone(), source })?;
        Ok(ParquetReader::new(BufReader::new(file)))
    }

    fn error(&self, source: polars::error::PolarsError) -> Error {
        Error::Parquet { path: self.path.clone(), source }
    }

    /// Stretches of rows, none of which crosses the border of a row group.
    fn slices(&self) -> Result<Vec<Range<usize>>> {
        let mut parquet = self.parquet()?;
        let metadata = parquet.get_metadata().map_err(|source| self.error(source))?;
        let mut slices = Vec::new();
        let mut start = 0;
        for group in &metadata.row_groups {
            let end = start + group.num_rows();
            while start < end {
                let slice_end = end.min(start + SLICE);
                slices.push(start..slice_end);
                start = slice_end;
            }
        }
        Ok(slices)
    }

    fn read(&self, slice: Range<usize>) -> Result<DataFrame> {
        self.parquet()?
            .with_columns(Some(self.columns.clone()))
            .with_slice(Some((slice.start, slice.len())))
            // The other strategies decode the row groups outside the slice as well.
            .read_parallel(ParallelStrategy::RowGroups)
            .finish()
            .map_err(|source| self.error(source))
    }
}

fn frame_rows(frame: &DataFrame, slice: Range<usize>) -> Vec<Row<Value>> {
    let columns: Vec<(&'static str, &Column)> = frame
        .columns()
        .iter()
        .filter_map(|column| Some((Value::field_name(column.name())?, column)))
        .collect();
    let row = |index: usize| {
        let cell = |column: &Column| column.get(index).map(value_of).unwrap_or_default();
        let fields = columns.iter().map(|&(name, column)| (name, cell(column))).collect();
        let number = (slice.start + index) as u64 + 1;
        Row { number, content: Ok(Value::Object(fields)) }
    };
    (0..frame.height()).map(row).collect()
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
            Value::Object(named.collect::<BTreeMap<_, _>>())
        }
        _ => Value::Plain("a number or other plain value"),
    }
}
