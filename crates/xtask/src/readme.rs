//! The README's commands: fenced blocks marked `sh ci` are run as they stand, those marked `sh slurm` by
//! the tests under Slurm.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    terminal::{self, say},
    workspace::{self, Workspace},
};

/// Folders of the checkout that the commands may name.
const FOLDERS: [&str; 3] = ["configs", "dummy_data", "prompts"];

/// What marks the blocks of every run.
const MARK: &str = "sh ci";

/// One fenced block to be run.
#[derive(Debug, PartialEq, Eq)]
pub struct Block {
    /// The line of its first command, from 1.
    pub line: usize,
    /// Its commands.
    pub text: String,
}

/// Runs every marked block of README.md in order, in a folder of its own with copies of the
/// folders that the commands name and the built programs on the PATH.
///
/// The commands take their model from the variable MODEL.
pub(crate) fn run(workspace: &Workspace, model: &Path) -> Result<usize> {
    let readme = workspace.root().join("README.md");
    let text =
        fs::read_to_string(&readme).with_context(|| format!("cannot read {}", readme.display()))?;
    let blocks = blocks(&text, MARK).with_context(|| readme.display().to_string())?;
    ensure!(!blocks.is_empty(), "{} has no block marked `{MARK}`", readme.display());
    let folder = tempfile::tempdir()?;
    for name in FOLDERS {
        copy_folder(&workspace.root().join(name), &folder.path().join(name))?;
    }
    let path = workspace::path_with(&workspace.programs()?)?;
    for block in &blocks {
        say!("-- README.md:{}\n{}", block.line, block.text);
        let mut command = workspace.command("bash");
        command
            .args(["-euo", "pipefail", "-c", &block.text])
            .env("MODEL", model)
            .env("PATH", &path)
            .current_dir(folder.path());
        terminal::run_silently(&mut command)
            .with_context(|| format!("the commands of README.md:{} failed", block.line))?;
    }
    Ok(blocks.len())
}

/// The blocks of a Markdown text whose info string is `mark`, such as `sh ci`.
///
/// # Errors
///
/// A block without an end, by its line.
pub fn blocks(markdown: &str, mark: &str) -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    let mut lines = markdown.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let indent = line.len() - line.trim_start().len();
        let body = line.trim();
        let fence = body.len() - body.trim_start_matches('`').len();
        if fence < 3 {
            continue;
        }
        let marked = body[fence..].split_whitespace().eq(mark.split(' '));
        let mut text = Vec::new();
        loop {
            let Some((_, line)) = lines.next() else {
                bail!("the block that begins in line {} has no end", number + 1)
            };
            let end = line.trim();
            if end.len() >= fence && end.chars().all(|c| c == '`') {
                break;
            }
            let shared = line.len() - line.trim_start().len();
            text.push(&line[indent.min(shared)..]);
        }
        if marked {
            blocks.push(Block { line: number + 2, text: text.join("\n") });
        }
    }
    Ok(blocks)
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    let unread = || format!("cannot copy {}", from.display());
    fs::create_dir_all(to).with_context(unread)?;
    for entry in fs::read_dir(from).with_context(unread)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target).with_context(unread)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marked_blocks_are_found_in_order() {
        let text = "# T\n```sh ci\none\n\ntwo\n```\n```sh\nnot this\n```\n\
                    - item\n\n  ```sh ci\n  three\n    indented\n  ```\n\
                    ````\n```sh ci\nquoted\n```\n````\n```sh cinema\nno\n```\n";
        let expected = [(3, "one\n\ntwo"), (13, "three\n  indented")]
            .map(|(line, text)| Block { line, text: text.to_owned() });
        assert_eq!(blocks(text, MARK).unwrap(), expected);
        assert_eq!(blocks(text, "sh cinema").unwrap()[0].text, "no");
    }

    #[test]
    fn a_block_without_an_end_is_an_error() {
        let error = blocks("a\n\n```sh ci\nllama --help\n", MARK).unwrap_err();
        assert!(error.to_string().contains("line 3"), "{error}");
    }

    #[test]
    fn folders_are_copied_whole() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("from");
        fs::create_dir_all(from.join("deep")).unwrap();
        fs::write(from.join("deep/a"), "x").unwrap();
        copy_folder(&from, &folder.path().join("to")).unwrap();
        assert_eq!(fs::read_to_string(folder.path().join("to/deep/a")).unwrap(), "x");
    }
}
