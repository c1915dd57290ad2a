//! A model that is split over ranks, saved as one checkpoint.

use std::{fs, path::Path};

use dromedary_llama::{
    Checkpoint, Error, Llama, LoadOptions, Lora, Plan, SaveOptions, Shard, TensorSpec, save_slices,
};
use dromedary_parallel::{Communicator, SingleProcess};
use tch::Tensor;

use crate::{
    collectives::Counting,
    same::{Answers, Question},
    support::{data, load, on_ranks, processes, stories},
    tensor_parallel::{numbers, odd, same_on_processes, texts},
};

const WEIGHTS: &str = "model.safetensors";

/// The bytes of each tensor of two checkpoints.
#[track_caller]
fn assert_same_weights(got: &Path, want: &Path) {
    let [got, want] = [got, want].map(|dir| Checkpoint::open(dir).unwrap());
    assert_eq!(got.config(), want.config());
    assert_eq!(got.specs().unwrap(), want.specs().unwrap());
    for name in want.names() {
        let [got, want] = [&got, &want].map(|checkpoint| checkpoint.read(name).unwrap());
        // They are finite, so that equal numbers are equal bits but for the sign of a zero.
        let signs = |t: &Tensor| t.signbit();
        assert!(got.equal(&want) && signs(&got).equal(&signs(&want)), "{name}");
    }
}

/// Fault 13: saved on two ranks, loaded on one and on three, and back.
fn saved_on_some_ranks_and_loaded_on_others(question: &Question) {
    let source = question.model.clone();
    let want = Answers::of(question, &SingleProcess);
    let dir = tempfile::tempdir().unwrap();
    let saved = |by: &Path, ranks: usize, name: &str| {
        let output = dir.path().join(name);
        processes(ranks, "save", &[by, &output], "saved");
        output
    };
    let two = saved(&source, 2, "two");
    assert_same_weights(&two, &source);
    same_on_processes(&Question { model: two.clone(), ..question.clone() }, &want, &[1, 3]);
    let three = saved(&two, 3, "three");
    same_on_processes(&Question { model: three.clone(), ..question.clone() }, &want, &[2]);
    let one = saved(&three, 1, "one");
    let bytes = |dir: &Path| fs::read(dir.join(WEIGHTS)).unwrap();
    assert!(bytes(&two) == bytes(&three) && bytes(&two) == bytes(&one));
}

#[test]
fn stories_are_saved_on_two_ranks_and_loaded_on_one_and_three() {
    saved_on_some_ranks_and_loaded_on_others(&texts(stories(), [8, 4, 4]));
}

/// A K/V head lives on two ranks at tp 2 and at tp 3.
#[test]
fn an_odd_model_is_saved_on_two_ranks_and_loaded_on_one_and_three() {
    let model = odd(15, 5, [37, 67, 523]);
    saved_on_some_ranks_and_loaded_on_others(&numbers(model.path(), 523, [8, 4, 4]));
}

/// 16-bit weights, several files, a head of its own; dense and packed weights.
#[test]
fn any_checkpoint_is_saved_as_it_is_stored() {
    for folder in ["bf16", "sharded", "untied"] {
        let checkpoint = Checkpoint::open(data(folder)).unwrap();
        let largest = checkpoint.specs().unwrap().iter().map(TensorSpec::size).max().unwrap();
        for (tp, pack) in [(2, true), (3, false)] {
            let dir = tempfile::tempdir().unwrap();
            let output = dir.path().join("saved");
            on_ranks(tp, |comm| {
                let options =
                    LoadOptions { tp_rank: comm.rank(), tp, pack, ..LoadOptions::default() };
                let model = load(&data(folder), &options);
                let checkpoint = Checkpoint::open(data(folder)).unwrap();
                let save = SaveOptions {
                    max_shard_size: 2 * largest,
                    ..SaveOptions::new(&output, data(folder))
                };
                model.save(checkpoint.specs().unwrap(), &save, comm).unwrap();
                // No rank returns before the folder is there.
                assert!(output.join("config.json").exists());
            });
            assert_same_weights(&output, &data(folder));
            assert!(Checkpoint::open(&output).unwrap().files().count() > 1);
        }
    }
}

/// No rank ever holds more than its slice of one tensor and blocks of 8 MB.
#[test]
fn a_large_tensor_goes_in_blocks() {
    let spec = |name: &str, shape: [i64; 2]| TensorSpec {
        name: name.into(),
        dtype: dromedary_llama::Dtype::F32,
        shape: shape.into(),
    };
    let config = Checkpoint::open(stories()).unwrap().config().clone();
    let (heads, hidden) = (config.num_attention_heads * config.head_dim, 120_001);
    let tensors = [
        spec("model.layers.0.self_attn.o_proj.weight", [hidden, heads]),
        spec("model.layers.0.self_attn.q_proj.weight", [heads, hidden]),
    ];
    let dir = tempfile::tempdir().unwrap();
    let plan = Plan::new(&config, 2).unwrap();
    on_ranks(2, |comm| {
        let comm = Counting::new(comm);
        let mut slice_of = |name: &str| {
            let spec = tensors.iter().find(|spec| spec.name == name).unwrap();
            let shape = plan.rank(comm.rank()).shard(name).local_shape(&spec.shape);
            Ok(Tensor::zeros(shape, (tch::Kind::Float, tch::Device::Cpu)))
        };
        let options = SaveOptions::new(dir.path().join("saved"), dir.path());
        save_slices(&plan, tensors.to_vec(), &mut slice_of, &options, &comm).unwrap();
        let sizes = comm.sizes_of(&["broadcast", "all_gather"]);
        assert!(sizes.len() > 5, "{sizes:?}");
        assert!(sizes.iter().all(|numbers| 4 * numbers <= 8 << 20), "{sizes:?}");
        // Half of the rows are rank 0's own, and stay where they are.
        let sent: i64 = comm.sizes_of(&["broadcast"]).iter().sum();
        assert_eq!(sent, heads * hidden / 2);
    });
}

/// What one rank alone knows of must not leave the others waiting.
#[test]
fn an_error_on_one_rank_is_one_on_all() {
    let errors = |break_it: &(dyn Fn(usize, &str, Tensor) -> Tensor + Sync), output: &Path| {
        on_ranks(3, |comm| {
            let checkpoint = Checkpoint::open(stories()).unwrap();
            let options = LoadOptions { tp_rank: comm.rank(), tp: 3, ..LoadOptions::default() };
            let model = Llama::load(&checkpoint, &options).unwrap();
            let mut slice_of =
                |name: &str| Ok(break_it(comm.rank(), name, model.slice(name)?.unwrap()));
            let (specs, options) = (checkpoint.specs()?, SaveOptions::new(output, stories()));
            save_slices(model.plan(), specs, &mut slice_of, &options, comm)
        })
        .into_iter()
        .map(|result: Result<(), Error>| result.unwrap_err().to_string())
        .collect::<Vec<_>>()
    };
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("saved");
    let down = "model.layers.2.mlp.down_proj.weight";
    let poisoned = errors(
        &|rank, name, slice| {
            if (rank, name) == (1, down) { slice.zeros_like() / 0.0 } else { slice }
        },
        &output,
    );
    assert!(poisoned.iter().all(|error| error.contains(down)), "{poisoned:?}");
    assert!(poisoned[2].starts_with("rank 0: "), "{poisoned:?}");
    let misshapen = errors(
        &|rank, name, slice| if (rank, name) == (2, down) { slice.tr() } else { slice },
        &output,
    );
    assert!(misshapen.iter().all(|error| error.contains(down)), "{misshapen:?}");
    assert!(misshapen[0].starts_with("rank 2: "), "{misshapen:?}");
    assert!(!output.exists() && fs::read_dir(dir.path()).unwrap().next().is_none());
    fs::create_dir(&output).unwrap();
    fs::write(output.join("notes"), "of somebody else").unwrap();
    let there = errors(&|_, _, slice| slice, &output);
    assert!(there.iter().all(|error| error.contains("saved")), "{there:?}");
}

/// The owned parts are the whole, each number once.
#[test]
fn every_row_has_one_owner() {
    let config = Checkpoint::open(stories()).unwrap().config().clone();
    for tp in 1..=config.num_attention_heads as usize {
        let plan = Plan::new(&config, tp).unwrap();
        for (name, all) in [("k_proj", 4), ("q_proj", 8)] {
            let tensor = format!("model.layers.0.self_attn.{name}.weight");
            let mut next = 0;
            for owned in (0..tp).filter_map(|rank| plan.owned(rank, &tensor)) {
                let Shard::Rows(rows) = owned else { panic!("{owned:?}") };
                assert_eq!(rows.range().start, next);
                next = rows.range().end;
            }
            assert_eq!(next, all * config.head_dim, "tp {tp}: {name}");
        }
        for name in ["model.norm.weight", "model.embed_tokens.weight"] {
            let owners: Vec<_> = (0..tp).filter(|rank| plan.owned(*rank, name).is_some()).collect();
            assert_eq!(owners, [0]);
        }
    }
}

/// It would be lost without a word, since the checkpoint has no place for it.
#[test]
fn a_model_with_an_adapter_is_not_saved_as_if_it_had_none() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("saved");
    let mut model = load(&stories(), &LoadOptions::default());
    let (name, part) = model.linears_mut().nth(3).unwrap();
    assert!(name.ends_with("o_proj"), "{name}");
    let zeros = |shape: [i64; 2]| Tensor::zeros(shape, (tch::Kind::Float, tch::Device::Cpu));
    let (a, b) = (zeros([4, 64]), zeros([64, 4]));
    part.lora = Some(Lora { a, b, scaling: 1.0, dropout: None });
    let specs = Checkpoint::open(stories()).unwrap().specs().unwrap();
    let save = SaveOptions::new(&output, stories());
    let message = model.save(specs, &save, &SingleProcess).unwrap_err().to_string();
    assert!(message.contains("saved") && message.contains("o_proj has an adapter"), "{message}");
    assert!(!output.exists());
}

#[test]
fn an_older_folder_is_there_until_the_new_one_is_complete() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("saved");
    let specs = || Checkpoint::open(stories()).unwrap().specs().unwrap();
    let model = load(&stories(), &LoadOptions::default());
    let save = SaveOptions::new(&output, stories());
    model.save(specs(), &save, &SingleProcess).unwrap();
    let older = fs::read(output.join(WEIGHTS)).unwrap();

    let message = model.save(specs(), &save, &SingleProcess).unwrap_err().to_string();
    assert!(message.contains("saved"), "{message}");
    let save = SaveOptions { replace: true, ..save };
    let _ = model.layers()[1].input_layernorm.weight.shallow_clone().fill_(2.0);
    let mut others = specs();
    others.last_mut().unwrap().name = "model.layers.9.mlp.up_proj.weight".into();
    model.save(others, &save, &SingleProcess).unwrap_err();
    assert!(fs::read(output.join(WEIGHTS)).unwrap() == older);
    model.save(specs(), &save, &SingleProcess).unwrap();
    let saved = Checkpoint::open(&output).unwrap();
    let norm = saved.read("model.layers.1.input_layernorm.weight").unwrap();
    assert_eq!(norm.mean(tch::Kind::Float).double_value(&[]), 2.0);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}
