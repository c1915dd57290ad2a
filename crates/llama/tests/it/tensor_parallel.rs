//! One model on several ranks, as threads: the same logits and the same tokens as on one.

use std::ops::ControlFlow;

use dromedary_llama::{
    Error, LoadOptions,
    generation::{EngineConfig, Sampling},
};
use dromedary_parallel::{Communicator, SingleProcess};
use tch::Tensor;

use crate::support::{Loaded, data, difference, load, on_ranks, request, run, stories};

fn values(tensor: &Tensor) -> (Vec<i64>, Vec<f32>) {
    (tensor.size(), Vec::try_from(tensor.reshape(-1)).unwrap())
}

fn tensor((size, values): &(Vec<i64>, Vec<f32>)) -> Tensor {
    Tensor::from_slice(values).reshape(size)
}

#[test]
fn logits_are_those_of_one_rank() {
    // 8 heads of 4 K/V heads; 6 heads of 2 with odd sizes; heads without groups.
    for (folder, counts) in
        [("stories260k", vec![2, 3, 8]), ("untied", vec![2, 3, 4, 5]), ("sharded", vec![2, 3])]
    {
        let dir = data(folder);
        let config = load(&dir, &LoadOptions::default());
        let ids: Vec<u32> =
            (0..60u32).map(|i| (i * 31 + 5) % config.config().vocab_size as u32).collect();
        let want = config.forward_logits(&ids, &SingleProcess).unwrap();
        for tp in counts {
            let ranks = on_ranks(tp, |comm| {
                let (tp_rank, tp) = (comm.rank(), comm.world_size());
                let model = load(&dir, &LoadOptions { tp_rank, tp, ..LoadOptions::default() });
                values(&model.forward_logits(&ids, comm).unwrap())
            });
            for rank in &ranks {
                assert_eq!(rank, &ranks[0], "ranks differ");
            }
            let off = difference(&tensor(&ranks[0]), &want);
            assert!(off <= 1e-5, "{folder} at tp {tp}: {off:.1e} x max|logit|");
        }
    }
}

#[test]
fn tokens_are_those_of_one_rank() {
    let greedy = Sampling::default();
    let wide = Sampling::nucleus(1.0, 1.0);
    let nucleus = Sampling::nucleus(1.0, 0.95);
    let generate = |comm: &dyn Communicator, sampling: &Sampling| {
        let loaded = Loaded::new(&stories(), comm);
        let prefix = loaded.tokenizer.encode_with_bos("Lily and Tom went to the park. They saw");
        let requests = [" a big dog", " a", " their mom and a red ball."].iter().enumerate();
        let requests = requests.map(|(index, text)| {
            let mut tokens = prefix.clone();
            tokens.extend(loaded.tokenizer.encode(text));
            request(format!("row {index}"), tokens)
        });
        let config = EngineConfig {
            max_batch_size: 2,
            max_gen_len: 48,
            sampling: sampling.clone(),
            ..EngineConfig::default()
        };
        let mut engine = loaded.engine(comm, config);
        engine.pin_prefix(&prefix).unwrap();
        let finished = run(&mut engine, requests.collect()).finished;
        finished.into_iter().map(|row| (row.id, row.tokens)).collect::<Vec<_>>()
    };
    for sampling in [greedy, wide, nucleus] {
        let want = generate(&SingleProcess, &sampling);
        for tp in [2, 3] {
            for rank in on_ranks(tp, |comm| generate(comm, &sampling)) {
                assert_eq!(rank, want, "{sampling:?} at tp {tp}");
            }
        }
    }
}

#[test]
fn one_rank_can_stop_all() {
    let ranks = on_ranks(2, |comm| {
        let loaded = Loaded::new(&stories(), comm);
        let mut engine = loaded.engine(comm, EngineConfig::default());
        let mut requests = (0..5).map(|row| request(format!("{row}"), vec![1, 403]));
        let mut events = 0;
        let mut sink = |_: dromedary_llama::generation::Event<'_>| {
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
