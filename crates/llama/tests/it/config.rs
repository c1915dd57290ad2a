//! Which configurations are read, how, and which are refused.

use std::fs;

use dromedary_llama::{Dtype, LlamaConfig, Result, RopeScaling, check_tokenizer, eos_token_ids};
use dromedary_tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::tiny;

fn parse(changes: Value) -> Result<LlamaConfig> {
    let mut config = tiny::config();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    LlamaConfig::from_json(config.to_string().as_bytes(), "some/config.json".as_ref())
}

fn refusal(changes: Value) -> String {
    let text = parse(changes).unwrap_err().to_string();
    assert!(text.starts_with("some/config.json: "), "{text}");
    text
}

#[test]
fn absent_keys_have_the_defaults_of_transformers() {
    let json = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 172,
        "num_hidden_layers": 5, "num_attention_heads": 8, "vocab_size": 512}"#;
    let config = LlamaConfig::from_json(json.as_bytes(), "config.json".as_ref()).unwrap();
    assert_eq!((config.num_key_value_heads, config.head_dim), (8, 8));
    assert_eq!((config.rms_norm_eps, config.rope_theta), (1e-6, 10_000.0));
    assert_eq!((config.max_position_embeddings, config.tie_word_embeddings), (2048, false));
    assert_eq!((config.rope_scaling, config.torch_dtype), (RopeScaling::None, None));
}

#[test]
fn explicit_keys_win() {
    let config = parse(json!({"rope_theta": 5e5, "torch_dtype": "bfloat16"})).unwrap();
    assert_eq!((config.head_dim, config.num_key_value_groups()), (4, 2));
    assert_eq!((config.rope_theta, config.torch_dtype), (5e5, Some(Dtype::Bf16)));
}

#[test]
fn rope_scaling_in_all_three_spellings() {
    let linear = RopeScaling::Linear { factor: 4.0 };
    for spelling in [
        json!({"rope_scaling": {"type": "linear", "factor": 4.0}}),
        json!({"rope_scaling": {"rope_type": "linear", "factor": 4}}),
        json!({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.5}}),
    ] {
        assert_eq!(parse(spelling).unwrap().rope_scaling, linear);
    }
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5});
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let config = parse(json!({"rope_parameters": llama3})).unwrap();
    assert_eq!((config.rope_scaling, config.rope_theta), (expected, 5e5));
    let plain = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}});
    let config = parse(plain).unwrap();
    assert_eq!((config.rope_scaling, config.rope_theta), (RopeScaling::None, 1e6));
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (changes, key) in [
        (json!({"attention_bias": true}), "attention_bias = true"),
        (json!({"mlp_bias": true}), "mlp_bias = true"),
        (json!({"hidden_act": "gelu"}), "hidden_act = gelu"),
        (json!({"model_type": "mistral"}), "model_type = mistral"),
        (json!({"architectures": ["LlamaForSequenceClassification"]}), "architectures"),
        (json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), "rope_type = dynamic"),
        (json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}), "rope_type = yarn"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor = 0.5"),
        (json!({"quantization_config": {"quant_method": "gptq"}}), "quantization_config = gptq"),
        (json!({"torch_dtype": "float8_e4m3fn"}), "torch_dtype = float8_e4m3fn"),
    ] {
        let text = refusal(changes);
        assert!(text.contains(key) && text.contains("not supported"), "{text}");
    }
}

#[test]
fn contradictions_are_refused_with_their_numbers() {
    for (changes, parts) in [
        (json!({"num_key_value_heads": 4}), ["num_attention_heads 6", "num_key_value_heads 4"]),
        (json!({"head_dim": null, "hidden_size": 64}), ["hidden_size 64", "num_attention_heads 6"]),
        (json!({"head_dim": 5}), ["head_dim 5", "odd"]),
        (json!({"num_attention_heads": 0}), ["num_attention_heads 0", "1..="]),
        (json!({"hidden_size": -14}), ["hidden_size -14", "1..="]),
        (json!({"num_hidden_layers": 1_000_000_000_000_i64}), ["num_hidden_layers", "4096"]),
        (json!({"vocab_size": i64::MAX}), ["vocab_size", "1..="]),
        (json!({"rms_norm_eps": -1.0}), ["rms_norm_eps -1", "positive"]),
        (
            json!({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}),
            ["rope_theta is 10000", "20000"],
        ),
        (json!({"rope_scaling": {"rope_type": "linear"}}), ["factor", "missing"]),
        (
            json!({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}),
            ["factor 0.5", "below 1"],
        ),
        (json!({"rope_scaling": {"factor": 2.0}}), ["rope_type", "without"]),
    ] {
        let text = refusal(changes);
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }
    let overflow = json!({"head_dim": 1 << 25, "num_attention_heads": 3 << 20});
    assert!(refusal(overflow).contains("num_attention_heads * head_dim"));
}

#[test]
fn malformed_files_are_named() {
    for text in ["", "[]", "{", r#"{"model_type": "llama"}"#] {
        let error = LlamaConfig::from_json(text.as_bytes(), "a/config.json".as_ref()).unwrap_err();
        assert!(error.to_string().starts_with("a/config.json: "), "{error}");
    }
    let error = LlamaConfig::open("/nonexistent").unwrap_err();
    assert!(error.to_string().contains("/nonexistent"), "{error}");
}

#[test]
fn parameters_of_a_tied_head_count_once() {
    let config = LlamaConfig::open(crate::stories260k()).unwrap();
    assert_eq!(config.num_parameters(), 260_032);
    let untied = LlamaConfig { tie_word_embeddings: false, ..config };
    assert_eq!(untied.num_parameters(), 260_032 + 512 * 64);
}

#[test]
fn end_tokens_come_from_three_files() {
    let tokenizer = Tokenizer::open(crate::stories260k()).unwrap();
    assert_eq!(eos_token_ids(crate::stories260k(), &tokenizer).unwrap(), [2]);
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    put("generation_config.json", r#"{"eos_token_id": [7, 5, 7]}"#);
    put("config.json", r#"{"eos_token_id": 9, "vocab_size": 10}"#);
    assert_eq!(eos_token_ids(dir.path(), &tokenizer).unwrap(), [2, 5, 7, 9]);
    put("config.json", r#"{"eos_token_id": null, "vocab_size": 10}"#);
    assert_eq!(eos_token_ids(dir.path(), &tokenizer).unwrap(), [2, 5, 7]);
    put("config.json", r#"{"eos_token_id": 10, "vocab_size": 10}"#);
    let text = eos_token_ids(dir.path(), &tokenizer).unwrap_err().to_string();
    assert!(text.contains("eos_token_id 10") && text.contains("vocab_size 10"), "{text}");
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let tokenizer = Tokenizer::open(crate::stories260k()).unwrap();
    let with_vocab = |vocab_size| parse(json!({"vocab_size": vocab_size})).unwrap();
    for fitting in [512, 576, 1024] {
        check_tokenizer(&with_vocab(fitting), &tokenizer).unwrap();
    }
    for other in [511, 1025, 49152] {
        let text = check_tokenizer(&with_vocab(other), &tokenizer).unwrap_err().to_string();
        assert!(text.contains("512") && text.contains(&other.to_string()), "{text}");
    }
}
