use std::{collections::BTreeMap, fs};

use clap::Parser;
use dromedary_command::StopFlag;
use dromedary_llama::{LlamaConfig, LoraConfig};
use dromedary_parallel::Communicator;
use dromedary_principle_engraving::{
    AdamWConfig, Example, Group, Operation, OptimizerConfig, PlanInput, PlannedRank,
    PlannedTraining, Ranks, Share, StepShape, TrainConfig, exchanges, train,
};
use serde_json::{Value, json};
use tch::Kind;

use crate::{
    counted::{Counted, Counts},
    job::Job,
    parallel::{
        Dims, Flags, MICRO_BATCHES, attached_with, flags, metrics, on_ranks, rows, trainer,
    },
    support::stories260k,
};

/// Gradients are summed over replicas once a step, a bucket at a time, and updates of divided moments are told
/// so: neither depends on the size of a bucket.
#[test]
fn buckets_change_nothing_and_each_is_exchanged_once_a_step() {
    const STEPS: u64 = 3;
    let run = |bucket: i64, ranks: usize| {
        on_ranks(2, |comm| {
            let comm = Counted::new(comm);
            let share = match ranks {
                1 => Share::ALL,
                ranks => Share { rank: comm.rank(), ranks },
            };
            let optimizer = OptimizerConfig { share, bucket, ..AdamWConfig::default().into() };
            let (model, trained) = attached_with(&comm, 1, optimizer);
            let numbers = trained.optimizer.num_parameters() as u64;
            let (examples, ranks) = (rows(), Ranks::new(&comm, 1).unwrap());
            let mut trainer = trainer(&model, trained, &examples, &ranks);
            for _ in 0..STEPS {
                trainer.train_step().unwrap();
            }
            let counts = comm.counts();
            let optimizer = &trainer.trained().optimizer;
            let states = (0..optimizer.entries().len()).map(|entry| {
                optimizer.state(entry, ranks.dp()).unwrap().map(|tensor| tensor.copy())
            });
            (states.collect::<Vec<_>>(), counts, numbers)
        })
    };
    for shares in [1, 2] {
        let whole = run(1 << 40, shares);
        for bucket in [1000, 4096] {
            let cut = run(bucket, shares);
            for ((got, counts, numbers), (want, of_whole, _)) in cut.iter().zip(&whole) {
                assert!(got == want, "values or moments differ at buckets of {bucket}");
                let count = |counts: &Counts, operation| counts[&("world", operation)];
                // A step's loss and whether it is skipped are summed by themselves.
                let buckets = |size: u64| numbers.div_ceil(size);
                let sums = |size| [STEPS * (buckets(size) + 2), STEPS * (4 * numbers + 16)];
                assert!(buckets(bucket as u64) > 5);
                assert_eq!(count(counts, "all-reduce"), sums(bucket as u64));
                assert_eq!(count(of_whole, "all-reduce"), sums(1 << 40));
                if shares == 1 {
                    assert!(!counts.contains_key(&("world", "broadcast")));
                    continue;
                }
                let half = numbers / 2;
                let each = half.div_ceil(bucket as u64) + (numbers - half).div_ceil(bucket as u64);
                assert_eq!(count(counts, "broadcast"), [STEPS * each, STEPS * 4 * numbers]);
                assert_eq!(count(of_whole, "broadcast"), [STEPS * 2, STEPS * 4 * numbers]);
            }
        }
    }
}

/// Rows of the same text, so that micro-batches are alike.
fn alike() -> Job {
    let job = Job::new(0);
    let row = |id| json!({"example_id": id, "instruction": "Tell a story.", "input": "", "output": "A cat."});
    let rows: Vec<Value> = (1..=24).map(row).collect();
    fs::write(job.path("sft.json"), serde_json::to_vec(&rows).unwrap()).unwrap();
    job
}

/// What each rank asks for in a run of so many steps.
fn counted(job: &Job, dims: Dims, steps: usize, more: &[&str]) -> Vec<Counts> {
    let out = job.path(&dims.name(&format!("steps{steps}")));
    let _ = fs::remove_dir_all(&out);
    let max_steps = steps.to_string();
    let flags = flags(job, dims, &out, &[more, &["--max-steps", &max_steps]].concat());
    let flags = Flags::parse_from([vec!["train".to_owned()], flags].concat());
    let config = TrainConfig::try_from(flags.train).unwrap();
    on_ranks(dims.dp * dims.tp, |comm| {
        let comm = Counted::new(comm);
        train(&config, &comm, 0, &StopFlag::default()).unwrap();
        comm.counts()
    })
}

/// The counts of `more` that `less` lacks.
fn beyond(more: &Counts, less: &Counts) -> Counts {
    let none = [0, 0];
    let difference = |(key, [calls, bytes]): (&_, &[u64; 2])| {
        let [fewer, smaller] = less.get(key).unwrap_or(&none);
        (*key, [calls - fewer, bytes - smaller])
    };
    more.iter().map(difference).filter(|(_, count)| *count != none).collect()
}

/// What `plan` counts of a step is what ranks of a real run ask for between two steps.
#[test]
fn the_plan_counts_what_a_step_exchanges() {
    let job = alike();
    let config = LlamaConfig::open(stories260k()).unwrap();
    let adapters = PlannedTraining::Adapters(LoraConfig { r: 4, ..LoraConfig::default() });
    let full = ["--full-finetune", "true"];
    let cases: [(&PlannedTraining, Kind, &[&str]); 3] = [
        (&adapters, Kind::Float, &[]),
        (&PlannedTraining::Weights, Kind::Float, &full),
        (&PlannedTraining::Weights, Kind::BFloat16, &[full[0], full[1], "--dtype", "bf16"]),
    ];
    let layouts = [(2, 1), (1, 2), (1, 3), (2, 2), (3, 2)].map(|(dp, tp)| Dims { dp, tp });
    for (training, kind, more) in cases {
        for (dims, divided) in layouts.into_iter().flat_map(|dims| [(dims, false), (dims, true)]) {
            let flags = [more, if divided { &["--shard-optimizer"] } else { &[] }].concat();
            let two = counted(&job, dims, 2, &flags);
            let one = counted(&job, dims, 1, &flags);
            // Steps have as many micro-batches as all replicas together accumulate.
            let micro_batches = (MICRO_BATCHES / dims.dp) as u64;
            let last = metrics(&job.path(&dims.name("steps2"))).pop().unwrap();
            let of_batch =
                |key: &str| last[key].as_u64().unwrap() / (micro_batches * dims.dp as u64);
            for (rank, (two, one)) in two.iter().zip(&one).enumerate() {
                let optimizer_shares = if divided { dims.dp } else { 1 };
                let rank = PlannedRank {
                    tp_rank: rank % dims.tp,
                    tp: dims.tp,
                    optimizer_shares,
                    nf4: false,
                };
                let input = PlanInput {
                    config: &config,
                    kind,
                    training: training.clone(),
                    tokens: of_batch("tokens"),
                    targets: of_batch("targets"),
                    kept_layers: 0,
                    rank,
                };
                let compute_kind = Kind::Float;
                let step = StepShape { input: &input, compute_kind, dp: dims.dp, micro_batches };
                let mut planned = BTreeMap::new();
                for exchange in exchanges(&step).unwrap() {
                    let group = match exchange.group {
                        Group::Tp if dims.dp > 1 => "tp",
                        Group::Dp if dims.tp > 1 => "dp",
                        // One group is all ranks.
                        _ => "world",
                    };
                    let operation = match exchange.operation {
                        Operation::AllReduce => "all-reduce",
                        Operation::Broadcast => "broadcast",
                    };
                    let [calls, bytes] = planned.entry((group, operation)).or_insert([0, 0]);
                    *calls += exchange.calls;
                    *bytes += exchange.bytes;
                }
                assert_eq!(beyond(two, one), planned, "{} {flags:?} {rank:?}", dims.name("run"));
            }
        }
    }
}

/// In 16 bits as a GPU computes, hidden states travel in 16 bits.
#[test]
fn sixteen_bit_layers_exchange_sixteen_bits() {
    let examples = rows();
    let config = LlamaConfig::open(stories260k()).unwrap();
    let counts = on_ranks(2, |comm| {
        let comm = Counted::new(comm);
        let ranks = Ranks::new(&comm, 2).unwrap();
        let (model, trained) = attached_with(&comm, 2, AdamWConfig::default());
        let model = model.computing_in(Kind::BFloat16);
        trainer(&model, trained, &examples, &ranks).train_step().unwrap();
        comm.counts()[&("world", "all-reduce")]
    });
    let batches: Vec<_> = examples.chunks(2).collect();
    assert_eq!(batches.len(), 2);
    let tokens: usize = examples.iter().map(|row| row.input_ids.len()).sum();
    let targets: usize = examples.iter().map(Example::num_targets).sum();
    let training = PlannedTraining::Adapters(LoraConfig { r: 4, ..LoraConfig::default() });
    for (tp_rank, [calls, bytes]) in counts.into_iter().enumerate() {
        let input = PlanInput {
            config: &config,
            kind: Kind::BFloat16,
            training: training.clone(),
            // Bytes are linear in them.
            tokens: tokens as u64 / 2,
            targets: targets as u64 / 2,
            kept_layers: 0,
            rank: PlannedRank { tp_rank, tp: 2, ..PlannedRank::default() },
        };
        assert_eq!((tokens % 2, targets % 2), (0, 0));
        let compute_kind = Kind::BFloat16;
        let step = StepShape { input: &input, compute_kind, dp: 1, micro_batches: 2 };
        let planned = exchanges(&step).unwrap();
        // Whether the run is to stop is asked by the loop around the trainer.
        let all = |of: fn(&[u64; 2]) -> u64| {
            planned.iter().map(|one| of(&[one.calls, one.bytes])).sum::<u64>()
        };
        assert_eq!([calls + 1, bytes + 8], [all(|[calls, _]| *calls), all(|[_, bytes]| *bytes)]);
    }
}
