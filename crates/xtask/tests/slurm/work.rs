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
const QUICK: &str = "[generate]\nmax_seq_len = 200\nmax_gen_len = 24\nmax_batch_size = 2\n\
    temperature = 1.0\ntop_p = 1.0\ndeterministic = true\ndevice = \"cpu\"\nthreads = 1\n";

/// A folder of prompts for step 2, and of its answers.
pub(crate) struct Work {
    folder: TempDir,
    prompts: usize,
}

/// A LLaMA of 260,000 parameters.
pub(crate) fn model() -> PathBuf {
    root().join("crates/llama/tests/data/stories260k")
}

impl Work {
    /// So many prompts, each answered in 24 tokens.
    pub(crate) fn quick(prompts: usize) -> Self {
        Self::with(prompts, QUICK)
    }

    /// So many prompts, one after the other and in up to 180 tokens: some hundredths of a second each.
    pub(crate) fn slow(prompts: usize) -> Self {
        let settings = QUICK
            .replace("max_gen_len = 24", "max_gen_len = 180")
            .replace("max_batch_size = 2", "max_batch_size = 1");
        Self::with(prompts, &settings)
    }

    fn with(prompts: usize, settings: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let rows: Vec<_> = (0..prompts)
            .map(|n| format!("{} {n}", BEGINNINGS[n % BEGINNINGS.len()]))
            .map(|text| serde_json::json!({"instruction": text, "input": ""}))
            .collect();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("prompts.json", &serde_json::to_string(&rows).unwrap());
        write("prompt.txt", SHORT_PROMPT);
        write("settings.toml", settings);
        Self { folder, prompts }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Submits step 2 with more flags and settings.
    pub(crate) fn submit<'a>(
        &self,
        cluster: &'a Cluster,
        flags: &[&str],
        settings: &[(&str, &str)],
    ) -> Job<'a> {
        let (model, prompt, config) =
            (model(), self.path("prompt.txt"), self.path("settings.toml"));
        let own = [
            ("MODEL", model.as_path()),
            ("OUT", self.folder.path()),
            ("PROMPT", &prompt),
            ("CONFIG", &config),
        ];
        let more = settings.iter().map(|(name, value)| (*name, Path::new(*value)));
        let settings: Vec<_> = own.into_iter().chain(more).collect();
        cluster.submit("step2.sbatch", flags, &settings)
    }

    /// Every whole row there is, sorted.
    pub(crate) fn rows(&self) -> Vec<String> {
        rows_of(self.folder.path())
    }

    /// Waits until some rows are there, and not all of them.
    pub(crate) fn until_in_the_middle(&self, cluster: &Cluster) {
        cluster.wait_until("there are rows", || self.rows().len() >= 3);
        assert!(self.rows().len() < self.prompts, "all rows were there at once");
    }

    /// Every row is there once, as one process by itself makes it.
    #[track_caller]
    pub(crate) fn assert_whole(&self, cluster: &Cluster) {
        self.assert_as_made_by(cluster, &["step2-self-align"]);
    }

    /// The same for a model that two processes hold: in long texts a token may come close enough to
    /// another one for the order of sums to decide between them.
    #[track_caller]
    pub(crate) fn assert_whole_of_two(&self, cluster: &Cluster) {
        let launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"];
        self.assert_as_made_by(
            cluster,
            &[&launcher[..], &["-n", "2", "step2-self-align"]].concat(),
        );
    }

    #[track_caller]
    fn assert_as_made_by(&self, cluster: &Cluster, program: &[&str]) {
        let alone = tempfile::tempdir().unwrap();
        let flag = |name: &str, path: &Path| format!("--{name}={}", path.display());
        let flags = [
            "generate".to_owned(),
            flag("config", &self.path("settings.toml")),
            flag("checkpoint", &model()),
            flag("input-file", &self.path("prompts.json")),
            flag("output-file", &alone.path().join("aligned.jsonl")),
            flag("meta-prompt-file", &self.path("prompt.txt")),
        ];
        let words: Vec<&str> =
            program.iter().copied().chain(flags.iter().map(String::as_str)).collect();
        cluster.run(words[0], &words[1..]);
        let expected = rows_of(alone.path());
        assert_eq!(expected.len(), self.prompts);
        let rows = self.rows();
        assert_eq!(rows.len(), self.prompts, "{}", cluster.said());
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
