use std::{
    fs,
    io::{Write, stderr},
    path::Path,
};

use dromedary_llama::{Checkpoint, Llama, LlamaConfig, LoadOptions, LoraConfig};
use dromedary_parallel::launch;
use dromedary_principle_engraving::{
    AdamWConfig, BatchConfig, Batches, Example, MemoryPlan, OptimizerConfig, PlanInput,
    PlannedRank, PlannedTraining, Ranks, Result, Schedule, ScheduleType, Share, Trained, Trainer,
    TrainerParts,
};
use tch::Kind;

use crate::{
    job::Job,
    launched, memory,
    parallel::{
        ADAPTERS, Dims, ONE, WEIGHTS, assert_same_run, metrics, on_threads, trained, under_mpirun,
    },
    support::stories260k,
};

/// What is divided over replicas comes to the same: values and moments to the bit where the sums have one
/// order only.
#[test]
fn what_is_divided_changes_nothing() {
    let job = Job::new(27);
    let sixteen = [WEIGHTS[0], WEIGHTS[1], "--dtype", "bf16"];
    let cases: [(&str, &[&str]); 3] =
        [("adapters", &ADAPTERS), ("weights", &WEIGHTS), ("sixteen-bit", &sixteen)];
    for (name, more) in cases {
        let one = job.path(&format!("one-{name}"));
        on_threads(&job, ONE, &one, more);
        let divided = [more, &["--shard-optimizer"]].concat();
        for dims in [Dims { dp: 2, tp: 1 }, Dims { dp: 4, tp: 1 }, Dims { dp: 2, tp: 2 }] {
            let plain = job.path(&dims.name(&format!("plain-{name}")));
            under_mpirun(&job, dims, &plain, more).assert_success();
            let out = job.path(&dims.name(&format!("divided-{name}")));
            under_mpirun(&job, dims, &out, &divided).assert_success();
            let same = |one: &Path, other: &Path| {
                let steps = metrics(one).len();
                let file = |dir: &Path| {
                    fs::read(dir.join(format!("checkpoint-{steps}/optimizer.safetensors"))).unwrap()
                };
                let results = trained(one).into_iter().zip(trained(other));
                file(one) == file(other) && results.into_iter().all(|(one, other)| one == other)
            };
            // With two addends a sum has one order only.
            assert!(dims.dp > 2 || same(&out, &plain), "{}", dims.name(name));
            match name {
                // A rounding to the other side is as large as the last bit of a weight.
                "sixteen-bit" => assert_similar_losses(&out, &one),
                _ => assert_same_run(&out, &one),
            }
            // The other way round too: what one has saved, the other goes on from.
            if dims.dp == 2 && dims.tp == 1 {
                for (dir, flags) in [(&plain, &divided[..]), (&out, more)] {
                    let steps = metrics(dir).len();
                    for name in [&format!("checkpoint-{steps}"), "adapter", "model"] {
                        let _ = fs::remove_dir_all(dir.join(name));
                    }
                    under_mpirun(&job, dims, dir, flags).assert_said("going on behind step 4");
                }
                assert!(same(&out, &plain), "{} after the exchange", dims.name(name));
            }
        }
    }
}

#[track_caller]
fn assert_similar_losses(got: &Path, want: &Path) {
    let losses = |dir| metrics(dir).iter().map(|step| step["loss"].as_f64().unwrap()).collect();
    let (got, want): (Vec<f64>, Vec<f64>) = (losses(got), losses(want));
    assert_eq!(got.len(), want.len());
    let far = |(got, want): (&f64, &f64)| (got / want - 1.0).abs() > 1e-2;
    assert!(!got.iter().zip(&want).any(far), "{got:?}, not {want:?}");
}

const CASE: &str = "DROMEDARY_TEST_DIVIDED_CASE";
const ROWS: usize = 2;
const ROW_TOKENS: usize = 64;

/// Of a model whose trained numbers outweigh what processes of the same kind differ by: 69 million.
const SIZES: [i64; 6] = [768, 2048, 8, 12, 12, 16_000];

/// What two replicas train, and in which kind the weights are.
#[derive(Clone, Copy)]
struct Case {
    what: &'static str,
    kind: Kind,
    divided: bool,
}

impl Case {
    fn training(self) -> PlannedTraining {
        match self.what {
            "adapters" => PlannedTraining::Adapters(LoraConfig { r: 256, ..LoraConfig::default() }),
            _ => PlannedTraining::Weights,
        }
    }

    fn number(number: usize) -> Self {
        let (what, kind) = [
            ("adapters", Kind::Float),
            ("weights", Kind::Float),
            ("weights in 16 bits", Kind::BFloat16),
        ][number / 2];
        Self { what, kind, divided: number % 2 == 1 }
    }

    fn planned(self, config: &LlamaConfig) -> f64 {
        let tokens = (ROWS * ROW_TOKENS) as u64;
        let optimizer_shares = if self.divided { 2 } else { 1 };
        let plan = MemoryPlan::new(&PlanInput {
            config,
            kind: self.kind,
            training: self.training(),
            tokens,
            targets: tokens / 2,
            kept_layers: 0,
            rank: PlannedRank { optimizer_shares, ..PlannedRank::default() },
        });
        plan.unwrap().total() as f64
    }
}

/// The peak of each of two processes is what the plan says, and so is what division saves.
#[test]
fn two_replicas_take_the_memory_that_is_planned() {
    let dir = tempfile::tempdir().unwrap();
    memory::write_model(dir.path(), &memory::config(SIZES, true));
    let config = LlamaConfig::open(dir.path()).unwrap();
    let mut whole = [0.0; 2];
    for number in 0..6 {
        let case = Case::number(number);
        let planned = case.planned(&config);
        let peaks = peaks(number, dir.path());
        for (rank, [loaded, peak]) in peaks.into_iter().enumerate() {
            let what = format!("{} divided {} on rank {rank}", case.what, case.divided);
            let off = peak / planned - 1.0;
            eprintln!(
                "{what}: {peak:.4e} of which {loaded:.4e} before, planned {planned:.4e}: {off:.3}"
            );
            assert!(off.abs() < 0.1, "{what}: {peak}, not {planned}");
            if case.divided {
                let saving = Case { divided: false, ..case }.planned(&config) - planned;
                let saved = whole[rank] - peak;
                // A difference of two peaks, each of which is what it is in this run alone.
                let off = (saved - saving).abs();
                assert!(off < 0.03 * planned, "{what} saves {saved}, not {saving}");
            }
        }
        whole = peaks.map(|[_, peak]| peak);
    }
}

/// Bytes that two processes have held at most, before the model and in all.
fn peaks(number: usize, dir: &Path) -> [[f64; 2]; 2] {
    let mut command = launched::mpirun();
    command.args(["-n", "2"]).arg(std::env::current_exe().unwrap());
    let child = ["--exact", "divided::child", "--ignored", "--nocapture", "--test-threads", "1"];
    command.args(child);
    let variable = format!("{number} {}", dir.display());
    let mut settings = vec![(CASE, variable.as_str())];
    if Case::number(number).what == "adapters" {
        // What glibc keeps of freed pieces below 32 MB is another amount in each run, and much beside the 120 MB
        // that adapters save; so it keeps none.
        settings.push(("MALLOC_MMAP_THRESHOLD_", "1000000"));
    }
    let end = launched::start(command, &settings).finish();
    let of_rank = |rank: usize| {
        let said = format!("rank {rank} took ");
        let line = end.said.lines().find_map(|line| line.split(&said).nth(1));
        let bytes = line.unwrap_or_else(|| panic!("{}", end.said));
        let bytes: Vec<f64> = serde_json::from_str(bytes).unwrap();
        <[f64; 2]>::try_from(bytes).unwrap()
    };
    [of_rank(0), of_rank(1)]
}

/// One of two processes whose memory is measured.
#[test]
#[ignore = "another test starts it"]
fn child() {
    let case_and_dir = std::env::var(CASE).unwrap();
    let (number, dir) = case_and_dir.split_once(' ').unwrap();
    let case = Case::number(number.parse().unwrap());
    tch::set_num_threads(1);
    launch()
        .unwrap()
        .run(|launch| -> Result<()> {
            let ranks = Ranks::new(launch.world(), 1).unwrap();
            // What libtorch, the kernels and MPI take when they are called for the first time.
            two_steps(&stories260k(), Case { divided: true, ..case }, &ranks);
            let before = memory::peak();
            two_steps(Path::new(dir), case, &ranks);
            let rank = launch.world().rank();
            // In one piece, as the lines of two ranks would mix otherwise.
            let line = format!("rank {rank} took [{before}, {}]\n", memory::peak());
            stderr().write_all(line.as_bytes()).unwrap();
            Ok(())
        })
        .unwrap();
}

fn two_steps(base: &Path, case: Case, ranks: &Ranks<'_>) {
    let options = LoadOptions { pack: false, kind: case.kind, ..LoadOptions::default() };
    let mut model = Llama::load(&Checkpoint::open(base).unwrap(), &options).unwrap();
    let share = match case.divided {
        true => Share { rank: ranks.dp().rank(), ranks: 2 },
        false => Share::ALL,
    };
    let optimizer = OptimizerConfig { share, ..AdamWConfig::default().into() };
    let trained = match case.training() {
        PlannedTraining::Weights => Trained::take_weights(&mut model, optimizer),
        PlannedTraining::Adapters(lora) => Trained::attach(&mut model, &lora, optimizer, 0),
    };
    let row = |example_id| {
        let input_ids = (0..ROW_TOKENS as u32).map(|at| at * 7 % 500 + 3).collect();
        Example::learned_from(example_id, input_ids, ROW_TOKENS / 2)
    };
    let examples: Vec<_> = (0..2 * ROWS as u64).map(row).collect();
    let batches =
        BatchConfig { batch_size: ROWS, accumulation_steps: 2, group_by_length: false, seed: 0 };
    let mut trainer = Trainer::new(TrainerParts {
        model: &model,
        trained: trained.unwrap(),
        examples: &examples,
        batches: Batches::new(batches, vec![1; examples.len()]),
        schedule: Schedule::new(ScheduleType::Constant, 1e-3, 0.0, 100),
        kept_layers: 0,
        ranks: ranks.clone(),
    });
    for _ in 0..2 {
        trainer.train_step().unwrap();
    }
}
