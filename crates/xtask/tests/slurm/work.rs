use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::cluster::{Cluster, Job, root};

/// A prompt that leaves room in 512 tokens of context.
const SHORT_PROMPT: &str = "Be good.\n\nUser:";

const BEGINNINGS: [&str; 6] =
    ["Once upon a time", "Tim had a dog", "Lily saw a cat", "The sun was", "A bird", "Mom said"];

/// Settings for a LLaMA of 260,000 parameters: rows of any company and any number of processes are
/// equal to the last bit.
const SETTINGS: &str = "[generate]\nmax_seq_len = 200\nmax_gen_len = 24\nmax_batch_size = 2\n\
    temperature = 1.0\ntop_p = 1.0\ndeterministic = true\ndevice = \"cpu\"\nthreads = 1\n";

/// Rows that a group has written when [`Work::stop_in_the_middle`] stops it.
const MIDDLE: usize = 4;

/// A folder of prompts for step 2, and of its answers.
pub(crate) struct Work<'a> {
    cluster: &'a Cluster,
    folder: TempDir,
    prompts: usize,
}

/// A LLaMA of 260,000 parameters.
pub(crate) fn model() -> PathBuf {
    root().join("crates/llama/tests/data/stories260k")
}

/// A folder that goes with the cluster.
pub(crate) fn folder_in(cluster: &Cluster) -> TempDir {
    tempfile::tempdir_in(cluster.folder()).unwrap()
}

impl<'a> Work<'a> {
    /// So many prompts, each answered in 24 tokens.
    pub(crate) fn new(cluster: &'a Cluster, prompts: usize) -> Self {
        let folder = folder_in(cluster);
        let rows: Vec<_> = (0..prompts)
            .map(|n| format!("{} {n}", BEGINNINGS[n % BEGINNINGS.len()]))
            .map(|text| serde_json::json!({"instruction": text, "input": ""}))
            .collect();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("prompts.json", &serde_json::to_string(&rows).unwrap());
        write("prompt.txt", SHORT_PROMPT);
        write("settings.toml", SETTINGS);
        Self { cluster, folder, prompts }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Submits step 2 with more flags and settings.
    pub(crate) fn submit(&self, flags: &[&str], settings: &[(&str, &str)]) -> Job<'a> {
        let (model, prompt, config) =
            (model(), self.path("prompt.txt"), self.path("settings.toml"));
        let own = [
            ("MODEL", model.as_path()),
            ("OUT", self.folder.path()),
            ("PROMPT", &prompt),
            ("STEP2_CONFIG", &config),
        ];
        let more = settings.iter().map(|(name, value)| (*name, Path::new(*value)));
        let settings: Vec<_> = own.into_iter().chain(more).collect();
        self.cluster.submit("step2.sbatch", flags, &settings)
    }

    /// Submits a job in which the first task of each group stops itself behind its fourth row. One that is
    /// started anew finds these rows and does not stop again.
    pub(crate) fn submit_to_stop_in_the_middle(&self, flags: &[&str]) -> Job<'a> {
        let fault = format!("rank=0,point=row-written{MIDDLE},how=stop");
        self.submit(flags, &[("DROMEDARY_FAULT", &fault)])
    }

    /// Every whole row there is, sorted.
    pub(crate) fn rows(&self) -> Vec<String> {
        rows_of(self.folder.path())
    }

    /// Some rows are there, and others not.
    #[track_caller]
    pub(crate) fn assert_begun(&self) {
        let rows = self.rows().len();
        assert!((MIDDLE..self.prompts).contains(&rows), "{rows} of {}", self.prompts);
    }

    /// Every row is there once, as one process by itself makes it.
    #[track_caller]
    pub(crate) fn assert_whole(&self) {
        let alone = folder_in(self.cluster);
        let flag = |name: &str, path: &Path| format!("--{name}={}", path.display());
        let flags = [
            "generate".to_owned(),
            flag("config", &self.path("settings.toml")),
            flag("checkpoint", &model()),
            flag("input-file", &self.path("prompts.json")),
            flag("output-file", &alone.path().join("aligned.jsonl")),
            flag("meta-prompt-file", &self.path("prompt.txt")),
        ];
        self.cluster.run("step2-self-align", &flags.each_ref().map(String::as_str));
        let expected = rows_of(alone.path());
        assert_eq!(expected.len(), self.prompts);
        let rows = self.rows();
        assert_eq!(rows.len(), self.prompts, "{}", self.cluster.said());
        assert_eq!(rows, expected);
    }

    /// Names of the files of rows that are marked as finished.
    pub(crate) fn finished(&self) -> Vec<String> {
        let names = fs::read_dir(self.folder.path()).unwrap().flatten();
        let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut marks: Vec<_> = names.filter(|name| name.ends_with(".jsonl.done")).collect();
        marks.sort();
        marks
    }
}

fn rows_of(folder: &Path) -> Vec<String> {
    let files = fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    let files = files.filter(|path| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("aligned") && name.ends_with(".jsonl")
    });
    let mut rows: Vec<String> = files
        .flat_map(|path| {
            let text = fs::read_to_string(path).unwrap();
            // A row that is being written has no end yet.
            let whole: Vec<String> = text
                .split_inclusive('\n')
                .filter(|line| line.ends_with('\n'))
                .map(str::to_owned)
                .collect();
            whole
        })
        .collect();
    rows.sort();
    rows
}
