use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::cluster::{Cluster, programs, root};
use crate::work::{Work, folder_in, model};

fn same_files(one: &Path, other: &Path, names: &[&str]) {
    for name in names {
        let [one, other] = [one, other].map(|folder| fs::read(folder.join(name)).unwrap());
        assert!(one == other, "{name} differs");
    }
}

/// The same in a job, with the programs on the PATH, and by itself, with them where `BIN_DIR` says.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn step_1_cleans_and_merges() {
    let cluster = Cluster::start();
    let [job, alone] = [(); 2].map(|()| folder_in(&cluster));
    let (data, tokenizer) = (root().join("dummy_data"), model());
    let settings = [("DATA", data.as_path()), ("OUT", job.path()), ("TOKENIZER", &tokenizer)];
    cluster.submit("step1.sbatch", &[], &settings).complete();
    let by_itself = cluster
        .command("bash")
        .arg("slurm/step1.sbatch")
        .envs(settings)
        .env("OUT", alone.path())
        .envs([("PATH", Path::new("/usr/bin:/bin")), ("BIN_DIR", &programs())])
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
    let cluster = Cluster::start();
    let work = Work::new(&cluster, 12);
    let states = work.submit(&["--nodes=2"], &[]).complete();
    assert_eq!(states[0]["NodeList"], "n[1-2]");
    assert_eq!(work.finished(), ["aligned.jsonl.done"]);
    work.assert_whole();
}

#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn step_2_shares_one_queue_among_two_models() {
    let cluster = Cluster::start();
    let work = Work::new(&cluster, 40);
    work.submit(&["--nodes=2"], &[("TP", "1")]).complete();
    assert_eq!(work.finished(), ["aligned_2shards_0.jsonl.done", "aligned_2shards_1.jsonl.done"]);
    work.assert_whole();
}

/// Whatever numbers the elements have.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn step_2_runs_as_an_array_of_groups() {
    let cluster = Cluster::start();
    let work = Work::new(&cluster, 12);
    let states = work.submit(&["--array=1-3"], &[]).complete();
    assert_eq!(states.len(), 3);
    let marks = [0, 1, 2].map(|group| format!("aligned_3shards_{group}.jsonl.done"));
    assert_eq!(work.finished(), marks);
    work.assert_whole();
}

/// Without PMIx each task is a world of one; two of them must not both answer all prompts.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn tasks_that_do_not_see_each_other_are_refused() {
    let cluster = Cluster::start();
    let work = Work::new(&cluster, 3);
    let job = work.submit(&["--nodes=2"], &[("LAUNCH", "srun --mpi=none")]);
    job.until(&["FAILED"]);
    assert!(job.log().contains("start with `srun --mpi=pmix`"), "{}", job.log());
    assert_eq!(work.rows().len(), 0);
}

/// mpirun starts its daemons on the other nodes through srun.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn mpirun_may_be_the_launcher() {
    let cluster = Cluster::start();
    let work = Work::new(&cluster, 6);
    let launch = "mpirun --allow-run-as-root --bind-to none --map-by ppr:1:node";
    work.submit(&["--nodes=2"], &[("LAUNCH", launch)]).complete();
    work.assert_whole();
}
