use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cluster::{Cluster, Job, programs, root};
use crate::work::{folder_in, model};

/// How far a matrix of an adapter may be from that of one process, of its own norm.
const TOLERANCE: f64 = 1e-4;

/// Micro-batches of a step, of all replicas together.
const MICRO_BATCHES: usize = 4;

/// Steps of a run, and the step of its first checkpoint. The kernel may hand a signal to a thread that
/// runs late, so a run that is told to stop in a save may make some of the steps behind it.
const STEPS: usize = 24;
const FIRST_SAVED: usize = 4;

/// Replicas, and ranks of each.
#[derive(Clone, Copy)]
struct Layout {
    dp: usize,
    tp: usize,
}

impl Layout {
    const ONE: Self = Self { dp: 1, tp: 1 };

    /// Both nodes, but for one rank.
    fn flags(self) -> Vec<String> {
        match self.dp * self.tp {
            1 => Vec::new(),
            ranks => vec!["--nodes=2".to_owned(), format!("--ntasks-per-node={}", ranks / 2)],
        }
    }
}

/// A folder of rows for step 3, and of what it makes of them.
struct Training<'a> {
    cluster: &'a Cluster,
    folder: TempDir,
    layout: Layout,
}

impl<'a> Training<'a> {
    /// The same rows in each step, whatever the layout.
    fn new(cluster: &'a Cluster, layout: Layout) -> Self {
        let training = Self::without_rows(cluster, layout, folder_in(cluster));
        let row = |n: usize| {
            json!({"example_id": n, "instruction": format!("Count to {n}."), "input": "",
                "output": format!("One, two, and so on to {n}."), "meta_prompt": "Be good.\n\n### User\n"})
        };
        let rows: Vec<_> = (0..24).map(row).collect();
        fs::write(training.path("sft.json"), serde_json::to_string(&rows).unwrap()).unwrap();
        training
    }

    /// Its rows are still to be merged.
    fn without_rows(cluster: &'a Cluster, layout: Layout, folder: TempDir) -> Self {
        let accumulation = MICRO_BATCHES / layout.dp;
        let settings = format!(
            "[train]\nmeta_prompt_pattern = \"prompts/dromedary_*prompt_distill.txt\"\nsource_max_len = 96\ntarget_max_len = 48\nmax_steps = {STEPS}\nsave_steps = {FIRST_SAVED}\n\
             per_device_train_batch_size = 2\ngradient_accumulation_steps = {accumulation}\n\
             learning_rate = 1e-3\nlora_r = 4\nthreads = 1\ndevice = \"cpu\"\n"
        );
        fs::write(folder.path().join("settings.toml"), settings).unwrap();
        Self { cluster, folder, layout }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn submit(&self, flags: &[&str], settings: &[(&str, &str)]) -> Job<'a> {
        let (model, config) = (model(), self.path("settings.toml"));
        let tp = self.layout.tp.to_string();
        let own = [
            ("MODEL", model.as_path()),
            ("OUT", self.folder.path()),
            ("STEP3_CONFIG", &config),
            ("TP", Path::new(&tp)),
        ];
        let more = settings.iter().map(|(name, value)| (*name, Path::new(*value)));
        let settings: Vec<_> = own.into_iter().chain(more).collect();
        let layout = self.layout.flags();
        let flags: Vec<&str> =
            layout.iter().map(String::as_str).chain(flags.iter().copied()).collect();
        self.cluster.submit("step3.sbatch", &flags, &settings)
    }

    /// Submits a job whose first rank stops itself while it saves the first checkpoint. One that is
    /// started anew goes on behind it.
    fn submit_to_stop_in_a_save(&self, flags: &[&str], settings: &[(&str, &str)]) -> Job<'a> {
        let fault = format!("rank=0,point=before-rename{FIRST_SAVED},how=stop");
        self.submit(flags, &[settings, &[("DROMEDARY_FAULT", &fault)]].concat())
    }

    /// The same training without Slurm, undisturbed.
    fn by_itself(&self) -> Self {
        let alone = Self::new(self.cluster, self.layout);
        let ranks = (self.layout.dp * self.layout.tp).to_string();
        let mpirun =
            ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", &ranks];
        let flag = |name: &str, path: PathBuf| format!("--{name}={}", path.display());
        let flags = [
            "step3-principle-engraving".to_owned(),
            "train".to_owned(),
            flag("config", alone.path("settings.toml")),
            flag("checkpoint", model()),
            flag("dataset", alone.path("sft.json")),
            flag("output-dir", alone.path("engraved")),
            format!("--tp={}", self.layout.tp),
        ];
        let words: Vec<&str> = mpirun.into_iter().chain(flags.iter().map(String::as_str)).collect();
        self.cluster.run(words[0], &words[1..]);
        alone
    }

    fn steps(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.path("engraved/metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn adapter(&self) -> Vec<u8> {
        fs::read(self.path("engraved/adapter/adapter_model.safetensors")).unwrap()
    }

    /// To the last bit, and with the same loss in each step, which is there once.
    #[track_caller]
    fn assert_equal_to(&self, other: &Self) {
        let losses = |run: &Self| -> Vec<Value> {
            run.steps().iter().map(|step| json!([step["step"], step["loss"]])).collect()
        };
        assert_eq!(losses(self).len(), STEPS);
        assert_eq!(losses(self), losses(other));
        assert!(self.adapter() == other.adapter(), "the adapters differ");
    }

    #[track_caller]
    fn assert_close_to(&self, other: &Self) {
        let (own, other) = (tensors(&self.adapter()), tensors(&other.adapter()));
        assert_eq!(own.len(), 2 * 7 * 5, "A and B of 7 matrices of 5 layers");
        assert!(own.keys().eq(other.keys()));
        for (name, values) in &own {
            let expected = &other[name];
            assert_eq!(values.len(), expected.len(), "{name}");
            // Of the whole matrix: AdamW makes much of single gradients that are rounding alone.
            let norm = |values: &mut dyn Iterator<Item = f64>| {
                values.map(|value| value * value).sum::<f64>().sqrt()
            };
            let off = norm(&mut values.iter().zip(expected).map(|(one, two)| one - two));
            let size = norm(&mut expected.iter().copied());
            assert!(off <= TOLERANCE * size, "{name}: off by {off} of {size}");
        }
        let moved = other.iter().filter(|(name, _)| name.contains("lora_B"));
        assert!(
            moved.flat_map(|(_, values)| values).any(|value| value.abs() > 1e-3),
            "nothing was learned"
        );
    }
}

/// The f32 tensors of a safetensors file: length of the header, header, numbers.
fn tensors(file: &[u8]) -> BTreeMap<String, Vec<f64>> {
    let (length, rest) = file.split_first_chunk().unwrap();
    let (header, numbers) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: BTreeMap<String, Value> = serde_json::from_slice(header).unwrap();
    let tensor = |(name, about): (String, Value)| {
        assert_eq!(about["dtype"], "F32", "{name}");
        let [begin, end] = [0, 1].map(|n| about["data_offsets"][n].as_u64().unwrap() as usize);
        let values = numbers[begin..end].as_chunks().0.iter();
        (name, values.map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect())
    };
    header.into_iter().filter(|(name, _)| name != "__metadata__").map(tensor).collect()
}

/// Replicas on both nodes, a model on both nodes, and both at once, to a model that can be loaded.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn step_3_trains_on_both_nodes_what_one_process_trains() {
    let cluster = Cluster::start();
    let alone = Training::new(&cluster, Layout::ONE).by_itself();
    for layout in [Layout { dp: 2, tp: 1 }, Layout { dp: 1, tp: 2 }, Layout { dp: 2, tp: 2 }] {
        let training = Training::new(&cluster, layout);
        let states = training.submit(&[], &[]).complete();
        assert_eq!(states[0]["NodeList"], "n[1-2]");
        training.assert_close_to(&alone);
        let merged = training.path("model").display().to_string();
        cluster.run("llama", &["inspect", "--verify", "--checkpoint", &merged]);
    }
}

/// A replica on each node, whose ranks save the same step and go on behind it. Slurm sends its signal not
/// before 70 s, when the ranks listen to it and the first of them has stopped.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn a_training_whose_time_is_nearly_over_goes_back_into_the_queue_and_finishes() {
    let cluster = Cluster::start();
    let training = Training::new(&cluster, Layout { dp: 2, tp: 2 });
    let job = training.submit_to_stop_in_a_save(&["--time=00:02:00", "--signal=USR1@50"], &[]);
    cluster.go_on_when_told(&job.stopped(1), Signal::USR1);
    let states = job.complete();
    assert_ne!(states[0]["Restarts"], "0", "{}", job.log());
    assert!(job.log().contains("going on behind step"), "{}", job.log());
    training.assert_equal_to(&training.by_itself());
}

/// It ends as it was stopped, with a checkpoint, and the same line goes on.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn a_training_that_was_put_back_often_enough_stays_stopped() {
    let cluster = Cluster::start();
    let training = Training::new(&cluster, Layout::ONE);
    let job = training.submit_to_stop_in_a_save(&[], &[("MAX_RESTARTS", "0")]);
    let task = job.stopped(1);
    cluster.run("scancel", &["--signal=USR1", &job.id]);
    cluster.go_on_when_told(&task, Signal::USR1);
    let states = job.until(&["FAILED", "COMPLETED"]);
    assert_eq!(
        (states[0]["JobState"].as_str(), states[0]["ExitCode"].as_str()),
        ("FAILED", "75:0")
    );
    assert!(job.log().contains("not put back into the queue: MAX_RESTARTS=0"), "{}", job.log());
    let made = training.steps().len();
    assert!((FIRST_SAVED..STEPS).contains(&made), "{made} steps");
    training.submit(&[], &[]).complete();
    training.assert_equal_to(&training.by_itself());
}

/// Programs of step 3, of which the one stops before it begins, when it is started for the first time.
fn stopping_before(program: &str, notes: &Path) -> TempDir {
    let folder = tempfile::tempdir_in(notes).unwrap();
    for name in ["step2-self-align", "step3-principle-engraving", "llama"] {
        let stop = format!("mkdir '{}/begun' && kill -STOP $$\n", notes.display());
        let stop = if name == program { stop.as_str() } else { "" };
        let path = folder.path().join(name);
        let run = programs().join(name);
        fs::write(&path, format!("#!/bin/sh\n{stop}exec {} \"$@\"\n", run.display())).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    folder
}

/// What is done by one task, before the training and behind it, hears of the end as well. The folder has a
/// name that would be a pattern of other ones.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn a_merge_whose_time_is_nearly_over_goes_back_into_the_queue() {
    let cluster = Cluster::start();
    for program in ["step2-self-align", "llama"] {
        let folder =
            tempfile::Builder::new().prefix("a [b]*").tempdir_in(cluster.folder()).unwrap();
        let training = Training::without_rows(&cluster, Layout::ONE, folder);
        let answers = root().join("dummy_data/aligned.jsonl");
        fs::copy(answers, training.path("aligned.jsonl")).unwrap();
        let config = training.path("step2.toml");
        fs::write(&config, "[merge-and-filter]\nallow_unfinished = true\n").unwrap();
        let notes = folder_in(&cluster);
        let programs = stopping_before(program, notes.path());
        let settings = [("BIN_DIR", programs.path()), ("STEP2_CONFIG", config.as_path())];
        let settings = settings.map(|(name, path)| (name, path.to_str().unwrap()));
        let job = training.submit(&["--ntasks-per-node=2"], &settings);
        let task = job.stopped(1);
        cluster.run("scancel", &["--signal=USR1", &job.id]);
        cluster.go_on_when_told(&task, Signal::USR1);
        let states = job.complete();
        assert_eq!(states[0]["Restarts"], "1", "{}", job.log());
        let merged = training.path("model").display().to_string();
        cluster.run("llama", &["inspect", "--verify", "--checkpoint", &merged]);
    }
}
