//! `demo` with programs that only leave the files that the real ones leave.

use std::{fs, path::Path};

use crate::machine::{Machine, errors};

/// A machine on which everything is built; the programs note how they were called.
fn built() -> Machine {
    let machine = Machine::ready();
    machine.model();
    machine.file("checkout/prompts/dromedary_concise_prompt_distill.txt");
    let metadata = format!(r#"{{"target_directory": "{}"}}"#, machine.path("target").display());
    machine.program("cargo", &format!("[ $1 != metadata ] || echo '{metadata}'"));
    let cleaning = r#"{"command": "'$1'", "rows_out": 3, "sources": {"dolly":
        {"rows": 5, "edited": 1, "kept": 3, "dropped": {"empty": 2}}}}"#;
    program(
        &machine,
        "step1-prompt-cleaning",
        &format!("mkdir -p runs/demo/$1\necho '{cleaning}' > runs/demo/$1/report.json"),
    );
    program(
        &machine,
        "step2-self-align",
        r#"cd runs/demo
           echo '{"id": "a", "finish_reason": "stop"}' > aligned.jsonl
           echo '{"rows": 1, "output_tokens": 90, "prefill_seconds": 1, "decode_seconds": 9}' \
               > metrics.jsonl
           echo '{"rows": 1, "kept": 1, "dropped": {}, "identity": 1}' > merge_report.json"#,
    );
    program(
        &machine,
        "step3-principle-engraving",
        r#"mkdir -p runs/demo/engraved
           echo '{"step": 1, "loss": 2.5, "tokens": 100, "seconds": 2.0}' \
               > runs/demo/engraved/metrics.jsonl"#,
    );
    program(&machine, "llama", "[ $1 = merge ] || printf \"$3 answers\\n\\n### User\"");
    machine
}

fn program(machine: &Machine, name: &str, script: &str) {
    let note = format!("echo \"{name} $1\" >> {}", machine.calls());
    machine.program(&format!("../target/release/{name}"), &format!("{note}\n{script}"));
}

fn demo(machine: &Machine, arguments: &[&str]) -> std::process::Output {
    let path = format!("{}:/usr/bin:/bin", machine.path("bin").display());
    machine.xtask(&[&["demo"], arguments].concat(), &[("PATH", Path::new(&path))])
}

const ALL: &str = "step1-prompt-cleaning subsample-openorca
step1-prompt-cleaning aggregate-sharegpt
step1-prompt-cleaning clean-and-merge
step2-self-align generate
step2-self-align merge-and-filter
step3-principle-engraving train
llama merge
llama complete
llama complete
llama complete
llama complete
llama complete
llama complete
";

#[test]
fn the_pipeline_is_run_in_order_and_reported() {
    let machine = built();
    let output = demo(&machine, &["--quick"]);
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(machine.called(), ALL);
    let page = fs::read_to_string(machine.path("checkout/runs/demo/report.md")).unwrap();
    for text in [
        "the first 16 of dummy_data",
        "| clean-and-merge | dolly | 5 | 1 | 3 | 2 empty |",
        "| generation, 1 rows, decoding | 90 | 9.0 | 10 |",
        "| 1 | 2.5000 |",
        "| runs/demo/base answers | runs/demo/model answers |",
    ] {
        assert!(page.contains(text), "{text}\n{page}");
    }
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        shown.contains("\n$ step2-self-align generate --config configs/step2_demo.toml"),
        "{shown}"
    );
    assert!(shown.contains("--limit 16"), "{shown}");
}

#[test]
fn an_interrupted_demo_goes_on_where_it_was() {
    let machine = built();
    let train = fs::read_to_string(machine.path("target/release/step3-principle-engraving"));
    program(&machine, "step3-principle-engraving", "exit 75");
    let output = demo(&machine, &[]);
    assert_eq!(output.status.code(), Some(75));
    assert!(errors(&output).contains("train was stopped"), "{}", errors(&output));
    assert!(!machine.path("checkout/runs/demo/report.md").exists());

    fs::write(machine.path("target/release/step3-principle-engraving"), train.unwrap()).unwrap();
    fs::remove_file(machine.calls()).unwrap();
    let output = demo(&machine, &[]);
    assert!(output.status.success(), "{}", errors(&output));
    let (_, rest) = ALL.split_once("merge-and-filter\n").unwrap();
    assert_eq!(machine.called(), rest);

    fs::remove_file(machine.calls()).unwrap();
    assert!(demo(&machine, &[]).status.success());
    assert_eq!(machine.called(), ALL, "a finished demo begins anew");
}

#[test]
fn a_failing_step_is_shown_as_typed() {
    let machine = built();
    program(&machine, "step3-principle-engraving", "exit 1");
    let output = demo(&machine, &[]);
    assert_eq!(output.status.code(), Some(1));
    let text = errors(&output);
    assert!(text.contains("exit status: 1: step3-principle-engraving train --config"), "{text}");
}

#[test]
fn prompts_of_the_users_are_taken_and_a_lacking_source_is_named() {
    let machine = built();
    for name in ["openorca/a.jsonl", "openorca/b.jsonl", "sharegpt/s.json", "dolly/d.jsonl"] {
        machine.file(&format!("data/{name}"));
    }
    let data = machine.path("data");
    fs::write(data.join("sharegpt/s.json"), "[]").unwrap();
    let arguments = ["--data", data.to_str().unwrap()];
    let output = demo(&machine, &arguments);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("data/oasst1"), "{}", errors(&output));
    assert_eq!(machine.called(), "");

    machine.file("data/oasst1/o.jsonl");
    let output = demo(&machine, &arguments);
    assert!(output.status.success(), "{}", errors(&output));
    let joined = fs::read_to_string(machine.path("checkout/runs/demo/openorca.jsonl")).unwrap();
    assert_eq!(joined, "2.13.0\n2.13.0\n", "each file ends its last line");
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(shown.contains("--train-data-path runs/demo/openorca.jsonl"), "{shown}");
    assert!(shown.contains(&format!("--dolly {}", data.join("dolly/d.jsonl").display())));
}
