use std::{
    fs,
    process::{Command, Output},
};

use serde_json::{Value, json};

use crate::{
    job::{BINARY, Job, stderr, succeeded},
    support::stories260k,
};

fn row(example_id: u64, output: &str) -> Value {
    json!({"example_id": example_id, "instruction": "Hi.", "input": "", "output": output})
}

fn inspect(job: &Job, rows: &[Value], flags: &[&str]) -> Output {
    let path = job.path("rows.json");
    fs::write(&path, serde_json::to_vec(rows).unwrap()).unwrap();
    Command::new(BINARY)
        .arg("inspect")
        .arg("--checkpoint")
        .arg(stories260k())
        .arg("--dataset")
        .arg(path)
        .arg("--meta-prompt-pattern")
        .arg(job.path("dromedary_*prompt_distill.txt"))
        .args(flags)
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The number in the line that begins with `name`, and what stands behind it.
fn counted<'a>(text: &'a str, name: &str) -> (usize, &'a str) {
    let line = text.lines().find_map(|line| line.trim().strip_prefix(name));
    let line = line.unwrap_or_else(|| panic!("no {name}: {text}")).trim();
    let (number, rest) = line.split_once(' ').unwrap_or((line, ""));
    (number.parse().unwrap(), rest.trim())
}

#[test]
fn rows_tokens_and_what_is_learned_are_shown() {
    let job = Job::new(1);
    let rows = [
        row(1, "Once upon a time.\n\n### User\n"),
        row(2, "Once upon a time there was"),
        json!({"example_id": 3, "instruction": "Hi.", "input": "", "output": "The end.\n\n### User\n",
            "meta_prompt": "# Own"}),
    ];
    let output = inspect(&job, &rows, &["--add-eos-to-target", "false"]);
    let text = stdout(&output);
    assert_eq!(stderr(&output), "");
    succeeded(output);
    assert_eq!(counted(&text, "rows").0, 3);
    assert_eq!(counted(&text, "without target").0, 0);
    assert_eq!(counted(&text, "meta prompt").0, 2);
    assert!(text.contains("the row's own") && text.contains("dromedary_a_prompt_distill.txt"));
    let [all, source, target, learned] =
        ["tokens", "source", "target", "learned"].map(|name| counted(&text, name).0);
    assert_eq!((all, learned), (source + target, target));
    assert_eq!(counted(&text, "stop marks"), (2, "66.7 % of the targets end in one"));

    // Off a terminal the learned stretch stands between marks, without a color.
    assert!(!text.contains('\u{1b}'), "{text}");
    let shown =
        "[<s>]# Dromedary\n\n### User\nHi.\n\n### Dromedary>>>\nOnce upon a time there was<<<";
    assert!(text.contains(shown), "{text}");
    assert!(text.contains("[<s>]# Own\nHi.\n\n### Dromedary>>>\nThe end."), "{text}");
    assert_eq!(text.matches("example_id").count(), 3);
    let counts: usize = text.lines().filter(|line| line.contains(" to ")).count();
    assert!(counts >= 1, "{text}");
}

#[test]
fn eos_and_what_is_cut_off_are_shown() {
    let job = Job::new(1);
    let rows = [row(1, "Once upon a time there was a girl."), row(2, "Yes.")];
    let output = inspect(&job, &rows, &["--source-max-len", "12", "--target-max-len", "8"]);
    let text = stdout(&output);
    succeeded(output);
    assert!(text.contains("Yes.[</s>]<<<"), "{text}");
    assert_eq!(counted(&text, "stop marks").0, 1);
    assert_eq!(counted(&text, "source").1, "longest 12 of 12");
    assert_eq!(counted(&text, "target").1, "longest 8 of 8");
    let cut: Vec<&str> = text.lines().filter(|line| line.contains("tokens cut off")).collect();
    assert_eq!(cut.len(), 3, "{text}");
    let rows_cut = |side: &str| {
        let line = text.lines().find(|line| line.contains(side)).unwrap().trim();
        line.trim_start_matches("truncated").trim().split_once(' ').unwrap().0.to_owned()
    };
    assert_eq!((rows_cut("on the left"), rows_cut("on the right")), ("2".into(), "1".into()));
}

#[test]
fn rows_without_a_target_are_named_and_refused_unless_dropped() {
    let job = Job::new(1);
    let rows = [row(7, "Yes."), row(8, ""), row(9, "  \n")];
    let refused = inspect(&job, &rows, &[]);
    let text = stderr(&refused);
    assert_eq!(refused.status.code(), Some(1), "{text}");
    assert!(
        text.contains("2 rows have no target") && text.contains("row 2 (example_id 8)"),
        "{text}"
    );
    assert!(text.contains("--drop-empty"), "{text}");
    let shown = stdout(&refused);
    assert_eq!(
        counted(&shown, "without target"),
        (2, "row 2 (example_id 8), row 3 (example_id 9)")
    );

    let dropped = inspect(&job, &rows, &["--drop-empty"]);
    assert_eq!(counted(&stdout(&dropped), "rows").0, 1);
    succeeded(dropped);
    let none = inspect(&job, &rows[1..], &["--drop-empty"]);
    assert_eq!(none.status.code(), Some(1));
    assert!(stderr(&none).contains("no row to train on"), "{}", stderr(&none));
}

#[test]
fn texts_cannot_command_the_terminal() {
    let job = Job::new(1);
    let output = inspect(&job, &[row(1, "a\u{1b}[2Jb\u{7}c")], &[]);
    let text = stdout(&output);
    succeeded(output);
    assert!(!text.contains('\u{1b}') && !text.contains('\u{7}'), "{text}");
    assert!(text.contains("\\u{1b}[2Jb"), "{text}");
}

#[test]
fn a_row_needs_a_meta_prompt_from_somewhere() {
    let job = Job::new(1);
    let run = |rows: &[Value]| {
        let path = job.path("own.json");
        fs::write(&path, serde_json::to_vec(rows).unwrap()).unwrap();
        let mut command = Command::new(BINARY);
        command.arg("inspect").arg("--checkpoint").arg(stories260k()).arg("--dataset").arg(path);
        command.output().unwrap()
    };
    let own = json!({"example_id": 1, "instruction": "i", "output": "o", "meta_prompt": "# Own"});
    succeeded(run(std::slice::from_ref(&own)));
    let refused = run(&[own, row(2, "o")]);
    let text = stderr(&refused);
    assert_eq!(refused.status.code(), Some(1), "{text}");
    assert!(
        text.contains("row 2 (example_id 2)") && text.contains("--meta-prompt-pattern"),
        "{text}"
    );
}
