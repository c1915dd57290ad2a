use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use unicode_segmentation::UnicodeSegmentation;

use crate::{Draft, DropReason, Dropped, Effect, Error, Result, Rule};

/// A prompt that shares so many words in a row with a text of a benchmark is taken from it.
const GRAM: usize = 13;
/// Of a shorter text all words must be there: in a row if there are at least so many ...
const MIN_RUN: usize = 8;
/// ... and else as the whole prompt, if there are at least so many.
const MIN_WHOLE: usize = 3;

/// Leaves out prompts that hold a part of a benchmark.
///
/// Words are compared without case and punctuation. A text of a benchmark that has fewer than 13
/// words counts as a whole: from 8 words on wherever it stands in the prompt, below that if the
/// prompt is nothing else.
#[derive(Clone, Debug)]
pub struct DecontaminationRule {
    files: Vec<PathBuf>,
    /// Hash and file of runs of `MIN_RUN` to `GRAM` words, by the number of words.
    runs: Vec<Vec<(u64, u32)>>,
    /// Hash and file of short texts.
    wholes: Vec<(u64, u32)>,
}

impl DecontaminationRule {
    /// Reads benchmarks: every text of JSON (questions as well as answers, whatever the fields are
    /// called) or JSON lines, every line of other files.
    ///
    /// # Errors
    /// A file that cannot be read or has no text of three words.
    pub fn open(files: &[PathBuf]) -> Result<DecontaminationRule> {
        let mut rule = DecontaminationRule {
            files: files.to_vec(),
            runs: vec![Vec::new(); GRAM - MIN_RUN + 1],
            wholes: Vec::new(),
        };
        for (number, file) in (0..).zip(files) {
            let before = rule.len();
            for_each_text(file, &mut |text, is_key| rule.add(text, is_key, number))?;
            if rule.len() == before {
                return Err(Error::NoBenchmark { path: file.clone() });
            }
        }
        for list in rule.runs.iter_mut().chain([&mut rule.wholes]) {
            list.sort_unstable();
            list.dedup_by_key(|&mut (hash, _)| hash);
        }
        Ok(rule)
    }

    fn len(&self) -> usize {
        self.wholes.len() + self.runs.iter().map(Vec::len).sum::<usize>()
    }

    /// Short keys are names of fields.
    fn add(&mut self, text: &str, is_key: bool, file: u32) {
        let words = hashed_words(text);
        if words.len() >= MIN_RUN {
            let len = words.len().min(GRAM);
            self.runs[len - MIN_RUN].extend(words.windows(len).map(|run| (hash(run), file)));
        } else if words.len() >= MIN_WHOLE && !is_key {
            self.wholes.push((hash(&words), file));
        }
    }

    /// The words that stand in a benchmark, and its file.
    pub fn overlap(&self, text: &str) -> Option<(String, &Path)> {
        let hashes = hashed_words(text);
        let found = |list: &[(u64, u32)], run: &[u64]| {
            let hash = hash(run);
            let place = list.binary_search_by_key(&hash, |&(hash, _)| hash).ok()?;
            Some(self.files[list[place].1 as usize].as_path())
        };
        let words = |start: usize, len: usize| {
            let words: Vec<&str> = text.unicode_words().skip(start).take(len).collect();
            words.join(" ")
        };
        if let Some(file) = found(&self.wholes, &hashes) {
            return Some((words(0, hashes.len()), file));
        }
        self.runs.iter().enumerate().filter(|(_, list)| !list.is_empty()).find_map(|(i, list)| {
            let len = i + MIN_RUN;
            let mut runs = hashes.windows(len).enumerate();
            runs.find_map(|(start, run)| Some((words(start, len), found(list, run)?)))
        })
    }
}

impl Rule for DecontaminationRule {
    fn name(&self) -> &'static str {
        "decontamination"
    }

    fn apply(&self, draft: &mut Draft) -> Effect {
        self.overlap(&draft.whole())
            .map(|(words, file)| {
                let detail = format!("{words:?} stands in {}", file.display());
                Dropped::with(DropReason::Contaminated, detail)
            })
            .into()
    }
}

fn hashed_words(text: &str) -> Vec<u64> {
    let hash = |word: &str| {
        let hash = blake3::hash(word.to_lowercase().as_bytes());
        hash.as_bytes()[..8].iter().fold(0, |hash, &byte| hash << 8 | u64::from(byte))
    };
    text.unicode_words().map(hash).collect()
}

/// The words are hashes already; the constant is odd, so that their order counts.
fn hash(words: &[u64]) -> u64 {
    words.iter().fold(words.len() as u64, |hash, word| {
        (hash.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}

/// Calls with each text of the file, and whether it is the name of a field.
fn for_each_text(path: &Path, found: &mut impl FnMut(&str, bool)) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let has =
        |ending: &str| name.trim_end_matches(".gz").trim_end_matches(".zst").ends_with(ending);
    if name.ends_with(".json") {
        let text = read(path)?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|source| Error::BenchmarkJson { path: path.to_owned(), source })?;
        texts_of(&value, found);
    } else if has(".json") || has(".jsonl") {
        for row in dromedary_records::read_rows::<Value>(path)? {
            texts_of(&row?, found);
        }
    } else {
        read(path)?.lines().for_each(|line| found(line, false));
    }
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|source| Error::Open { path: path.to_owned(), source })
}

fn texts_of(value: &Value, found: &mut impl FnMut(&str, bool)) {
    match value {
        Value::String(text) => found(text, false),
        Value::Array(items) => items.iter().for_each(|item| texts_of(item, found)),
        Value::Object(fields) => {
            for (key, value) in fields {
                found(key, true);
                texts_of(value, found);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}
