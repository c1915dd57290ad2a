//! What a model must give however it is split: compared by the tests, where ranks are threads, and by
//! the program that they start under mpirun.

// Shapes: T = tokens of a prompt, V = vocab_size.

pub(crate) mod gradients;

use std::{collections::BTreeMap, ops::ControlFlow, path::PathBuf};

use dromedary_llama::{
    Checkpoint, Llama, LoadOptions,
    generation::{Engine, EngineConfig, Event, Request, Sampling},
};
use dromedary_parallel::Communicator;
use dromedary_tokenizer::Tokenizer;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

/// How far logits may be off, as a share of the largest.
const LOGITS: f64 = 1e-5;

/// Tokens that all prompts begin with; they are the engine's shared prefix.
const PREFIX: usize = 3;

/// A tensor that may go to another thread.
pub(crate) type Values = (Vec<i64>, Vec<f32>);

pub(crate) fn values(tensor: &Tensor) -> Values {
    let tensor = tensor.detach().to_kind(Kind::Float);
    (tensor.size(), Vec::try_from(tensor.reshape(-1)).unwrap())
}

pub(crate) fn tensor((size, values): &Values) -> Tensor {
    Tensor::from_slice(values).reshape(&size[..])
}

/// Values around 0 that depend on `seed` alone: libtorch's generator is one for all threads, and
/// tests run in several.
pub(crate) fn noise(shape: &[i64], seed: u64) -> Tensor {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let count = shape.iter().product::<i64>() as usize;
    let values: Vec<f32> = (0..count).map(|_| generator.random_range(-2.0..2.0)).collect();
    Tensor::from_slice(&values).view(shape)
}

/// A model, and what is asked of it.
#[derive(Debug, Clone)]
pub(crate) struct Question {
    pub(crate) model: PathBuf,
    pub(crate) tokenizer: PathBuf,
    pub(crate) prompts: Vec<Vec<u32>>,
    /// Tokens of each row, for each way of [`SAMPLINGS`].
    pub(crate) lengths: [usize; 3],
}

/// Temperature and top-p: the best token, any token, those that hold 0.95.
const SAMPLINGS: [(f64, f64); 3] = [(0.0, 1.0), (1.0, 1.0), (1.0, 0.95)];

/// What a model says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answers {
    /// Of each prompt, after each of its tokens: (T, V).
    pub(crate) logits: Vec<Values>,
    /// The rows of each way of sampling.
    pub(crate) rows: Vec<Vec<Vec<u32>>>,
}

impl Answers {
    /// Every rank of the group must call this.
    pub(crate) fn of(question: &Question, comm: &dyn Communicator) -> Self {
        tch::set_num_threads(1);
        let (tp_rank, tp) = (comm.rank(), comm.world_size());
        let options = LoadOptions { tp_rank, tp, ..LoadOptions::default() };
        let model = Llama::load(&Checkpoint::open(&question.model).unwrap(), &options).unwrap();
        let tokenizer = Tokenizer::open(&question.tokenizer).unwrap();
        let logits = |ids: &Vec<u32>| values(&model.forward_logits(ids, comm).unwrap());
        Self {
            logits: question.prompts.iter().map(logits).collect(),
            rows: SAMPLINGS
                .into_iter()
                .zip(question.lengths)
                .map(|((temperature, top_p), length)| {
                    let config = EngineConfig {
                        max_batch_size: question.prompts.len(),
                        max_gen_len: length,
                        sampling: Sampling::nucleus(temperature, top_p),
                        ..EngineConfig::default()
                    };
                    let mut engine = Engine::new(&model, &tokenizer, comm, config).unwrap();
                    generate(&mut engine, &question.prompts)
                })
                .collect(),
        }
    }

    /// The first thing in which these answers are not those of one rank.
    pub(crate) fn compare(&self, want: &Self) -> Result<(), String> {
        for (number, (got, want)) in self.logits.iter().zip(&want.logits).enumerate() {
            let [got, want] = [got, want].map(|values| tensor(values).to_kind(Kind::Double));
            if got.size() != want.size() {
                return Err(format!("logits of prompt {number} are {:?}", got.size()));
            }
            let largest = |t: &Tensor| f64::try_from(t.abs().max()).unwrap();
            let off = largest(&(&got - &want)) / largest(&want);
            if off.is_nan() || off > LOGITS {
                return Err(format!("logits of prompt {number} are off by {off:.1e}"));
            }
        }
        for (way, (got, want)) in self.rows.iter().zip(&want.rows).enumerate() {
            if let Some(row) = (0..want.len()).find(|row| got.get(*row) != Some(&want[*row])) {
                let (got, want) = (got.get(row), &want[row]);
                return Err(format!("way {way}, row {row}: {got:?} and not {want:?}"));
            }
        }
        Ok(())
    }
}

fn generate(engine: &mut Engine<'_>, prompts: &[Vec<u32>]) -> Vec<Vec<u32>> {
    engine.pin_prefix(&prompts[0][..PREFIX]).unwrap();
    let request = |(row, tokens): (usize, &Vec<u32>)| Request {
        id: row.to_string(),
        tokens: tokens.clone(),
        seed: 5,
    };
    let mut requests = prompts.iter().enumerate().map(request);
    let mut rows = BTreeMap::new();
    engine
        .run(&mut || requests.next(), &mut |event| {
            if let Event::Finished(row) = event {
                rows.insert(row.id.parse::<usize>().unwrap(), row.tokens);
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(rows.len(), prompts.len(), "a row is missing");
    rows.into_values().collect()
}
