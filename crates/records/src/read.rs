use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dromedary_files::{JsonLine, JsonlReader};
use serde::de::DeserializeOwned;

use crate::elements::{Element, ElementReader, Kind};
use crate::{Error, Result};

const BUFFER_BYTES: usize = 1 << 18;
const GZIP: &[u8] = b"\x1f\x8b";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

type Source = Box<dyn BufRead + Send>;

/// The rows of a file, one in memory at a time; see [`read_rows`].
#[derive(Debug)]
pub struct Rows<T> {
    rows: RawRows,
    row: PhantomData<fn() -> T>,
}

/// The rows of a file before they are parsed; see [`read_raw_rows`].
pub struct RawRows {
    path: Arc<Path>,
    format: Format,
    progress: ReadProgress,
}

enum Format {
    Elements(ElementReader<Source>),
    Lines(JsonlReader<Source, ()>),
}

impl fmt::Debug for RawRows {
    fn fmt(&self, text: &mut fmt::Formatter<'_>) -> fmt::Result {
        let format = match self.format {
            Format::Elements(_) => "Elements",
            Format::Lines(_) => "Lines",
        };
        text.debug_struct("RawRows").field("format", &format).finish_non_exhaustive()
    }
}

/// A row that is not parsed yet: that is most of the work of reading, and any thread can do it.
#[derive(Clone, Debug)]
pub struct RawRow {
    path: Arc<Path>,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    Element(Element),
    Line(JsonLine),
}

impl RawRow {
    /// Its bytes.
    pub fn text(&self) -> &[u8] {
        match &self.content {
            Content::Element(element) => &element.text,
            Content::Line(line) => line.text(),
        }
    }

    /// The row as a value.
    ///
    /// # Errors
    /// One whose [`is_bad_row`](Error::is_bad_row) is true.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        match &self.content {
            Content::Element(element) => element.parse(&self.path),
            Content::Line(line) => Ok(line.parse(&self.path)?),
        }
    }
}

/// Reads the rows of a JSON array or of a JSONL file, plain or compressed by gzip or zstd.
///
/// The content tells which it is, whatever the file's name: Dromedary writes JSONL into `.json`
/// files. A file whose first line is a brace alone has one object, or several, over many lines. An
/// empty file has no rows. Errors name the file and the row (array) or line (JSONL); after one
/// whose [`is_bad_row`](Error::is_bad_row) is true the next row follows, after any other nothing
/// does.
///
/// # Errors
/// [`Error::File`] where the file cannot be opened, [`Error::Read`] where its beginning cannot be
/// decompressed.
pub fn read_rows<T: DeserializeOwned>(path: impl AsRef<Path>) -> Result<Rows<T>> {
    Ok(Rows { rows: read_raw_rows(path)?, row: PhantomData })
}

/// Finds the rows of a file as [`read_rows`] does and leaves it to the caller to parse them, on
/// several threads for example.
///
/// # Errors
/// As [`read_rows`].
pub fn read_raw_rows(path: impl AsRef<Path>) -> Result<RawRows> {
    let path: Arc<Path> = path.as_ref().into();
    let read_error = |source| Error::Read { path: path.to_path_buf(), source };
    let file = File::open(&path)
        .map_err(|source| dromedary_files::Error::Read { path: path.to_path_buf(), source })?;
    let progress = ReadProgress::of(&file);
    let file = Counted { file, read: Arc::clone(&progress.read) };
    let mut source = decompressed(file).map_err(read_error)?;
    let head = head(&mut source).map_err(read_error)?;
    let elements =
        |source, kind| Format::Elements(ElementReader::new(source, kind, path.to_path_buf()));
    let format = if head.last() == Some(&b'[') {
        elements(source, Kind::Array)
    } else if head.ends_with(b"\n") {
        // A brace and the end of its line; what stands before it may be a byte order mark.
        elements(Box::new(Cursor::new(b"{").chain(source)), Kind::Objects)
    } else {
        let lines: Source = Box::new(Cursor::new(head).chain(source));
        Format::Lines(JsonlReader::new(lines, &*path))
    };
    Ok(RawRows { path, format, progress })
}

impl RawRows {
    /// How much of the file has been read.
    pub fn progress(&self) -> ReadProgress {
        self.progress.clone()
    }
}

/// How much of a file has been read, at any time and from any thread.
#[derive(Clone, Debug)]
pub struct ReadProgress {
    read: Arc<AtomicU64>,
    total: u64,
}

impl ReadProgress {
    fn of(file: &File) -> ReadProgress {
        let total = file.metadata().map_or(0, |metadata| metadata.len());
        ReadProgress { read: Arc::default(), total }
    }

    /// The share, from 0 to 1; 0 for a pipe, whose end nobody knows.
    pub fn share(&self) -> f64 {
        let read = self.read.load(Ordering::Relaxed) as f64;
        if self.total > 0 { (read / self.total as f64).min(1.0) } else { 0.0 }
    }
}

/// Counts the bytes of the file itself, compressed or not.
struct Counted {
    file: File,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.file.read(buffer)?;
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(bytes)
    }
}

fn decompressed(file: Counted) -> io::Result<Source> {
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

/// Reads up to the first byte that is neither mark nor white space, and if that is a brace alone
/// on its line, to the end of the line.
fn head(source: &mut Source) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut behind_brace = false;
    for byte in source.bytes() {
        let byte = byte?;
        head.push(byte);
        let is_mark = head.len() <= BYTE_ORDER_MARK.len() && BYTE_ORDER_MARK.starts_with(&head);
        let is_end = match byte {
            b'\n' => behind_brace,
            b'{' if !behind_brace => {
                behind_brace = true;
                false
            }
            _ => !is_mark && !byte.is_ascii_whitespace(),
        };
        if is_end {
            break;
        }
    }
    Ok(head)
}

impl Iterator for RawRows {
    type Item = Result<RawRow>;

    fn next(&mut self) -> Option<Result<RawRow>> {
        let content = match &mut self.format {
            Format::Elements(elements) => elements.next_element()?.map(Content::Element),
            // Lines may be parsed one by one, but a file that is cut off is no matter of one row.
            Format::Lines(lines) => lines
                .next_line()?
                .and_then(|line| line.check_tail(&self.path).map(|()| Content::Line(line)))
                .map_err(Error::from),
        };
        Some(content.map(|content| RawRow { path: Arc::clone(&self.path), content }))
    }
}

impl<T: DeserializeOwned> Iterator for Rows<T> {
    type Item = Result<T>;

    fn next(&mut self) -> Option<Result<T>> {
        Some(self.rows.next()?.and_then(|row| row.parse()))
    }
}
