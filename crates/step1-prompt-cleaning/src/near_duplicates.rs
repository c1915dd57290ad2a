#![expect(
    clippy::disallowed_types,
    reason = "the order of the map cannot be seen: it is only asked"
)]

use std::collections::hash_map::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::text::normalize;
use crate::{Error, Result};

/// A text is the set of its runs of so many characters.
const SHINGLE: usize = 5;
/// A text is looked up under so many keys.
const BANDS: usize = 16;
/// Texts of the least similarity share a key with at least this probability.
const MIN_RECALL: f64 = 0.99;
/// So many texts under one key are looked at, and so many of all compared; more of them come from
/// templates, whose rows are similar without being near-duplicates.
const MAX_OF_BAND: usize = 256;
const MAX_COMPARED: usize = 64;
/// Texts wait in memory until there are so many bytes of them.
const PENDING: usize = 1 << 20;
const NONE: u32 = u32::MAX;

/// The keys of a text, made apart from the search because it is the costly part: threads can share
/// it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sketch {
    text: String,
    keys: [u32; BANDS],
}

/// Makes [`Sketch`]es: MinHash signatures, cut into bands whose hashes are the keys.
#[derive(Clone, Debug)]
pub struct Sketcher {
    rows_per_band: usize,
    /// Factor and summand of each hash function.
    functions: Vec<(u64, u64)>,
}

impl Sketcher {
    /// For texts that are near-duplicates from this Jaccard similarity on.
    pub fn new(threshold: f64) -> Sketcher {
        let rows_per_band = rows_per_band(threshold);
        let function = |i: u64| (mix(2 * i) | 1, mix(2 * i + 1));
        let functions = (0..(BANDS * rows_per_band) as u64).map(function).collect();
        Sketcher { rows_per_band, functions }
    }

    /// The sketch of a text; case and runs of white space are the same to it.
    pub fn sketch(&self, text: &str) -> Sketch {
        let text = normalize(text);
        let shingles = shingles(&text);
        let minimum = |&(factor, summand): &(u64, u64)| {
            let hashes = shingles.iter().map(|s| s.wrapping_mul(factor).wrapping_add(summand));
            hashes.min().unwrap_or_default()
        };
        let minima: Vec<u64> = self.functions.iter().map(minimum).collect();
        let mut keys = [0; BANDS];
        for (band, rows) in minima.chunks_exact(self.rows_per_band).enumerate() {
            let key = rows.iter().fold(band as u64, |key, &row| mix(key ^ row));
            // The upper half of the mixed bits.
            keys[band] = (key >> 32) as u32;
        }
        Sketch { text, keys }
    }
}

/// The longest bands with which texts of the threshold are still found: long ones bring few texts
/// that are not similar.
fn rows_per_band(threshold: f64) -> usize {
    let found = |rows: i32| 1.0 - (1.0 - threshold.powi(rows)).powi(BANDS as i32);
    (2..=16).take_while(|&rows| found(rows) >= MIN_RECALL).last().unwrap_or(1) as usize
}

/// The hashes of the runs of [`SHINGLE`] characters, sorted, each once; of a shorter text its own.
fn shingles(text: &str) -> Vec<u64> {
    let codes: Vec<u64> = text.chars().map(|c| u64::from(u32::from(c))).collect();
    let hash = |run: &[u64]| mix(run.iter().fold(run.len() as u64, |hash, &code| mix(hash) ^ code));
    let mut shingles: Vec<u64> = match codes.len() {
        0..=SHINGLE => vec![hash(&codes)],
        _ => codes.windows(SHINGLE).map(hash).collect(),
    };
    shingles.sort_unstable();
    shingles.dedup();
    shingles
}

/// The finalizer of splitmix64: every bit of the input changes half of those of the output.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The share of two texts' runs of five characters that they have in common: the Jaccard similarity
/// that near-duplicates are measured by.
pub fn similarity(one: &str, other: &str) -> f64 {
    jaccard(&shingles(&normalize(one)), &shingles(&normalize(other)))
}

fn jaccard(one: &[u64], other: &[u64]) -> f64 {
    let (mut i, mut j, mut common) = (0, 0, 0_usize);
    while i < one.len() && j < other.len() {
        common += usize::from(one[i] == other[j]);
        let (a, b) = (one[i], other[j]);
        i += usize::from(a <= b);
        j += usize::from(b <= a);
    }
    common as f64 / (one.len() + other.len() - common) as f64
}

/// The earlier text that one is similar to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NearMatch {
    /// Its number in the order of admission, from 0.
    pub index: usize,
    /// The Jaccard similarity of the two.
    pub similarity: f64,
}

/// Texts of which no two are similar: MinHash with locality-sensitive hashing finds candidates, and
/// their true similarity decides.
///
/// It holds about 320 bytes a text; the texts themselves wait in a nameless temporary file.
#[derive(Debug)]
pub struct NearDuplicates {
    threshold: f64,
    /// From a key to the last entry under it; entry `BANDS * text + band` is the text's.
    last: HashMap<u32, u32>,
    /// From an entry to the one before it under the same key.
    previous: Vec<u32>,
    texts: Texts,
}

impl NearDuplicates {
    /// No texts yet; they will wait in this folder.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn new(threshold: f64, folder: &Path) -> Result<NearDuplicates> {
        let texts = Texts::new(folder)?;
        Ok(NearDuplicates { threshold, last: HashMap::new(), previous: Vec::new(), texts })
    }

    /// Adds the text, unless it is similar to one that was added: then that is the result.
    ///
    /// # Errors
    /// A temporary file that cannot be written or read.
    pub fn admit(&mut self, sketch: Sketch) -> Result<Option<NearMatch>> {
        let own = shingles(&sketch.text);
        for index in self.candidates(&sketch.keys) {
            let other = self.texts.get(index)?;
            let similarity = jaccard(&own, &shingles(&other));
            if similarity >= self.threshold {
                return Ok(Some(NearMatch { index, similarity }));
            }
        }
        self.add(&sketch)?;
        Ok(None)
    }

    /// The texts that share most keys, the earliest first where they share equally many.
    fn candidates(&self, keys: &[u32; BANDS]) -> Vec<usize> {
        let mut entries = Vec::new();
        for key in keys {
            let mut entry = self.last.get(key).copied().unwrap_or(NONE);
            for _ in 0..MAX_OF_BAND {
                if entry == NONE {
                    break;
                }
                entries.push(entry as usize / BANDS);
                entry = self.previous[entry as usize];
            }
        }
        entries.sort_unstable();
        let mut shared: Vec<(usize, usize)> =
            entries.chunk_by(PartialEq::eq).map(|same| (same.len(), same[0])).collect();
        shared.sort_by_key(|&(keys, index)| (std::cmp::Reverse(keys), index));
        shared.truncate(MAX_COMPARED);
        shared.into_iter().map(|(_, index)| index).collect()
    }

    fn add(&mut self, sketch: &Sketch) -> Result<()> {
        if self.previous.len() + BANDS > NONE as usize {
            return Err(Error::TooManyPrompts { max: NONE as usize / BANDS });
        }
        for &key in &sketch.keys {
            let entry = self.previous.len() as u32;
            self.previous.push(self.last.insert(key, entry).unwrap_or(NONE));
        }
        self.texts.push(&sketch.text)
    }
}

/// Texts by number, on disk.
#[derive(Debug)]
struct Texts {
    folder: PathBuf,
    file: File,
    /// The end of each text.
    ends: Vec<u64>,
    written: u64,
    pending: Vec<u8>,
}

impl Texts {
    fn new(folder: &Path) -> Result<Texts> {
        let file = tempfile::tempfile_in(folder)
            .map_err(|source| Error::Spill { folder: folder.to_owned(), source })?;
        let folder = folder.to_owned();
        Ok(Texts { folder, file, ends: Vec::new(), written: 0, pending: Vec::new() })
    }

    fn push(&mut self, text: &str) -> Result<()> {
        self.pending.extend_from_slice(text.as_bytes());
        self.ends.push(self.written + self.pending.len() as u64);
        if self.pending.len() < PENDING {
            return Ok(());
        }
        let written = self.file.write_all_at(&self.pending, self.written);
        self.written += self.pending.len() as u64;
        self.pending.clear();
        written.map_err(|source| Error::Spill { folder: self.folder.clone(), source })
    }

    fn get(&self, index: usize) -> Result<String> {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        self.read(start, self.ends[index])
            .map_err(|source| Error::Spill { folder: self.folder.clone(), source })
    }

    /// A text is written or pending as a whole.
    fn read(&self, start: u64, end: u64) -> io::Result<String> {
        let len = (end - start) as usize;
        let bytes = match start.checked_sub(self.written) {
            Some(start) => self.pending[start as usize..start as usize + len].to_vec(),
            None => {
                let mut bytes = vec![0; len];
                self.file.read_exact_at(&mut bytes, start)?;
                bytes
            }
        };
        String::from_utf8(bytes).map_err(io::Error::other)
    }
}
