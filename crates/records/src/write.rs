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
        Ok(RowWriter { path: path.to_owned(), sink, format, rows: 0 })
    }

    /// Writes one row.
    ///
    /// # Errors
    /// [`Error::Write`] where it has no JSON form, [`Error::File`] where the disk is full.
    pub fn write(&mut self, row: &impl Serialize) -> Result<()> {
        let row = self.encoder().encode(row)?;
        self.write_encoded(&row)
    }

    /// What encodes the rows of this file, on several threads for example.
    pub fn encoder(&self) -> RowEncoder {
        RowEncoder { path: self.path.clone(), format: self.format }
    }

    /// Writes a row that the [`encoder`](RowWriter::encoder) of this file has made.
    ///
    /// # Errors
    /// [`Error::File`] where the disk is full.
    pub fn write_encoded(&mut self, row: &EncodedRow) -> Result<()> {
        let before = match (self.format, self.rows) {
            (Format::Lines, _) => "",
            (Format::Array, 0) => "[",
            (Format::Array, _) => ",",
        };
        self.rows += 1;
        self.sink
            .write_all(before.as_bytes())
            .and_then(|()| self.sink.write_all(&row.text))
            .map_err(Error::write(&self.path))
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

/// What most rows take, so that their text seldom moves while it grows.
const ROW_BYTES: usize = 1024;

/// Encodes rows for a [`RowWriter`].
#[derive(Clone, Debug)]
pub struct RowEncoder {
    path: PathBuf,
    format: Format,
}

/// A row as it stands in its file.
#[derive(Clone, Debug)]
pub struct EncodedRow {
    text: Vec<u8>,
}

impl RowEncoder {
    /// The row as the file will have it.
    ///
    /// # Errors
    /// [`Error::Write`] where it has no JSON form.
    pub fn encode(&self, row: &impl Serialize) -> Result<EncodedRow> {
        let encoded = match self.format {
            Format::Array => indented(row),
            Format::Lines => serde_json::to_vec(row).map(|mut text| {
                text.push(b'\n');
                text
            }),
        };
        let text = encoded.map_err(|error| Error::write(&self.path)(error.into()))?;
        Ok(EncodedRow { text })
    }
}

/// A row on lines of its own, as an element of an array.
fn indented(row: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut text = Vec::with_capacity(ROW_BYTES);
    text.extend_from_slice(b"\n  ");
    let mut formatter = PrettyFormatter::with_indent(b"  ");
    // As if within an array: what that writes is written by the file.
    formatter.begin_array(&mut io::sink()).map_err(serde_json::Error::io)?;
    row.serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter))?;
    Ok(text)
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
