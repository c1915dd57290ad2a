//! One model on several ranks, as threads and as processes: the same logits and the same tokens as on
//! one.

// Shapes: T = tokens of a prompt, V = vocab_size.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use dromedary_llama::{
    Error, LoadOptions,
    generation::{EngineConfig, Event},
};
use dromedary_parallel::{Communicator, SingleProcess};
use dromedary_tokenizer::Tokenizer;
use serde_json::json;
use tch::Tensor;

use crate::{
    given::{smollm2, soak},
    same::{Answers, Question, tensor},
    support::{Loaded, load, on_ranks, processes, request, stories},
    tiny::{self, Tiny},
};

/// Behind a beginning that all share, so that the engine's shared prefix is used.
const ENDINGS: [&str; 8] = [
    " a red kite in the tree.",
    " that it was late",
    " two ducks, and one of them",
    " nothing at all. \"Where is my",
    " the old gate",
    " his sister, who",
    " rain",
    " a box with a small key in it. Tim",
];

pub(crate) fn texts(model: PathBuf, lengths: [usize; 3]) -> Question {
    let tokenizer = Tokenizer::open(&model).unwrap();
    let prompt = |ending: &&str| tokenizer.encode_with_bos(&format!("One morning Tim saw{ending}"));
    let prompts = ENDINGS.iter().map(prompt).collect();
    Question { tokenizer: model.clone(), model, prompts, lengths }
}

/// Prompts for models whose vocabulary is no language; a tokenizer with fewer tokens spells their rows.
pub(crate) fn numbers(model: &Path, vocab_size: u32, lengths: [usize; 3]) -> Question {
    let prompt = |row: u32| {
        let ids = (0..5 + 7 * row).map(|i| (i * (31 + 2 * row) + 5) % vocab_size);
        [1, 2, 3].into_iter().chain(ids).collect()
    };
    let prompts = (0..8).map(prompt).collect();
    Question { model: model.into(), tokenizer: stories(), prompts, lengths }
}

/// Sizes that share no factor, and heads that few counts divide.
pub(crate) fn odd(heads: i64, kv_heads: i64, [hidden, ffn, vocab]: [i64; 3]) -> Tiny {
    let mut config = tiny::config();
    for (key, value) in [
        ("num_attention_heads", heads),
        ("num_key_value_heads", kv_heads),
        ("hidden_size", hidden),
        ("intermediate_size", ffn),
        ("vocab_size", vocab),
        ("max_position_embeddings", 256),
    ] {
        config[key] = json!(value);
    }
    let mut model = Tiny::of(config, (hidden + ffn) as u64);
    model.tensors.values_mut().for_each(|weight| *weight = &*weight * 0.5);
    model.single()
}

#[track_caller]
fn same_on_threads(question: &Question, want: &Answers, counts: &[usize]) {
    for &tp in counts {
        let ranks = on_ranks(tp, |comm| Answers::of(question, comm));
        for (number, rank) in ranks.iter().enumerate() {
            assert!(rank == &ranks[0], "rank {number} of {tp} differs from the first");
        }
        if let Err(difference) = ranks[0].compare(want) {
            panic!("{} at tp {tp}: {difference}", question.model.display());
        }
    }
}

#[track_caller]
pub(crate) fn same_on_processes(question: &Question, want: &Answers, counts: &[usize]) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("want.safetensors");
    write(&file, question, want);
    for &ranks in counts {
        processes(ranks, "same", &[&question.model, &question.tokenizer, &file], "agrees");
    }
}

/// Question and answers in a file, for ranks that are processes.
fn write(path: &Path, question: &Question, want: &Answers) {
    let ids =
        |ids: &[u32]| Tensor::from_slice(&ids.iter().map(|id| i64::from(*id)).collect::<Vec<_>>());
    let mut tensors = Vec::new();
    for (number, (prompt, logits)) in question.prompts.iter().zip(&want.logits).enumerate() {
        tensors.push((format!("prompt.{number:03}"), ids(prompt)));
        tensors.push((format!("logits.{number:03}"), tensor(logits)));
    }
    for (way, rows) in want.rows.iter().enumerate() {
        for (row, tokens) in rows.iter().enumerate() {
            tensors.push((format!("way {way}.{row:03}"), ids(tokens)));
        }
    }
    Tensor::write_safetensors(&tensors, path).unwrap();
}

/// Of even counts, counts that cut K/V heads, and as many ranks as heads.
#[test]
fn stories_are_the_same_on_any_ranks() {
    let question = texts(stories(), [64, 24, 24]);
    let want = Answers::of(&question, &SingleProcess);
    assert!(want.rows[0].iter().all(|row| row.len() == 64));
    assert!(want.rows[1] != want.rows[0] && want.rows[1] != want.rows[2]);
    same_on_threads(&question, &want, &[2, 3, 8]);
    same_on_processes(&question, &want, &[3]);
    if soak() {
        same_on_processes(&question, &want, &[2, 8]);
    }
}

#[test]
fn odd_models_are_the_same_on_any_ranks() {
    for (heads, kv_heads, sizes, counts, more) in [
        (7, 7, [31, 53, 521], vec![2, 7], vec![3, 5]),
        (15, 5, [37, 67, 523], vec![4, 7], vec![2, 11, 15]),
        (11, 1, [29, 43, 541], vec![3], vec![11]),
    ] {
        let model = odd(heads, kv_heads, sizes);
        let question = numbers(model.path(), sizes[2] as u32, [64, 16, 16]);
        let want = Answers::of(&question, &SingleProcess);
        same_on_threads(&question, &want, &counts);
        if heads == 15 || soak() {
            same_on_processes(&question, &want, &[2]);
        }
        if soak() {
            same_on_threads(&question, &want, &more);
        }
    }
}

/// 9 heads of 3 K/V heads: only 3 and 9 divide them. The other counts are for those who have time.
#[test]
fn smollm2_is_the_same_on_any_ranks() {
    let Some(model) = smollm2() else { return };
    let question = texts(model, [64, 6, 6]);
    let want = Answers::of(&question, &SingleProcess);
    same_on_threads(&question, &want, &[2]);
    same_on_processes(&question, &want, &[3]);
    if soak() {
        same_on_threads(&question, &want, &[3, 4, 5, 9]);
        same_on_processes(&question, &want, &[2, 4, 5, 9]);
        // Drawn tokens in rows as long as the best ones.
        let question = Question { lengths: [1, 64, 64], ..question };
        let want = Answers::of(&question, &SingleProcess);
        assert!(want.rows[1].iter().map(Vec::len).sum::<usize>() > 8 * 32);
        same_on_processes(&question, &want, &[3]);
    }
}

/// What is compared must be able to differ.
#[test]
fn other_answers_are_told_apart() {
    let question = texts(stories(), [4, 4, 4]);
    let want = Answers::of(&question, &SingleProcess);
    let mut logits = want.clone();
    let largest = logits.logits[2].1.iter().copied().fold(0.0, |a: f32, b| a.max(b.abs()));
    logits.logits[2].1[70] += 2e-5 * largest;
    assert!(logits.compare(&want).unwrap_err().contains("prompt 2"));
    logits.logits[2].1[70] = f32::NAN;
    assert!(logits.compare(&want).is_err());
    let mut rows = want.clone();
    rows.rows[1][3][2] ^= 1;
    assert!(rows.compare(&want).unwrap_err().contains("way 1, row 3"));
}

#[test]
fn one_rank_can_stop_all() {
    let ranks = on_ranks(2, |comm| {
        let loaded = Loaded::new(&stories(), comm);
        let mut engine = loaded.engine(comm, EngineConfig::default());
        let mut requests = (0..5).map(|row| request(format!("{row}"), vec![1, 403]));
        let mut events = 0;
        let mut sink = |_: Event<'_>| {
            events += 1;
            if comm.rank() == 1 && events > 20 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        engine.run(&mut || requests.next(), &mut sink).unwrap()
    });
    assert!(ranks.iter().all(|statistics| statistics.stopped));
    assert_eq!(ranks[0].output_tokens, ranks[1].output_tokens);
}

/// A wish to stop that comes with the end of a row, whose slot is free then: all ranks go on to admit
/// the same rows until they have agreed.
#[test]
fn one_rank_can_stop_while_slots_are_free() {
    for slots in [1, 2] {
        let ranks = on_ranks(2, |comm| {
            let loaded = Loaded::new(&stories(), comm);
            let config =
                EngineConfig { max_batch_size: slots, max_gen_len: 3, ..EngineConfig::default() };
            let mut engine = loaded.engine(comm, config);
            let mut requests = (0..5).map(|row| request(format!("{row}"), vec![1, 403, row]));
            let mut sink = |event: Event<'_>| match event {
                Event::Finished(_) if comm.rank() == 1 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            };
            engine.run(&mut || requests.next(), &mut sink).unwrap()
        });
        assert!(ranks[0].stopped && ranks[1].stopped, "{slots}");
        assert_eq!(ranks[0].output_tokens, ranks[1].output_tokens);
        assert!(ranks[0].finished < 5, "{:?}", ranks[0]);
    }
    // With the last row that runs, where the others can only be rejected.
    let ranks = on_ranks(2, |comm| {
        let loaded = Loaded::new(&stories(), comm);
        let config = EngineConfig { max_gen_len: 3, max_seq_len: 8, ..EngineConfig::default() };
        let mut engine = loaded.engine(comm, config);
        let mut requests = (0..3).map(|row| request(format!("{row}"), vec![403; 20]));
        let mut sink = |event: Event<'_>| match event {
            Event::Rejected { .. } if comm.rank() == 1 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        };
        engine.run(&mut || requests.next(), &mut sink).unwrap()
    });
    assert!(ranks[0].stopped && ranks[1].stopped);
}

#[test]
fn groups_that_do_not_fit_are_errors() {
    let model = load(&stories(), &LoadOptions { tp_rank: 0, tp: 2, ..LoadOptions::default() });
    let error = model.forward_logits(&[1], &SingleProcess).unwrap_err();
    assert!(matches!(error, Error::GroupSize { expected: 2, got: 1 }), "{error}");
    let checkpoint = dromedary_llama::Checkpoint::open(stories()).unwrap();
    let refused = |tp_rank, tp| {
        let options = LoadOptions { tp_rank, tp, ..LoadOptions::default() };
        dromedary_llama::Llama::load(&checkpoint, &options).unwrap_err().to_string()
    };
    assert!(refused(0, 9).contains("9") && refused(0, 9).contains("8"));
    assert!(refused(2, 2).contains("rank 2"));
}
