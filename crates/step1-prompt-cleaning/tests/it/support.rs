use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use dromedary_prompt_cleaning::{Compat, Report, Session, SharedArgs, SourceCounts};
use serde_json::Value;

/// A folder that disappears with the test, and files in it.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// A file of JSON lines.
    pub(crate) fn lines(&self, name: &str, rows: &[Value]) -> PathBuf {
        let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
        self.write(name, text)
    }

    /// The names of all files in it.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.0.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// A session that nothing stops and that shows nothing.
pub(crate) fn quiet() -> Session {
    Session::default()
}

pub(crate) fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub(crate) fn dummy_data(name: &str) -> PathBuf {
    checkout().join("dummy_data").join(name)
}

/// A real tokenizer of 512 pieces, whose texts begin with BOS.
pub(crate) fn small_tokenizer() -> PathBuf {
    checkout().join("crates/llama/tests/data/stories260k/tokenizer.json")
}

/// The file below the folder of real samples; `None`, with a message, where there is no such folder.
pub(crate) fn real_sample(name: &str) -> Option<PathBuf> {
    match std::env::var_os("DROMEDARY_TEST_DATA") {
        Some(folder) => Some(Path::new(&folder).join(name)),
        None => {
            let required =
                std::env::var_os("DROMEDARY_REQUIRE_TEST_DATA").is_some_and(|v| v == "1");
            assert!(!required, "DROMEDARY_TEST_DATA is not set");
            eprintln!("skipped: DROMEDARY_TEST_DATA is not set");
            None
        }
    }
}

/// Runs the binary as a user does.
pub(crate) fn step1(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_step1-prompt-cleaning"))
        .args(args)
        .env_remove("RUST_LOG")
        .output()
        .unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The rows of a JSON array.
pub(crate) fn array(path: &Path) -> Vec<Value> {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The instructions of a JSON array, in its order.
pub(crate) fn instructions(path: &Path) -> Vec<String> {
    array(path).iter().map(|row| row["instruction"].as_str().unwrap().to_owned()).collect()
}

/// The instructions as a sorted list.
pub(crate) fn instruction_set(path: &Path) -> Vec<String> {
    let mut set = instructions(path);
    set.sort();
    set
}

/// The flags that say whose rules to follow.
pub(crate) fn following(compat: Option<Compat>) -> SharedArgs {
    SharedArgs { compat, ..SharedArgs::default() }
}

/// Asserts that every row has one fate.
pub(crate) fn assert_sums(report: &Report) {
    for (source, counts) in &report.sources {
        assert_eq!(counts.rows, counts.kept + counts.dropped_rows(), "{source}: {counts:?}");
        assert!(counts.edited <= counts.rows, "{source}: {counts:?}");
        assert!(counts.edits.values().all(|&rows| rows <= counts.edited), "{source}: {counts:?}");
    }
    let sum = |of: fn(&SourceCounts) -> u64| -> u64 { report.sources.values().map(of).sum() };
    assert_eq!(sum(|counts| counts.kept), report.rows_out);
    assert_eq!(
        sum(|counts| counts.rows),
        report.inputs.iter().map(|input| input.rows).sum::<u64>()
    );
}
