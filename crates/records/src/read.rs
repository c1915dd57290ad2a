use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::Path;

use dromedary_files::JsonlReader;
use serde::de::DeserializeOwned;

use crate::array::ArrayReader;
use crate::{Error, Result};

const BUFFER_BYTES: usize = 1 << 18;
const GZIP: &[u8] = b"\x1f\x8b";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

type Source = Box<dyn BufRead + Send>;

/// The rows of a file, one in memory at a time; see [`read_rows`].
pub struct Rows<T> {
    format: Format<T>,
}

enum Format<T> {
    Array(ArrayReader<Source>),
    Lines(JsonlReader<Source, T>),
}

impl<T> fmt::Debug for Rows<T> {
    fn fmt(&self, text: &mut fmt::Formatter<'_>) -> fmt::Result {
        let format = match self.format {
            Format::Array(_) => "Array",
            Format::Lines(_) => "Lines",
        };
        text.debug_struct("Rows").field("format", &format).finish_non_exhaustive()
    }
}

/// Reads the rows of a JSON array or of a JSONL file, plain or compressed by gzip or zstd.
///
/// The content tells which it is, whatever the file's name: Dromedary writes JSONL into `.json`
/// files. An empty file has no rows. Errors name the file and the row (array) or line (JSONL);
/// after one whose [`is_bad_row`](Error::is_bad_row) is true the next row follows, after any
/// other nothing does.
///
/// # Errors
/// [`Error::File`] where the file cannot be opened, [`Error::Read`] where its beginning cannot be
/// decompressed.
pub fn read_rows<T: DeserializeOwned>(path: impl AsRef<Path>) -> Result<Rows<T>> {
    let path = path.as_ref().to_owned();
    let read_error = |source| Error::Read { path: path.clone(), source };
    let file = File::open(&path)
        .map_err(|source| dromedary_files::Error::Read { path: path.clone(), source })?;
    let mut source = decompressed(file).map_err(read_error)?;
    let head = head(&mut source).map_err(read_error)?;
    let format = if head.last() == Some(&b'[') {
        Format::Array(ArrayReader::new(source, path))
    } else {
        let lines: Source = Box::new(Cursor::new(head).chain(source));
        Format::Lines(JsonlReader::new(lines, path))
    };
    Ok(Rows { format })
}

fn decompressed(file: File) -> io::Result<Source> {
    let mut file = BufReader::with_capacity(BUFFER_BYTES, file);
    let magic = file.fill_buf()?;
    if magic.starts_with(GZIP) {
        let plain = flate2::bufread::MultiGzDecoder::new(file);
        Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, plain)))
    } else if magic.starts_with(ZSTD) {
        let plain = zstd::Decoder::with_buffer(file)?;
        Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, plain)))
    } else {
        Ok(Box::new(file))
    }
}

/// Reads up to the first byte that is neither mark nor white space.
fn head(source: &mut Source) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    for byte in source.bytes() {
        let byte = byte?;
        head.push(byte);
        let is_mark = head.len() <= BYTE_ORDER_MARK.len() && BYTE_ORDER_MARK.starts_with(&head);
        if !is_mark && !byte.is_ascii_whitespace() {
            break;
        }
    }
    Ok(head)
}

impl<T: DeserializeOwned> Iterator for Rows<T> {
    type Item = Result<T>;

    fn next(&mut self) -> Option<Result<T>> {
        match &mut self.format {
            Format::Array(array) => array.next_row(),
            Format::Lines(lines) => {
                Some(lines.next()?.map(|(_line, row)| row).map_err(Error::from))
            }
        }
    }
}
