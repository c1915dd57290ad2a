use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::IgnoredAny;

use crate::durable::{existing_parent, sync_dir};
use crate::jsonl::{BYTE_ORDER_MARK, MAX_LINE_BYTES};
use crate::{Error, Result};

/// A power cut costs at most the rows of this time; a sync per row would cost more.
const SYNC_EVERY: Duration = Duration::from_secs(5);

/// An append-only file of JSON objects, one a line, that survives kills.
///
/// One process writes it (see [`Lock`](crate::Lock)). A row is on disk whole or, after the next
/// [`open`](JsonlAppender::open), not at all.
#[derive(Debug)]
pub struct JsonlAppender {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines.
    len: u64,
    synced: Instant,
}

/// What [`JsonlAppender::open`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Whole lines, blank ones included.
    pub lines: u64,
    /// Bytes of a row cut in the middle, which are gone now.
    pub cut_bytes: u64,
    /// Whether the last row was whole and lacked its line end alone, which it has now.
    pub completed_last: bool,
}

impl JsonlAppender {
    /// Opens or creates a file and repairs its end: a last line without an end is completed where
    /// its object is whole, else cut.
    ///
    /// # Errors
    /// [`Error::NotJsonl`], with the file untouched, where it does not begin as JSON objects, one
    /// a line (a JSON array, some other text); [`Error::Write`] where it cannot be opened for
    /// writing; [`Error::Read`].
    pub fn open(path: impl AsRef<Path>) -> Result<(JsonlAppender, Recovered)> {
        let path = path.as_ref().to_owned();
        let parent = existing_parent(&path)?;
        let is_new = !path.exists();
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&path)
            .map_err(Error::write(&path))?;
        if is_new {
            sync_dir(&parent).map_err(Error::write(&path))?;
        }
        let extent = Extent::scan(&mut file).map_err(Error::read(&path))?;
        check_beginning(&mut file, &path)?;
        let mut appender =
            JsonlAppender { path, file, len: extent.whole_bytes, synced: Instant::now() };
        let recovered = appender.repair_end(extent)?;
        Ok((appender, recovered))
    }

    fn repair_end(&mut self, extent: Extent) -> Result<Recovered> {
        let mut recovered = Recovered { lines: extent.lines, ..Recovered::default() };
        if extent.tail_bytes == 0 {
            return Ok(recovered);
        }
        let tail = read_tail(&mut self.file, extent).map_err(Error::read(&self.path))?;
        if is_object(&tail) {
            self.file.write_all(b"\n").map_err(Error::write(&self.path))?;
            self.len += extent.tail_bytes + 1;
            recovered.lines += 1;
            recovered.completed_last = true;
        } else {
            self.file.set_len(self.len).map_err(Error::write(&self.path))?;
            recovered.cut_bytes = extent.tail_bytes;
        }
        self.sync()?;
        Ok(recovered)
    }

    /// Appends one row as one line with one write.
    ///
    /// # Errors
    /// [`Error::Encode`] where `row` has no JSON form or is no object; [`Error::Write`] where the
    /// disk is full, after the part that was written is cut off again.
    pub fn append(&mut self, row: &impl Serialize) -> Result<()> {
        let encode_error = |source| Error::Encode { path: self.path.clone(), source };
        let mut line = serde_json::to_vec(row).map_err(encode_error)?;
        if line.first() != Some(&b'{') {
            return Err(encode_error(serde::ser::Error::custom("a row must be an object")));
        }
        line.push(b'\n');
        if let Err(source) = self.file.write_all(&line) {
            // Should this fail too, the next open cuts the tail.
            let _ = self.file.set_len(self.len);
            return Err(Error::Write { path: self.path.clone(), source });
        }
        self.len += line.len() as u64;
        if self.synced.elapsed() >= SYNC_EVERY { self.sync() } else { Ok(()) }
    }

    /// Makes all rows survive a power cut; `append` does it every few seconds on its own.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(Error::write(&self.path))?;
        self.synced = Instant::now();
        Ok(())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// How far a file consists of whole lines.
#[derive(Clone, Copy)]
struct Extent {
    lines: u64,
    whole_bytes: u64,
    tail_bytes: u64,
}

impl Extent {
    fn scan(file: &mut File) -> io::Result<Extent> {
        let mut extent = Extent { lines: 0, whole_bytes: 0, tail_bytes: 0 };
        let mut buffer = vec![0; 1 << 20];
        file.seek(SeekFrom::Start(0))?;
        loop {
            let len = file.read(&mut buffer)?;
            let bytes = &buffer[..len];
            if len == 0 {
                return Ok(extent);
            }
            extent.lines += bytes.iter().filter(|&&byte| byte == b'\n').count() as u64;
            extent.tail_bytes += len as u64;
            if let Some(last) = bytes.iter().rposition(|&byte| byte == b'\n') {
                let behind = (len - last - 1) as u64;
                extent.whole_bytes += extent.tail_bytes - behind;
                extent.tail_bytes = behind;
            }
        }
    }
}

/// Refuses a file that is something else, before its end is taken for a torn row: a JSON array
/// given by mistake would lose its last line.
fn check_beginning(file: &mut File, path: &Path) -> Result<()> {
    let head = first_line(file).map_err(Error::read(path))?;
    let head = head.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&head);
    let not_jsonl =
        |message: &str| Error::NotJsonl { path: path.to_owned(), message: message.to_owned() };
    if head.iter().find(|byte| !byte.is_ascii_whitespace()).is_some_and(|&byte| byte != b'{') {
        return Err(not_jsonl("its first row is no JSON object"));
    }
    if head.ends_with(b"\n") && !is_object(head) {
        return Err(not_jsonl("its first line is no whole JSON object"));
    }
    Ok(())
}

/// The first line that is not blank, with its end; empty where there is none.
fn first_line(file: &mut File) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(0))?;
    let mut reader = BufReader::new(file.take(MAX_LINE_BYTES as u64));
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        if !line.iter().all(u8::is_ascii_whitespace) {
            return Ok(line);
        }
        line.clear();
    }
    Ok(line)
}

/// The bytes behind the last line end, or nothing where they are more than a row can have.
fn read_tail(file: &mut File, extent: Extent) -> io::Result<Vec<u8>> {
    let mut tail = Vec::new();
    if extent.tail_bytes <= MAX_LINE_BYTES as u64 {
        file.seek(SeekFrom::Start(extent.whole_bytes))?;
        file.read_to_end(&mut tail)?;
    }
    Ok(tail)
}

/// An object has a last character, so that a whole one is told from a part of one; a number has
/// not.
fn is_object(line: &[u8]) -> bool {
    let first = line.iter().find(|byte| !byte.is_ascii_whitespace());
    first == Some(&b'{') && serde_json::from_slice::<IgnoredAny>(line).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::read_jsonl;
    use proptest::prelude::*;
    use serde::Deserialize;
    use std::fs;

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    struct Row {
        id: u32,
        text: String,
    }

    fn row(id: u32) -> Row {
        Row { id, text: format!("{id} \u{1F42A}\n\"") }
    }

    fn read(path: &Path) -> Vec<Row> {
        read_jsonl(path).unwrap().map(|row| row.unwrap().1).collect()
    }

    fn opened(content: &[u8]) -> (Result<Recovered>, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        fs::write(&path, content).unwrap();
        let recovered = JsonlAppender::open(&path).map(|(_, recovered)| recovered);
        (recovered, fs::read(&path).unwrap())
    }

    #[test]
    fn a_torn_tail_is_cut_at_every_byte() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs/rows.jsonl");
        let (mut rows, _) = JsonlAppender::open(&path).unwrap();
        rows.append(&row(1)).unwrap();
        let first = fs::metadata(&path).unwrap().len() as usize;
        rows.append(&row(2)).unwrap();
        let whole = fs::read(&path).unwrap();
        for len in first..whole.len() - 1 {
            fs::write(&path, &whole[..len]).unwrap();
            let (mut rows, recovered) = JsonlAppender::open(&path).unwrap();
            assert_eq!((recovered.lines, recovered.cut_bytes), (1, (len - first) as u64));
            rows.append(&row(2)).unwrap();
            assert_eq!(read(&path), [row(1), row(2)], "cut at {len}");
        }
    }

    #[test]
    fn a_whole_row_without_its_line_end_is_kept() {
        let (recovered, content) = opened(b"{\"id\": 1}\n{\"id\": 2}");
        let expected = Recovered { lines: 2, cut_bytes: 0, completed_last: true };
        assert_eq!(recovered.unwrap(), expected);
        assert_eq!(content, b"{\"id\": 1}\n{\"id\": 2}\n");
    }

    #[test]
    fn zeros_of_a_power_cut_are_cut() {
        let (recovered, content) = opened(b"{\"id\": 1}\n\0\0\0\0");
        assert_eq!(recovered.unwrap().cut_bytes, 4);
        assert_eq!(content, b"{\"id\": 1}\n");
    }

    #[test]
    fn a_file_of_one_torn_row_becomes_empty() {
        let (recovered, content) = opened(b"\n{\"id");
        assert_eq!(recovered.unwrap(), Recovered { lines: 1, cut_bytes: 4, ..Default::default() });
        assert_eq!(content, b"\n");
    }

    #[test]
    fn marks_and_windows_line_ends_are_no_damage() {
        let text = b"\xef\xbb\xbf{\"id\": 1}\r\n\r\n{\"id\": 2}\r\n";
        let (recovered, content) = opened(text);
        assert_eq!(recovered.unwrap(), Recovered { lines: 3, ..Default::default() });
        assert_eq!(content, text);
    }

    #[test]
    fn other_files_are_refused_and_stay_as_they_are() {
        for text in ["[\n  {}\n]", "[{}]", "hello", "{\n  \"a\": 1\n}", "{\"a\": 1,}\n{}\n{"] {
            let (recovered, content) = opened(text.as_bytes());
            assert!(matches!(recovered.unwrap_err(), Error::NotJsonl { .. }), "{text}");
            assert_eq!(content, text.as_bytes());
        }
    }

    #[test]
    fn rows_that_are_no_objects_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        let (mut rows, _) = JsonlAppender::open(&path).unwrap();
        let error = rows.append(&[1, 2]).unwrap_err();
        assert!(matches!(error, Error::Encode { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn the_extent_does_not_depend_on_the_buffer() {
        let line = format!("{{\"x\": \"{}\"}}\n", "y".repeat(700_000));
        let (recovered, content) = opened((line.repeat(3) + "{\"x").as_bytes());
        assert_eq!(recovered.unwrap(), Recovered { lines: 3, cut_bytes: 3, ..Default::default() });
        assert_eq!(content.len(), 3 * line.len());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_cut_keeps_the_rows_before_it(
            texts in prop::collection::vec(any::<String>(), 1..6),
            cut in any::<prop::sample::Index>(),
        ) {
            let rows: Vec<Row> =
                (0..).zip(&texts).map(|(id, text)| Row { id, text: text.clone() }).collect();
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("rows.jsonl");
            let (mut appender, _) = JsonlAppender::open(&path).unwrap();
            for row in &rows {
                appender.append(row).unwrap();
            }
            let whole = fs::read(&path).unwrap();
            let kept = &whole[..=cut.index(whole.len())];
            fs::write(&path, kept).unwrap();
            let (mut appender, recovered) = JsonlAppender::open(&path).unwrap();
            let found = read(&path);
            prop_assert_eq!(found.len() as u64, recovered.lines);
            prop_assert_eq!(&found[..], &rows[..found.len()]);
            for row in &rows[found.len()..] {
                appender.append(row).unwrap();
            }
            prop_assert_eq!(fs::read(&path).unwrap(), whole);
        }
    }
}
