use std::fs;
use std::time::{Duration, Instant};

use crate::faults::sample;
use crate::support::{Folder, array, stderr};

/// A value of the footer, in Thrift's compact protocol.
enum Thrift {
    I32(i32),
    I64(i64),
    Text(&'static str),
    Struct(Vec<(u8, Thrift)>),
    List(Vec<Thrift>),
}

use Thrift::{I32, I64, List, Struct, Text};

impl Thrift {
    fn kind(&self) -> u8 {
        match self {
            I32(_) => 5,
            I64(_) => 6,
            Text(_) => 8,
            List(_) => 9,
            Struct(_) => 12,
        }
    }

    fn write(&self, bytes: &mut Vec<u8>) {
        match self {
            I32(number) => write_number(zigzag((*number).into()), bytes),
            I64(number) => write_number(zigzag(*number), bytes),
            Text(text) => {
                write_number(text.len() as u64, bytes);
                bytes.extend_from_slice(text.as_bytes());
            }
            Struct(fields) => {
                let mut last = 0;
                for (id, value) in fields {
                    bytes.push((id - last) << 4 | value.kind());
                    value.write(bytes);
                    last = *id;
                }
                bytes.push(0);
            }
            List(values) => {
                let kind = values.first().map_or(12, Thrift::kind);
                bytes.push(0xf0 | kind);
                write_number(values.len() as u64, bytes);
                values.iter().for_each(|value| value.write(bytes));
            }
        }
    }
}

fn zigzag(number: i64) -> u64 {
    (number << 1 ^ number >> 63) as u64
}

fn write_number(mut number: u64, bytes: &mut Vec<u8>) {
    while number > 0x7f {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// A plain page of one text, again and again.
fn page(text: &str, rows: usize) -> Vec<u8> {
    let mut values = Vec::new();
    for _ in 0..rows {
        values.extend_from_slice(&(text.len() as u32).to_le_bytes());
        values.extend_from_slice(text.as_bytes());
    }
    let size = values.len() as i32;
    let (plain, run_length) = (0, 3);
    let counts =
        [(1, I32(rows as i32)), (2, I32(plain)), (3, I32(run_length)), (4, I32(run_length))];
    let header = [(1, I32(0)), (2, I32(size)), (3, I32(size)), (5, Struct(counts.into()))];
    let mut page = Vec::new();
    Struct(header.into()).write(&mut page);
    page.extend(values);
    page
}

/// What the footer says of the pages.
#[derive(Clone, Copy)]
struct Promise {
    /// All groups lie in the same place.
    groups: usize,
    rows_in_group: i64,
    bytes_in_column: Option<i64>,
}

/// A parquet file by hand: two columns of ten rows, and a footer that promises what it likes.
fn file(promise: Promise) -> Vec<u8> {
    let mut bytes = b"PAR1".to_vec();
    let mut columns = Vec::new();
    for (name, text) in [("id", "flan.1"), ("question", "Why is the sea salty?")] {
        let page = page(text, 10);
        let size = page.len() as i64;
        let facts = [
            (1, I32(6)),
            (2, List(vec![I32(0), I32(3)])),
            (3, List(vec![Text(name)])),
            (4, I32(0)),
            (5, I64(promise.rows_in_group)),
            (6, I64(promise.bytes_in_column.unwrap_or(size))),
            (7, I64(size)),
            (9, I64(bytes.len() as i64)),
        ];
        columns.push((bytes.len() as i64, facts));
        bytes.extend(page);
    }
    let group = || {
        let column = |(at, facts): &(i64, [(u8, Thrift); 8])| {
            let copied = facts.iter().map(|(id, value)| (*id, copy(value))).collect();
            Struct(vec![(2, I64(*at)), (3, Struct(copied))])
        };
        let columns = columns.iter().map(column).collect();
        Struct(vec![(1, List(columns)), (2, I64(1000)), (3, I64(promise.rows_in_group))])
    };
    let text = |name| {
        let fields = [(1, I32(6)), (3, I32(0)), (4, Text(name)), (6, I32(0))];
        Struct(fields.into())
    };
    let root = Struct(vec![(4, Text("schema")), (5, I32(2))]);
    let rows = promise.rows_in_group.saturating_mul(promise.groups as i64);
    let footer = Struct(vec![
        (1, I32(1)),
        (2, List(vec![root, text("id"), text("question")])),
        (3, I64(rows)),
        (4, List((0..promise.groups).map(|_| group()).collect())),
    ]);
    let start = bytes.len();
    footer.write(&mut bytes);
    let size = (bytes.len() - start) as u32;
    bytes.extend_from_slice(&size.to_le_bytes());
    bytes.extend_from_slice(b"PAR1");
    bytes
}

fn copy(value: &Thrift) -> Thrift {
    match value {
        I32(number) => I32(*number),
        I64(number) => I64(*number),
        Text(text) => Text(text),
        Struct(fields) => Struct(fields.iter().map(|(id, value)| (*id, copy(value))).collect()),
        List(values) => List(values.iter().map(copy).collect()),
    }
}

const HONEST: Promise = Promise { groups: 1, rows_in_group: 10, bytes_in_column: None };

/// As 42.parquet does it: a file of kilobytes with petabytes of text, in row groups that share
/// their pages, or in rows and bytes that only the footer knows of.
#[test]
fn bombs_are_refused_by_their_footers() {
    let folder = Folder::new();
    folder.write("honest.parquet", file(HONEST));
    let output = sample(&folder, "honest");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(array(&folder.path("honest.json")).len(), 1);
    let bombs = [
        ("shared", Promise { groups: 500, ..HONEST }, "bytes in its columns"),
        (
            "forty-two",
            Promise { groups: 500, rows_in_group: i32::MAX.into(), ..HONEST },
            "rows cannot be in",
        ),
        ("endless", Promise { rows_in_group: i64::MAX / 2, ..HONEST }, "rows cannot be in"),
        ("inflating", Promise { bytes_in_column: Some(1 << 40), ..HONEST }, "bytes out of"),
    ];
    for (name, promise, message) in bombs {
        let bytes = file(promise);
        assert!(bytes.len() < 200_000, "{name}: {} bytes", bytes.len());
        let path = folder.write(&format!("{name}.parquet"), bytes);
        let start = Instant::now();
        let output = sample(&folder, name);
        assert!(start.elapsed() < Duration::from_secs(60), "{name} was read");
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{name}: {said}");
        assert!(said.contains(message) && said.contains(path.to_str().unwrap()), "{name}: {said}");
        assert!(!folder.path(&format!("{name}.json")).exists(), "{name}");
        fs::remove_file(path).unwrap();
    }
}
