//! `llama inspect`, as a user runs it.

use std::{
    fs,
    process::{Command, Output},
};

use tch::Kind;

use crate::tiny::Tiny;

fn inspect(args: &[&std::ffi::OsStr]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_llama")).arg("inspect").args(args).output().unwrap()
}

#[test]
fn a_real_checkpoint_is_described() {
    let dir = crate::stories260k();
    let output = inspect(&["--checkpoint".as_ref(), dir.as_os_str(), "--verify".as_ref()]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "parameters     260032",
        "heads          8 query, 4 key/value, 8 wide",
        "context        512",
        "rope           theta 10000, not scaled",
        "vocabulary     512, head tied to the embedding",
        "tensors        47 x F32, 1040128 bytes",
        "files          1, 1044992 bytes",
        "512 tokens, bos 1, put first, eos [2]",
        "every weight is finite",
    ] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    let print = text.lines().find_map(|line| line.strip_prefix("fingerprint    ")).unwrap();
    assert_eq!(print.len(), 64);
}

#[test]
fn verify_finds_a_nan_that_opening_cannot_see() {
    let tiny = Tiny::new(1).stored_as(Kind::BFloat16);
    let name = "model.layers.1.post_attention_layernorm.weight";
    let _ = tiny.tensors[name].get(3).fill_(f64::NAN);
    let tiny = tiny.single();
    let dir = tiny.path().as_os_str();
    assert_eq!(inspect(&["--ckpt_dir".as_ref(), dir]).status.code(), Some(0));
    let output = inspect(&["--ckpt_dir".as_ref(), dir, "--verify".as_ref(), "True".as_ref()]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains(name) && text.contains("NaN at element 3"), "{text}");
}

#[test]
fn a_tokenizer_of_another_model_is_an_error() {
    let tiny = Tiny::new(1).single();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(crate::stories260k().join(name), tiny.path().join(name)).unwrap();
    }
    let output = inspect(&["--checkpoint".as_ref(), tiny.path().as_os_str()]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("512 tokens") && text.contains("37"), "{text}");
    assert!(output.stdout.is_empty());
}
