//! PEFT adapter folders, written and read.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    ops::ControlFlow,
    path::Path,
};

use dromedary_llama::{
    Adapter, AdapterFile, Checkpoint, DEFAULT_MAX_SHARD_SIZE, Error, LlamaConfig, LoadOptions,
    LoraConfig, LoraPair, MergeOptions, merge,
};
use dromedary_parallel::{Communicator, SingleProcess};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::{
    support,
    tiny::{self, Tiny, assert_same, noise, write_file},
};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

/// A random adapter for all linear layers.
pub(crate) fn random(tiny: &Tiny, r: i64, seed: u64) -> Adapter {
    let config = LoraConfig { r, lora_alpha: 12.0, ..LoraConfig::default() };
    let tensors = tiny::modules(tiny)
        .into_iter()
        .zip((seed * 1000..).step_by(2))
        .map(|((module, out, inner), seed)| {
            let (lora_a, lora_b) = (noise(&[r, inner], seed), noise(&[out, r], seed + 1));
            (module, LoraPair { lora_a, lora_b })
        })
        .collect();
    Adapter { config, tensors }
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn what_is_saved_is_read_back() {
    let (tiny, dir) = (Tiny::new(1), tempfile::tempdir().unwrap());
    for kind in [Kind::Float, Kind::BFloat16] {
        let path = dir.path().join(format!("{kind:?}"));
        let mut adapter = random(&tiny, 3, 2);
        adapter.config.use_rslora = kind == Kind::BFloat16;
        adapter.config.base_model_name_or_path = Some("models/tiny".into());
        for pair in adapter.tensors.values_mut() {
            pair.lora_a = pair.lora_a.to_kind(kind);
            pair.lora_b = pair.lora_b.to_kind(kind);
        }
        adapter.save(&path).unwrap();
        let read = Adapter::open(&path).unwrap();
        assert_eq!(read.config, adapter.config);
        assert_eq!(read.tensors.len(), 14);
        for (module, pair) in &adapter.tensors {
            assert_same(&read.tensors[module].lora_a, &pair.lora_a);
            assert_same(&read.tensors[module].lora_b, &pair.lora_b);
        }
        dromedary_files::Manifest::read(&path).unwrap().verify(&path).unwrap();
        assert!(adapter.save(&path).is_err(), "an adapter was overwritten");
    }
}

#[test]
fn files_are_those_of_peft() {
    let (tiny, dir) = (Tiny::new(1), tempfile::tempdir().unwrap());
    let path = dir.path().join("adapter");
    random(&tiny, 3, 2).save(&path).unwrap();
    let config = read_json(&path.join("adapter_config.json"));
    for (key, value) in [
        ("peft_type", json!("LORA")),
        ("task_type", json!("CAUSAL_LM")),
        ("r", json!(3)),
        ("lora_alpha", json!(12)),
        ("lora_dropout", json!(0.0)),
        ("bias", json!("none")),
        ("use_rslora", json!(false)),
        ("inference_mode", json!(true)),
        ("fan_in_fan_out", json!(false)),
        ("modules_to_save", json!(null)),
        ("base_model_name_or_path", json!(null)),
        (
            "target_modules",
            json!(["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    let bytes = fs::read(path.join("adapter_model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), 28);
    let a = file.tensor("base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight").unwrap();
    let b = file.tensor("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight").unwrap();
    assert_eq!((a.shape(), b.shape()), (&[3, 14][..], &[24, 3][..]));
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
}

/// What PEFT saved, read and saved again, is what PEFT saved.
#[test]
fn an_adapter_of_peft_survives_a_round_trip() {
    let (peft, dir) = (crate::data().join("peft_adapter"), tempfile::tempdir().unwrap());
    let path = dir.path().join("adapter");
    let adapter = Adapter::open(&peft).unwrap();
    assert_eq!((adapter.config.r, adapter.config.scaling()), (4, 1.5));
    adapter.save(&path).unwrap();
    let [theirs, ours] = [&peft, &path].map(|dir| read_json(&dir.join("adapter_config.json")));
    for (key, value) in ours.as_object().unwrap() {
        match key.as_str() {
            "target_modules" => {
                let names = |value: &Value| {
                    let names = value.as_array().unwrap().iter();
                    names.map(|name| name.as_str().unwrap().to_string()).collect::<BTreeSet<_>>()
                };
                assert_eq!(names(value), names(&theirs[key]));
            }
            _ => assert_eq!(value, &theirs[key], "{key}"),
        }
    }
    let [theirs, ours] =
        [&peft, &path].map(|dir| fs::read(dir.join("adapter_model.safetensors")).unwrap());
    let theirs = safetensors::SafeTensors::deserialize(&theirs).unwrap();
    let ours = safetensors::SafeTensors::deserialize(&ours).unwrap();
    assert_eq!(ours.len(), theirs.len());
    for (name, tensor) in theirs.tensors() {
        assert_eq!(ours.tensor(&name).unwrap(), tensor, "{name}");
    }
}

#[test]
fn the_scale_follows_alpha_and_rank() {
    let config = LoraConfig::default();
    assert_eq!(config.scaling(), 0.25);
    assert_eq!(LoraConfig { use_rslora: true, ..config }.scaling(), 2.0);
}

/// An adapter folder with its configuration changed.
fn changed(changes: Value) -> Result<AdapterFile, Error> {
    let (tiny, dir) = (Tiny::new(1), tempfile::tempdir().unwrap());
    let path = dir.path().join("adapter");
    random(&tiny, 3, 2).save(&path).unwrap();
    let mut config = read_json(&path.join("adapter_config.json"));
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    fs::write(path.join("adapter_config.json"), config.to_string()).unwrap();
    AdapterFile::open(&path)
}

#[test]
fn other_kinds_of_adapter_are_refused_by_name() {
    for (change, key) in [
        (json!({"peft_type": "IA3"}), "peft_type = IA3"),
        (json!({"bias": "all"}), "bias = all"),
        (json!({"use_dora": true}), "use_dora = true"),
        (json!({"fan_in_fan_out": true}), "fan_in_fan_out = true"),
        (json!({"modules_to_save": ["lm_head"]}), "modules_to_save"),
        (json!({"rank_pattern": {"q_proj": 4}}), "rank_pattern"),
        (json!({"alpha_pattern": {"q_proj": 4}}), "alpha_pattern"),
        (json!({"layers_to_transform": [1]}), "layers_to_transform"),
        (json!({"exclude_modules": ["k_proj"]}), "exclude_modules"),
        (json!({"init_lora_weights": "pissa_niter_16"}), "init_lora_weights"),
    ] {
        let text = changed(change).unwrap_err().to_string();
        assert!(text.contains(key) && text.contains("adapter_config.json"), "{text}");
    }
    for (change, part) in [
        (json!({"target_modules": "all-linear"}), "target_modules"),
        (json!({"target_modules": ["q_proj"]}), "down_proj is no target module"),
        (json!({"r": 4}), "r is 4"),
        (json!({"r": 0}), "r is 0"),
        (json!({"lora_alpha": "x"}), "adapter_config.json"),
    ] {
        let text = changed(change).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
    // What current PEFT writes beside these, unset.
    changed(json!({"use_dora": false, "rank_pattern": {}, "layers_to_transform": null,
        "corda_config": null, "megatron_core": "megatron.core", "peft_version": "0.18.0"}))
    .unwrap();
}

#[test]
fn damaged_adapters_are_refused_by_name() {
    type Change = fn(&mut BTreeMap<String, Tensor>);
    let prefix = "base_model.model.model.layers.0.self_attn.q_proj";
    let cases: [(Change, &str); 4] = [
        (
            |t| {
                drop(t.remove(&format!(
                    "{}.lora_B.weight",
                    "base_model.model.model.layers.0.self_attn.q_proj"
                )))
            },
            "has no lora_B",
        ),
        (
            |t| {
                drop(t.insert("base_model.model.lm_head.weight".into(), Tensor::zeros([2, 2], CPU)))
            },
            "lm_head.weight is not a factor",
        ),
        (|t| t.clear(), "no factors"),
        (|t| t.values_mut().for_each(|t| *t = t.to_kind(Kind::Int64)), "I64"),
    ];
    for (change, part) in cases {
        let (tiny, dir) = (Tiny::new(1), tempfile::tempdir().unwrap());
        let path = dir.path().join("adapter");
        let adapter = random(&tiny, 3, 2);
        adapter.save(&path).unwrap();
        let mut tensors = BTreeMap::new();
        for (module, pair) in adapter.tensors {
            tensors.insert(format!("base_model.model.{module}.lora_A.weight"), pair.lora_a);
            tensors.insert(format!("base_model.model.{module}.lora_B.weight"), pair.lora_b);
        }
        assert!(tensors.contains_key(&format!("{prefix}.lora_A.weight")));
        change(&mut tensors);
        write_file(&path.join("adapter_model.safetensors"), &tensors);
        let text = AdapterFile::open(&path).unwrap_err().to_string();
        assert!(text.contains(part) && text.contains("adapter_model.safetensors"), "{text}");
    }
    let dir = tempfile::tempdir().unwrap();
    assert!(AdapterFile::open(dir.path()).unwrap_err().to_string().contains("adapter_config.json"));
}

#[test]
fn a_nan_is_not_saved() {
    let (tiny, dir) = (Tiny::new(1), tempfile::tempdir().unwrap());
    let adapter = random(&tiny, 3, 2);
    let module = "model.layers.1.mlp.up_proj";
    let _ = adapter.tensors[module].lora_b.get(4).get(1).fill_(f64::NAN);
    let text = adapter.save(dir.path().join("adapter")).unwrap_err().to_string();
    assert!(text.contains(module) && text.contains("NaN at element 13"), "{text}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn adapters_of_other_models_do_not_fit() {
    let (tiny, dir) = (Tiny::new(1).single(), tempfile::tempdir().unwrap());
    let path = dir.path().join("adapter");
    random(&tiny, 3, 2).save(&path).unwrap();
    let file = AdapterFile::open(&path).unwrap();
    let model = Checkpoint::open(tiny.path()).unwrap().config().clone();
    file.check_fits(&model).unwrap();
    match file.check_fits(&LlamaConfig { intermediate_size: 40, ..model.clone() }).unwrap_err() {
        Error::AdapterShape { name, lora_a, lora_b, base } => {
            assert_eq!(name, "model.layers.0.mlp.down_proj");
            assert_eq!((lora_a, lora_b, base), (vec![3, 23], vec![14, 3], vec![14, 40]));
        }
        other => panic!("{other}"),
    }
    let fewer = LlamaConfig { num_hidden_layers: 1, ..model.clone() };
    assert!(file.check_fits(&fewer).unwrap_err().to_string().contains("model.layers.1."));
    let more = LlamaConfig { num_hidden_layers: 3, ..model };
    let text = file.check_fits(&more).unwrap_err().to_string();
    assert!(text.contains("7 of") && text.contains("model.layers.2."), "{text}");
}

#[test]
fn an_adapter_runs_without_being_merged_at_any_number_of_ranks() {
    let base = Tiny::of(
        {
            let mut config = tiny::config();
            config["num_attention_heads"] = json!(12);
            config
        },
        51,
    )
    .single();
    let [adapter, merged] = ["adapter", "merged"].map(|name| base.path().join(name));
    random(&base, 3, 9).save(&adapter).unwrap();
    let options = MergeOptions {
        checkpoint: base.path().to_path_buf(),
        adapter: adapter.clone(),
        output: merged.clone(),
        max_shard_size: DEFAULT_MAX_SHARD_SIZE,
        verify: true,
    };
    merge(&options, &mut |_| ControlFlow::Continue(())).unwrap();
    let ids = [3, 7, 1, 30, 12];
    let whole = |dir: &Path| support::load(dir, &LoadOptions::default());
    let want = whole(&merged).forward_logits(&ids, &SingleProcess).unwrap();
    let plain = whole(base.path()).forward_logits(&ids, &SingleProcess).unwrap();
    assert!(support::difference(&plain, &want) > 1e-2, "the adapter changes nothing");
    let adapter = AdapterFile::open(&adapter).unwrap();
    let dir = base.path().to_path_buf();
    for tp in [1, 2, 3, 5] {
        for pack in [true, false] {
            let got = support::on_ranks(tp, |comm| {
                let options =
                    LoadOptions { tp_rank: comm.rank(), tp, pack, ..LoadOptions::default() };
                let mut model = support::load(&dir, &options);
                model.attach(&adapter).unwrap();
                model.forward_logits(&ids, comm).unwrap()
            });
            let off = support::difference(&got[0], &want);
            assert!(off < 1e-5, "tp {tp}, packed {pack}: {off:.1e}");
        }
    }
}
