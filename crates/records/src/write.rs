use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use dromedary_files::AtomicFile;
use flate2::write::GzEncoder;
use serde::Serialize;

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
        let text = match self.format {
            Format::Array => serde_json::to_string_pretty(row).map(|text| {
                let comma = if self.rows == 0 { "[" } else { "," };
                // Within strings of JSON a line end is escaped, so these are all between tokens.
                format!("{comma}\n  {}", text.replace('\n', "\n  "))
            }),
            Format::Lines => serde_json::to_string(row).map(|text| text + "\n"),
        };
        let text = text.map_err(|error| Error::write(&self.path)(error.into()))?;
        self.rows += 1;
        self.sink.write_all(text.as_bytes()).map_err(Error::write(&self.path))
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
