//! Shapes: T = tokens, r = LoRA rank.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use dromedary_command::StopFlag;
use dromedary_llama::{Adapter, Checkpoint, Llama, LoadOptions, LoraConfig, Shard};
use dromedary_parallel::{Communicator, ThreadCommunicator, threads};
use dromedary_principle_engraving::{
    AdamWConfig, BatchConfig, Batches, Example, OptimizerConfig, Ranks, Schedule, ScheduleType,
    TrainArgs, TrainConfig, Trained, Trainer, TrainerParts, train,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tch::Tensor;

use crate::{
    job::{BINARY, Job},
    launched::{self, End},
    support::{self, stories260k},
};

/// How far losses, norms and trained numbers may be from those of one rank.
const TOLERANCE: f64 = 1e-4;
/// Micro-batches of a step, of all replicas together.
pub(crate) const MICRO_BATCHES: usize = 4;
const SOON: Duration = Duration::from_secs(60);

#[derive(Parser)]
pub(crate) struct Flags {
    #[command(flatten)]
    pub(crate) train: TrainArgs,
}

/// A layout of ranks.
#[derive(Clone, Copy)]
pub(crate) struct Dims {
    pub(crate) dp: usize,
    pub(crate) tp: usize,
}

impl Dims {
    pub(crate) fn name(self, what: &str) -> String {
        format!("{what}-dp{}-tp{}", self.dp, self.tp)
    }
}

/// tp 2 cuts the model's 8 heads of 4 K/V heads evenly, tp 3 puts two K/V heads on two ranks each.
pub(crate) const LAYOUTS: [Dims; 4] =
    [Dims { dp: 2, tp: 1 }, Dims { dp: 1, tp: 2 }, Dims { dp: 1, tp: 3 }, Dims { dp: 2, tp: 2 }];
pub(crate) const ONE: Dims = Dims { dp: 1, tp: 1 };

/// Flags of a run whose steps see the same rows at any layout: two epochs, the last step of each with
/// fewer micro-batches than replicas could use.
pub(crate) fn flags(job: &Job, dims: Dims, output_dir: &Path, more: &[&str]) -> Vec<String> {
    let accumulation = (MICRO_BATCHES / dims.dp).to_string();
    let path = |path: PathBuf| path.display().to_string();
    let mut flags: Vec<String> = [
        ("--checkpoint", path(stories260k())),
        ("--dataset", path(job.path("sft.json"))),
        ("--meta-prompt-pattern", path(job.path("dromedary_*prompt_distill.txt"))),
        ("--output-dir", path(output_dir.to_owned())),
        ("--per-device-train-batch-size", "2".to_owned()),
        ("--gradient-accumulation-steps", accumulation),
        ("--num-train-epochs", "2".to_owned()),
        ("--learning-rate", "1e-3".to_owned()),
        ("--lora-r", "4".to_owned()),
        ("--save-steps", "4".to_owned()),
        ("--threads", "1".to_owned()),
        ("--tp", dims.tp.to_string()),
    ]
    .into_iter()
    .filter(|(flag, _)| !more.contains(flag))
    .flat_map(|(flag, value)| [flag.to_owned(), value])
    .collect();
    flags.extend(more.iter().map(|flag| (*flag).to_owned()));
    flags
}

/// A run whose ranks are threads of this process.
pub(crate) fn on_threads(job: &Job, dims: Dims, output_dir: &Path, more: &[&str]) {
    let flags = flags(job, dims, output_dir, more);
    let flags = Flags::parse_from([vec!["train".to_owned()], flags].concat());
    let config = TrainConfig::try_from(flags.train).unwrap();
    for result in on_ranks(dims.dp * dims.tp, |comm| train(&config, comm, 0, &StopFlag::default()))
    {
        result.unwrap();
    }
}

pub(crate) fn on_ranks<R: Send>(
    count: usize,
    run: impl Fn(&ThreadCommunicator) -> R + Sync,
) -> Vec<R> {
    let run = &run;
    thread::scope(|scope| {
        let rank = |comm: ThreadCommunicator| {
            scope.spawn(move || {
                tch::set_num_threads(1);
                run(&comm)
            })
        };
        let ranks: Vec<_> = threads(count).into_iter().map(rank).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// A run of the program under mpirun.
pub(crate) fn start(
    job: &Job,
    dims: Dims,
    output_dir: &Path,
    more: &[&str],
    variables: &[(&str, &str)],
) -> launched::Job {
    let mut command = launched::mpirun();
    command.args(["-n", &(dims.dp * dims.tp).to_string(), BINARY, "train"]);
    command.args(flags(job, dims, output_dir, more));
    launched::start(command, variables)
}

pub(crate) fn under_mpirun(job: &Job, dims: Dims, output_dir: &Path, more: &[&str]) -> End {
    start(job, dims, output_dir, more, &[]).finish()
}

pub(crate) fn metrics(output_dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(output_dir.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The trained numbers by name: of the adapter, or of the model.
pub(crate) fn trained(output_dir: &Path) -> Vec<(String, Tensor)> {
    let adapter = output_dir.join("adapter");
    if adapter.exists() {
        let tensors = Adapter::open(adapter).unwrap().tensors;
        return tensors
            .into_iter()
            .flat_map(|(name, pair)| {
                [(format!("{name} A"), pair.lora_a), (format!("{name} B"), pair.lora_b)]
            })
            .collect();
    }
    let model = Checkpoint::open(output_dir.join("model")).unwrap();
    model.names().map(|name| (name.to_owned(), model.read(name).unwrap())).collect()
}

fn norm(tensor: &Tensor) -> f64 {
    tensor.norm().double_value(&[])
}

pub(crate) fn largest(tensor: &Tensor) -> f64 {
    tensor.abs().max().double_value(&[])
}

/// Losses, norms and results of both runs agree.
#[track_caller]
pub(crate) fn assert_same_run(got: &Path, want: &Path) {
    let (got_steps, want_steps) = (metrics(got), metrics(want));
    assert_eq!(got_steps.len(), want_steps.len());
    for (got, want) in got_steps.iter().zip(&want_steps) {
        for key in ["loss", "grad_norm", "learning_rate", "eval_loss"] {
            let [got, want] = [got, want].map(|step| step.get(key).and_then(Value::as_f64));
            let (Some(got), Some(want)) = (got, want) else {
                assert_eq!(got, want, "{key}");
                continue;
            };
            assert!((got - want).abs() <= TOLERANCE * want.abs(), "{key}: {got}, not {want}");
        }
        for key in ["example_ids", "tokens", "targets", "step"] {
            assert_eq!(got[key], want[key], "{key}");
        }
    }
    let (got, want) = (trained(got), trained(want));
    assert_eq!(got.len(), want.len());
    for ((name, got), (_, want)) in got.iter().zip(&want) {
        // Of the whole matrix: a single number whose gradient is rounding alone may be anything up to the
        // learning rate, since AdamW divides gradients by their size.
        let off = norm(&(got - want));
        assert!(off <= TOLERANCE * norm(want), "{name}: off by {off} of {}", norm(want));
    }
}

/// Held-out rows, dropout whose masks are those of the whole model, gradients that are clipped.
pub(crate) const ADAPTERS: [&str; 6] =
    ["--lora-dropout", "0.1", "--eval-dataset-size", "5", "--eval-steps", "3"];
pub(crate) const WEIGHTS: [&str; 2] = ["--full-finetune", "true"];

fn every_layout_trains_as_one_rank(more: &[&str]) {
    let job = Job::new(27);
    let one = job.path(&ONE.name("one"));
    on_threads(&job, ONE, &one, more);
    let clipped = |step: &&Value| step["grad_norm"].as_f64().unwrap() > 0.3;
    assert!(metrics(&one).iter().filter(clipped).count() > 2, "{:?}", metrics(&one));
    for dims in LAYOUTS {
        let out = job.path(&dims.name("threads"));
        on_threads(&job, dims, &out, more);
        assert_same_run(&out, &one);
        let out = job.path(&dims.name("mpirun"));
        under_mpirun(&job, dims, &out, more).assert_success();
        assert_same_run(&out, &one);
    }
}

/// Settings are looked at before ranks are joined.
#[test]
fn what_is_wrong_with_the_flags_is_no_failure_of_the_job() {
    let job = Job::new(4);
    let end = under_mpirun(&job, LAYOUTS[0], &job.path("out"), &["--seed", "7", "--bits", "3"]);
    end.assert_code(2).assert_said("--bits 3");
}

#[test]
fn adapters_of_every_layout_are_those_of_one_rank() {
    every_layout_trains_as_one_rank(&ADAPTERS);
}

/// The base's linear layers in four bits, quantised as a whole, then cut.
#[test]
fn adapters_on_four_bits_are_those_of_one_rank_at_every_layout() {
    let dir = tempfile::tempdir().unwrap();
    let base = support::quantised(&stories260k(), &dir.path().join("nf4"));
    every_layout_trains_as_one_rank(
        &[&ADAPTERS[..], &["--checkpoint", base.to_str().unwrap()]].concat(),
    );
}

#[test]
fn weights_of_every_layout_are_those_of_one_rank() {
    every_layout_trains_as_one_rank(&WEIGHTS);
}

pub(crate) fn rows() -> Vec<Example> {
    (0..4u64)
        .map(|id| {
            let ids = (0..9 + 11 * id).map(|at| ((at * 29 + id * 17) % 500 + 3) as u32);
            Example::learned_from(id, ids.collect(), 2 + 3 * id as usize)
        })
        .collect()
}

fn attached(comm: &dyn Communicator, tp: usize) -> (Llama, Trained) {
    attached_with(comm, tp, AdamWConfig::default())
}

/// Adapters whose A and B are both random, each rank's part of the same whole ones.
pub(crate) fn attached_with(
    comm: &dyn Communicator,
    tp: usize,
    optimizer: impl Into<OptimizerConfig>,
) -> (Llama, Trained) {
    let options =
        LoadOptions { pack: false, tp_rank: comm.rank() % tp, tp, ..LoadOptions::default() };
    let mut model = Llama::load(&Checkpoint::open(stories260k()).unwrap(), &options).unwrap();
    let config = LoraConfig { r: 4, ..LoraConfig::default() };
    let mut trained = Trained::attach(&mut model, &config, optimizer, 7).unwrap();
    for entry in 0..trained.parts().len() {
        let local = trained.optimizer.entries()[entry].shape.clone();
        let shard = trained.parts()[entry].shard();
        let [rows, columns] = shard.full_shape(&local)[..] else { panic!() };
        let value = |at: i64| (0.1 * ((at * 37 + 101 * entry as i64) as f64).sin()) as f32;
        let values: Vec<f32> = (0..rows * columns).map(value).collect();
        let own = shard.narrow(&Tensor::from_slice(&values).view([rows, columns])).unwrap();
        trained.set_value(entry, &own).unwrap();
    }
    (model, trained)
}

pub(crate) fn trainer<'a>(
    model: &'a Llama,
    trained: Trained,
    examples: &'a [Example],
    ranks: &Ranks<'a>,
) -> Trainer<'a> {
    let config =
        BatchConfig { batch_size: 2, accumulation_steps: 2, group_by_length: false, seed: 0 };
    Trainer::new(TrainerParts {
        model,
        trained,
        examples,
        batches: Batches::new(config, vec![1; examples.len()]),
        schedule: Schedule::new(ScheduleType::Constant, 1e-3, 0.0, 100),
        kept_layers: 2,
        ranks: ranks.clone(),
    })
}

/// The gradients of one rank: as backward leaves them and complete, and the norms of the latter.
struct Gradients {
    /// By entry: name, shard, whether a partial sum over all ranks, rows that several ranks hold.
    entries: Vec<(String, Shard, bool, bool)>,
    raw: Vec<Tensor>,
    complete: Vec<Tensor>,
    norm: f64,
}

fn gradients(comm: &dyn Communicator, tp: usize) -> Gradients {
    let examples = rows();
    let ranks = Ranks::new(comm, tp).unwrap();
    let (model, trained) = attached(comm, tp);
    let mut trainer = trainer(&model, trained, &examples, &ranks);
    trainer.forward_backward().unwrap();
    let all = |trainer: &Trainer<'_>| -> Vec<Tensor> {
        let optimizer = &trainer.trained().optimizer;
        (0..optimizer.entries().len()).map(|entry| optimizer.gradient(entry).copy()).collect()
    };
    let raw = all(&trainer);
    let norm = trainer.complete_gradients().unwrap();
    let trained = trainer.trained();
    let entries = trained
        .parts()
        .iter()
        .zip(trained.optimizer.entries())
        .map(|(part, entry)| {
            let shard = part.shard().clone();
            (entry.name.clone(), shard, part.is_replicated(), !part.shared().is_empty())
        })
        .collect();
    Gradients { entries, raw, complete: all(&trainer), norm }
}

/// The three rules of gradients under tensor parallelism, each with what comes of leaving it out.
#[test]
fn each_rule_of_gradients_is_needed_and_kept() {
    let one = gradients(&dromedary_parallel::SingleProcess, 1);
    let ranks = on_ranks(3, |comm| gradients(comm, 3));
    let (mut replicated, mut shared, mut squares) = (0.0_f64, 0.0_f64, 0.0);
    for rank in &ranks {
        assert!((rank.norm / one.norm - 1.0).abs() < 1e-5, "{} {}", rank.norm, one.norm);
        for (index, (name, shard, is_replicated, is_shared)) in rank.entries.iter().enumerate() {
            let want = shard.narrow(&one.complete[index]).unwrap();
            let scale = largest(&one.complete[index]);
            let off = |got: &Tensor| largest(&(got - &want)) / scale;
            assert!(off(&rank.complete[index]) < 1e-4, "{name}: {}", off(&rank.complete[index]));
            let without = off(&rank.raw[index]);
            match (is_replicated, is_shared) {
                // Rule 1: what all ranks hold is a partial sum on each.
                (true, _) => replicated = replicated.max(without),
                // Rule 2: so are rows of a K/V head on two ranks.
                (false, true) => shared = shared.max(without),
                (false, false) => assert!(without < 1e-4, "{name}: {without}"),
            }
            squares += rank.complete[index].norm().double_value(&[]).powi(2);
        }
    }
    assert!(replicated > 1e-2 && shared > 1e-2, "{replicated} {shared}");
    // Rule 3: the norm counts each number once, not on everyone who holds it.
    assert!(squares.sqrt() > 1.01 * one.norm, "{} {}", squares.sqrt(), one.norm);
}

/// Replicas see different rows, and none sees all of them.
#[test]
fn a_replica_alone_has_other_gradients() {
    let one = gradients(&dromedary_parallel::SingleProcess, 1);
    for rank in on_ranks(2, |comm| gradients(comm, 1)) {
        let off = |got: &[Tensor]| {
            let pairs = got.iter().zip(&one.complete);
            pairs.map(|(got, want)| largest(&(got - want)) / largest(want)).fold(0.0, f64::max)
        };
        assert!(off(&rank.complete) < 1e-4 && off(&rank.raw) > 1e-2);
    }
}

/// Fault 24: one rank's numbers are not finite.
#[test]
fn all_ranks_skip_a_step_that_is_not_finite_on_one() {
    let poisoned = |tp: usize| {
        let values = on_ranks(2, |comm| {
            let examples = rows();
            let ranks = Ranks::new(comm, tp).unwrap();
            let (model, trained) = attached(comm, tp);
            let mut trainer = trainer(&model, trained, &examples, &ranks);
            let values = |trainer: &Trainer<'_>| support::numbers(&trainer.trained().optimizer);
            assert!(!trainer.train_step().unwrap().skipped);
            let leaf = trainer.trained().leaf(5).detach();
            let mended = leaf.copy();
            if comm.rank() == 1 {
                let _ = leaf.shallow_clone().fill_(f64::INFINITY);
            }
            let before = values(&trainer);
            let step = trainer.train_step().unwrap();
            assert!(step.skipped, "rank {} went on", comm.rank());
            assert!(before.iter().zip(values(&trainer)).all(|(one, other)| *one == other));
            assert_eq!(trainer.trained().optimizer.updates(), 1);
            leaf.shallow_clone().copy_(&mended);
            let step = trainer.train_step().unwrap();
            assert!(!step.skipped);
            (step.loss, values(&trainer))
        });
        assert_eq!(values[0].0, values[1].0);
        values
    };
    // Replicas stay alike to the last bit.
    let replicas = poisoned(1);
    assert!(replicas[0].1.iter().zip(&replicas[1].1).all(|(one, other)| one == other));
    poisoned(2);
}

/// Fault 25: fewer rows than replicas.
#[test]
fn one_row_on_two_replicas_is_one_row() {
    let job = Job::new(1);
    let one = job.path("one");
    on_threads(&job, ONE, &one, &[]);
    let two = Dims { dp: 2, tp: 1 };
    under_mpirun(&job, two, &job.path("two"), &[]).assert_success();
    assert_same_run(&job.path("two"), &one);
}

/// Fault 2: one rank fails between two collectives.
#[test]
fn the_failure_of_one_rank_is_everyones() {
    let job = Job::new(27);
    for (dims, fault) in [
        (Dims { dp: 2, tp: 1 }, "rank=1,point=step2"),
        (Dims { dp: 1, tp: 2 }, "rank=1,point=half-block3,how=error"),
        (Dims { dp: 1, tp: 2 }, "rank=1,point=step3,how=kill"),
    ] {
        let out = job.path(&dims.name("failed"));
        let mut run = start(&job, dims, &out, &[], &[("DROMEDARY_FAULT", fault)]);
        run.until_said("fault on purpose", 1);
        let end = run.end(SOON);
        assert!(end.status.is_some_and(|status| !status.success()), "{fault}: {}", end.said);
        assert!(!out.join("adapter").exists());
        fs::remove_dir_all(out).unwrap();
    }
}

/// Fault 4: ranks that were started with different settings.
#[test]
fn ranks_that_disagree_train_nothing() {
    let job = Job::new(8);
    let two = Dims { dp: 2, tp: 1 };
    let mut command = launched::mpirun();
    command.args(["-n", "1", BINARY, "train"]).args(flags(&job, two, &job.path("out"), &[]));
    command.args([":", "-n", "1", BINARY, "train"]);
    command.args(flags(&job, two, &job.path("out"), &["--seed", "7"]));
    let end = launched::start(command, &[]).finish();
    assert!(end.status.is_some_and(|status| !status.success()), "{}", end.said);
    end.assert_said("the settings").assert_said("seed: 7");
    assert!(!job.path("out/metrics.jsonl").exists());
}

/// Fault 13, its second half.
#[test]
fn a_tp_that_does_not_fit_names_both_numbers() {
    let job = Job::new(4);
    for (dims, messages) in [
        (Dims { dp: 1, tp: 3 }, ["--tp 2", "tp = 2 does not divide the 3 ranks"]),
        (Dims { dp: 1, tp: 9 }, ["--tp 9", "tp = 9 is not in 1..=8"]),
    ] {
        let mut command = launched::mpirun();
        command.args(["-n", &dims.tp.to_string(), BINARY, "train"]);
        let [flag, message] = messages;
        let tp: usize = flag.trim_start_matches("--tp ").parse().unwrap();
        command.args(flags(&job, Dims { dp: 1, tp }, &job.path("out"), &[]));
        let end = launched::start(command, &[]).finish();
        assert!(end.status.is_some_and(|status| !status.success()), "{}", end.said);
        end.assert_said(message);
    }
}

pub(crate) fn checkpoints(out: &Path) -> Vec<String> {
    let names = fs::read_dir(out).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
    names.retain(|name| name.contains("checkpoint-"));
    names.sort();
    names
}

/// Faults 5 and 6: a signal to one rank ends all of them behind one checkpoint, and the next run computes
/// the same bits; a second signal in the middle of the save tears nothing.
#[test]
fn a_signal_to_one_rank_stops_all_behind_one_checkpoint() {
    let job = Job::new(27);
    let few = ["--max-steps", "9"];
    for (dims, rank) in [(Dims { dp: 2, tp: 1 }, 1), (Dims { dp: 1, tp: 2 }, 0)] {
        let whole = job.path(&dims.name("whole"));
        under_mpirun(&job, dims, &whole, &few).assert_success();
        for (name, point, signals) in [
            // Rank `rank` stands before step 6; the others wait for it.
            (
                "between",
                format!("rank={rank},point=step6,how=stop"),
                vec![(rank, Signal::TERM, None)],
            ),
            // A second Ctrl-C behind the save would end rank 1 at once.
            (
                "saving",
                "rank=0,point=before-manifest4,how=stop".to_owned(),
                vec![
                    (1, Signal::INT, Some("SIGINT: stopping at the next safe point")),
                    (0, Signal::USR1, None),
                    (1, Signal::INT, Some("SIGINT: a save is under way")),
                    (0, Signal::TERM, None),
                ],
            ),
        ] {
            let out = job.path(&dims.name(name));
            let end = stopped(&job, dims, &out, &signals, &point, &few);
            end.assert_code(75);
            match name {
                "between" => assert_stopped_at_6(&out, &end),
                _ => assert_eq!(checkpoints(&out), ["checkpoint-4"], "{}", end.said),
            }
            under_mpirun(&job, dims, &out, &few).assert_success();
            let file = |dir: &Path, name: &str| fs::read(dir.join(name)).unwrap();
            for name in ["adapter/adapter_model.safetensors", "checkpoint-9/optimizer.safetensors"]
            {
                assert!(file(&out, name) == file(&whole, name), "{name} differs");
            }
        }
    }
}

/// One checkpoint behind that of step 4: at step 6, or at the next where the rank that gets the signal asks before
/// its handler has run.
#[track_caller]
pub(crate) fn assert_stopped_at_6(out: &Path, end: &End) {
    let names = checkpoints(out);
    let is_so = |last| names == ["checkpoint-4", last];
    assert!(is_so("checkpoint-6") || is_so("checkpoint-7"), "{names:?}\n{}", end.said);
}

/// A signal to a rank, and what that rank says of it before the next is sent; one that stands still says nothing.
pub(crate) type Sent = (usize, Signal, Option<&'static str>);

fn stopped(job: &Job, dims: Dims, out: &Path, signals: &[Sent], fault: &str, more: &[&str]) -> End {
    let run = start(job, dims, out, more, &[("DROMEDARY_FAULT", fault)]);
    signalled(run, dims.dp * dims.tp, signals)
}

/// Signals to ranks while one of them stands still at its fault, from which it goes on then.
pub(crate) fn signalled(mut run: launched::Job, ranks: usize, signals: &[Sent]) -> End {
    run.until_said("fault on purpose", 1);
    let pids = if ranks == 1 { vec![run.launcher()] } else { run.pids() };
    assert_eq!(pids.len(), ranks);
    // It says so before it stands still, and a signal to go on that comes in between is lost.
    let stands = |pid: &Pid| {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
        stat.is_ok_and(|stat| stat.contains(") T "))
    };
    let begun = Instant::now();
    while !pids.iter().any(stands) {
        assert!(begun.elapsed() < SOON, "no rank stands still");
        thread::sleep(Duration::from_millis(5));
    }
    for (rank, signal, answer) in signals {
        kill_process(pids[*rank], *signal).unwrap();
        if let Some(answer) = answer {
            run.until_said(answer, 1);
        }
    }
    for pid in pids {
        kill_process(pid, Signal::CONT).unwrap();
    }
    run.finish()
}

/// Checkpoints of one layout are read at another: the trained numbers go on as if nothing had changed.
#[test]
fn checkpoints_are_read_at_another_layout() {
    let job = Job::new(27);
    let one = job.path("one");
    on_threads(&job, ONE, &one, &[]);
    let steps = metrics(&one).len();
    for more in [&[][..], &WEIGHTS[..]] {
        let whole = job.path(&format!("whole{}", more.len()));
        on_threads(&job, ONE, &whole, more);
        let cut = job.path(&format!("cut{}", more.len()));
        // Written at each of these, read at the next; every run ends at the checkpoint of step 4.
        for (from, to) in [(LAYOUTS[3], LAYOUTS[2]), (LAYOUTS[2], ONE), (ONE, LAYOUTS[3])] {
            let _ = fs::remove_dir_all(&cut);
            on_threads(&job, from, &cut, more);
            for name in [&format!("checkpoint-{steps}"), "adapter", "model"] {
                let _ = fs::remove_dir_all(cut.join(name));
            }
            let end = under_mpirun(&job, to, &cut, more);
            end.assert_success();
            end.assert_said(&format!(
                "was written at dp {} x tp {} and is read at dp {} x tp {}",
                from.dp, from.tp, to.dp, to.tp
            ));
            assert_same_run(&cut, &whole);
        }
    }
}

#[test]
fn a_checkpoint_of_other_rows_a_step_is_refused_with_what_must_be_the_same() {
    let job = Job::new(8);
    let out = job.path("out");
    on_threads(&job, Dims { dp: 2, tp: 1 }, &out, &["--max-steps", "1"]);
    // One replica with the flags of two: half of the rows a step.
    let mut command = std::process::Command::new(BINARY);
    command.arg("train").args(flags(&job, Dims { dp: 2, tp: 1 }, &out, &["--max-steps", "1"]));
    let end = launched::start(command, &[]).finish();
    end.assert_code(1).assert_said("it was written at dp 2 x tp 1").assert_said("x dp");
}
