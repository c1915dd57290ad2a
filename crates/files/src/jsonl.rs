use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::de::{DeserializeOwned, IgnoredAny};

use crate::{Error, Result};

/// A longer line is an error instead of a process without memory.
pub const MAX_LINE_BYTES: usize = 64 << 20;

pub(crate) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The rows of a JSONL file with their line numbers; see [`read_jsonl`].
#[derive(Debug)]
pub struct JsonlReader<R, T> {
    path: PathBuf,
    lines: R,
    line: u64,
    broken: bool,
    row: PhantomData<fn() -> T>,
}

/// A line that is not parsed yet: that is most of the work of reading, and any thread can do it.
#[derive(Clone, Debug)]
pub struct JsonLine {
    number: u64,
    text: Vec<u8>,
    end: End,
}

impl JsonLine {
    /// Its number, from 1.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Its bytes.
    pub fn text(&self) -> &[u8] {
        match self.number {
            1 => self.text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&self.text),
            _ => &self.text,
        }
    }

    /// Whether it is the last line and not cut off, or another one; `path` is for the error.
    ///
    /// # Errors
    /// [`Error::TornTail`].
    pub fn check_tail(&self, path: &Path) -> Result<()> {
        match self.end {
            End::File => match self.parse::<IgnoredAny>(path) {
                Err(error @ Error::TornTail { .. }) => Err(error),
                _ => Ok(()),
            },
            End::Newline | End::TooLong => Ok(()),
        }
    }

    /// The row on it; `path` is for the errors.
    ///
    /// # Errors
    /// [`Error::Row`] and [`Error::TornTail`], as [`read_jsonl`] says.
    pub fn parse<T: DeserializeOwned>(&self, path: &Path) -> Result<T> {
        let row_error =
            |message: String| Error::Row { path: path.to_owned(), line: self.number, message };
        if matches!(self.end, End::TooLong) {
            return Err(row_error(format!("it is longer than {MAX_LINE_BYTES} bytes")));
        }
        serde_json::from_slice(self.text()).map_err(|error| match self.end {
            End::File if error.is_eof() => {
                Error::TornTail { path: path.to_owned(), line: self.number }
            }
            _ => row_error(one_line(&error)),
        })
    }
}

/// Reads a file of one JSON value per line.
///
/// A byte order mark, CRLF and blank lines are accepted, and a last line without an end where it
/// is whole. A bad row is an error that names path and line, and the rows behind it can still be
/// read: [`Error::Row`] for wrong JSON (NaN, lone surrogates, duplicate fields, a depth above 128,
/// bytes that are no UTF-8, more than [`MAX_LINE_BYTES`]), [`Error::TornTail`] for a last line
/// that was cut off. After [`Error::Read`] nothing follows.
///
/// # Errors
/// [`Error::Read`] where the file cannot be opened.
pub fn read_jsonl<T: DeserializeOwned>(
    path: impl AsRef<Path>,
) -> Result<JsonlReader<BufReader<File>, T>> {
    let path = path.as_ref();
    let file = File::open(path).map_err(Error::read(path))?;
    Ok(JsonlReader::new(BufReader::with_capacity(1 << 18, file), path))
}

/// How a line ended.
#[derive(Clone, Copy, Debug)]
enum End {
    Newline,
    TooLong,
    File,
}

impl<R: BufRead, T: DeserializeOwned> JsonlReader<R, T> {
    /// Reads rows from any source; `path` is for the errors.
    pub fn new(lines: R, path: impl Into<PathBuf>) -> JsonlReader<R, T> {
        JsonlReader { path: path.into(), lines, line: 0, broken: false, row: PhantomData }
    }

    /// The number of the line that was read last.
    pub fn line(&self) -> u64 {
        self.line
    }

    /// The next line that is not blank, without looking into it.
    pub fn next_line(&mut self) -> Option<Result<JsonLine>> {
        while !self.broken {
            let (text, end) = match self.read_line() {
                Ok(line) => line,
                Err(source) => {
                    self.broken = true;
                    return Some(Err(Error::Read { path: self.path.clone(), source }));
                }
            };
            if matches!(end, End::File) {
                self.broken = true;
                if text.is_empty() {
                    return None;
                }
            }
            self.line += 1;
            let line = JsonLine { number: self.line, text, end };
            if !line.text().iter().all(u8::is_ascii_whitespace) {
                return Some(Ok(line));
            }
        }
        None
    }

    fn read_line(&mut self) -> io::Result<(Vec<u8>, End)> {
        let mut text = Vec::new();
        let limit = MAX_LINE_BYTES as u64 + 1;
        (&mut self.lines).take(limit).read_until(b'\n', &mut text)?;
        if text.last() == Some(&b'\n') {
            text.pop();
            return Ok((text, End::Newline));
        }
        if text.len() <= MAX_LINE_BYTES {
            return Ok((text, End::File));
        }
        self.lines.skip_until(b'\n')?;
        Ok((text, End::TooLong))
    }
}

/// serde_json counts lines of its input, which is one line of ours.
fn one_line(error: &serde_json::Error) -> String {
    let column = error.column();
    let text = error.to_string();
    let message = text.strip_suffix(&format!(" at line {} column {column}", error.line()));
    let message = match message.unwrap_or(&text) {
        // What serde_json says of a first half of a pair without its second half.
        "unexpected end of hex escape" => "a lone surrogate, which is no character,",
        message => message,
    };
    format!("{message} at column {column}")
}

impl<R: BufRead, T: DeserializeOwned> Iterator for JsonlReader<R, T> {
    type Item = Result<(u64, T)>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(self.next_line()?.and_then(|line| Ok((line.number, line.parse(&self.path)?))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;
    use serde_json::Value;

    #[derive(Debug, PartialEq, Deserialize)]
    struct Row {
        id: String,
    }

    fn rows<T: DeserializeOwned>(text: &[u8]) -> Vec<Result<(u64, T)>> {
        JsonlReader::new(text, "x.jsonl").collect()
    }

    fn only_error(text: &[u8]) -> String {
        let rows = rows::<Row>(text);
        assert_eq!(rows.len(), 1);
        rows.into_iter().next().unwrap().unwrap_err().to_string()
    }

    #[test]
    fn mark_crlf_blank_lines_and_a_missing_end_are_accepted() {
        let text = b"\xef\xbb\xbf{\"id\": \"a\"}\r\n\r\n  \n{\"id\": \"b\"}\r\n{\"id\": \"c\"}";
        let rows: Vec<_> = rows::<Row>(text).into_iter().map(Result::unwrap).collect();
        let found: Vec<_> = rows.iter().map(|(line, row)| (*line, row.id.as_str())).collect();
        assert_eq!(found, [(1, "a"), (4, "b"), (5, "c")]);
    }

    #[test]
    fn a_bad_row_is_named_and_the_next_one_read() {
        let rows = rows::<Row>(b"{\"id\": 1}\n{\"id\": \"b\"}\n");
        let error = rows[0].as_ref().unwrap_err().to_string();
        assert!(error.starts_with("x.jsonl, line 1: invalid type"), "{error}");
        assert!(!error.contains("line 1 column"), "{error}");
        assert_eq!(rows[1].as_ref().unwrap().0, 2);
    }

    #[test]
    fn a_cut_last_line_is_told_from_a_bad_one() {
        for text in ["{\"id\": \"a", "{", "{\"id\": \"\\ud83d", "{\"id\":", "{\"id\": \"a\""] {
            let error = rows::<Row>(text.as_bytes()).pop().unwrap().unwrap_err();
            assert!(matches!(error, Error::TornTail { line: 1, .. }), "{text}: {error}");
            let line = JsonlReader::<_, Row>::new(text.as_bytes(), "x").next_line().unwrap();
            assert!(line.unwrap().check_tail(Path::new("x")).is_err());
        }
        for text in ["{\"id\": 1}", "{\"id\" \"a\"}", "{\"id\": \"a\n"] {
            let error = rows::<Row>(text.as_bytes()).pop().unwrap().unwrap_err();
            assert!(matches!(error, Error::Row { .. }), "{text}: {error}");
        }
    }

    #[test]
    fn hostile_rows_are_errors_and_not_crashes() {
        let deep = [vec![b'['; 100_000], vec![b'\n']].concat();
        let error = rows::<Value>(&deep).remove(0).unwrap_err().to_string();
        assert!(error.starts_with("x.jsonl, line 1: recursion limit exceeded"), "{error}");
        let deep_in_unknown_field = [b"{\"x\": ".as_slice(), &deep].concat();
        assert!(only_error(&deep_in_unknown_field).contains("x.jsonl, line 1"));
        for (text, expected) in [
            (&b"{\"id\": \"\\ud83d\"}\n"[..], "surrogate"),
            (b"{\"id\": \"\\udc00\"}\n", "surrogate"),
            (b"{\"id\": NaN}\n", "expected value"),
            (b"{\"id\": \"a\", \"id\": \"b\"}\n", "duplicate field"),
            (b"{\"id\": \"\xff\"}\n", "unicode"),
            (b"{\"id\": \"a\"} {}\n", "trailing characters"),
            (b"\0\0\0\n", "expected value"),
        ] {
            let error = only_error(text);
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_line_that_is_too_long_costs_no_more_memory_than_the_limit() {
        let row = b"{\"id\": \"b\"}\n";
        let long = io::repeat(b'x').take(3 * MAX_LINE_BYTES as u64);
        let text = BufReader::new(long.chain(&b"\n"[..]).chain(&row[..]));
        let mut reader = JsonlReader::<_, Row>::new(text, "x.jsonl");
        let line = reader.next_line().unwrap().unwrap();
        assert!(line.text.capacity() <= 2 * MAX_LINE_BYTES + 64);
        let error = line.parse::<Row>(Path::new("x.jsonl")).unwrap_err().to_string();
        assert!(error.contains("line 1: it is longer than"), "{error}");
        assert_eq!(reader.next().unwrap().unwrap().0, 2);
        assert!(reader.next().is_none());
    }

    #[test]
    fn a_failing_disk_ends_the_rows() {
        struct Failing;
        impl Read for Failing {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("disk"))
            }
        }
        let mut reader = JsonlReader::<_, Row>::new(BufReader::new(Failing), "x.jsonl");
        assert!(matches!(reader.next().unwrap().unwrap_err(), Error::Read { .. }));
        assert!(reader.next().is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_give_rows_or_errors(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let lines = bytes.split(|&byte| byte == b'\n').count();
            prop_assert!(rows::<Value>(&bytes).len() <= lines);
        }

        #[test]
        fn strings_survive(texts in prop::collection::vec(any::<String>(), 0..8)) {
            let text: String =
                texts.iter().map(|text| serde_json::to_string(text).unwrap() + "\n").collect();
            let read: Vec<String> =
                rows(text.as_bytes()).into_iter().map(|row| row.unwrap().1).collect();
            prop_assert_eq!(read, texts);
        }
    }
}
