use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use dromedary_llama::{ClosedForm, Llama};
use dromedary_principle_engraving::{
    BatchLimits, CollateConfig, DataConfig, Dataset, DatasetFormat, Error, Example, LearnedTurns,
    MicroBatch, Ranks, Trained, held_out_loss,
};
use dromedary_tokenizer::{ChatOptions, Tokenizer};
use serde::Deserialize;
use serde_json::{Value, json};
use tch::{Kind, Reduction, Tensor};

use crate::{
    gradients::logits_by_one_graph,
    job::{BINARY, Job, stderr, succeeded},
    support,
};

#[derive(Deserialize)]
struct Case {
    model: String,
    format: DatasetFormat,
    learned_turns: LearnedTurns,
    add_eos_to_target: bool,
    train_on_source: bool,
    source_max_len: usize,
    target_max_len: usize,
    chat_template: Option<PathBuf>,
    chat_date: Option<String>,
    /// The data set as a file: the order of keys counts.
    rows: String,
    golden: Vec<Golden>,
}

#[derive(Debug, Deserialize)]
struct Golden {
    ids: Vec<u32>,
    learned: Vec<(usize, usize)>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A tokenizer of the golden values; `None` where it is not at hand and not required.
fn tokenizer_of(model: &str) -> Option<PathBuf> {
    let variable = match model {
        "stories260k" => return Some(support::stories260k()),
        "smollm2" => "DROMEDARY_SMOLLM2",
        _ => "DROMEDARY_TOKENIZERS",
    };
    let required = std::env::var_os("DROMEDARY_REQUIRE_TEST_DATA").is_some_and(|v| v == "1");
    let folder = std::env::var_os(variable).map(PathBuf::from);
    assert!(folder.is_some() || !required, "{variable} is not set");
    folder.map(|folder| if model == "llama" { folder.join("llama.json") } else { folder })
}

fn config(tokenizer: PathBuf, format: Option<DatasetFormat>) -> DataConfig {
    DataConfig {
        tokenizer,
        dataset: PathBuf::new(),
        max_train_samples: None,
        drop_empty: false,
        format,
        meta_prompt_pattern: None,
        chat: ChatOptions::default(),
        collate: CollateConfig {
            source_max_len: 1024,
            target_max_len: 256,
            train_on_source: false,
            add_eos_to_target: true,
            learned_turns: LearnedTurns::Assistant,
        },
    }
}

fn read(rows: &[Value], config: &DataConfig) -> Result<Dataset, Error> {
    read_text(&serde_json::to_string(rows).unwrap(), config)
}

fn read_text(rows: &str, config: &DataConfig) -> Result<Dataset, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.json");
    fs::write(&path, rows).unwrap();
    Dataset::read(&path, None, config, &Tokenizer::open(&config.tokenizer).unwrap())
}

fn read_stories(rows: &[Value]) -> Result<Dataset, Error> {
    read(rows, &config(support::stories260k(), None))
}

#[test]
fn every_row_is_the_tokens_and_the_mask_of_hugging_face() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/formats/formats.json");
    let cases: Vec<Case> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let mut compared = 0;
    for (number, case) in cases.into_iter().enumerate() {
        let Some(tokenizer) = tokenizer_of(&case.model) else { continue };
        let plain = config(tokenizer, Some(case.format));
        let template = case.chat_template.map(|path| root().join(path));
        let config = DataConfig {
            chat: ChatOptions { template, date: case.chat_date },
            collate: CollateConfig {
                source_max_len: case.source_max_len,
                target_max_len: case.target_max_len,
                train_on_source: case.train_on_source,
                add_eos_to_target: case.add_eos_to_target,
                learned_turns: case.learned_turns,
            },
            ..plain
        };
        let dataset = read_text(&case.rows, &config).unwrap();
        let what = format!("case {number}, {} {}", case.model, case.format);
        assert_eq!(dataset.examples.len(), case.golden.len(), "{what}");
        for (example, golden) in dataset.examples.iter().zip(&case.golden) {
            let learned: Vec<_> = golden.learned.iter().map(|&(start, end)| start..end).collect();
            let row = example.example_id;
            assert_eq!(example.input_ids, golden.ids, "{what}, row {row}");
            assert_eq!(example.learned, learned, "{what}, row {row}");
            compared += 1;
        }
        let audit = &dataset.audit;
        let targets: usize = case.golden.iter().flat_map(|g| &g.learned).map(|(a, b)| b - a).sum();
        assert_eq!((audit.format, audit.learned_tokens), (case.format, targets), "{what}");
        assert_eq!(
            audit.tokens(),
            case.golden.iter().map(|golden| golden.ids.len()).sum::<usize>()
        );
    }
    assert!(compared >= 50, "{compared}");
}

/// Loss and norm of its gradients, each row through a graph of its own, with -100 where nothing is learned.
fn straightforward(model: &Llama, trained: &Trained, examples: &[Example]) -> (f64, f64) {
    let mut sum = Tensor::from(0.0_f32);
    let mut count = 0;
    for example in examples {
        let ids: Vec<i64> = example.input_ids.iter().map(|&id| i64::from(id)).collect();
        let is_learned = |at: usize| example.learned.iter().any(|range| range.contains(&at));
        let label = |at: usize| if is_learned(at) { ids[at] } else { -100 };
        let labels: Vec<i64> = (1..ids.len()).map(label).collect();
        count += labels.iter().filter(|&&label| label != -100).count();
        let logits = logits_by_one_graph(model, &MicroBatch::new([example])); // (T, V)
        let logits = logits.narrow(0, 0, labels.len() as i64); // (T - 1, V)
        let labels = Tensor::from_slice(&labels);
        sum += logits.cross_entropy_loss::<Tensor>(&labels, None, Reduction::Sum, -100, 0.0);
    }
    let loss = sum / count as f64;
    let leaves: Vec<_> = (0..trained.num_leaves()).map(|leaf| trained.leaf(leaf)).collect();
    let gradients = Tensor::run_backward(&[&loss], &leaves, false, false);
    let squares: f64 =
        gradients.iter().map(|g| g.square().sum(Kind::Double).double_value(&[])).sum();
    (loss.double_value(&[]), squares.sqrt())
}

/// EOS is one of the tokens that a conversation may have.
#[test]
fn the_limit_of_a_conversation_counts_eos() {
    let rows = [json!({"text": "### Human: Who?### Assistant: Tom."})];
    let whole = read_stories(&rows).unwrap();
    let ids = &whole.examples[0].input_ids;
    for (learned_turns, room) in [(LearnedTurns::Assistant, 1), (LearnedTurns::All, 0)] {
        let mut config = config(support::stories260k(), None);
        config.collate.learned_turns = learned_turns;
        let target_max_len = 3;
        let source_max_len = ids.len() - target_max_len + room - 1;
        config.collate = CollateConfig { source_max_len, target_max_len, ..config.collate };
        let limited = read(&rows, &config).unwrap();
        let longest = limited.examples[0].input_ids.len();
        assert_eq!(
            (longest, limited.examples[0].truncated_right),
            (ids.len() - 1 + room, 1 - room)
        );
        assert_eq!(limited.audit.conversation.longest, longest);
        assert_eq!(limited.audit.conversation.max_len, longest);
        assert_eq!(limited.audit.stop_marks, room);
    }
}

#[test]
fn rows_with_several_answers_train_as_if_each_stood_alone() {
    let rows = [
        json!({"text": "### Human: Who?### Assistant: Tom.### Human: And?### Assistant: Lily too."}),
        json!({"text": "### Human: Hi.### Assistant: Hello.### Human: Bye."}),
        json!({"text": "### Human: A.### Assistant: B.### Human: C.### Assistant: D.### Human: E.### Assistant: F."}),
    ];
    let examples = read_stories(&rows).unwrap().examples;
    assert_eq!(examples.iter().map(|row| row.learned.len()).collect::<Vec<_>>(), [2, 1, 3]);
    let mut model = support::load(&support::stories260k());
    let trained = support::attach_random(&mut model, 4);
    let (loss, norm) = straightforward(&model, &trained, &examples);
    let form = ClosedForm::of(&model, false);
    for limits in [1, 3].map(BatchLimits::of_rows) {
        let held_out =
            held_out_loss(&model, form.as_ref(), &examples, limits, &Ranks::single()).unwrap();
        assert!((held_out - loss).abs() < 1e-5 * loss, "{held_out} {loss}");
    }
    let mut trainer = support::trainer(&model, trained, &examples, 0);
    let step = trainer.train_step().unwrap();
    assert!((step.loss - loss).abs() < 1e-5 * loss, "{} {loss}", step.loss);
    assert!((step.grad_norm - norm).abs() < 1e-4 * norm, "{} {norm}", step.grad_norm);
}

#[test]
fn the_format_is_told_by_the_fields_of_the_first_row() {
    let template = DataConfig {
        chat: ChatOptions { template: Some(template("zephyr")), date: None },
        ..config(support::stories260k(), None)
    };
    let plain = config(support::stories260k(), None);
    let hi = json!([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}]);
    let said = json!([{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Yes."}]);
    for (row, format, config) in [
        (json!({"instruction": "i", "output": "o"}), DatasetFormat::Alpaca, &plain),
        (json!({"prompt": "p", "completion": "c"}), DatasetFormat::SelfInstruct, &plain),
        (json!({"input": "i", "output": "o"}), DatasetFormat::InputOutput, &plain),
        (json!({"text": "<human>: Hi.\n<bot>: Yes."}), DatasetFormat::Chip2, &plain),
        (json!({"text": "### Human: Hi.### Assistant: Yes."}), DatasetFormat::Oasst1, &plain),
        (json!({"chosen": "\n\nHuman: Hi.\n\nAssistant: Yes."}), DatasetFormat::HhRlhf, &plain),
        (json!({"conversations": said}), DatasetFormat::Sharegpt, &template),
        (json!({"messages": hi, "text": "unused"}), DatasetFormat::Chat, &template),
    ] {
        assert_eq!(read(&[row], config).unwrap().audit.format, format);
    }
    let dromedary =
        json!({"instruction": "i", "output": "o", "example_id": 4, "meta_prompt": "# M"});
    let dataset = read_stories(&[dromedary]).unwrap();
    assert_eq!(dataset.audit.format, DatasetFormat::Dromedary);
    assert_eq!(dataset.examples[0].example_id, 4);
    let error = read_stories(&[json!({"question": "q", "text": "t"})]).unwrap_err().to_string();
    assert!(error.contains("`question`, `text`") && error.contains("--dataset-format"), "{error}");
}

fn template(name: &str) -> PathBuf {
    root()
        .join(format!("crates/step3-principle-engraving/tests/data/formats/templates/{name}.jinja"))
}

#[test]
fn a_row_of_another_format_is_named_with_its_fields() {
    let alpaca = json!({"instruction": "i", "output": "o"});
    let error = |rows: &[Value], format: DatasetFormat| {
        let config = config(support::stories260k(), Some(format));
        read(rows, &config).unwrap_err().to_string()
    };
    for (rows, format, wanted) in [
        (
            vec![alpaca.clone(), json!({"prompt": "p", "completion": "c"})],
            DatasetFormat::Alpaca,
            &[
                "rows.json",
                "row 2",
                "alpaca",
                "no `instruction`",
                "`completion`, `prompt`",
                "self-instruct",
            ][..],
        ),
        (
            vec![alpaca.clone(), json!({"instruction": ["i"], "output": "o"})],
            DatasetFormat::Alpaca,
            &["row 2", "alpaca", "expected a string"],
        ),
        (
            vec![alpaca],
            DatasetFormat::Dromedary,
            &["row 1", "dromedary", "no `example_id`", "alpaca"],
        ),
        (
            vec![json!({"text": "<human>: a\n<bot>: b\n<human>: c\n<bot>: d"})],
            DatasetFormat::Chip2,
            &["row 1", "chip2", "2 times", "<bot>: "],
        ),
        (
            vec![json!({"text": "Hello."})],
            DatasetFormat::Oasst1,
            &["row 1", "oasst1", "### Human:"],
        ),
        (vec![json!({"chosen": "Hello."})], DatasetFormat::HhRlhf, &["row 1", "hh-rlhf", "Human:"]),
        (vec![json!(7)], DatasetFormat::Oasst1, &["rows.json", "row 1"]),
    ] {
        let error = error(&rows, format);
        assert!(wanted.iter().all(|part| error.contains(part)), "{error}");
    }
}

fn chat_error(rows: &[Value], name: &str) -> String {
    let config = DataConfig {
        chat: ChatOptions { template: Some(template(name)), date: None },
        ..config(support::stories260k(), None)
    };
    read(rows, &config).unwrap_err().to_string()
}

#[test]
fn what_a_chat_template_cannot_write_is_named() {
    let user = json!({"role": "user", "content": "Hi."});
    let answer = json!({"role": "assistant", "content": "Yes."});
    let good = json!({"messages": [user, answer]});
    let twice = json!({"messages": [user, user, answer]});
    let error = chat_error(&[good.clone(), twice], "llama2");
    assert!(error.contains("row 2") && error.contains("take turns"), "{error}");
    let nobody = json!({"messages": [{"content": "Hi."}]});
    let error = chat_error(&[good, nobody], "llama2");
    assert!(error.contains("row 2") && error.contains("message 1 has no role"), "{error}");
    let stranger = json!({"conversations": [{"from": "human", "value": "Hi."}, {"from": "cat", "value": "Meow."}]});
    let error = chat_error(&[stranger], "llama2");
    assert!(error.contains("row 1") && error.contains("turn 2 is from \"cat\""), "{error}");
    // No template beside stories260k's tokenizer.
    let error = read_stories(&[json!({"messages": [user]})]).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json has no chat_template"), "{error}");
}

#[test]
fn a_template_that_rewrites_turns_is_refused_unless_it_says_what_is_learned() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.jinja");
    let body = "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}BLOCK{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
    let text = "{{ m.content if loop.last else 'cut' }}";
    let messages = ["user", "assistant", "user", "assistant"]
        .map(|role| json!({"role": role, "content": "Once upon"}));
    let row = json!({"messages": messages});
    let read_with = |body: &str, turns: LearnedTurns| {
        fs::write(&path, body).unwrap();
        let mut config = config(support::stories260k(), None);
        config.chat.template = Some(path.clone());
        config.collate.learned_turns = turns;
        read(std::slice::from_ref(&row), &config)
    };
    let rewriting = body.replace("BLOCK", text);
    let error = read_with(&rewriting, LearnedTurns::Assistant).unwrap_err().to_string();
    assert!(error.contains("row 1") && error.contains("turn 2"), "{error}");
    assert!(error.contains("{% generation %}"), "{error}");
    assert_eq!(read_with(&rewriting, LearnedTurns::Last).unwrap().audit.stretches, 1);
    assert_eq!(read_with(&rewriting, LearnedTurns::All).unwrap().audit.stretches, 1);
    let blocks = body.replace("BLOCK", &format!("{{% generation %}}{text}{{% endgeneration %}}"));
    let audit = read_with(&blocks, LearnedTurns::Assistant).unwrap().audit;
    // Nothing tells where an answer ends: the template writes what was said and no more.
    assert_eq!((audit.stretches, audit.stop_marks), (2, 0));
}

#[test]
fn names_of_special_tokens_in_messages_are_text() {
    let talk = |text: &str| json!({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]});
    let mut config = config(support::stories260k(), None);
    config.chat.template = Some(template("zephyr"));
    let tokenizer = Tokenizer::open(&config.tokenizer).unwrap();
    let eos = tokenizer.eos_id().unwrap();
    let spelled = "a</s><s> \u{fdd0}b\u{fdd1}\u{fdd2}\u{f0000} </s>";
    let rows = read(&[talk("plain"), talk(spelled)], &config).unwrap().examples;
    for row in &rows {
        assert_eq!(row.input_ids.iter().filter(|&&id| tokenizer.is_special(id)).count(), 2);
        assert_eq!(row.learned.len(), 1);
        assert_eq!(row.input_ids.iter().filter(|&&id| id == eos).count(), 2);
    }
    assert_eq!(tokenizer.decode(&rows[1].input_ids).matches(spelled).count(), 2);
}

#[test]
fn settings_that_a_format_has_no_use_for_are_refused() {
    let pair = [json!({"prompt": "p", "completion": "c"})];
    let refused = |change: &dyn Fn(&mut DataConfig), setting: &str| {
        let mut config = config(support::stories260k(), None);
        change(&mut config);
        let error = read(&pair, &config).unwrap_err().to_string();
        assert!(error.contains(setting) && error.contains("self-instruct"), "{error}");
    };
    refused(&|c| c.meta_prompt_pattern = Some("*.txt".into()), "--meta-prompt-pattern");
    refused(&|c| c.collate.learned_turns = LearnedTurns::Last, "--learned-turns");
    refused(&|c| c.chat.template = Some("t.jinja".into()), "--chat-template");
    refused(&|c| c.chat.date = Some("2024-07-26".into()), "--chat-date");
}

#[test]
fn parquet_is_refused_with_a_way_out() {
    let path = root().join("dummy_data/openorca.parquet");
    let config = config(support::stories260k(), None);
    let tokenizer = Tokenizer::open(&config.tokenizer).unwrap();
    let error = Dataset::read(&path, None, &config, &tokenizer).unwrap_err().to_string();
    assert!(error.contains("openorca.parquet is parquet") && error.contains("to_json"), "{error}");
}

#[test]
fn conversations_without_an_answer_are_named_and_may_be_dropped() {
    let rows = [
        json!({"text": "### Human: Hi.### Assistant: Yes."}),
        json!({"text": "### Human: Anybody there?"}),
    ];
    let dataset = read_stories(&rows).unwrap();
    assert_eq!(dataset.audit.without_target, [(2, 2)]);
    assert!(dataset.check(false).unwrap_err().to_string().contains("row 2"));
    dataset.check(true).unwrap();
}

fn run(job: &Job, command: &str, rows: &[Value], flags: &[&str]) -> Output {
    let path = job.path("rows.json");
    fs::write(&path, serde_json::to_vec(rows).unwrap()).unwrap();
    Command::new(BINARY)
        .arg(command)
        .arg("--checkpoint")
        .arg(support::stories260k())
        .arg("--dataset")
        .arg(path)
        .args(flags)
        .output()
        .unwrap()
}

fn inspected(rows: &[Value], flags: &[&str]) -> String {
    let output = run(&Job::new(1), "inspect", rows, flags);
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    succeeded(output);
    text
}

#[test]
fn inspect_shows_each_answer_between_marks() {
    let text = inspected(
        &[json!({"text": "### Human: Who?### Assistant: Tom.### Human: And?### Assistant: Lily."})],
        &["--dataset_format", "oasst1"],
    );
    let shown = "[<s>]### Human: Who?### Assistant:>>> Tom.### Human:<<< And?### Assistant:>>> Lily.[</s>]<<<\n";
    assert!(text.contains(shown), "{text}");
    assert!(text.contains("1  oasst1") && text.contains(", in 2 stretches"), "{text}");
    assert!(text.contains("100.0 % of the targets end in one"), "{text}");

    let text = inspected(
        &[json!({"instruction": "Name a river.", "output": "The Rhine."})],
        &["--dataset-format", "alpaca"],
    );
    assert!(
        text.contains("### Instruction:\nName a river.\n\n### Response: >>>The Rhine.[</s>]<<<"),
        "{text}"
    );

    let template = root().join("prompts/dromedary_chat_template.jinja");
    let talk = [
        json!({"from": "system", "value": "# Dromedary"}),
        json!({"from": "human", "value": "Who?"}),
        json!({"from": "gpt", "value": "Tom."}),
        json!({"from": "human", "value": "And?"}),
        json!({"from": "gpt", "value": "Lily."}),
    ];
    let flags = ["--chat-template", template.to_str().unwrap(), "--learned-turns", "last"];
    let text = inspected(&[json!({"conversations": talk})], &flags);
    let shown = "# Dromedary\n\n### User\nWho?\n\n### Dromedary\nTom.\n\n### User\nAnd?\n\n### Dromedary>>>\nLily.\n\n### User\n<<<";
    assert!(text.contains(shown), "{text}");
    assert!(text.contains("100.0 % of the targets end in one"), "{text}");
}

/// What `plan --json` prints.
fn planned(job: &Job, flags: &[&str]) -> Value {
    let mut command = Command::new(BINARY);
    command.arg("plan").arg("--checkpoint").arg(support::stories260k().join("config.json"));
    let output = command.args(["--gflops", "10", "--json"]).args(flags).current_dir(&job.dir);
    let output = output.output().unwrap();
    let plan = serde_json::from_slice(&output.stdout);
    succeeded(output);
    plan.unwrap()
}

#[test]
fn a_plan_counts_the_rows_of_a_data_set() {
    let job = Job::new(1);
    let rows = [
        json!({"text": "### Human: Who?### Assistant: Tom.### Human: And?### Assistant: Lily too."}),
        json!({"text": "### Human: Hi.### Assistant: Hello."}),
    ];
    fs::write(job.path("rows.json"), serde_json::to_vec(&rows).unwrap()).unwrap();
    let dataset = read_stories(&rows).unwrap();
    let lengths: Vec<usize> = dataset.examples.iter().map(|row| row.input_ids.len()).collect();
    let tokens: usize = lengths.iter().sum();
    let counted = ["--dataset", "rows.json", "--dataset-format", "oasst1"];
    let plan = planned(&job, &counted);
    let learned = dataset.audit.learned_tokens as f64 / tokens as f64;
    let [mean, longest, learned] =
        [tokens.div_ceil(2).to_string(), lengths[0].to_string(), learned.to_string()];
    let told =
        ["--rows", "2", "--row-tokens", &mean, "--max-row-tokens", &longest, "--learned", &learned];
    assert_eq!(plan, planned(&job, &told));
    let last = planned(&job, &[&counted[..], &["--learned-turns", "last"]].concat());
    assert!(last["flops"].as_f64().unwrap() < plan["flops"].as_f64().unwrap());
    let more = planned(&job, &[&counted[..], &["--rows", "200"]].concat());
    assert_eq!(more["tokens"], json!(200 * tokens.div_ceil(2)));
}

#[test]
fn a_run_on_conversations_learns_holds_rows_out_and_says_how_it_was_trained() {
    let job = Job::new(1);
    let rows: Vec<Value> = (0..12)
        .map(|n| {
            let ask = |what: &str| json!({"from": "human", "value": format!("{what} {n}?")});
            let tell = |what: &str| json!({"from": "gpt", "value": format!("Once upon a time there was {what}.")});
            json!({"conversations": [ask("Who"), tell("a cat"), ask("And"), tell("a dog")]})
        })
        .collect();
    let template = root().join("prompts/dromedary_chat_template.jinja");
    let out = job.path("out");
    let flags = [
        "--output-dir",
        out.to_str().unwrap(),
        "--dataset-format",
        "sharegpt",
        "--chat-template",
        template.to_str().unwrap(),
        "--eval-dataset-size",
        "3",
        "--lora-r",
        "4",
        "--learning-rate",
        "1e-2",
        "--gradient-accumulation-steps",
        "3",
        "--num-train-epochs",
        "6",
        "--threads",
        "1",
        "--logging-steps",
        "1",
    ];
    let output = run(&job, "train", &rows, &flags);
    let log = stderr(&output);
    succeeded(output);
    let lines = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let loss = |line: &Value| line["loss"].as_f64().unwrap();
    assert!(loss(&lines[lines.len() - 1]) < 0.7 * loss(&lines[0]), "{log}");
    assert!(lines.last().unwrap()["eval_loss"].as_f64().unwrap() < loss(&lines[0]));
    let card = fs::read_to_string(out.join("adapter/README.md")).unwrap();
    assert!(card.contains("| format of the rows | sharegpt |"), "{card}");
    assert!(
        card.contains("chat template") && card.contains("dromedary_chat_template.jinja"),
        "{card}"
    );
}
