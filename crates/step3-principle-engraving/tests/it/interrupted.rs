use std::{collections::BTreeMap, fs, path::Path, process::Command};

use dromedary_llama::Checkpoint;
use dromedary_tokenizer::Tokenizer;
use rustix::process::Signal;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::{Value, json};
use tch::Kind;

use crate::{
    job::{BINARY, Job},
    launched,
    parallel::{
        Dims, ONE, assert_same_run, assert_stopped_at_6, flags, metrics, on_threads, signalled,
        under_mpirun,
    },
    support::stories260k,
};

const TWO_REPLICAS: Dims = Dims { dp: 2, tp: 1 };
const TWO_SHARES: Dims = Dims { dp: 1, tp: 2 };

/// A text whose tokens no other row has.
const POISON: &str = "\u{732b}";

/// The tokens of single bytes, of which texts consist that the vocabulary does not know.
const BYTES: std::ops::Range<u32> = 3..259;

/// stories260k with its head apart, and numbers in the embeddings of the poison's tokens that f32 holds and
/// f16 does not: rows with it, and no others, are not finite where the base is kept in f16.
fn poisonous(dir: &Path) {
    fs::create_dir(dir).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(stories260k().join(name), dir.join(name)).unwrap();
    }
    let config = fs::read(stories260k().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["tie_word_embeddings"] = json!(false);
    fs::write(dir.join("config.json"), config.to_string()).unwrap();

    let checkpoint = Checkpoint::open(stories260k()).unwrap();
    let read = |name: &str| checkpoint.read(name).unwrap().to_kind(Kind::Float);
    let names = checkpoint.names();
    let mut tensors: BTreeMap<_, _> = names.map(|name| (name.to_owned(), read(name))).collect();
    let embedding = "model.embed_tokens.weight";
    tensors.insert("lm_head.weight".to_owned(), read(embedding));
    let tokenizer = Tokenizer::open(dir.join("tokenizer.json")).unwrap();
    let plain = tokenizer.encode("Tell a story about 7 cats.\n\nThey were happy.");
    let is_its_own = |id: &u32| BYTES.contains(id) && !plain.contains(id);
    let ids: Vec<_> = tokenizer.encode(POISON).into_iter().filter(is_its_own).collect();
    assert!(!ids.is_empty());
    for id in ids {
        let _ = tensors[embedding].get(i64::from(id)).fill_(1e6);
    }
    let bytes = tensors.into_iter().map(|(name, tensor)| {
        let mut bytes = vec![0; 4 * tensor.numel()];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        (name, tensor.size().iter().map(|&size| size as usize).collect::<Vec<_>>(), bytes)
    });
    let bytes: Vec<_> = bytes.collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

/// Puts the poison into the rows with these ids.
fn poison(job: &Job, is_meant: impl Fn(u64) -> bool) {
    let path = job.path("sft.json");
    let mut rows: Vec<Value> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for row in rows.iter_mut().filter(|row| is_meant(row["example_id"].as_u64().unwrap())) {
        row["instruction"] = json!(format!("What are 5 {POISON} in cats?"));
    }
    fs::write(path, serde_json::to_vec(&rows).unwrap()).unwrap();
}

/// Fault 24 between processes: one row, which one replica reads, is not finite. All ranks leave the same steps
/// out, and what they learn is what one rank learns from the others.
#[test]
fn a_poisoned_row_is_skipped_by_all_ranks_alike() {
    let job = Job::new(27);
    let base = job.path("base");
    poisonous(&base);
    poison(&job, |id| id == 11);
    let more = ["--checkpoint", base.to_str().unwrap(), "--dtype", "f16"];
    let one = job.path("one");
    on_threads(&job, ONE, &one, &more);
    for dims in [TWO_REPLICAS, TWO_SHARES] {
        let out = job.path(&dims.name("out"));
        let end = under_mpirun(&job, dims, &out, &more);
        end.assert_success().assert_said("step skipped");
        assert_same_run(&out, &one);
        let steps = metrics(&out);
        for step in &steps {
            let is_poisoned = step["example_ids"].as_array().unwrap().contains(&json!(11));
            assert_eq!(step["skipped"], json!(is_poisoned), "{step}");
            assert_eq!(step["loss"].is_null() || step["grad_norm"].is_null(), is_poisoned);
        }
        // Once in each of two epochs.
        let skipped = steps.iter().filter(|step| step["skipped"] == json!(true)).count();
        assert_eq!((steps.len(), skipped), (8, 2));
        let state = fs::read(out.join("checkpoint-8/trainer_state.json")).unwrap();
        let state: Value = serde_json::from_slice(&state).unwrap();
        assert_eq!(state["updates"], json!(steps.len() - skipped));
    }
}

/// Its end: five steps in a row, and every rank is gone.
#[test]
fn poison_in_every_row_ends_all_ranks_with_the_rows_named() {
    let job = Job::new(60);
    let base = job.path("base");
    poisonous(&base);
    poison(&job, |_| true);
    let more = ["--checkpoint", base.to_str().unwrap(), "--dtype", "f16"];
    for dims in [TWO_REPLICAS, TWO_SHARES] {
        let out = job.path(&dims.name("out"));
        let end = under_mpirun(&job, dims, &out, &more);
        assert!(end.status.is_some_and(|status| !status.success()), "{}", end.said);
        end.assert_said("not finite in 5 steps in a row").assert_said("example_ids");
        end.assert_nothing_left(2);
        // The step that ends the run is among them, and the rows of all five are named.
        let steps = metrics(&out);
        assert_eq!(steps.len(), 5);
        let ids: Vec<Value> = steps.iter().map(|step| step["example_ids"].clone()).collect();
        let ids = Value::from(ids).to_string().replace(',', ", ");
        end.assert_said(&ids);
        assert!(!out.join("adapter").exists());
    }
}

/// The program as so many tasks of srun see themselves: the command, and variables for it.
fn tasks(count: usize) -> (Command, Vec<(&'static str, &'static str)>) {
    const OF_SLURM: [(&str, &str); 2] = [("SLURM_JOB_ID", "77"), ("SLURM_STEP_ID", "0")];
    if count == 1 {
        return (Command::new(BINARY), OF_SLURM.to_vec());
    }
    // Around mpirun they would make it look for Slurm's own tools.
    let mut command = launched::mpirun();
    for (name, value) in OF_SLURM {
        command.args(["-x", &format!("{name}={value}")]);
    }
    command.args(["-n", &count.to_string(), BINARY]);
    (command, Vec::new())
}

/// A task of srun that is stopped ends well and leaves word for the batch script, rank 0 alone; the next run
/// goes on as if there had been no end. A rank's SIGUSR1 is what Slurm sends before the time is over.
#[test]
fn ranks_that_slurm_stops_leave_word_to_requeue_and_go_on_to_the_same_bits() {
    let job = Job::new(27);
    for dims in [ONE, TWO_REPLICAS, TWO_SHARES] {
        let ranks = dims.dp * dims.tp;
        let whole = job.path(&dims.name("whole"));
        under_mpirun(&job, dims, &whole, &[]).assert_success();
        let out = job.path(&dims.name("out"));
        let (mut command, mut variables) = tasks(ranks);
        command.arg("train").args(flags(&job, dims, &out, &[]));
        variables.push(("DROMEDARY_FAULT", "rank=0,point=step6,how=stop"));
        let run = launched::start(command, &variables);
        // Alone it stands still.
        let answer = (ranks > 1).then_some("SIGUSR1: stopping at the next safe point");
        let end = signalled(run, ranks, &[(ranks - 1, Signal::USR1, answer)]);
        // The first task that ends badly would make srun kill the others while they save.
        end.assert_code(0).assert_said("the next run goes on from");
        let word = fs::read_to_string(out.join("requeue-77.json")).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&word).unwrap(), json!({"job_id": "77"}));
        assert_stopped_at_6(&out, &end);
        assert!(!out.join("adapter").exists());
        under_mpirun(&job, dims, &out, &[]).assert_success();
        for name in ["adapter/adapter_model.safetensors", "checkpoint-8/optimizer.safetensors"] {
            let file = |dir: &Path| fs::read(dir.join(name)).unwrap();
            assert!(file(&out) == file(&whole), "{name} differs, {}", dims.name("ranks"));
        }
    }
}
