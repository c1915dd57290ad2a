//! Where the demo's prompts come from.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::terminal::say;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The files of the four sources.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Inputs {
    pub(super) openorca: Vec<PathBuf>,
    pub(super) sharegpt: Vec<PathBuf>,
    pub(super) dolly: Vec<PathBuf>,
    pub(super) oasst1: Vec<PathBuf>,
}

impl Inputs {
    /// The samples that come with the checkout.
    pub(super) fn of_checkout() -> Self {
        let file = |name: &str| vec![Path::new("dummy_data").join(name)];
        Self {
            openorca: file("openorca.parquet"),
            sharegpt: file("sharegpt.json"),
            dolly: file("dolly.jsonl"),
            oasst1: file("oasst1.jsonl"),
        }
    }

    /// The files in a folder of the user's, one subfolder a source.
    pub(super) fn of_folder(folder: &Path) -> Result<Self> {
        let folder = fs::canonicalize(folder)
            .with_context(|| format!("cannot read {}", folder.display()))?;
        Ok(Self {
            openorca: files(&folder.join("openorca"), &["jsonl", "parquet"])?,
            sharegpt: arrays(files(&folder.join("sharegpt"), &["json"])?)?,
            dolly: files(&folder.join("dolly"), &["jsonl"])?,
            oasst1: files(&folder.join("oasst1"), &["jsonl"])?,
        })
    }
}

/// The files of a folder with one of the endings, in the order of their names; those of the last
/// ending that any file has.
fn files(folder: &Path, endings: &[&str]) -> Result<Vec<PathBuf>> {
    let unread = || format!("cannot read {}", folder.display());
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).with_context(unread)? {
        paths.push(entry.with_context(unread)?.path());
    }
    paths.sort();
    let of = |ending: &str| {
        let ends = |path: &&PathBuf| path.extension().is_some_and(|other| other == ending);
        paths.iter().filter(ends).cloned().collect::<Vec<_>>()
    };
    let found = endings.iter().rev().map(|ending| of(ending)).find(|found| !found.is_empty());
    let found = found.unwrap_or_default();
    ensure!(!found.is_empty(), "no *.{} in {}", endings.join(", *."), folder.display());
    Ok(found)
}

/// The files that are exports of conversations, which are JSON arrays; a single conversation is none.
fn arrays(files: Vec<PathBuf>) -> Result<Vec<PathBuf>> {
    let mut arrays = Vec::new();
    for path in files {
        let mut start = Vec::new();
        fs::File::open(&path)
            .and_then(|file| file.take(1024).read_to_end(&mut start))
            .with_context(|| format!("cannot read {}", path.display()))?;
        let first = start.trim_ascii_start().strip_prefix(BYTE_ORDER_MARK).unwrap_or(&start);
        if first.trim_ascii_start().starts_with(b"[") {
            arrays.push(path);
        } else {
            say!("left out, since it is no JSON array: {}", path.display());
        }
    }
    ensure!(!arrays.is_empty(), "no file of conversations is a JSON array");
    Ok(arrays)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_four_sources_are_found_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        for name in [
            "openorca/b.jsonl",
            "openorca/a.jsonl",
            "sharegpt/s.json",
            "sharegpt/notes.txt",
            "dolly/d.jsonl",
            "oasst1/o.jsonl",
        ] {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "\u{feff} [").unwrap();
        }
        fs::write(root.join("sharegpt/one.json"), "{}").unwrap();
        let inputs = Inputs::of_folder(&root).unwrap();
        assert_eq!(inputs.openorca, ["a", "b"].map(|n| root.join(format!("openorca/{n}.jsonl"))));
        assert_eq!(inputs.sharegpt, [root.join("sharegpt/s.json")]);
        fs::write(root.join("openorca/whole.parquet"), "").unwrap();
        let inputs = Inputs::of_folder(&root).unwrap();
        assert_eq!(inputs.openorca, [root.join("openorca/whole.parquet")]);
        fs::remove_file(root.join("dolly/d.jsonl")).unwrap();
        let error = Inputs::of_folder(&root).unwrap_err().to_string();
        assert!(error.contains("no *.jsonl in") && error.contains("dolly"), "{error}");
    }
}
