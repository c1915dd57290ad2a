use std::io::{self, BufRead};
use std::path::{Path, PathBuf};

use dromedary_files::MAX_LINE_BYTES;
use memchr::memchr2;
use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// The elements of a JSON array, or objects one after the other; one in memory at a time.
///
/// serde_json reads an array at once; so brackets and strings are followed here, and each element
/// goes to serde_json on its own. An element that does not parse does not end the rest.
#[derive(Debug)]
pub(crate) struct ElementReader<R> {
    path: PathBuf,
    bytes: R,
    kind: Kind,
    rows: u64,
    at_last: bool,
    ended: bool,
}

/// What the elements stand in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Between brackets and commas; the reader begins behind the first bracket.
    Array,
    /// Objects over several lines each, with white space between them.
    Objects,
}

/// An element that is not parsed yet.
#[derive(Clone, Debug)]
pub(crate) struct Element {
    /// From 1.
    pub(crate) number: u64,
    /// No longer than one byte more than the limit.
    pub(crate) text: Vec<u8>,
}

impl Element {
    pub(crate) fn parse<T: DeserializeOwned>(&self, path: &Path) -> Result<T> {
        let row_error =
            |message: String| Error::Row { path: path.to_owned(), row: self.number, message };
        if self.text.len() > MAX_LINE_BYTES {
            return Err(row_error(format!("it is longer than {MAX_LINE_BYTES} bytes")));
        }
        if is_blank(&self.text) {
            return Err(row_error("there is nothing between two commas, or behind one".to_owned()));
        }
        serde_json::from_slice(&self.text).map_err(|error| row_error(message(&error)))
    }
}

impl<R: BufRead> ElementReader<R> {
    /// `path` is for the errors.
    pub(crate) fn new(bytes: R, kind: Kind, path: PathBuf) -> ElementReader<R> {
        ElementReader { path, bytes, kind, rows: 0, at_last: false, ended: false }
    }

    pub(crate) fn next_element(&mut self) -> Option<Result<Element>> {
        if self.ended {
            return None;
        }
        match self.read_element() {
            Ok(Some(text)) => {
                self.rows += 1;
                Some(Ok(Element { number: self.rows, text }))
            }
            Ok(None) => {
                self.ended = true;
                None
            }
            Err(error) => {
                self.ended = true;
                Some(Err(error))
            }
        }
    }

    /// The bytes of the next element; `None` behind the last one.
    fn read_element(&mut self) -> Result<Option<Vec<u8>>> {
        if self.at_last {
            return self.check_that_nothing_follows().map(|()| None);
        }
        let mut element = Vec::new();
        let mut scan = Scan::default();
        loop {
            let chunk = fill(&mut self.bytes)
                .map_err(|source| Error::Read { path: self.path.clone(), source })?;
            if chunk.is_empty() {
                let is_end = self.kind == Kind::Objects && is_blank(&element);
                return if is_end { Ok(None) } else { Err(self.broken(self.cut_off())) };
            }
            let end = scan.end_of_element(chunk, self.kind);
            let len = end.unwrap_or(chunk.len());
            let room = MAX_LINE_BYTES + 1 - element.len();
            element.extend_from_slice(&chunk[..len.min(room)]);
            if let Some(end) = end {
                let delimiter = usize::from(self.kind == Kind::Array);
                self.at_last = delimiter > 0 && chunk[end] == b']';
                self.bytes.consume(end + delimiter);
                break;
            }
            self.bytes.consume(len);
        }
        let is_empty_array = self.rows == 0 && self.at_last && is_blank(&element);
        if is_empty_array { self.read_element() } else { Ok(Some(element)) }
    }

    fn check_that_nothing_follows(&mut self) -> Result<()> {
        loop {
            let chunk = fill(&mut self.bytes)
                .map_err(|source| Error::Read { path: self.path.clone(), source })?;
            if chunk.is_empty() {
                return Ok(());
            }
            if !is_blank(chunk) {
                return Err(self.broken("something follows the array"));
            }
            let len = chunk.len();
            self.bytes.consume(len);
        }
    }

    fn cut_off(&self) -> &'static str {
        match self.kind {
            Kind::Array => "the array is cut off",
            Kind::Objects => "the object is cut off",
        }
    }

    fn broken(&self, message: &str) -> Error {
        Error::Array { path: self.path.clone(), rows: self.rows, message: message.to_owned() }
    }
}

fn is_blank(bytes: &[u8]) -> bool {
    bytes.iter().all(u8::is_ascii_whitespace)
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
    /// Where the element ends within these bytes: at its comma or at the array's bracket, or
    /// behind the object's brace.
    fn end_of_element(&mut self, bytes: &[u8], kind: Kind) -> Option<usize> {
        let mut at = 0;
        while at < bytes.len() {
            if self.in_string {
                at += self.skip_string(&bytes[at..]);
                continue;
            }
            match bytes[at] {
                b'"' => self.in_string = true,
                b'[' | b'{' => self.depth += 1,
                b',' | b']' if self.depth == 0 && kind == Kind::Array => return Some(at),
                b']' | b'}' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 && kind == Kind::Objects {
                        return Some(at + 1);
                    }
                }
                _ => {}
            }
            at += 1;
        }
        None
    }

    /// The bytes up to the end of the string, or all.
    fn skip_string(&mut self, bytes: &[u8]) -> usize {
        let mut at = usize::from(std::mem::take(&mut self.escaped));
        while let Some(next) = memchr2(b'"', b'\\', bytes.get(at..).unwrap_or_default()) {
            at += next;
            if bytes[at] == b'"' {
                self.in_string = false;
                return at + 1;
            }
            at += 2;
        }
        self.escaped = at > bytes.len();
        bytes.len()
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
        read(&text[1..], buffer, Kind::Array)
    }

    fn read(text: &[u8], buffer: usize, kind: Kind) -> Vec<Result<Value>> {
        let bytes = BufReader::with_capacity(buffer, text);
        let mut reader = ElementReader::new(bytes, kind, "x.json".into());
        let elements = std::iter::from_fn(|| reader.next_element());
        elements.map(|element| element?.parse(Path::new("x.json"))).collect()
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
        let mut reader = ElementReader::new(bytes, Kind::Array, "x.json".into());
        let element = reader.next_element().unwrap().unwrap();
        let path = Path::new("x.json");
        let error = element.parse::<Value>(path).unwrap_err();
        assert!(error.to_string().contains("row 1: it is longer than"), "{error}");
        assert!(element.text.capacity() <= 2 * MAX_LINE_BYTES + 2);
        let last = reader.next_element().unwrap().unwrap();
        assert_eq!(last.parse::<Value>(path).unwrap(), 2);
    }

    #[test]
    fn objects_over_several_lines_follow_each_other() {
        let text = br#"{
          "a": "}\\",
          "b": [{}, {"c": 1}]
        }
        {
          "a": 2
        } "#;
        for buffer in [1, 2, 5, 4096] {
            let found = read(text, buffer, Kind::Objects);
            assert_eq!(found.len(), 2);
            assert_eq!(found[0].as_ref().unwrap()["a"], "}\\");
            assert_eq!(found[1].as_ref().unwrap()["a"], 2);
        }
        let cut = read(&text[..30], 3, Kind::Objects);
        assert!(cut[0].as_ref().unwrap_err().to_string().ends_with("the object is cut off"));
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
