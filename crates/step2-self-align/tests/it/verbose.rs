use std::fs;
use std::path::Path;

use dromedary_command::StopFlag;
use dromedary_records::{AlignedResponse, FinishReason, TrainingRow, read_rows};
use dromedary_self_align::{Filter, Form, GenerateArgs, MetaPrompt, Rule, Template, Verdict};

use crate::support::{folder_of, generate_args, generate_with, lines, run_to, write_rows};

const THOROUGH: &str = "A kettle heats water with the current of the mains. Inside stands a coil of \
    metal that resists the current and grows hot.\n\n1. The water around the coil warms first and \
    rises, so that colder water flows in below.\n2. When steam reaches the switch at the handle, a \
    strip of two metals bends and breaks the circuit.\n\nIn short: a coil, moving water, and a strip \
    that knows when to stop.";

fn row(instruction: &str, answer: &str) -> AlignedResponse {
    AlignedResponse {
        output: format!("{answer}\n\n### User"),
        ..crate::support::row(instruction, answer)
    }
}

fn filter() -> Filter {
    Filter::new(None, &MetaPrompt::open_as(Form::Verbose, None).unwrap())
}

fn kept(row: &AlignedResponse) -> String {
    match filter().judge(row) {
        Verdict::Kept(kept) => kept.output,
        verdict => panic!("{verdict:?}: {:?}", row.output),
    }
}

fn dropped(row: &AlignedResponse) -> Rule {
    match filter().judge(row) {
        Verdict::Dropped(rule) => rule,
        verdict => panic!("{verdict:?}"),
    }
}

#[test]
fn a_prompt_stands_behind_the_verbose_text_and_before_its_mark() {
    let meta_prompt = MetaPrompt::open_as(Form::Verbose, None).unwrap();
    let template = Template::new(&meta_prompt);
    let text = template.fill("Why?", "");
    assert!(text.starts_with("# Dromedary\n\n## System Overview\n\n"), "{text}");
    assert!(text.ends_with("\n\n### User\nWhy?\n\n### Dromedary (extensive)\n"), "{text}");
    let text = template.fill("Sum up.", "A text.");
    assert!(text.ends_with("\n### User\nSum up.\n\nA text.\n\n### Dromedary (extensive)\n"));
}

#[test]
fn a_thorough_answer_is_kept_as_a_row_of_training() {
    assert_eq!(
        kept(&row("How does a kettle work?", THOROUGH)),
        format!("{THOROUGH}\n\n### User\n")
    );
    // The model may open its own next turn, with or without the remark.
    for turn in ["### Dromedary", "### Dromedary (extensive)\nAnd"] {
        let mut row = row("How does a kettle work?", THOROUGH);
        row.output = format!("{THOROUGH}\n\n{turn}");
        row.finish_reason = FinishReason::Length;
        assert_eq!(kept(&row), format!("{THOROUGH}\n\n### User\n"), "{turn}");
    }
}

#[test]
fn each_verbose_rule_drops_what_it_is_for() {
    assert_eq!(dropped(&row("x", " \n")), Rule::Empty);
    assert_eq!(dropped(&row("x", &"You can take a walk in the park. ".repeat(9))), Rule::Loop);
    let mut cut = row("x", THOROUGH);
    cut.output = THOROUGH.to_owned();
    cut.finish_reason = FinishReason::Length;
    assert_eq!(dropped(&cut), Rule::Truncated);
    assert_eq!(dropped(&row("How does a kettle work?", "It heats water.")), Rule::Short);
    assert_eq!(dropped(&row(THOROUGH, THOROUGH)), Rule::Echo);
    let marked = THOROUGH.replace("\n2. When", "\n### User\n2. When");
    assert_eq!(dropped(&row("x", &marked)), Rule::TurnMark);
    let meta_prompt = MetaPrompt::open_as(Form::Verbose, None).unwrap();
    let own = meta_prompt.text.split("### Dromedary (extensive)\n").nth(1).unwrap();
    let own = own.split("\n\n### User").next().unwrap();
    assert_eq!(dropped(&row("Who are you?", own)), Rule::Leakage);
    // Neither thoughts nor an affirmation are asked for, and Watson is somebody else.
    let holmes = format!("{THOROUGH} Watson wrote that down.");
    assert_eq!(kept(&row("x", &holmes)), format!("{holmes}\n\n### User\n"));
}

#[test]
fn what_comes_near_a_verbose_rule_is_kept() {
    let stays = |instruction: &str, answer: String| {
        assert_eq!(kept(&row(instruction, &answer)), format!("{answer}\n\n### User\n"));
    };
    let refrain = "Heat rises and water follows.";
    stays("x", format!("{refrain} {THOROUGH} {refrain}"));
    let question = "How does a kettle bring its water to the boil?";
    stays(question, format!("You ask: \"{question}\" {THOROUGH}"));
    stays("x", THOROUGH.replace("In short:", "A line like ### User is a heading. In short:"));
    let meta_prompt = MetaPrompt::open_as(Form::Verbose, None).unwrap();
    let own = meta_prompt.text.split("### Dromedary (extensive)\n").nth(1).unwrap();
    let phrase: Vec<&str> = own.split_whitespace().take(6).collect();
    stays("x", format!("{THOROUGH} {}", phrase.join(" ")));
    // Ended by the model itself, and cut behind the mark of the next turn.
    let mut complete = row("x", THOROUGH);
    complete.output = THOROUGH.to_owned();
    complete.finish_reason = FinishReason::Eos;
    assert_eq!(kept(&complete), format!("{THOROUGH}\n\n### User\n"));
}

#[test]
fn short_but_complete_answers_at_the_border() {
    let words = |count: usize| -> String {
        (0..count).map(|n| format!("word{n}")).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(dropped(&row("x", &words(39))), Rule::Short);
    kept(&row("x", &words(40)));
}

#[test]
fn verbose_rows_are_generated_continued_and_not_mixed_with_others() {
    let folder = folder_of(&["Once upon a time", "Tim had a dog"]);
    let folder = folder.path();
    fs::write(
        folder.join("long.txt"),
        "Be long.\n\n### User\nHi.\n\n### Ada (long)\nHello.\n\n### User\n",
    )
    .unwrap();
    let args = || GenerateArgs {
        template: Some(Form::Verbose),
        meta_prompt_file: Some(folder.join("long.txt")),
        max_seq_len: Some(150),
        ..generate_args(folder)
    };
    let report = generate_with(args(), &StopFlag::default()).unwrap();
    assert_eq!(report.answered, 2);
    assert_eq!(generate_with(args(), &StopFlag::default()).unwrap().done_before, 2);
    let settings = fs::read_to_string(folder.join("aligned.jsonl.settings.json")).unwrap();
    assert!(
        settings.contains("### Ada (long)") && settings.contains("\\n\\n### User"),
        "{settings}"
    );
    let other = GenerateArgs { template: None, ..generate_args(folder) };
    assert!(generate_with(other, &StopFlag::default()).is_err());
}

fn merge(folder: &Path, more: &str, code: i32) -> String {
    let command = format!(
        "merge-and-filter --template verbose --data-file-pattern verbose.jsonl --allow-unfinished \
         --output-file verbose_sft.json {more}"
    );
    run_to(code, folder, &command)
}

#[test]
fn verbose_rows_become_training_rows() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_rows(
        &folder.join("verbose.jsonl"),
        &[row("How does a kettle work?", THOROUGH), row("Why?", "Because.")],
    );
    merge(folder, "", 0);
    let rows: Vec<TrainingRow> =
        read_rows(folder.join("verbose_sft.json")).unwrap().map(Result::unwrap).collect();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].output, format!("{THOROUGH}\n\n### User\n"));
    assert_eq!(lines(&folder.join("dropped.jsonl"))[0]["rule"], "short");
    let message = merge(folder, "--compat dromedary", 2);
    assert!(message.contains("not of verbose ones"), "{message}");
}
