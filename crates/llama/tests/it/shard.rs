//! `llama shard`: a file a rank, loaded as it is.

use std::{fs, ops::ControlFlow, path::Path, process::Command};

use dromedary_llama::{
    Checkpoint, Error, Llama, LoadOptions, Plan, ShardOptions, ShardReport, shard,
};
use dromedary_parallel::{Communicator, SingleProcess};
use serde_json::json;
use tch::Tensor;
use tempfile::TempDir;

use crate::{
    support,
    tiny::{self, Tiny, assert_same},
};

fn cut(from: &Path, to: &Path, tp: usize) -> dromedary_llama::Result<ShardReport> {
    let (checkpoint, output) = (from.to_path_buf(), to.to_path_buf());
    let options = ShardOptions { checkpoint, output, tp, verify: true };
    shard(&options, &mut |_| ControlFlow::Continue(()))
}

/// stories260k cut for so many ranks.
fn stories(tp: usize) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let report = cut(&support::stories(), &dir.path().join("cut"), tp).unwrap();
    assert!(report.difference.unwrap().largest < 1e-12, "{report:?}");
    dir
}

const IDS: [u32; 7] = [1, 403, 407, 261, 378, 5, 42];

fn logits(dir: &Path, tp: usize) -> Tensor {
    let logits = |comm: &dyn Communicator| {
        let options = LoadOptions { tp_rank: comm.rank(), tp, ..LoadOptions::default() };
        let model = Llama::load(&Checkpoint::open(dir).unwrap(), &options).unwrap();
        model.forward_logits(&IDS, comm).unwrap()
    };
    support::on_ranks(tp, |comm| logits(comm)).remove(0)
}

#[test]
fn each_rank_loads_its_file_without_slicing_and_logits_are_equal() {
    let whole = support::load(&support::stories(), &LoadOptions::default());
    let want = whole.forward_logits(&IDS, &SingleProcess).unwrap();
    for tp in [1, 2, 3, 5, 8] {
        let dir = stories(tp);
        let cut = dir.path().join("cut");
        assert!(support::difference(&logits(&cut, tp), &want) < 1e-5, "{tp}");

        // Every byte that a rank reads becomes part of a tensor, of all ranks' files its own alone.
        let checkpoint = Checkpoint::open(&cut).unwrap();
        assert_eq!(checkpoint.cut_for(), Some(tp));
        let rank = tp - 1;
        checkpoint.check_rank(rank, tp).unwrap();
        let plan = Plan::new(checkpoint.config(), tp).unwrap();
        let mut bytes = 0;
        for spec in checkpoint.specs().unwrap() {
            let shard = plan.rank(rank).shard(&spec.name);
            let slice = checkpoint.read_slice(&spec.name, &shard).unwrap();
            assert_eq!(slice.size(), shard.local_shape(&spec.shape));
            bytes += slice.numel() as u64 * 4;
        }
        let counters = checkpoint.counters();
        assert_eq!((counters.bytes_read, counters.bytes_copied), (bytes, bytes), "{tp}");
        let file = cut.join(format!("rank-{rank:02}-of-{tp:02}.safetensors"));
        assert!(file.metadata().unwrap().len() >= bytes);
    }
}

#[test]
fn slices_of_any_model_and_the_whole_are_the_same_bytes() {
    let mut config = tiny::config();
    config["num_attention_heads"] = json!(12);
    let base = Tiny::of(config, 31).sharded(2);
    let whole = Checkpoint::open(base.path()).unwrap();
    for tp in [1, 2, 5, 7, 12] {
        let to = base.path().join(format!("cut{tp}"));
        cut(base.path(), &to, tp).unwrap();
        let checkpoint = Checkpoint::open(&to).unwrap();
        dromedary_files::Manifest::read(&to).unwrap().verify(&to).unwrap();
        for (name, tensor) in &base.tensors {
            assert_same(&checkpoint.read(name).unwrap(), tensor);
            // Also for another number of ranks than it is cut for.
            for ranks in [tp, 3] {
                let plan = Plan::new(whole.config(), ranks).unwrap();
                for rank in 0..ranks {
                    let shard = plan.rank(rank).shard(name);
                    let want = whole.read_slice(name, &shard).unwrap();
                    assert_same(&checkpoint.read_slice(name, &shard).unwrap(), &want);
                }
            }
        }
    }
}

#[test]
fn the_files_of_other_ranks_need_not_be_there() {
    let dir = stories(3);
    let cut = dir.path().join("cut");
    fs::remove_file(cut.join("rank-00-of-03.safetensors")).unwrap();
    fs::remove_file(cut.join("rank-02-of-03.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(&cut).unwrap();
    let options = |tp_rank| LoadOptions { tp_rank, tp: 3, ..LoadOptions::default() };
    Llama::load(&checkpoint, &options(1)).unwrap();
    let text = Llama::load(&checkpoint, &options(2)).unwrap_err().to_string();
    assert!(text.contains("rank-02-of-03.safetensors"), "{text}");
}

#[test]
fn wrong_and_damaged_files_are_refused_by_name() {
    let load = |cut: &Path, tp_rank, tp| {
        let options = LoadOptions { tp_rank, tp, ..LoadOptions::default() };
        Checkpoint::open(cut).and_then(|checkpoint| Llama::load(&checkpoint, &options))
    };
    let refused = |cut: &Path, rank, parts: &[&str]| {
        let text = load(cut, rank, 2).unwrap_err().to_string();
        for part in parts {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    };
    let name = |rank| format!("rank-{rank:02}-of-02.safetensors");
    let change = |at: usize| {
        let dir = stories(2);
        let cut = dir.path().join("cut");
        let mut bytes = fs::read(cut.join(name(1))).unwrap();
        let at = if at == usize::MAX { bytes.len() - 3 } else { at };
        bytes[at] ^= 4;
        fs::write(cut.join(name(1)), bytes).unwrap();
        (dir, cut)
    };
    for at in [3, 100, 40_000, usize::MAX] {
        let (_dir, cut) = change(at);
        refused(&cut, 1, &[&name(1), "hash"]);
        load(&cut, 0, 2).unwrap();
    }
    let dir = stories(2);
    let cut = dir.path().join("cut");
    let error = load(&cut, 0, 3).unwrap_err();
    assert!(matches!(error, Error::CutForOthers { expected: 2, got: 3, .. }), "{error}");
    let error = load(&cut, 0, 1).unwrap_err().to_string();
    assert!(error.contains("cut for 2") && error.contains('1'), "{error}");

    // Rank 0's file in place of rank 1's, of the same size or not.
    fs::copy(cut.join(name(0)), cut.join(name(1))).unwrap();
    refused(&cut, 1, &[&name(1), "expected"]);
    fs::remove_file(cut.join(name(1))).unwrap();
    refused(&cut, 1, &[&name(1)]);
    // A configuration of another model.
    fs::copy(support::data("untied").join("config.json"), cut.join("config.json")).unwrap();
    refused(&cut, 0, &["config.json"]);
    fs::remove_file(cut.join("manifest.json")).unwrap();
    refused(&cut, 0, &["manifest.json"]);
}

#[test]
fn the_program_cuts_and_completes_under_mpirun() {
    let dir = tempfile::tempdir().unwrap();
    let cut = dir.path().join("cut");
    let llama = env!("CARGO_BIN_EXE_llama");
    let output = Command::new(llama)
        .args(["shard", "--tp", "2", "--checkpoint"])
        .args([&support::stories(), Path::new("--output"), &cut])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("logits differ by "));
    let complete = |mut command: Command, checkpoint: &Path| {
        let output = command
            .args(["complete", "--temperature", "0", "--max-gen-len", "24"])
            .args(["--prompt", "Once upon a time", "--checkpoint"])
            .arg(checkpoint)
            .output()
            .unwrap();
        (output.status.code(), output.stdout, String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let want = complete(Command::new(llama), &support::stories());
    let got = complete(support::mpirun(2, llama), &cut);
    assert_eq!((got.0, &got.1), (Some(0), &want.1), "{}", got.2);
    let alone = complete(Command::new(llama), &cut);
    assert_eq!(alone.0, Some(1));
    assert!(alone.2.contains("cut for 2"), "{}", alone.2);
}

#[test]
fn what_stops_or_fails_leaves_nothing() {
    let out = tempfile::tempdir().unwrap();
    let to = out.path().join("cut");
    let text = cut(&support::stories(), &to, 9).unwrap_err().to_string();
    assert!(text.contains("tp = 9") && text.contains("1..=8"), "{text}");
    let options = ShardOptions { checkpoint: support::stories(), output: to, tp: 2, verify: false };
    let stopped = shard(&options, &mut |_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
}

#[path = "../../examples/write_shard.rs"]
#[allow(dead_code, unreachable_pub, reason = "it is a program, whose main is for those who run it")]
mod write_shard;

#[test]
fn the_library_example_writes_a_rank_s_slices() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("rank2");
    let report = write_shard::write_shard(&support::stories(), 3, 2, &output).unwrap();
    assert!(report.contains("[44, 64] of [172, 64]"), "{report}");
    let whole = Checkpoint::open(support::stories()).unwrap();
    let plan = Plan::new(whole.config(), 3).unwrap();
    let written = Tensor::read_safetensors(output.join("model.safetensors")).unwrap();
    assert_eq!(written.len(), whole.names().count());
    for (name, slice) in written {
        assert_same(&slice, &whole.read_slice(&name, &plan.rank(2).shard(&name)).unwrap());
    }
}
