//! Names of the files that the groups of one generation write, and the mark of a finished one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use dromedary_files::{hash_file, write_atomic};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The file that group `group_rank` of `group_size` writes.
///
/// `aligned.jsonl` stays as it is for one group, and becomes `aligned_{G}shards_{R}.jsonl` for
/// several. A `.json` always gets shards and `.jsonl`: Dromedary's own commands name an output
/// `self_align.json` and then look for `self_align_*shards_*.jsonl`. A name with `shards` in it
/// says already which one it is.
pub fn shard_path(output_file: &Path, group_rank: usize, group_size: usize) -> PathBuf {
    let name = output_file.file_name().unwrap_or_default().to_string_lossy();
    let (stem, is_json) = match name.strip_suffix(".jsonl") {
        Some(stem) => (stem, false),
        None => (name.strip_suffix(".json").unwrap_or(&name), name.ends_with(".json")),
    };
    let sharded = !stem.contains("shards") && (group_size > 1 || is_json);
    let shard = if sharded { format!("_{group_size}shards_{group_rank}") } else { String::new() };
    output_file.with_file_name(format!("{stem}{shard}.jsonl"))
}

/// The file beside an output whose name is made of both names: `metrics` for `aligned.jsonl` is
/// `metrics.jsonl`, for a shard `metrics_{G}shards_{R}.jsonl`; no pattern of rows matches it.
pub(crate) fn metrics_path(shard: &Path) -> PathBuf {
    let suffix =
        shard_of(shard).map(|(_, size, rank)| format!("_{size}shards_{rank}")).unwrap_or_default();
    shard.with_file_name(format!("metrics{suffix}.jsonl"))
}

/// `path` with an ending behind its whole name.
pub(crate) fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(ending);
    path.with_file_name(name)
}

/// What stands in the `.done` file beside a finished output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Done {
    /// Rows in the file.
    pub rows: u64,
    /// Those of them whose prompt was rejected.
    pub rejected: u64,
    /// BLAKE3 of the file, in hexadecimal digits.
    pub blake3: String,
}

impl Done {
    pub(crate) fn path(shard: &Path) -> PathBuf {
        beside(shard, ".done")
    }

    pub(crate) fn write(shard: &Path, rows: u64, rejected: u64) -> Result<()> {
        let done = Done { rows, rejected, blake3: hash_file(shard)? };
        let text = format!(
            "{{\n  \"rows\": {},\n  \"rejected\": {},\n  \"blake3\": \"{}\"\n}}\n",
            done.rows, done.rejected, done.blake3
        );
        Ok(write_atomic(Done::path(shard), text.as_bytes())?)
    }

    /// The mark of a finished file.
    ///
    /// # Errors
    /// [`Error::Unfinished`] where there is none, or where the file has changed since.
    pub fn check(shard: &Path) -> Result<Done> {
        let unfinished = |message: String| Error::Unfinished { path: shard.to_owned(), message };
        let path = Done::path(shard);
        if !path.exists() {
            return Err(unfinished(format!("is not finished, there is no {}", path.display())));
        }
        let text = fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        let done: Done = serde_json::from_slice(&text)
            .map_err(|error| unfinished(format!("{} is no mark: {error}", path.display())))?;
        let blake3 = hash_file(shard)?;
        if blake3 != done.blake3 {
            return Err(unfinished(format!("has changed since {} was written", path.display())));
        }
        Ok(done)
    }
}

/// `stem`, group size and group rank of a name such as `aligned_2shards_0.jsonl`.
fn shard_of(path: &Path) -> Option<(String, usize, usize)> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".jsonl")?;
    let (before, rank) = stem.rsplit_once("shards_")?;
    let (stem, size) = before.rsplit_once('_')?;
    Some((stem.to_owned(), size.parse().ok()?, rank.parse().ok()?))
}

/// Whether all shards of each generation are there.
pub(crate) fn check_complete(paths: &[PathBuf], pattern: &str) -> Result<()> {
    let mut groups: BTreeMap<(PathBuf, usize), BTreeSet<usize>> = BTreeMap::new();
    for path in paths {
        if let Some((stem, size, rank)) = shard_of(path) {
            groups.entry((path.with_file_name(stem), size)).or_default().insert(rank);
        }
    }
    for ((stem, size), ranks) in groups {
        if let Some(missing) = (0..size).find(|rank| !ranks.contains(rank)) {
            let stem = stem.file_name().unwrap_or_default().to_string_lossy();
            return Err(Error::Unfinished {
                path: pattern.into(),
                message: format!("{stem}_{size}shards_{missing}.jsonl is missing"),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(output: &str, rank: usize, size: usize) -> String {
        shard_path(Path::new(output), rank, size).display().to_string()
    }

    #[test]
    fn groups_name_their_files_as_the_original_does() {
        assert_eq!(name("runs/aligned.jsonl", 0, 1), "runs/aligned.jsonl");
        assert_eq!(name("aligned.jsonl", 1, 4), "aligned_4shards_1.jsonl");
        assert_eq!(name("self_align.json", 0, 1), "self_align_1shards_0.jsonl");
        assert_eq!(name("self_align.json", 31, 32), "self_align_32shards_31.jsonl");
        assert_eq!(name("a_32shards_7.jsonl", 7, 32), "a_32shards_7.jsonl");
        assert_eq!(name("a_32shards_7.json", 7, 32), "a_32shards_7.jsonl");
        assert_eq!(name("aligned", 0, 1), "aligned.jsonl");
    }

    #[test]
    fn metrics_go_with_the_shard_and_match_no_pattern_of_rows() {
        let metrics = |path: &str| metrics_path(Path::new(path)).display().to_string();
        assert_eq!(metrics("a/aligned.jsonl"), "a/metrics.jsonl");
        assert_eq!(metrics("a/aligned_2shards_1.jsonl"), "a/metrics_2shards_1.jsonl");
    }

    #[test]
    fn a_missing_shard_is_named() {
        let paths = ["a_3shards_0.jsonl", "a_3shards_2.jsonl"].map(PathBuf::from);
        let message = check_complete(&paths, "a_*").unwrap_err().to_string();
        assert!(message.contains("a_3shards_1.jsonl is missing"), "{message}");
        assert!(check_complete(&["x.jsonl".into()], "*").is_ok());
    }

    #[test]
    fn done_tells_a_file_that_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("aligned.jsonl");
        fs::write(&path, "{}\n").unwrap();
        assert!(Done::check(&path).unwrap_err().to_string().contains("is not finished"));
        Done::write(&path, 1, 0).unwrap();
        assert_eq!(Done::check(&path).unwrap().rows, 1);
        fs::write(&path, "{}\n{}\n").unwrap();
        assert!(Done::check(&path).unwrap_err().to_string().contains("has changed"));
    }
}
