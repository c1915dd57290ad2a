//! Names of the files that the groups of one generation write, and the mark of a finished one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use dromedary_files::{hash_file, read_jsonl, write_atomic};
use dromedary_records::FinishReason;
use serde::de::DeserializeOwned;
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
    let stem = Shard::of(shard).stem.file_name().unwrap_or_default().to_owned();
    let name = shard.file_name().unwrap_or_default().to_string_lossy();
    let behind = name.strip_prefix(&*stem.to_string_lossy()).unwrap_or(".jsonl");
    shard.with_file_name(format!("metrics{behind}"))
}

/// `path` with an ending behind its whole name.
pub(crate) fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(ending);
    path.with_file_name(name)
}

/// Which group of which generation a file of rows is of: `aligned_2shards_0.jsonl` is the first of
/// two of `aligned`, `aligned.jsonl` the only one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shard {
    /// The file without shards and ending.
    pub(crate) stem: PathBuf,
    pub(crate) size: usize,
    pub(crate) rank: usize,
}

impl Shard {
    /// By a file's name.
    pub(crate) fn of(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let stem = name.strip_suffix(".jsonl").unwrap_or(&name);
        let numbers = || {
            let (before, rank) = stem.rsplit_once("shards_")?;
            let (stem, size) = before.rsplit_once('_')?;
            Some((stem, size.parse().ok()?, rank.parse().ok()?))
        };
        let (stem, size, rank) = numbers().unwrap_or((stem, 1, 0));
        Self { stem: path.with_file_name(stem), size, rank }
    }
}

/// All files of rows that stand beside `shard` and belong to the same generation, whatever numbers
/// of groups have written them; in the order of their names.
pub(crate) fn family(shard: &Path) -> Result<Vec<PathBuf>> {
    let stem = Shard::of(shard).stem;
    let folder = match shard.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let unread = |source| Error::Read { path: folder.to_owned(), source };
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(unread)? {
        let path = shard.with_file_name(entry.map_err(unread)?.file_name());
        let is_rows = path.extension().is_some_and(|extension| extension == "jsonl");
        if is_rows && Shard::of(&path).stem == stem {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// What is read of a row that is there.
#[derive(Deserialize)]
pub(crate) struct RowHead {
    pub(crate) id: String,
    pub(crate) finish_reason: FinishReason,
}

/// The rows of a file of rows that is not this process's: its last line may be cut, by a kill or
/// because somebody is writing it, and is no row then.
///
/// # Errors
/// [`Error::Files`], naming file and line.
pub(crate) fn whole_rows<T: DeserializeOwned>(
    path: &Path,
) -> Result<impl Iterator<Item = Result<T>>> {
    let rows = read_jsonl::<T>(path)?;
    Ok(rows.filter_map(|row| match row {
        Ok((_, row)) => Some(Ok(row)),
        Err(dromedary_files::Error::TornTail { .. }) => None,
        Err(error) => Some(Err(error.into())),
    }))
}

/// What stands in the `.done` file beside a finished output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Done {
    /// Rows in the file.
    pub rows: u64,
    /// Those of them whose prompt was rejected.
    pub rejected: u64,
    /// Prompts that the run had to see answered, be it in this file or in another one of the
    /// generation; where a run had several groups, all of them stand in its first file.
    #[serde(default)]
    pub prompts: u64,
    /// BLAKE3 of the file, in hexadecimal digits.
    pub blake3: String,
}

impl Done {
    pub(crate) fn path(shard: &Path) -> PathBuf {
        beside(shard, ".done")
    }

    pub(crate) fn write(shard: &Path, rows: u64, rejected: u64, prompts: u64) -> Result<()> {
        let done = Done { rows, rejected, prompts, blake3: hash_file(shard)? };
        write_json(&Done::path(shard), &done)
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

/// Writes a value as JSON over several lines, whole or not at all.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let failed =
        |error: serde_json::Error| Error::Write { path: path.to_owned(), source: error.into() };
    let mut text = serde_json::to_vec_pretty(value).map_err(failed)?;
    text.push(b'\n');
    Ok(write_atomic(path, &text)?)
}

/// Whether the generations that files belong to are finished: for each there is a number of groups
/// all of whose files are there and marked, and the files hold a row for every prompt. Those of other
/// numbers of groups are what runs have left that were stopped before; their rows count.
///
/// # Errors
/// [`Error::Unfinished`] naming the file that is missing or not finished.
pub(crate) fn check_complete(paths: &[PathBuf], pattern: &str) -> Result<()> {
    let mut generations: BTreeMap<PathBuf, Vec<&PathBuf>> = BTreeMap::new();
    for path in paths {
        generations.entry(Shard::of(path).stem).or_default().push(path);
    }
    generations.values().try_for_each(|paths| check_generation(paths, pattern))
}

fn check_generation(paths: &[&PathBuf], pattern: &str) -> Result<()> {
    let mut sizes: BTreeMap<usize, BTreeMap<usize, &PathBuf>> = BTreeMap::new();
    for path in paths {
        let Shard { size, rank, .. } = Shard::of(path);
        sizes.entry(size).or_default().insert(rank, path);
    }
    let mut unfinished = None;
    let mut prompts = None;
    for (size, files) in sizes {
        match check_groups(size, &files, pattern) {
            Ok(of_size) => prompts = prompts.max(Some(of_size)),
            Err(error) => unfinished = Some(unfinished.unwrap_or(error)),
        }
    }
    match (prompts, unfinished) {
        (None, Some(error)) => Err(error),
        (Some(prompts), _) => check_rows(paths, prompts, pattern),
        (None, None) => Ok(()),
    }
}

/// The prompts that all groups of this number had to see answered.
fn check_groups(size: usize, files: &BTreeMap<usize, &PathBuf>, pattern: &str) -> Result<u64> {
    let mut prompts = 0;
    for rank in 0..size {
        let Some(path) = files.get(&rank) else {
            let stem = files.values().next().map(|path| Shard::of(path).stem).unwrap_or_default();
            let stem = stem.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let message = format!("{stem}_{size}shards_{rank}.jsonl is missing");
            return Err(Error::Unfinished { path: pattern.into(), message });
        };
        prompts += Done::check(path)?.prompts;
    }
    Ok(prompts)
}

fn check_rows(paths: &[&PathBuf], prompts: u64, pattern: &str) -> Result<()> {
    let mut ids = BTreeSet::new();
    for path in paths {
        for row in whole_rows::<RowHead>(path)? {
            ids.insert(row?.id);
        }
    }
    let rows = ids.len() as u64;
    if rows >= prompts {
        return Ok(());
    }
    Err(Error::Unfinished {
        path: pattern.into(),
        message: format!(
            "{rows} of {prompts} prompts have a row in these files; the others are in files of an \
             earlier run that the pattern leaves out, or were lost with them"
        ),
    })
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

    fn folder_of(files: &[(&str, &[&str])]) -> (tempfile::TempDir, Vec<PathBuf>) {
        let folder = tempfile::tempdir().unwrap();
        let paths = files.iter().map(|(name, ids)| {
            let path = folder.path().join(name);
            let row = |id: &&str| format!("{{\"id\":\"{id}\",\"finish_reason\":\"stop\"}}\n");
            fs::write(&path, ids.iter().map(row).collect::<String>()).unwrap();
            path
        });
        let paths = paths.collect();
        (folder, paths)
    }

    fn complaint(paths: &[PathBuf]) -> String {
        check_complete(paths, "a*.jsonl").unwrap_err().to_string()
    }

    #[test]
    fn all_files_of_one_number_of_groups_are_to_be_there_and_finished() {
        let files: [(&str, &[&str]); 2] =
            [("a_3shards_0.jsonl", &["x"]), ("a_3shards_2.jsonl", &["y"])];
        let (_folder, paths) = folder_of(&files);
        Done::write(&paths[0], 1, 0, 1).unwrap();
        assert!(complaint(&paths).contains("a_3shards_1.jsonl is missing"));
        let files: [(&str, &[&str]); 3] =
            [("a_2shards_0.jsonl", &["x"]), ("a_2shards_1.jsonl", &["y"]), ("a.jsonl", &["z"])];
        let (_folder, paths) = folder_of(&files);
        assert!(complaint(&paths).contains("is not finished"));
        Done::write(&paths[0], 1, 0, 2).unwrap();
        Done::write(&paths[1], 1, 0, 1).unwrap();
        // What a run of one group had left before it was stopped.
        assert!(check_complete(&paths, "a*.jsonl").is_ok());
        assert!(complaint(&paths[..2]).contains("2 of 3 prompts have a row"));
        fs::write(&paths[2], "{\"id\":\"z\",\"fini").unwrap();
        assert!(complaint(&paths).contains("2 of 3 prompts have a row"));
    }

    #[test]
    fn a_generation_has_the_files_of_all_numbers_of_groups() {
        let names = ["a.jsonl", "a_2shards_0.jsonl", "a_31shards_4.jsonl"];
        let others = ["ab.jsonl", "a.jsonl.done", "metrics.jsonl", "a_2shards_x.jsonl", "a.json"];
        let (folder, _) = folder_of(&[]);
        for name in names.iter().chain(&others) {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let found = family(&folder.path().join("a_9shards_8.jsonl")).unwrap();
        assert_eq!(found, names.map(|name| folder.path().join(name)));
    }

    #[test]
    fn done_tells_a_file_that_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("aligned.jsonl");
        fs::write(&path, "{}\n").unwrap();
        assert!(Done::check(&path).unwrap_err().to_string().contains("is not finished"));
        Done::write(&path, 1, 0, 1).unwrap();
        assert_eq!(Done::check(&path).unwrap().rows, 1);
        fs::write(&path, "{}\n{}\n").unwrap();
        assert!(Done::check(&path).unwrap_err().to_string().contains("has changed"));
    }
}
