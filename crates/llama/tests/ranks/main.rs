//! What the tests start under mpirun: `llama-ranks MODEL TOKENIZER WANT` says whether the ranks together
//! give what one gave.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use dromedary_parallel::{Error, launch};
use tch::Tensor;

#[path = "../same/mod.rs"]
mod same;

use same::{Answers, Question, values};

fn main() -> Result<(), Error> {
    launch()?.run(|launch| {
        let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
        let [model, tokenizer, want] = args.as_slice() else { panic!("three arguments") };
        let (question, want) = read(Path::new(want), model.clone(), tokenizer.clone());
        let world = launch.world();
        let got = Answers::of(&question, world);
        if let Err(difference) = got.compare(&want) {
            panic!("{difference}");
        }
        let line = format!("rank {} of {} agrees\n", world.rank(), world.world_size());
        // In one write: ranks share a pipe.
        io::stderr().write_all(line.as_bytes()).expect("the tests read it");
        Ok(())
    })
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
