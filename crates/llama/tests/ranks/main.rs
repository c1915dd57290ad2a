//! What the tests start under mpirun: `llama-ranks same MODEL TOKENIZER WANT` says whether the ranks
//! together give what one gave, `llama-ranks save MODEL OUTPUT` loads a model and saves it again,
//! `llama-ranks gradients MODEL LAYER` says whether the gradients of the ranks are those of one.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use dromedary_llama::{Checkpoint, Llama, LoadOptions, SaveOptions};
use dromedary_parallel::{Communicator, Error, SingleProcess, launch};
use tch::Tensor;

#[allow(dead_code, reason = "the tests, where ranks are threads, look at all of it")]
#[path = "../same/mod.rs"]
mod same;

use same::{Answers, Question, gradients::gradients, values};

fn main() -> Result<(), Error> {
    launch()?.run(|launch| {
        let (task, args) = {
            let mut args = std::env::args_os().skip(1).map(PathBuf::from);
            (args.next().unwrap(), args.collect::<Vec<_>>())
        };
        let world = launch.world();
        let done = match (task.to_str().unwrap(), args.as_slice()) {
            ("same", [model, tokenizer, want]) => {
                let (question, want) = read(want, model.clone(), tokenizer.clone());
                if let Err(difference) = Answers::of(&question, world).compare(&want) {
                    panic!("{difference}");
                }
                "agrees"
            }
            ("save", [model, output]) => {
                save(model, output, world);
                "saved"
            }
            ("gradients", [model, layer]) => {
                let layer = layer.to_str().unwrap().parse().unwrap();
                for pack in [true, false] {
                    let one = gradients(model, pack, layer, &SingleProcess);
                    if let Err(error) = gradients(model, pack, layer, world).compare(&one) {
                        panic!("packed {pack}: {error}");
                    }
                }
                "has these gradients"
            }
            (task, args) => panic!("{task} with {} arguments", args.len()),
        };
        let line = format!("rank {} of {} {done}\n", world.rank(), world.world_size());
        // In one write: ranks share a pipe.
        io::stderr().write_all(line.as_bytes()).expect("the tests read it");
        Ok(())
    })
}

fn save(model: &Path, output: &Path, world: &dyn Communicator) {
    tch::set_num_threads(1);
    let checkpoint = Checkpoint::open(model).unwrap();
    let (tp_rank, tp) = (world.rank(), world.world_size());
    let options = LoadOptions { tp_rank, tp, ..LoadOptions::default() };
    let llama = Llama::load(&checkpoint, &options).unwrap();
    let specs = checkpoint.specs().unwrap();
    llama.save(specs, &SaveOptions::new(output, model), world).unwrap();
}

/// The question and what one rank answered, as the tests write them.
fn read(path: &Path, model: PathBuf, tokenizer: PathBuf) -> (Question, Answers) {
    let tensors: BTreeMap<String, Tensor> =
        Tensor::read_safetensors(path).unwrap().into_iter().collect();
    let of = |prefix: &str| {
        let prefix = format!("{prefix}.");
        tensors
            .iter()
            .filter(|(name, _)| name.starts_with(&prefix))
            .map(|(_, tensor)| tensor)
            .collect::<Vec<_>>()
    };
    let ids = |tensor: &Tensor| {
        let ids = Vec::<i64>::try_from(tensor).unwrap();
        ids.into_iter().map(|id| u32::try_from(id).unwrap()).collect::<Vec<u32>>()
    };
    let rows = |way: usize| of(&format!("way {way}")).into_iter().map(ids).collect::<Vec<_>>();
    let rows = (0..3).map(rows).collect::<Vec<_>>();
    let question = Question {
        model,
        tokenizer,
        prompts: of("prompt").into_iter().map(ids).collect(),
        lengths: [0, 1, 2].map(|way: usize| rows[way][0].len()),
    };
    (question, Answers { logits: of("logits").into_iter().map(values).collect(), rows })
}
