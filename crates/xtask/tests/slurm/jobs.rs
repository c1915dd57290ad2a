use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::cluster::{Cluster, root};
use crate::work::{Work, model};

fn same_files(one: &Path, other: &Path, names: &[&str]) {
    for name in names {
        let [one, other] = [one, other].map(|folder| fs::read(folder.join(name)).unwrap());
        assert!(one == other, "{name} differs");
    }
}

#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn step_1_cleans_and_merges() {
    let cluster = Cluster::start();
    let [job, alone] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (data, tokenizer) = (root().join("dummy_data"), model());
    let settings = [("DATA", data.as_path()), ("OUT", job.path()), ("TOKENIZER", &tokenizer)];
    cluster.submit("step1.sbatch", &[], &settings).complete();
    let by_itself = cluster
        .command("bash")
        .arg("slurm/step1.sbatch")
        .envs(settings)
        .env("OUT", alone.path())
        .output()
        .unwrap();
    assert!(by_itself.status.success(), "{}", String::from_utf8_lossy(&by_itself.stderr));
    let files = ["openorca_prompts.json", "sharegpt_prompts.json", "prompts.json"];
    same_files(job.path(), alone.path(), &files);
    let prompts: Vec<Value> =
        serde_json::from_slice(&fs::read(job.path().join("prompts.json")).unwrap()).unwrap();
    assert!(prompts.len() > 50, "{} prompts", prompts.len());
}

#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn step_2_holds_one_model_on_two_nodes() {
    let (cluster, work) = (Cluster::start(), Work::quick(12));
    let job = work.submit(&cluster, &["--nodes=2"], &[]);
    let states = job.complete();
    assert_eq!(states[0]["NodeList"], "n[1-2]");
    assert_eq!(work.finished(), ["aligned.jsonl.done"]);
    work.assert_whole(&cluster);
}

#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn step_2_shares_one_queue_among_two_models() {
    let (cluster, work) = (Cluster::start(), Work::quick(40));
    work.submit(&cluster, &["--nodes=2"], &[("TP", "1")]).complete();
    assert_eq!(work.finished(), ["aligned_2shards_0.jsonl.done", "aligned_2shards_1.jsonl.done"]);
    work.assert_whole(&cluster);
}

#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn step_2_runs_as_an_array_of_groups() {
    let (cluster, work) = (Cluster::start(), Work::quick(12));
    let states = work.submit(&cluster, &["--array=0-2"], &[]).complete();
    assert_eq!(states.len(), 3);
    let marks = [0, 1, 2].map(|group| format!("aligned_3shards_{group}.jsonl.done"));
    assert_eq!(work.finished(), marks);
    work.assert_whole(&cluster);
}

/// Without PMIx each task is a world of one; two of them must not both answer all prompts.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn tasks_that_do_not_see_each_other_are_refused() {
    let (cluster, work) = (Cluster::start(), Work::quick(3));
    let job = work.submit(&cluster, &["--nodes=2"], &[("LAUNCH", "srun --mpi=none")]);
    job.until(&["FAILED"]);
    assert!(job.log().contains("start with `srun --mpi=pmix`"), "{}", job.log());
    assert_eq!(work.rows().len(), 0);
}

/// mpirun starts its daemons on the other nodes through srun.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn mpirun_may_be_the_launcher() {
    let (cluster, work) = (Cluster::start(), Work::quick(6));
    let launch = "mpirun --allow-run-as-root --bind-to none --map-by ppr:1:node";
    work.submit(&cluster, &["--nodes=2"], &[("LAUNCH", launch)]).complete();
    work.assert_whole(&cluster);
}

/// To a model that can be loaded.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn step_3_trains_on_identity_rows_and_merges() {
    let cluster = Cluster::start();
    let folder = tempfile::tempdir().unwrap();
    let settings = "[train]\nsource_max_len = 128\ntarget_max_len = 64\nmax_steps = 2\n\
        per_device_train_batch_size = 2\ngradient_accumulation_steps = 1\nlora_r = 4\nthreads = 1\n";
    fs::write(folder.path().join("settings.toml"), settings).unwrap();
    let rows: Vec<_> = (0..8)
        .map(|n| {
            serde_json::json!({"example_id": n, "instruction": format!("Count to {n}."),
                "input": "", "output": "One, two.", "meta_prompt": "Be good.\n\n### User\n"})
        })
        .collect();
    fs::write(folder.path().join("sft.json"), serde_json::to_string(&rows).unwrap()).unwrap();
    let (model, config) = (model(), folder.path().join("settings.toml"));
    let settings = [("MODEL", model.as_path()), ("OUT", folder.path()), ("CONFIG", &config)];
    cluster.submit("step3.sbatch", &[], &settings).complete();
    let trained = folder.path().join("model");
    cluster.run("llama", &["inspect", "--checkpoint", &trained.display().to_string()]);
}
