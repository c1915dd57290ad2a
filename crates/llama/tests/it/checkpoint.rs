//! Checkpoint folders: what is read is what is stored, and what does not fit is named.

use std::{collections::BTreeMap, fs, path::Path};

use dromedary_llama::{
    Checkpoint, Dtype, Error, Footprint, Llama, LoadOptions, Plan, ReadCounters, TensorProblems,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::given::smollm2;
use crate::tiny::{self, FFN, HEADS, HIDDEN, Tiny, VOCAB, assert_same, write_file};

const Q: &str = "model.layers.1.self_attn.q_proj.weight";

fn problems(tiny: &Tiny) -> TensorProblems {
    match Checkpoint::open(tiny.path()).unwrap_err() {
        Error::WrongTensors { problems, .. } => problems,
        other => panic!("{other}"),
    }
}

fn refusal(tiny: &Tiny) -> String {
    Checkpoint::open(tiny.path()).unwrap_err().to_string()
}

#[test]
fn tensors_are_read_as_they_are_stored() {
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
        let tiny = Tiny::new(1).stored_as(kind);
        let tiny = if kind == Kind::Half { tiny.single() } else { tiny.sharded(3) };
        let checkpoint = Checkpoint::open(tiny.path()).unwrap();
        assert_eq!(checkpoint.dtype(), tiny::dtype_of(kind));
        assert_eq!(checkpoint.names().count(), tiny.tensors.len());
        let mut bytes = 0;
        for (name, tensor) in &tiny.tensors {
            assert_same(&checkpoint.read(name).unwrap(), tensor);
            bytes += tensor.numel() * kind.elt_size_in_bytes();
            assert_eq!(checkpoint.counters().bytes_read, bytes as u64);
        }
    }
}

#[test]
fn files_of_transformers_open() {
    let data = crate::data();
    let dirs = ["stories260k", "untied", "bf16", "sharded", "linear_rope", "llama3_rope"];
    for dir in dirs {
        let checkpoint = Checkpoint::open(data.join(dir)).unwrap();
        let elements: i64 =
            checkpoint.names().map(|name| checkpoint.read(name).unwrap().numel() as i64).sum();
        assert_eq!(elements, checkpoint.config().num_parameters(), "{dir}");
    }
    assert_eq!(Checkpoint::open(data.join("bf16")).unwrap().dtype(), Dtype::Bf16);
    assert!(Checkpoint::open(data.join("sharded")).unwrap().files().count() > 1);
}

#[test]
fn slices_of_all_ranks_are_the_whole() {
    let tiny = Tiny::new(2).stored_as(Kind::BFloat16).sharded(2);
    let checkpoint = Checkpoint::open(tiny.path()).unwrap();
    for tp in 1..=HEADS as usize {
        let plan = Plan::new(checkpoint.config(), tp).unwrap();
        for (name, whole) in &tiny.tensors {
            let parts: Vec<_> = (0..tp)
                .map(|rank| {
                    let shard = plan.rank(rank).shard(name);
                    let part = checkpoint.read_slice(name, &shard).unwrap();
                    assert_eq!(part.size(), shard.local_shape(&whole.size()));
                    part
                })
                .collect();
            if name.contains("o_proj") || name.contains("down_proj") {
                assert_same(&Tensor::cat(&parts, 1), whole);
            } else if name.contains("k_proj") || name.contains("v_proj") {
                let kv = plan.rank(tp - 1).kv_heads();
                let (start, end) =
                    (kv.start as i64 * tiny::HEAD_DIM, kv.end as i64 * tiny::HEAD_DIM);
                assert_same(&parts[tp - 1], &whole.narrow(0, start, end - start));
            } else if name.contains("proj") || name.contains("lm_head") {
                assert_same(&Tensor::cat(&parts, 0), whole);
            } else {
                parts.iter().for_each(|part| assert_same(part, whole));
            }
        }
        let tied = checkpoint.read_slice("model.embed_tokens.weight", &plan.rank(0).tied_head());
        assert_eq!(tied.unwrap().size()[0], plan.rank(0).vocab.end);
    }
}

#[test]
fn tensors_larger_than_one_read_are_whole() {
    let mut config = tiny::config();
    config["hidden_size"] = json!(1050);
    config["intermediate_size"] = json!(1411);
    config["num_hidden_layers"] = json!(1);
    let tiny = Tiny::of(config, 3).single();
    let checkpoint = Checkpoint::open(tiny.path()).unwrap();
    let plan = Plan::new(checkpoint.config(), 3).unwrap();
    let (up, down) = ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight");
    assert_same(&checkpoint.read(up).unwrap(), &tiny.tensors[up]);
    let before = checkpoint.counters().bytes_read;
    let parts: Vec<_> =
        (0..3).map(|rank| checkpoint.read_slice(up, &plan.rank(rank).shard(up)).unwrap()).collect();
    assert_same(&Tensor::cat(&parts, 0), &tiny.tensors[up]);
    // Rows are read alone, columns out of whole rows.
    assert_eq!(checkpoint.counters().bytes_read - before, 4 * 1050 * 1411);
    let before = checkpoint.counters().bytes_read;
    let parts: Vec<_> = (0..3)
        .map(|rank| checkpoint.read_slice(down, &plan.rank(rank).shard(down)).unwrap())
        .collect();
    assert_same(&Tensor::cat(&parts, 1), &tiny.tensors[down]);
    assert_eq!(checkpoint.counters().bytes_read - before, 3 * 4 * 1050 * 1411);
    let mut blocks = Vec::new();
    for block in checkpoint.read_blocks(down, 100_000).unwrap() {
        let (rows, block) = block.unwrap();
        assert!(block.size()[0] == rows.end - rows.start && block.numel() <= 25_000);
        blocks.push(block);
    }
    assert_same(&Tensor::cat(&blocks, 0), &tiny.tensors[down]);
}

/// A rank copies what the plan says, and reads it in large pieces.
#[test]
fn a_rank_copies_its_share_alone() {
    let copies_its_share = |dir: &Path, tp: usize| {
        for tp_rank in 0..tp {
            let checkpoint = Checkpoint::open(dir).unwrap();
            let options = LoadOptions { tp_rank, tp, pack: false, ..LoadOptions::default() };
            let model = Llama::load(&checkpoint, &options).unwrap();
            let planned = Footprint::new(model.config(), model.plan(), &options);
            let size = checkpoint.dtype().size() as u64;
            let ReadCounters { reads, bytes_read, bytes_copied } = checkpoint.counters();
            let share = (planned.parameters * size) as f64;
            assert!((bytes_copied as f64 / share - 1.0).abs() <= 0.05, "{bytes_copied} of {share}");
            assert_eq!(bytes_read, planned.parameters_read * size);
            // One for what is left of each tensor, all others of 1 MB and more.
            let largest = checkpoint.names().count() as u64 + bytes_read / (1 << 20);
            assert!(reads <= largest, "{reads} reads for {bytes_read} bytes");
        }
    };
    let tiny = Tiny::new(2).stored_as(Kind::BFloat16).sharded(2);
    for tp in 1..=HEADS as usize {
        copies_its_share(tiny.path(), tp);
    }
    for tp in [2, 3, 8] {
        copies_its_share(&crate::stories260k(), tp);
    }
    if let Some(dir) = smollm2() {
        for tp in [2, 9] {
            copies_its_share(&dir, tp);
        }
    }
}

#[test]
fn a_slice_planned_for_another_model_is_refused() {
    let tiny = Tiny::new(4).single();
    let checkpoint = Checkpoint::open(tiny.path()).unwrap();
    let mut config = checkpoint.config().clone();
    config.intermediate_size = 40;
    let plan = Plan::new(&config, 2).unwrap();
    for name in ["model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"] {
        let error = checkpoint.read_slice(name, &plan.rank(0).shard(name)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(name) && text.contains("40") && text.contains("23"), "{text}");
    }
    assert!(matches!(checkpoint.read("model.lm"), Err(Error::NoSuchTensor { .. })));
}

/// Fault 16: all that is wrong is listed at once.
#[test]
fn wrong_tensors_are_listed_by_name() {
    let mut tiny = Tiny::new(5);
    tiny.tensors.remove("model.norm.weight");
    tiny.tensors.remove(Q);
    tiny.tensors.insert(
        "model.layers.2.input_layernorm.weight".into(),
        Tensor::zeros([HIDDEN], (Kind::Float, Device::Cpu)),
    );
    let transposed = tiny.tensors["lm_head.weight"].tr().contiguous();
    tiny.tensors.insert("lm_head.weight".into(), transposed);
    let integers = tiny.tensors["model.layers.0.mlp.up_proj.weight"].to_kind(Kind::Int64);
    tiny.tensors.insert("model.layers.0.mlp.up_proj.weight".into(), integers);
    for tiny in [tiny.sharded(2)] {
        let found = problems(&tiny);
        assert_eq!(found.missing, [Q, "model.norm.weight"]);
        assert_eq!(found.unexpected, ["model.layers.2.input_layernorm.weight"]);
        assert_eq!(
            found.misshapen,
            [format!("lm_head.weight (expected [{VOCAB}, {HIDDEN}], got [{HIDDEN}, {VOCAB}])")]
        );
        assert_eq!(found.wrong_dtype, ["model.layers.0.mlp.up_proj.weight (I64)"]);
        let text = refusal(&tiny);
        let dir = tiny.path().display().to_string();
        for part in [&dir, Q, "model.norm.weight", "2 missing", "1 unexpected", "I64"] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }
}

#[test]
fn another_model_is_not_listed_in_full() {
    let mut tiny = Tiny::new(5).single();
    tiny.config["num_hidden_layers"] = json!(80);
    tiny.write_config();
    let text = refusal(&tiny);
    assert!(text.contains("702 missing") && text.contains("and 678 more"), "{text}");
    assert!(text.len() < 2000, "{text}");
}

/// Fault 16: a NaN is found when its tensor is read, on whatever way.
#[test]
fn weights_that_are_not_finite_are_named() {
    let down = "model.layers.0.mlp.down_proj.weight";
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
        for value in [f64::NAN, f64::INFINITY] {
            let tiny = Tiny::new(6).stored_as(kind);
            let _ = tiny.tensors[Q].get(3).get(2).fill_(value);
            let _ = tiny.tensors[down].get(5).get(FFN - 1).fill_(value);
            let tiny = tiny.single();
            let checkpoint = Checkpoint::open(tiny.path()).unwrap();
            match checkpoint.read(Q).unwrap_err() {
                Error::NonFinite { name, element, value: got, .. } => {
                    assert_eq!((name.as_str(), element), (Q, (3 * HIDDEN + 2) as u64));
                    assert_eq!(got.is_nan(), value.is_nan());
                }
                other => panic!("{other}"),
            }
            let plan = Plan::new(checkpoint.config(), 2).unwrap();
            let text =
                checkpoint.read_slice(down, &plan.rank(1).shard(down)).unwrap_err().to_string();
            assert!(text.contains(down) && text.contains("model.safetensors"), "{text}");
            assert!(checkpoint.read("model.norm.weight").is_ok());
        }
    }
}

#[test]
fn a_truncated_file_is_named() {
    let tiny = Tiny::new(7).sharded(2);
    let name = "model-00002-of-00002.safetensors";
    let path = tiny.path().join(name);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let text = refusal(&tiny);
    assert!(text.contains(name) && text.contains("truncated"), "{text}");
    assert!(text.contains(&bytes.len().to_string()), "{text}");
    // Cut after it was opened.
    fs::write(&path, &bytes).unwrap();
    let checkpoint = Checkpoint::open(tiny.path()).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    let errors = checkpoint.names().filter_map(|name| checkpoint.read(name).err());
    let texts: Vec<_> = errors.map(|error| error.to_string()).collect();
    assert!(!texts.is_empty());
    assert!(
        texts.iter().all(|text| text.contains(name) && text.contains("truncated")),
        "{texts:?}"
    );
}

#[test]
fn index_and_files_must_agree() {
    let edit = |change: &dyn Fn(&mut Value, &Tiny)| {
        let tiny = Tiny::new(8).sharded(2);
        let mut index: Value = serde_json::from_slice(&fs::read(tiny.index()).unwrap()).unwrap();
        change(&mut index, &tiny);
        fs::write(tiny.index(), index.to_string()).unwrap();
        let text = refusal(&tiny);
        assert!(text.contains(&tiny.path().display().to_string()), "{text}");
        text
    };
    let other = "model-00001-of-00002.safetensors";
    let text =
        edit(&|index, _| index["weight_map"]["model.norm.weight"] = json!("gone.safetensors"));
    assert!(text.contains("gone.safetensors"), "{text}");
    let text = edit(&|index, _| {
        let map = index["weight_map"].as_object_mut().unwrap();
        let right = map[Q].clone();
        map[Q] = json!(if right == other { "model-00002-of-00002.safetensors" } else { other });
    });
    assert!(text.contains(Q), "{text}");
    let text = edit(&|index, _| {
        index["weight_map"].as_object_mut().unwrap().remove(Q);
    });
    assert!(text.contains(Q), "{text}");
    let text = edit(&|index, _| index["weight_map"]["extra"] = json!(other));
    assert!(text.contains("extra"), "{text}");
    for outside in ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "x.bin"] {
        let text = edit(&|index, _| index["weight_map"]["extra"] = json!(outside));
        assert!(text.contains("not the name of a safetensors file"), "{text}");
    }
    let text = edit(&|index, _| *index = json!({}));
    assert!(text.contains("weight_map"), "{text}");
}

#[test]
fn a_name_twice_in_the_index_is_refused() {
    let tiny = Tiny::new(8).sharded(2);
    let index = fs::read_to_string(tiny.index()).unwrap();
    let twice = index.replacen(
        "\"weight_map\":{",
        "\"weight_map\":{\"model.norm.weight\":\"x.safetensors\",",
        1,
    );
    assert_ne!(index, twice);
    fs::write(tiny.index(), twice).unwrap();
    assert!(refusal(&tiny).contains("model.norm.weight occurs twice"));
}

#[test]
fn the_same_tensor_in_two_files_is_refused() {
    let tiny = Tiny::new(8).sharded(2);
    let all = tiny.tensors.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect();
    write_file(&tiny.path().join("model-00001-of-00002.safetensors"), &all);
    assert!(refusal(&tiny).contains("which the index does not say"));
}

#[test]
fn folders_without_a_checkpoint_say_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let refusal = |path: &std::path::Path| Checkpoint::open(path).unwrap_err().to_string();
    assert!(refusal(&dir.path().join("none")).contains("no such folder"));
    assert!(refusal(dir.path()).contains("config.json"));
    fs::write(dir.path().join("config.json"), tiny::config().to_string()).unwrap();
    assert!(refusal(&dir.path().join("config.json")).contains("not a folder"));
    assert!(refusal(dir.path()).contains("no model.safetensors"));
    fs::write(dir.path().join("pytorch_model.bin"), b"").unwrap();
    assert!(refusal(dir.path()).contains("pickle"));
    let tiny = Tiny::new(9).sharded(2).single();
    assert!(refusal(tiny.path()).contains("move one of them away"));
}

#[test]
fn a_tied_head_may_be_stored_and_derived_tensors_are_not_missed() {
    let mut tiny = Tiny::new(10);
    tiny.config["tie_word_embeddings"] = json!(true);
    let frequencies = Tensor::ones([2], (Kind::Float, Device::Cpu));
    tiny.tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), frequencies);
    let mut tiny = tiny.single();
    let checkpoint = Checkpoint::open(tiny.path()).unwrap();
    assert!(checkpoint.names().all(|name| !name.contains("lm_head") && !name.contains("inv_freq")));
    assert!(checkpoint.read("lm_head.weight").is_err());

    let head = tiny.tensors["lm_head.weight"].narrow(0, 0, VOCAB - 1);
    tiny.tensors.insert("lm_head.weight".into(), head);
    assert_eq!(problems(&tiny.single()).misshapen.len(), 1);

    let mut untied = Tiny::new(10);
    untied.tensors.remove("lm_head.weight");
    assert_eq!(problems(&untied.single()).missing, ["lm_head.weight"]);
}

#[test]
fn the_fingerprint_sees_every_part() {
    let print = |tiny: &Tiny| Checkpoint::open(tiny.path()).unwrap().fingerprint().unwrap();
    let fresh = || Tiny::new(11).sharded(2);
    let original = print(&fresh());
    assert_eq!(print(&fresh()), original);
    let mut seen = BTreeMap::from([(original, "original")]);

    let changed = Tiny::new(11);
    let _ = changed.tensors["model.norm.weight"].get(13).fill_(0.5);
    seen.insert(print(&changed.sharded(2)), "one weight");
    let mut changed = fresh();
    changed.config["rope_theta"] = json!(20_000.0);
    changed.write_config();
    seen.insert(print(&changed), "configuration");
    let changed = fresh();
    fs::write(changed.path().join("tokenizer.json"), "{}").unwrap();
    seen.insert(print(&changed), "tokenizer");
    seen.insert(print(&Tiny::new(11).single()), "files");
    assert_eq!(seen.len(), 5, "{seen:?}");
}
