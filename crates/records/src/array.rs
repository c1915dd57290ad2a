use std::io::{self, BufRead};
use std::path::PathBuf;

use dromedary_files::MAX_LINE_BYTES;
use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// The elements of a JSON array, one in memory at a time.
///
/// serde_json reads an array at once, or values without commas between them; so brackets and
/// strings are followed here, and each element goes to serde_json on its own. An element that
/// does not parse does not end the rest.
#[derive(Debug)]
pub(crate) struct ArrayReader<R> {
    path: PathBuf,
    bytes: R,
    rows: u64,
    at_last: bool,
    ended: bool,
    element: Vec<u8>,
}

impl<R: BufRead> ArrayReader<R> {
    /// `bytes` begins behind the opening bracket; `path` is for the errors.
    pub(crate) fn new(bytes: R, path: PathBuf) -> ArrayReader<R> {
        ArrayReader { path, bytes, rows: 0, at_last: false, ended: false, element: Vec::new() }
    }

    pub(crate) fn next_row<T: DeserializeOwned>(&mut self) -> Option<Result<T>> {
        if self.ended {
            return None;
        }
        match self.read_element() {
            Ok(true) => {
                self.rows += 1;
                Some(self.parse())
            }
            Ok(false) => {
                self.ended = true;
                None
            }
            Err(error) => {
                self.ended = true;
                Some(Err(error))
            }
        }
    }

    fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        let row_error =
            |message: String| Error::Row { path: self.path.clone(), row: self.rows, message };
        if self.element.len() > MAX_LINE_BYTES {
            return Err(row_error(format!("it is longer than {MAX_LINE_BYTES} bytes")));
        }
        if self.element.iter().all(u8::is_ascii_whitespace) {
            return Err(row_error("there is nothing between two commas, or behind one".to_owned()));
        }
        serde_json::from_slice(&self.element).map_err(|error| row_error(message(&error)))
    }

    /// Fills `element`; false behind the last one.
    fn read_element(&mut self) -> Result<bool> {
        if self.at_last {
            return self.check_that_nothing_follows().map(|()| false);
        }
        self.element.clear();
        let mut scan = Scan::default();
        loop {
            let chunk = fill(&mut self.bytes)
                .map_err(|source| Error::Read { path: self.path.clone(), source })?;
            if chunk.is_empty() {
                return Err(self.broken("the array is cut off"));
            }
            let end = scan.delimiter(chunk);
            let len = end.unwrap_or(chunk.len());
            let room = MAX_LINE_BYTES + 1 - self.element.len();
            self.element.extend_from_slice(&chunk[..len.min(room)]);
            if let Some(end) = end {
                self.at_last = chunk[end] == b']';
                self.bytes.consume(end + 1);
                break;
            }
            self.bytes.consume(len);
        }
        let is_empty_array =
            self.rows == 0 && self.at_last && self.element.iter().all(u8::is_ascii_whitespace);
        if is_empty_array { self.read_element() } else { Ok(true) }
    }

    fn check_that_nothing_follows(&mut self) -> Result<()> {
        loop {
            let chunk = fill(&mut self.bytes)
                .map_err(|source| Error::Read { path: self.path.clone(), source })?;
            if chunk.is_empty() {
                return Ok(());
            }
            if !chunk.iter().all(u8::is_ascii_whitespace) {
                return Err(self.broken("something follows the array"));
            }
            let len = chunk.len();
            self.bytes.consume(len);
        }
    }

    fn broken(&self, message: &str) -> Error {
        Error::Array { path: self.path.clone(), rows: self.rows, message: message.to_owned() }
    }
}

/// `fill_buf`, unless a signal interrupts it.
fn fill<R: BufRead>(bytes: &mut R) -> io::Result<&[u8]> {
    while let Err(error) = bytes.fill_buf() {
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    bytes.fill_buf()
}

/// Lines are counted from the row's beginning.
fn message(error: &serde_json::Error) -> String {
    // What serde_json says of a first half of a pair without its second half.
    error
        .to_string()
        .replace("unexpected end of hex escape", "a lone surrogate, which is no character,")
        .replace(" at line ", " at its line ")
}

/// How deep in an element the scan is.
#[derive(Default)]
struct Scan {
    depth: u64,
    in_string: bool,
    escaped: bool,
}

impl Scan {
    /// Where the element ends within these bytes: at its comma or at the array's bracket.
    fn delimiter(&mut self, bytes: &[u8]) -> Option<usize> {
        bytes.iter().position(|&byte| self.is_delimiter(byte))
    }

    fn is_delimiter(&mut self, byte: u8) -> bool {
        if self.escaped {
            self.escaped = false;
        } else if self.in_string {
            self.escaped = byte == b'\\';
            self.in_string = byte != b'"';
        } else {
            match byte {
                b'"' => self.in_string = true,
                b'[' | b'{' => self.depth += 1,
                b',' | b']' if self.depth == 0 => return true,
                b']' | b'}' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;
    use std::io::{BufReader, Read};

    /// Reads with buffers of a few bytes, so that every border is met.
    fn rows(text: &[u8], buffer: usize) -> Vec<Result<Value>> {
        let bytes = BufReader::with_capacity(buffer, &text[1..]);
        let mut reader = ArrayReader::new(bytes, "x.json".into());
        std::iter::from_fn(|| reader.next_row()).collect()
    }

    fn errors(text: &str) -> Vec<String> {
        rows(text.as_bytes(), 7)
            .into_iter()
            .filter_map(|row| row.err())
            .map(|e| e.to_string())
            .collect()
    }

    #[test]
    fn empty_arrays_have_no_rows() {
        for text in ["[]", "[ \n ]\n", "[]  \r\n"] {
            assert!(rows(text.as_bytes(), 1).is_empty(), "{text}");
        }
    }

    #[test]
    fn a_bad_element_does_not_end_the_rest() {
        let found = rows(br#"[{"a": 1}, {"a" 2}, {"a": 3}]"#, 4);
        assert_eq!(found.len(), 3);
        let error = found[1].as_ref().unwrap_err();
        assert!(error.is_bad_row());
        assert!(error.to_string().starts_with("x.json, row 2: expected `:`"), "{error}");
        assert_eq!(found[2].as_ref().unwrap()["a"], 3);
    }

    #[test]
    fn a_cut_array_is_an_error_behind_its_last_row() {
        for text in ["[", "[{}, {", "[{}, {}", "[{}, \"]", "[{}, {\"a\": [1, 2]"] {
            let errors = errors(text);
            let last = errors.last().unwrap();
            assert!(last.ends_with("the array is cut off"), "{text}: {last}");
        }
        assert!(errors("[{}, {")[0].starts_with("x.json, behind row 1:"));
    }

    #[test]
    fn misplaced_commas_and_trailing_text_are_errors() {
        assert!(errors("[1,,2]")[0].contains("row 2: there is nothing between two commas"));
        assert!(errors("[1,]")[0].contains("row 2: there is nothing"));
        assert!(errors("[1] x")[0].contains("behind row 1: something follows the array"));
        assert!(errors("[1 2]")[0].contains("row 1: trailing characters"));
    }

    #[test]
    fn hostile_elements_are_bad_rows() {
        let deep = format!("[{}{}, 1]", "[".repeat(100_000), "]".repeat(100_000));
        let found = rows(deep.as_bytes(), 4096);
        assert!(found[0].as_ref().unwrap_err().to_string().contains("recursion limit"));
        assert_eq!(found[1].as_ref().unwrap(), 1);
        for (text, expected) in [
            ("[NaN]", "row 1: expected"),
            (r#"["\ud800"]"#, "row 1: a lone surrogate"),
            (r#"["\udc00"]"#, "surrogate"),
        ] {
            assert!(errors(text)[0].contains(expected), "{:?}", errors(text));
        }
    }

    #[test]
    fn an_element_that_is_too_long_costs_no_more_memory_than_the_limit() {
        let long = io::repeat(b'1').take(2 * MAX_LINE_BYTES as u64);
        let bytes = BufReader::new(long.chain(&b", 2]"[..]));
        let mut reader = ArrayReader::new(bytes, "x.json".into());
        let error = reader.next_row::<Value>().unwrap().unwrap_err();
        assert!(error.to_string().contains("row 1: it is longer than"), "{error}");
        assert!(reader.element.capacity() <= 2 * MAX_LINE_BYTES + 2);
        assert_eq!(reader.next_row::<Value>().unwrap().unwrap(), 2);
    }

    proptest! {
        #[test]
        fn any_array_is_read_as_serde_json_reads_it(
            texts in prop::collection::vec(any::<String>(), 0..6),
            buffer in 1_usize..20,
            pretty in any::<bool>(),
        ) {
            let values: Vec<Value> =
                texts.iter().map(|text| serde_json::json!({text: [text, {"x": text}]})).collect();
            let write = if pretty { serde_json::to_vec_pretty } else { serde_json::to_vec };
            let text = write(&values);
            let read: Vec<Value> =
                rows(&text.unwrap(), buffer).into_iter().map(Result::unwrap).collect();
            prop_assert_eq!(read, values);
        }

        #[test]
        fn any_bytes_end(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let text = [b"[".as_slice(), &bytes].concat();
            prop_assert!(rows(&text, 5).len() <= bytes.len() + 1);
        }

        #[test]
        fn where_serde_json_finds_an_array_so_do_we(text in r#"[\[\]{},:"\\ 1a]{0,12}"#) {
            let text = format!("[{text}");
            let found: Result<Vec<Value>> = rows(text.as_bytes(), 3).into_iter().collect();
            match serde_json::from_str::<Vec<Value>>(&text) {
                Ok(values) => prop_assert_eq!(found.unwrap(), values),
                Err(_) => prop_assert!(found.is_err()),
            }
        }
    }
}
