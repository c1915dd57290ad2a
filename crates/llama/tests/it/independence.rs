//! What a row's tokens depend on: with `deterministic` on nothing but the row.

use std::{collections::BTreeMap, process::Command};

use dromedary_llama::generation::{DETERMINISTIC_ENVIRONMENT, EngineConfig, Request, Sampling};
use dromedary_parallel::{Communicator, SingleProcess};

use crate::support::{Loaded, on_ranks, request, run, stories};

type Rows = BTreeMap<String, Vec<u32>>;

/// Rows of many lengths; some begin with all of the prefix, some with a part or nothing of it.
fn prompts(loaded: &Loaded, prefix: &[u32]) -> Vec<Request> {
    (0..11usize)
        .map(|index| {
            let shared = if index % 4 == 3 { index } else { prefix.len() };
            let mut tokens = prefix[..shared].to_vec();
            tokens
                .extend((0..1 + index * index % 37).map(|at| 260 + (at * 37 + index) as u32 % 200));
            tokens.extend(loaded.tokenizer.encode([" a dog", " Tim", " the sun was"][index % 3]));
            request(format!("row {index}"), tokens)
        })
        .collect()
}

fn prefix(loaded: &Loaded) -> Vec<u32> {
    loaded.tokenizer.encode_with_bos("Lily and Tom went to the park. They saw a big")
}

fn config(sampling: &Sampling) -> EngineConfig {
    EngineConfig {
        max_batch_size: 5,
        max_seq_len: 128,
        max_gen_len: 40,
        sampling: sampling.clone(),
        // Rows end at different lengths.
        eos_token_ids: vec![426, 403, 13],
        ..EngineConfig::default()
    }
}

fn generate(
    loaded: &Loaded,
    comm: &dyn Communicator,
    config: &EngineConfig,
    requests: Vec<Request>,
) -> Rows {
    let mut engine = loaded.engine(comm, config.clone());
    engine.pin_prefix(&prefix(loaded)).unwrap();
    let output = run(&mut engine, requests);
    output.finished.into_iter().map(|row| (row.id, row.tokens)).collect()
}

/// All rows together, and the same rows in every other company.
fn companies(loaded: &Loaded, comm: &dyn Communicator, config: &EngineConfig) -> (Rows, Vec<Rows>) {
    let requests = prompts(loaded, &prefix(loaded));
    let of = |requests: Vec<Request>| generate(loaded, comm, config, requests);
    let together = of(requests.clone());
    let reversed = of(requests.iter().rev().cloned().collect());
    let alone = requests.iter().flat_map(|request| of(vec![request.clone()])).collect();
    // As after a kill: what is left begins in other slots, beside other rows.
    let mut resumed = of(requests[..4].to_vec());
    resumed.extend(of(requests[4..].to_vec()));
    (together, vec![reversed, alone, resumed])
}

fn samplings() -> [Sampling; 3] {
    [Sampling::default(), Sampling::nucleus(1.0, 0.95), Sampling::nucleus(1.0, 1.0)]
}

#[test]
fn deterministic_rows_depend_on_no_other_row() {
    // The kernels need no help; libtorch's operations do.
    for (tp, pack) in [(1, true), (2, true), (3, true), (1, false), (2, false), (3, false)] {
        for sampling in samplings() {
            let config = EngineConfig { deterministic: true, ..config(&sampling) };
            let ranks = on_ranks(tp, |comm| {
                let loaded = Loaded::packed(&stories(), comm, pack);
                companies(&loaded, comm, &config)
            });
            for (together, others) in ranks {
                assert_eq!(together.len(), 11);
                for other in others {
                    assert_eq!(other, together, "tp {tp}, packed {pack}, {sampling:?}");
                }
            }
        }
    }
}

/// With all cores, where products are split between threads.
#[test]
fn deterministic_logits_are_equal_to_the_last_bit() {
    let Some(dir) = crate::given::smollm2() else { return };
    logits_are_equal_to_the_last_bit(&Loaded::packed(&dir, &SingleProcess, true));
}

/// MKL reads its variables once, so that they are those of a process.
#[test]
fn deterministic_logits_of_libtorch_are_equal_to_the_last_bit() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "independence::compare_logits_of_libtorch"])
        .envs(DETERMINISTIC_ENVIRONMENT)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "a child of deterministic_logits_of_libtorch_are_equal_to_the_last_bit"]
fn compare_logits_of_libtorch() {
    let Some(dir) = crate::given::smollm2() else { return };
    logits_are_equal_to_the_last_bit(&Loaded::packed(&dir, &SingleProcess, false));
}

fn logits_are_equal_to_the_last_bit(loaded: &Loaded) {
    tch::set_num_threads(2);
    // At such a temperature the token is nearly uniform over the vocabulary: the last bits of the
    // logits decide soon.
    let sampling = Sampling { top_k: 2000, ..Sampling::nucleus(1e6, 1.0) };
    let config = EngineConfig {
        max_batch_size: 3,
        max_seq_len: 48,
        max_gen_len: 12,
        deterministic: true,
        sampling,
        ..EngineConfig::default()
    };
    let of = |requests: Vec<Request>| -> Rows {
        let mut engine = loaded.engine(&SingleProcess, config.clone());
        engine.pin_prefix(&(1000..1100).collect::<Vec<u32>>()).unwrap();
        let output = run(&mut engine, requests);
        output.finished.into_iter().map(|row| (row.id, row.tokens)).collect()
    };
    let requests: Vec<Request> = (0..4u32)
        .map(|row| request(format!("row {row}"), (1000..1100 + 7 * row).chain([row]).collect()))
        .collect();
    let together = of(requests.clone());
    let reversed = of(requests.iter().rev().cloned().collect());
    assert_eq!(reversed, together);
    let alone: Rows = requests.into_iter().flat_map(|request| of(vec![request])).collect();
    assert_eq!(alone, together);
}

/// Without it, rounding may decide where two tokens are nearly equal, and nowhere else.
#[test]
fn other_rows_differ_only_from_near_ties_on() {
    assert_eq!(differing_rows(true), 0, "the kernels' rows are the same in any company");
    eprintln!("{} rows differ", differing_rows(false));
}

/// Rows that another company changes, each of which has a near tie where it begins to differ.
fn differing_rows(pack: bool) -> usize {
    let loaded = Loaded::packed(&stories(), &SingleProcess, pack);
    let requests = prompts(&loaded, &prefix(&loaded));
    let (together, others) = companies(&loaded, &SingleProcess, &config(&Sampling::default()));
    let mut differing = 0;
    for (id, tokens) in others.iter().flatten() {
        let Some(at) = (0..tokens.len().max(together[id].len()))
            .find(|&at| tokens.get(at) != together[id].get(at))
        else {
            continue;
        };
        differing += 1;
        let prompt = &requests.iter().find(|request| request.id == *id).unwrap().tokens;
        let ids = [&prompt[..], &tokens[..at]].concat();
        let logits = loaded.model.forward_logits(&ids, &SingleProcess).unwrap().get(-1);
        let (best, _) = logits.topk(2, -1, true, true);
        let gap = best.double_value(&[0]) - best.double_value(&[1]);
        assert!(gap < 1e-3, "{id} differs at {at}, where the two best are {gap} apart");
    }
    differing
}
