//! Models of the test data, and short ways to run them.

use std::{
    ffi::OsStr,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::Command,
};

use dromedary_llama::{
    Checkpoint, Llama, LoadOptions, Weight,
    generation::{Engine, EngineConfig, Event, FinishedRow, Request, Statistics},
};
use dromedary_parallel::{Communicator, ThreadCommunicator, threads};
use dromedary_tokenizer::Tokenizer;
use tch::Tensor;

/// A folder of the test data.
pub(crate) fn data(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(folder)
}

pub(crate) fn stories() -> PathBuf {
    data("stories260k")
}

/// A program under `mpirun -n RANKS`. A rank that waits for a missing one ends the job in time.
pub(crate) fn mpirun(ranks: usize, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n"]);
    command.arg(ranks.to_string()).arg(program.as_ref());
    command.env("DROMEDARY_COLLECTIVE_TIMEOUT", "300");
    command
}

/// Runs a task of `llama-ranks` on real processes, each of which must say `done`.
#[track_caller]
pub(crate) fn processes(ranks: usize, task: &str, args: &[&Path], done: &str) {
    let mut command = mpirun(ranks, env!("CARGO_BIN_EXE_llama-ranks"));
    let output = command.arg(task).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    for rank in 0..ranks {
        assert!(said.contains(&format!("rank {rank} of {ranks} {done}")), "{said}");
    }
}

pub(crate) fn load(dir: &Path, options: &LoadOptions) -> Llama {
    // Tests run side by side: more threads than cores would wait for each other.
    tch::set_num_threads(1);
    Llama::load(&Checkpoint::open(dir).unwrap(), options).unwrap()
}

/// A model on one rank of a group, and its tokenizer.
pub(crate) struct Loaded {
    pub(crate) model: Llama,
    pub(crate) tokenizer: Tokenizer,
}

impl Loaded {
    pub(crate) fn new(dir: &Path, comm: &dyn Communicator) -> Self {
        Self::packed(dir, comm, true)
    }

    /// For this crate's kernels, or for libtorch's operations.
    pub(crate) fn packed(dir: &Path, comm: &dyn Communicator, pack: bool) -> Self {
        Self::with(dir, comm, LoadOptions { pack, ..LoadOptions::default() })
    }

    /// With these options but for the rank.
    pub(crate) fn with(dir: &Path, comm: &dyn Communicator, options: LoadOptions) -> Self {
        let (tp_rank, tp) = (comm.rank(), comm.world_size());
        let options = LoadOptions { tp_rank, tp, ..options };
        Self { model: load(dir, &options), tokenizer: Tokenizer::open(dir).unwrap() }
    }

    pub(crate) fn engine<'a>(
        &'a self,
        comm: &'a dyn Communicator,
        config: EngineConfig,
    ) -> Engine<'a> {
        Engine::new(&self.model, &self.tokenizer, comm, config).unwrap()
    }
}

/// What a run gave, in the order in which rows ended.
#[derive(Debug, Default)]
pub(crate) struct Output {
    pub(crate) finished: Vec<FinishedRow>,
    pub(crate) rejected: Vec<(String, String)>,
    /// Rows without finite logits, and the number of tokens that they had.
    pub(crate) failed: Vec<(String, u64)>,
    /// The pieces of each row, joined, by id.
    pub(crate) streamed: std::collections::BTreeMap<String, String>,
    pub(crate) statistics: Statistics,
}

impl Output {
    pub(crate) fn row(&self, id: &str) -> &FinishedRow {
        self.finished.iter().find(|row| row.id == id).unwrap()
    }
}

pub(crate) fn run(engine: &mut Engine<'_>, requests: Vec<Request>) -> Output {
    let mut output = Output::default();
    let mut requests = requests.into_iter();
    let statistics = engine.run(&mut || requests.next(), &mut |event| {
        match event {
            Event::Token { id, text } => {
                output.streamed.entry(id.to_owned()).or_default().push_str(text);
            }
            Event::Finished(row) => output.finished.push(row),
            Event::Rejected { id, reason } => output.rejected.push((id, reason)),
            Event::Failed { id, position } => output.failed.push((id, position)),
        }
        ControlFlow::Continue(())
    });
    output.statistics = statistics.unwrap();
    output
}

pub(crate) fn request(id: impl Into<String>, tokens: Vec<u32>) -> Request {
    Request { id: id.into(), tokens, seed: 11 }
}

/// The best next tokens, each from a forward pass over the whole sequence.
pub(crate) fn greedy_ids(
    model: &Llama,
    prompt: &[u32],
    count: usize,
    comm: &dyn Communicator,
) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    for _ in 0..count {
        let logits = model.forward_logits(&ids, comm).unwrap();
        let best = i64::try_from(logits.get(-1).argmax(0, false)).unwrap();
        ids.push(u32::try_from(best).unwrap());
    }
    ids.split_off(prompt.len())
}

/// Runs `f` on every rank of a group of threads; the results are in rank order.
pub(crate) fn on_ranks<R: Send>(tp: usize, f: impl Fn(&ThreadCommunicator) -> R + Sync) -> Vec<R> {
    let f = &f;
    std::thread::scope(|scope| {
        let rank = |comm: ThreadCommunicator| {
            scope.spawn(move || {
                tch::set_num_threads(1);
                f(&comm)
            })
        };
        let ranks: Vec<_> = threads(tp).into_iter().map(rank).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Puts the query rows into the order of another rotary convention, which is what a converter does
/// that forgets to undo it.
pub(crate) fn permute_queries(model: &Llama) {
    let heads = model.heads().clone();
    let (n_q, head_dim) = (heads.n_local_heads(), heads.head_dim);
    for layer in model.layers() {
        let Weight::Dense(weight) = &layer.qkv_proj.weight else { panic!("packed") };
        let rows = n_q * head_dim;
        let columns = weight.size()[1];
        let q = weight.narrow(0, 0, rows);
        let permuted =
            q.view([n_q, head_dim / 2, 2, columns]).transpose(1, 2).reshape([rows, columns]);
        weight.narrow(0, 0, rows).copy_(&permuted);
    }
}

/// The largest difference as a share of the largest value wanted.
pub(crate) fn difference(got: &Tensor, want: &Tensor) -> f64 {
    let [got, want] = [got, want].map(|t| t.to_kind(tch::Kind::Double));
    let largest = f64::try_from(want.abs().max()).unwrap();
    f64::try_from((got - want).abs().max()).unwrap() / largest
}
