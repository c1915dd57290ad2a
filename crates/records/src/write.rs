use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use dromedary_files::AtomicFile;
use flate2::write::GzEncoder;
use serde::Serialize;
use serde_json::ser::{Formatter as _, PrettyFormatter};

use crate::{Error, Result};

/// Writes rows to a file that appears when it is whole.
///
/// Dropped without [`finish`](RowWriter::finish), nothing appears and an older file stays.
#[derive(Debug)]
pub struct RowWriter {
    path: PathBuf,
    sink: Sink,
    format: Format,
    rows: u64,
    /// Holds the rows that are written one by one.
    single: EncodedRows,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// Indented by two, as Dromedary's files are.
    Array,
    Lines,
}

/// The file behind its compression.
enum Sink {
    Plain(AtomicFile),
    Gzip(GzEncoder<AtomicFile>),
    Zstd(zstd::Encoder<'static, AtomicFile>),
}

impl RowWriter {
    /// Begins a JSONL file where the name ends in `.jsonl` or `.ndjson`, else a JSON array; in
    /// either case `.gz` or `.zst` behind that compresses it.
    ///
    /// # Errors
    /// [`Error::File`] where the file cannot be created.
    pub fn create(path: impl AsRef<Path>) -> Result<RowWriter> {
        let format = format_of_name(path.as_ref());
        RowWriter::begin(path.as_ref(), format)
    }

    /// Begins a JSON array, compressed where the name ends in `.gz` or `.zst`.
    ///
    /// # Errors
    /// As [`create`](RowWriter::create).
    pub fn json_array(path: impl AsRef<Path>) -> Result<RowWriter> {
        RowWriter::begin(path.as_ref(), Format::Array)
    }

    /// Begins a JSONL file, compressed where the name ends in `.gz` or `.zst`.
    ///
    /// # Errors
    /// As [`create`](RowWriter::create).
    pub fn jsonl(path: impl AsRef<Path>) -> Result<RowWriter> {
        RowWriter::begin(path.as_ref(), Format::Lines)
    }

    fn begin(path: &Path, format: Format) -> Result<RowWriter> {
        let sink = Sink::create(path)?;
        let single = EncodedRows::new(path, format);
        Ok(RowWriter { path: path.to_owned(), sink, format, rows: 0, single })
    }

    /// Writes one row.
    ///
    /// # Errors
    /// [`Error::Write`] where it has no JSON form, [`Error::File`] where the disk is full.
    pub fn write(&mut self, row: &impl Serialize) -> Result<()> {
        self.single.clear();
        self.single.push(row)?;
        put(&mut self.sink, &mut self.rows, &self.single).map_err(Error::write(&self.path))
    }

    /// What encodes rows of this file, on several threads for example.
    pub fn encoder(&self) -> RowEncoder {
        RowEncoder { path: self.path.clone(), format: self.format }
    }

    /// Writes rows that the [`encoder`](RowWriter::encoder) of this file has made.
    ///
    /// # Errors
    /// [`Error::File`] where the disk is full.
    pub fn write_encoded(&mut self, rows: &EncodedRows) -> Result<()> {
        put(&mut self.sink, &mut self.rows, rows).map_err(Error::write(&self.path))
    }

    /// Completes the file and lets it appear; returns how many rows it has.
    ///
    /// # Errors
    /// [`Error::File`]; nothing appears and an older file stays.
    pub fn finish(mut self) -> Result<u64> {
        let end = match (self.format, self.rows) {
            (Format::Lines, _) => "",
            (Format::Array, 0) => "[]\n",
            (Format::Array, _) => "\n]\n",
        };
        self.sink.write_all(end.as_bytes()).map_err(Error::write(&self.path))?;
        let file = self.sink.into_file().map_err(Error::write(&self.path))?;
        file.commit()?;
        Ok(self.rows)
    }
}

/// Writes rows behind `written` others.
fn put(sink: &mut Sink, written: &mut u64, rows: &EncodedRows) -> io::Result<()> {
    if rows.rows == 0 {
        return Ok(());
    }
    let before = match (rows.format, *written) {
        (Format::Lines, _) => "",
        (Format::Array, 0) => "[",
        (Format::Array, _) => ",",
    };
    *written += rows.rows;
    sink.write_all(before.as_bytes())?;
    sink.write_all(&rows.text)
}

/// Encodes rows for a [`RowWriter`].
#[derive(Clone, Debug)]
pub struct RowEncoder {
    path: PathBuf,
    format: Format,
}

impl RowEncoder {
    /// No rows yet.
    pub fn rows(&self) -> EncodedRows {
        EncodedRows::new(&self.path, self.format)
    }
}

/// Rows as they stand in their file.
#[derive(Clone, Debug)]
pub struct EncodedRows {
    path: PathBuf,
    format: Format,
    text: Vec<u8>,
    rows: u64,
}

impl EncodedRows {
    fn new(path: &Path, format: Format) -> EncodedRows {
        EncodedRows { path: path.to_owned(), format, text: Vec::new(), rows: 0 }
    }

    fn clear(&mut self) {
        self.text.clear();
        self.rows = 0;
    }

    /// Adds a row.
    ///
    /// # Errors
    /// [`Error::Write`] where it has no JSON form; the rows are of no use then.
    pub fn push(&mut self, row: &impl Serialize) -> Result<()> {
        let pushed = match self.format {
            Format::Array => {
                let before = if self.rows == 0 { "\n  " } else { ",\n  " };
                self.text.extend_from_slice(before.as_bytes());
                write_indented(&mut self.text, row)
            }
            Format::Lines => serde_json::to_writer(&mut self.text, row).map(|()| {
                self.text.push(b'\n');
            }),
        };
        self.rows += 1;
        pushed.map_err(|error| Error::write(&self.path)(error.into()))
    }
}

/// A row on lines of its own, as an element of an array.
fn write_indented(text: &mut Vec<u8>, row: &impl Serialize) -> serde_json::Result<()> {
    let mut formatter = PrettyFormatter::with_indent(b"  ");
    // As if within an array: what that writes is written by the file.
    formatter.begin_array(&mut io::sink()).map_err(serde_json::Error::io)?;
    row.serialize(&mut serde_json::Serializer::with_formatter(text, formatter))
}

fn has_ending(path: &Path, endings: &[&str]) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| endings.iter().any(|end| extension.eq_ignore_ascii_case(end)))
}

fn format_of_name(path: &Path) -> Format {
    let bare = if has_ending(path, &["gz", "zst"]) { path.with_extension("") } else { path.into() };
    if has_ending(&bare, &["jsonl", "ndjson"]) { Format::Lines } else { Format::Array }
}

impl Sink {
    fn create(path: &Path) -> Result<Sink> {
        let file = AtomicFile::create(path)?;
        if has_ending(path, &["gz"]) {
            Ok(Sink::Gzip(GzEncoder::new(file, flate2::Compression::default())))
        } else if has_ending(path, &["zst"]) {
            let encoder = zstd::Encoder::new(file, zstd::DEFAULT_COMPRESSION_LEVEL);
            encoder.map(Sink::Zstd).map_err(Error::write(path))
        } else {
            Ok(Sink::Plain(file))
        }
    }

    fn into_file(self) -> io::Result<AtomicFile> {
        match self {
            Sink::Plain(file) => Ok(file),
            Sink::Gzip(encoder) => encoder.finish(),
            Sink::Zstd(encoder) => encoder.finish(),
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Sink::Plain(file) => file.write(bytes),
            Sink::Gzip(encoder) => encoder.write(bytes),
            Sink::Zstd(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Sink::Plain(file) => file.flush(),
            Sink::Gzip(encoder) => encoder.flush(),
            Sink::Zstd(encoder) => encoder.flush(),
        }
    }
}

impl fmt::Debug for Sink {
    fn fmt(&self, text: &mut fmt::Formatter<'_>) -> fmt::Result {
        text.write_str(match self {
            Sink::Plain(_) => "Plain",
            Sink::Gzip(_) => "Gzip",
            Sink::Zstd(_) => "Zstd",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_tells_the_format() {
        for (name, format) in [
            ("a.json", Format::Array),
            ("a.json.gz", Format::Array),
            ("a.jsonl", Format::Lines),
            ("a.JSONL.ZST", Format::Lines),
            ("a.ndjson", Format::Lines),
            ("jsonl", Format::Array),
            ("a", Format::Array),
        ] {
            assert_eq!(format_of_name(Path::new(name)), format, "{name}");
        }
    }
}
