use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

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

/// All of its elements, before any of them answers.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn an_array_with_gaps_is_refused() {
    let cluster = Cluster::start();
    let work = Work::new(&cluster, 12);
    let states = work.submit(&["--array=0-6:2"], &[]).ended();
    assert_eq!(states.len(), 4);
    for state in states {
        assert_eq!((state["JobState"].as_str(), state["ExitCode"].as_str()), ("FAILED", "2:0"));
        let log = cluster.job(&state["JobId"]).log();
        assert!(log.contains("4 elements from 0 to 6") && log.contains("--array=0-3"), "{log}");
    }
    assert_eq!(work.rows().len(), 0);
}

/// mpirun starts its daemons on the other nodes through srun.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn mpirun_may_be_the_launcher() {
    let cluster = Cluster::start();
    let work = Work::new(&cluster, 6);
    let launch = "mpirun --allow-run-as-root --bind-to none --map-by ppr:2:node";
    work.submit(&["--nodes=2", "--ntasks-per-node=2"], &[("LAUNCH", launch)]).complete();
    work.assert_whole();
}

/// A program in a folder of its own that notes what a task is given, and does nothing else.
fn noting(program: &str, notes: &Path) -> TempDir {
    let folder = tempfile::tempdir_in(notes).unwrap();
    let script = format!(
        "#!/bin/sh\n\
         echo \"$SLURMD_NODENAME: GPUs ${{CUDA_VISIBLE_DEVICES-unset}}, $SLURM_CPUS_ON_NODE CPUs\" \
         > {}/task-$$.txt\n",
        notes.display()
    );
    let path = folder.path().join(program);
    fs::write(&path, script).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

/// All GPUs, for NCCL connects those that both ends see, but none of other jobs; and all CPUs, also where
/// mpirun's daemons hand on what srun gave them.
#[test]
#[ignore = "needs Slurm: cargo xtask test --slurm"]
fn tasks_have_what_their_job_has_on_the_node() {
    let cluster = Cluster::start();
    let mpirun = "mpirun --allow-run-as-root --bind-to none --map-by ppr:2:node";
    for launcher in [None, Some(("LAUNCH", mpirun))] {
        let notes = folder_in(&cluster);
        let programs = noting("step2-self-align", notes.path());
        let programs = ("BIN_DIR", programs.path().to_str().unwrap());
        let settings: Vec<_> = [programs].into_iter().chain(launcher).collect();
        let work = Work::new(&cluster, 1);
        work.submit(&["--nodes=2", "--ntasks-per-node=2"], &settings).complete();
        let files = fs::read_dir(notes.path()).unwrap().flatten().map(|entry| entry.path());
        let mut seen: Vec<String> = files
            .filter(|path| path.is_file())
            .map(|path| fs::read_to_string(path).unwrap())
            .collect();
        seen.sort();
        let expected = ["n1", "n1", "n2", "n2"].map(|node| format!("{node}: GPUs 0,1, 16 CPUs\n"));
        assert_eq!(seen, expected, "{launcher:?}");
    }
}
