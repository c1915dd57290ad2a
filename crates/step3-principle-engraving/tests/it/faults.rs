use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
    thread,
    time::Duration,
};

use dromedary_files::Manifest;
use serde_json::{Value, json};

use crate::job::{Job, computed, file, stderr, succeeded};

const FLAGS: [&str; 6] = ["--max-steps", "8", "--save-steps", "2", "--save-total-limit", "2"];

/// What a run computed: loss, gradient norm, learning rate and rows of each step, and the bytes of
/// the adapter and of the last checkpoint's moments.
#[derive(Debug, PartialEq)]
struct Computed {
    steps: Vec<(u64, f64, f64, f64)>,
    rows: Vec<Value>,
    adapter: Vec<u8>,
    moments: Vec<u8>,
}

fn outcome(job: &Job, output_dir: &str) -> Computed {
    let metrics = job.metrics(output_dir);
    let dir = job.path(output_dir);
    Computed {
        steps: metrics.iter().map(computed).collect(),
        rows: metrics.iter().map(|step| step["example_ids"].clone()).collect(),
        adapter: file(&dir, "adapter/adapter_model.safetensors"),
        moments: file(&dir, "checkpoint-8/optimizer.safetensors"),
    }
}

/// A run of 8 steps without interruption.
fn whole(job: &Job) -> Computed {
    succeeded(job.train("whole", &FLAGS));
    let outcome = outcome(job, "whole");
    assert_eq!(outcome.steps.len(), 8);
    assert!(outcome.rows.iter().all(|rows| rows.as_array().unwrap().len() == 2));
    outcome
}

fn with_fault(job: &Job, output_dir: &str, fault: &str) -> Output {
    job.command(output_dir, &FLAGS).env("DROMEDARY_FAULT", fault).output().unwrap()
}

/// Checkpoints that are whole, oldest first.
fn good(job: &Job, output_dir: &str) -> Vec<String> {
    let mut names = job.names(output_dir);
    names.retain(|name| name.starts_with("checkpoint-"));
    names.retain(|name| {
        let path = job.path(output_dir).join(name);
        Manifest::read(&path).is_ok_and(|manifest| manifest.verify(&path).is_ok())
    });
    names
}

/// What a kill behind step 4's checkpoint leaves: `checkpoint-2`, `checkpoint-4` and metrics behind.
fn cut_behind_step_4(job: &Job, output_dir: &str) {
    let killed = with_fault(job, output_dir, "rank=0,point=before-manifest6,how=kill");
    assert_eq!(killed.status.code(), None, "{}", stderr(&killed));
    assert_eq!(good(job, output_dir), ["checkpoint-2", "checkpoint-4"]);
    assert_eq!(job.metrics(output_dir).len(), 6);
}

#[test]
fn a_kill_at_any_point_of_a_save_loses_no_checkpoint_and_no_bit() {
    let job = Job::new(16);
    let whole = whole(&job);
    // Of the save behind step 6, which rotates checkpoint 2 away.
    let points: [(&str, &[&str]); 5] = [
        ("after-shard6", &["checkpoint-2", "checkpoint-4"]),
        ("before-manifest6", &["checkpoint-2", "checkpoint-4"]),
        ("before-rename6", &["checkpoint-2", "checkpoint-4"]),
        ("after-rename6", &["checkpoint-2", "checkpoint-4", "checkpoint-6"]),
        ("in-rotation2", &["checkpoint-2.trash", "checkpoint-4", "checkpoint-6"]),
    ];
    for (point, left) in points {
        let killed = with_fault(&job, point, &format!("rank=0,point={point},how=kill"));
        assert_eq!(killed.status.code(), None, "{point}: {}", stderr(&killed));
        assert_eq!(good(&job, point), left, "{point}");
        let torn = job.names(point).into_iter().filter(|name| name.ends_with(".tmp")).count();
        assert_eq!(torn, usize::from(!left.contains(&"checkpoint-6")), "{point}");

        let again = job.train(point, &FLAGS);
        let text = stderr(&again);
        succeeded(again);
        let newest = left.last().unwrap();
        assert!(text.contains("going on") && text.contains(newest), "{point}: {text}");
        assert_eq!(text.contains("was never complete"), torn == 1, "{point}: {text}");
        assert_eq!(outcome(&job, point), whole, "{point}");
        let names = job.names(point);
        let clean = |name: &String| !name.ends_with(".tmp") && !name.ends_with(".trash");
        assert!(names.iter().all(clean), "{names:?}");
    }
}

#[test]
fn all_that_killed_runs_left_is_removed_and_nothing_else() {
    let job = Job::new(4);
    let left = [".model.Zk3f9a.tmp", ".adapter.Zk3f9a.tmp", ".checkpoint-4.Zk3f9a.tmp"];
    for name in left.into_iter().chain([".modeller.tmp"]) {
        let dir = job.path("out").join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("model.safetensors"), "torn").unwrap();
    }
    let output = job.train("out", &["--max-steps", "1"]);
    let text = stderr(&output);
    succeeded(output);
    let names = job.names("out");
    for name in left {
        assert!(!names.contains(&name.to_owned()) && text.contains(name), "{name}: {text}");
    }
    assert!(names.contains(&".modeller.tmp".to_owned()), "{names:?}");
}

#[test]
fn what_a_checkpoint_leaves_out_is_noticed() {
    let job = Job::new(16);
    let whole = whole(&job);
    cut_behind_step_4(&job, "control");
    succeeded(job.train("control", &FLAGS));
    assert_eq!(outcome(&job, "control"), whole);

    let forget = |part: &str, state: &mut Value| match part {
        "updates" => state["updates"] = json!(0),
        part => state["position"][part] = json!(0),
    };
    for part in ["data", "schedule", "updates"] {
        cut_behind_step_4(&job, part);
        rewrite_state(&job.path(part).join("checkpoint-4"), |state| forget(part, state));
        succeeded(job.train(part, &FLAGS));
        assert_ne!(outcome(&job, part), whole, "{part}");
    }
}

#[test]
fn random_numbers_that_a_checkpoint_leaves_out_are_noticed() {
    let job = Job::new(16);
    let flags = [&FLAGS[..], &["--lora-dropout", "0.2"]].concat();
    succeeded(job.train("whole", &flags));
    let whole = outcome(&job, "whole");
    for (dir, is_left_out) in [("control", false), ("rng", true)] {
        let fault = "rank=0,point=before-manifest6,how=kill";
        let killed = job.command(dir, &flags).env("DROMEDARY_FAULT", fault).output().unwrap();
        assert_eq!(killed.status.code(), None, "{}", stderr(&killed));
        if is_left_out {
            let checkpoint = job.path(dir).join("checkpoint-4");
            rewrite_state(&checkpoint, |state| state["position"]["rng"] = json!(0));
        }
        succeeded(job.train(dir, &flags));
        assert_eq!(outcome(&job, dir) == whole, !is_left_out, "{dir}");
    }
}

/// Changes a checkpoint's state, and its manifest with it.
fn rewrite_state(checkpoint: &Path, change: impl FnOnce(&mut Value)) {
    let path = checkpoint.join("trainer_state.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut state);
    fs::write(&path, state.to_string()).unwrap();
    let manifest = Manifest::of_dir(checkpoint).unwrap();
    let text = serde_json::to_vec(&manifest).unwrap();
    fs::write(checkpoint.join("manifest.json"), text).unwrap();
}

/// Ways in which a file of a checkpoint is damaged.
const WAYS: [&str; 4] = ["truncated", "zeroed", "one bit", "deleted"];

fn damage(way: &str, path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    match way {
        "truncated" => bytes.truncate(bytes.len() / 2),
        "zeroed" => bytes.fill(0),
        "one bit" => *bytes.last_mut().unwrap() ^= 1,
        _ => return fs::remove_file(path).unwrap(),
    }
    fs::write(path, bytes).unwrap();
}

#[test]
fn every_damage_to_a_checkpoint_is_named_and_passed_over_loudly() {
    let job = Job::new(16);
    let whole = whole(&job);
    let names = [
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
        "manifest.json",
    ];
    cut_behind_step_4(&job, "cut");
    for (way, name) in WAYS.iter().flat_map(|way| names.iter().map(move |name| (way, name))) {
        let dir = format!("{way} {name}");
        copy_folder(&job.path("cut"), &job.path(&dir));
        let checkpoint = job.path(&dir).join("checkpoint-4");
        damage(way, &checkpoint.join(name));
        let explicit = [&FLAGS[..], &["--resume", checkpoint.to_str().unwrap()]].concat();
        let refused = job.train(&dir, &explicit);
        assert_eq!(refused.status.code(), Some(1), "{dir}");
        let text = stderr(&refused);
        assert!(text.contains(name) && text.contains("checkpoint-4"), "{dir}: {text}");

        let automatic = job.train(&dir, &FLAGS);
        let text = stderr(&automatic);
        succeeded(automatic);
        assert!(text.contains(name) && text.contains("checkpoint-2"), "{dir}: {text}");
        assert_eq!(outcome(&job, &dir), whole, "{dir}");
    }
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn rotation_leaves_two_checkpoints_that_are_whole() {
    let job = Job::new(16);
    cut_behind_step_4(&job, "out");
    // Bits rot in the newer one; the older must outlive the saves that follow.
    damage("one bit", &job.path("out/checkpoint-4/optimizer.safetensors"));
    let killed = with_fault(&job, "out", "rank=0,point=after-rename6,how=kill");
    assert_eq!(killed.status.code(), None, "{}", stderr(&killed));
    damage("one bit", &job.path("out/checkpoint-4/optimizer.safetensors"));
    succeeded(job.train("out", &FLAGS));
    assert_eq!(good(&job, "out"), ["checkpoint-6", "checkpoint-8"]);

    cut_behind_step_4(&job, "rotten");
    let stopped = Stopped::at(&job, "rotten", "before-rename6");
    damage("one bit", &job.path("rotten/checkpoint-4/optimizer.safetensors"));
    assert_eq!(stopped.go_on_with(&["-TERM"]), Some(75));
    // A busy machine may tell the run of the signal only when the next step has begun.
    let left = good(&job, "rotten");
    assert!(left.len() >= 2 && left.contains(&"checkpoint-6".to_owned()), "{left:?}");
}

/// A run that stands still at a point of a save, so that signals meet it there.
struct Stopped {
    child: std::process::Child,
}

impl Stopped {
    fn at(job: &Job, output_dir: &str, point: &str) -> Self {
        let mut child = job
            .command(output_dir, &FLAGS)
            .env("DROMEDARY_FAULT", format!("rank=0,point={point},how=stop"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let status = format!("/proc/{}/stat", child.id());
        for _ in 0..12_000 {
            // The state stands behind the name in brackets; T is stopped.
            if fs::read_to_string(&status).unwrap().contains(") T ") {
                return Self { child };
            }
            thread::sleep(Duration::from_millis(10));
        }
        child.kill().unwrap();
        panic!("not at {point} in two minutes: {:?}", child.wait());
    }

    /// Sends the signals, lets the run go on and returns its exit code.
    fn go_on_with(mut self, signals: &[&str]) -> Option<i32> {
        for signal in [signals, &["-CONT"]].concat() {
            send(signal, &self.child);
        }
        self.child.wait().unwrap().code()
    }
}

/// Fault 5: a signal between two steps, wherever it comes.
#[test]
fn a_signal_ends_the_run_behind_a_checkpoint_and_the_next_run_computes_the_same_bits() {
    let job = Job::new(40);
    let flags = ["--max-steps", "400", "--save-steps", "1000"];
    succeeded(job.train("whole", &flags));
    let outcome = |dir: &str| {
        let metrics = job.metrics(dir);
        let rows: Vec<Value> = metrics.iter().map(|step| step["example_ids"].clone()).collect();
        let steps: Vec<_> = metrics.iter().map(computed).collect();
        (steps, rows, file(&job.path(dir), "adapter/adapter_model.safetensors"))
    };
    for signal in ["-TERM", "-USR1", "-INT"] {
        let mut child = job.command(signal, &flags).stderr(Stdio::null()).spawn().unwrap();
        job.wait_for_metrics(signal);
        send(signal, &child);
        assert_eq!(child.wait().unwrap().code(), Some(75), "{signal}");
        let done = job.metrics(signal).len();
        assert!(done < 400, "{signal}");
        assert_eq!(good(&job, signal), [format!("checkpoint-{done}")]);
        assert!(!job.path(signal).join("adapter").exists());
        succeeded(job.train(signal, &flags));
        assert!(outcome(signal) == outcome("whole"), "{signal}");
    }
}

fn send(signal: &str, child: &std::process::Child) {
    assert!(
        Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success()
    );
}

#[test]
fn a_second_signal_in_the_middle_of_a_save_tears_nothing() {
    let job = Job::new(16);
    let whole = whole(&job);
    for (dir, signals) in [("usr1-term", ["-USR1", "-TERM"]), ("int-usr1", ["-INT", "-USR1"])] {
        let stopped = Stopped::at(&job, dir, "before-manifest4");
        assert_eq!(good(&job, dir), ["checkpoint-2"]);
        assert_eq!(stopped.go_on_with(&signals), Some(75), "{dir}");
        // A busy machine may tell the run of its signals only when the next step has begun.
        let left = good(&job, dir);
        assert!(left.len() >= 2 && left.contains(&"checkpoint-4".to_owned()), "{dir}: {left:?}");
        assert!(job.names(dir).iter().all(|name| !name.ends_with(".tmp")));
        succeeded(job.train(dir, &FLAGS));
        assert_eq!(outcome(&job, dir), whole, "{dir}");
    }
}
