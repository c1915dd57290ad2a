use std::fs;
use std::path::{Path, PathBuf};

use dromedary_command::{Error, Result};
use glob::{MatchOptions, glob_with};
use serde::{Deserialize, Deserializer};

use super::refuse_hub_name;

/// How the names of the files end that a folder is searched for.
const ENDINGS: [&str; 4] = [".parquet", ".json", ".jsonl", ".ndjson"];

/// The files that a flag names: files as they are given, those of a folder and those that a pattern
/// (`*`, `?`, `[...]`) fits in the order of their names.
pub(crate) fn found_files(given: &[PathBuf], flag: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in given {
        refuse_hub_name(path, flag)?;
        let found = match path.to_str() {
            _ if path.is_dir() => of_folder(path, flag)?,
            Some(pattern) if pattern.contains(['*', '?', '[']) && !path.exists() => {
                of_pattern(pattern, flag)?
            }
            _ => vec![path.clone()],
        };
        if found.is_empty() {
            let path = path.display();
            return Err(Error::usage(format!("{flag} {path}: there is no file of rows")));
        }
        files.extend(found);
    }
    Ok(files)
}

fn of_folder(folder: &Path, flag: &str) -> Result<Vec<PathBuf>> {
    let unreadable = |error| Error::usage(format!("{flag} {}: {error}", folder.display()));
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.is_file() && has_rows(&path) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn of_pattern(pattern: &str, flag: &str) -> Result<Vec<PathBuf>> {
    let refused = |error: String| Error::usage(format!("{flag} {pattern}: {error}"));
    // Hidden files are others' unfinished ones.
    let options = MatchOptions { require_literal_leading_dot: true, ..MatchOptions::new() };
    let paths = glob_with(pattern, options).map_err(|error| refused(error.to_string()))?;
    let mut files = Vec::new();
    for path in paths {
        let path = path.map_err(|error| refused(error.to_string()))?;
        if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn has_rows(path: &Path) -> bool {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return false };
    let name = name.to_ascii_lowercase();
    let name = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
    !name.starts_with('.') && ENDINGS.iter().any(|ending| name.ends_with(ending))
}

/// A list of paths, or one path that stands alone.
pub(crate) fn one_or_many<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Vec<PathBuf>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Paths {
        One(PathBuf),
        Many(Vec<PathBuf>),
    }
    Ok(match Paths::deserialize(deserializer)? {
        Paths::One(path) => vec![path],
        Paths::Many(paths) => paths,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_and_patterns_give_sorted_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["b.json", "a.jsonl.gz", "c.parquet", "d.ndjson.zst", ".e.json", "notes.txt"] {
            fs::write(path(name), "").unwrap();
        }
        let found = |given: &str| found_files(&[path(given)], "--dolly");
        let names = ["a.jsonl.gz", "b.json", "c.parquet", "d.ndjson.zst"];
        assert_eq!(found("").unwrap(), names.map(path));
        assert_eq!(found("[bc].*").unwrap(), ["b.json", "c.parquet"].map(path));
        let both = [path("c.parquet"), path("*.json*")];
        let in_order = ["c.parquet", "a.jsonl.gz", "b.json"].map(path);
        assert_eq!(found_files(&both, "--dolly").unwrap(), in_order);
        // A file that is not there is told when it is opened.
        assert_eq!(found("none.json").unwrap(), [path("none.json")]);
        let error = found("*.csv").unwrap_err().to_string();
        assert!(error.contains("--dolly") && error.contains("no file of rows"), "{error}");
    }
}
