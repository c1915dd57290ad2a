use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use dromedary_command::StopFlag;
use dromedary_prompt_cleaning::{
    AggregateArgs, AggregateConfig, Compat, Error, JudgeArgs, MergeArgs, MergeConfig, Report,
    Result, Session, SharedArgs, SubsampleArgs, SubsampleConfig, aggregate_sharegpt,
    clean_and_merge, subsample_openorca,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::support::{
    Folder, array, assert_sums, following, instruction_set, instructions, quiet, small_tokenizer,
};

fn subsample(args: SubsampleArgs) -> Result<Report> {
    let judge = JudgeArgs { tokenizer: Some(small_tokenizer()), ..args.judge };
    let args = SubsampleArgs { judge, ..args };
    let report = subsample_openorca(&SubsampleConfig::try_from(args).unwrap(), &quiet())?;
    assert_sums(&report);
    Ok(report)
}

fn sample_of(input: &Path, output: &Path) -> SubsampleArgs {
    SubsampleArgs {
        train_data_path: vec![input.to_owned()],
        output_path: Some(output.to_owned()),
        ..SubsampleArgs::default()
    }
}

fn questions(stratum: &str, texts: &[&str]) -> Vec<Value> {
    texts.iter().map(|text| json!({"id": format!("{stratum}.1"), "question": text})).collect()
}

fn dropped(report: &Report, source: &str, reason: &str) -> u64 {
    report.sources[source].dropped.get(reason).copied().unwrap_or(0)
}

#[test]
fn the_corrected_sample_filters_then_compares_normalised_texts() {
    let folder = Folder::new();
    let long = "word ".repeat(300);
    let input = folder.lines(
        "o.jsonl",
        &questions(
            "flan",
            &["  What is rain? ", "what is  RAIN?", "Premise: no", "On the premises.", &long, " "],
        ),
    );
    let output = folder.path("out.json");
    let report = subsample(sample_of(&input, &output)).unwrap();
    assert_eq!(instruction_set(&output), ["On the premises.", "What is rain?"]);
    for reason in ["duplicate", "nli_task", "too_long", "empty"] {
        assert_eq!(dropped(&report, "openorca/flan", reason), 1, "{reason}");
    }
    // Two texts have white space at their ends, and so have the long and the empty one.
    assert_eq!(report.sources["openorca/flan"].edits["whitespace"], 3);
}

#[test]
fn dromedarys_sample_compares_exact_texts() {
    let folder = Folder::new();
    let texts = ["What is rain?", "what is rain?", "What is rain?\n", "On the premises.", "", " "];
    let input = folder.lines("o.jsonl", &questions("t0", &texts));
    let output = folder.path("out.json");
    let args =
        SubsampleArgs { shared: following(Some(Compat::Dromedary)), ..sample_of(&input, &output) };
    let report = subsample(args).unwrap();
    assert_eq!(instruction_set(&output), ["", "What is rain?", "what is rain?"]);
    assert_eq!(dropped(&report, "openorca/t0", "duplicate"), 2);
    assert_eq!(dropped(&report, "openorca/t0", "nli_task"), 1);
}

#[test]
fn of_equal_questions_the_first_stratum_wins_wherever_it_stands() {
    let folder = Folder::new();
    let rows = ["cot", "flan", "niv", "t0"].map(|stratum| questions(stratum, &["same", "premise"]));
    let input = folder.lines("o.jsonl", &rows.concat());
    for compat in [None, Some(Compat::Dromedary)] {
        let output = folder.path("out.json");
        let report =
            subsample(SubsampleArgs { shared: following(compat), ..sample_of(&input, &output) })
                .unwrap();
        assert_eq!(report.sources["openorca/niv"].kept, 1);
        assert_eq!(report.rows_out, 1);
        let nli = |source| dropped(&report, source, "nli_task");
        let of_others = nli("openorca/cot") + nli("openorca/flan") + nli("openorca/t0");
        assert_eq!(nli("openorca/niv"), 1);
        // Dromedary compares before it filters, so it drops the others as duplicates.
        assert_eq!(of_others, if compat.is_some() { 0 } else { 3 });
    }
}

#[test]
fn the_cap_holds_for_each_stratum_and_draws_by_seed() {
    let folder = Folder::new();
    let rows: Vec<Value> = (0..300)
        .map(|n| json!({"id": format!("{}.{n}", ["niv", "cot"][n % 2]), "question": format!("q {n}")}))
        .collect();
    let input = folder.lines("o.jsonl", &rows);
    let sample = |seed, cap, name: &str| {
        let output = folder.path(name);
        let report = subsample(SubsampleArgs {
            judge: JudgeArgs { seed: Some(seed), ..JudgeArgs::default() },
            max_samples_per_dataset: Some(cap),
            ..sample_of(&input, &output)
        });
        (report.unwrap(), instructions(&output))
    };
    let (report, ten) = sample(1, 10, "a.json");
    assert_eq!(ten.len(), 20);
    for source in ["openorca/niv", "openorca/cot"] {
        assert_eq!(report.sources[source].kept, 10);
        assert_eq!(dropped(&report, source, "over_cap"), 140);
    }
    let (_, other_seed) = sample(2, 10, "b.json");
    assert_ne!(ten, other_seed);
    // A larger cap keeps what a smaller one kept.
    let (_, twenty) = sample(1, 20, "c.json");
    let twenty: BTreeSet<String> = twenty.into_iter().collect();
    assert!(ten.iter().all(|question| twenty.contains(question)));
    let (_, all) = sample(1, 1000, "d.json");
    assert_eq!(all.len(), 300);
    assert_ne!(all, rows.iter().map(|row| row["question"].as_str().unwrap()).collect::<Vec<_>>());
}

#[test]
fn the_order_of_the_rows_and_the_threads_change_nothing() {
    let folder = Folder::new();
    let mut rows: Vec<Value> = (0..9000)
        .map(|n| json!({"id": format!("flan.{n}"), "question": format!("question number {}", n % 8000)}))
        .collect();
    let input = folder.lines("o.jsonl", &rows);
    rows.reverse();
    let reversed = folder.lines("r.jsonl", &rows);
    let bytes = |input: &Path, threads| {
        let output = folder.path("out.json");
        subsample(SubsampleArgs {
            shared: SharedArgs { threads: Some(threads), ..SharedArgs::default() },
            max_samples_per_dataset: Some(5000),
            ..sample_of(input, &output)
        })
        .unwrap();
        fs::read(output).unwrap()
    };
    let once = bytes(&input, 1);
    assert_eq!(once, bytes(&input, 2));
    assert_eq!(once, bytes(&reversed, 2));
}

#[test]
fn rows_beyond_memory_come_back_in_the_same_order() {
    let folder = Folder::new();
    // 40 MB of text: more than the buckets hold in memory.
    let filler = "x y ".repeat(500);
    let text: String = (0..20_000)
        .map(|n| format!("{}\n", json!({"instruction": format!("{n} {filler}")})))
        .collect();
    let input = folder.write("s.jsonl", text);
    let output = folder.path("out.jsonl");
    let args = MergeArgs {
        sharegpt_prompt_path: vec![input],
        output_file: Some(output.clone()),
        judge: JudgeArgs { max_prompt_len: Some(100_000), ..JudgeArgs::default() },
        ..MergeArgs::default()
    };
    let report = clean_and_merge(&MergeConfig::try_from(args).unwrap(), &quiet()).unwrap();
    assert_eq!(report.rows_out, 20_000);
    let written = fs::read_to_string(&output).unwrap();
    let numbers: Vec<u64> = written
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|row| row["instruction"].as_str().unwrap().split(' ').next().unwrap().parse().unwrap())
        .collect();
    let set: BTreeSet<u64> = numbers.iter().copied().collect();
    assert_eq!(set.len(), 20_000);
    assert!(!numbers.is_sorted());
    assert_eq!(folder.names(), ["out.jsonl", "s.jsonl"]);
}

fn aggregate(files: &[PathBuf], output: &Path, compat: Option<Compat>) -> Result<Report> {
    let args = AggregateArgs {
        data_files: files.to_vec(),
        output_file: Some(output.to_owned()),
        shared: following(compat),
    };
    let report = aggregate_sharegpt(&AggregateConfig::try_from(args).unwrap(), &quiet())?;
    assert_sums(&report);
    Ok(report)
}

#[test]
fn sharegpt_keeps_the_first_of_equal_prompts_over_all_files() {
    let folder = Folder::new();
    let conversation = |text: &str| json!({"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": ""}]});
    let one = folder.write(
        "a.json",
        json!([conversation("B"), conversation("a"), conversation("B"), conversation(" ")])
            .to_string(),
    );
    let two = folder.lines("b.jsonl", &[conversation("A"), json!({"text": "<human>: c <bot>: x"})]);
    let files = [one, two];
    let output = folder.path("out.json");
    let report = aggregate(&files, &output, None).unwrap();
    assert_eq!(instructions(&output), ["B", "a", "c"]);
    assert_eq!(dropped(&report, "sharegpt", "duplicate"), 2);
    assert_eq!(dropped(&report, "sharegpt", "empty"), 1);
    aggregate(&files, &output, Some(Compat::Dromedary)).unwrap();
    assert_eq!(instructions(&output), ["B", "a", " ", "A", "c"]);
}

/// The model is read where the other file is not there, and measures the same lengths.
#[test]
fn a_sentencepiece_model_measures_as_the_tokenizer_json_made_of_it() {
    let folder = Folder::new();
    let texts: Vec<String> = (1..40).map(|words| "Why, Tim? ".repeat(words)).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let input = folder.lines("o.jsonl", &questions("flan", &texts));
    fs::create_dir(folder.path("model")).unwrap();
    fs::copy(small_tokenizer().with_extension("model"), folder.path("model/tokenizer.model"))
        .unwrap();
    let sample = |tokenizer: PathBuf, output: &str| {
        let output = folder.path(output);
        let judge = JudgeArgs { tokenizer: Some(tokenizer), ..JudgeArgs::default() };
        let args = SubsampleArgs { judge, ..sample_of(&input, &output) };
        let config = SubsampleConfig::try_from(args).unwrap();
        let report = subsample_openorca(&config, &quiet()).unwrap();
        (instruction_set(&output), dropped(&report, "openorca/flan", "too_long"))
    };
    let (kept, too_long) = sample(small_tokenizer(), "json.json");
    assert!(!kept.is_empty() && too_long > 0);
    assert_eq!(sample(folder.path("model"), "model.json"), (kept, too_long));
}

fn merge(args: MergeArgs) -> Result<Report> {
    let judge = JudgeArgs { tokenizer: Some(small_tokenizer()), ..args.judge };
    let args = MergeArgs { judge, ..args };
    let report = clean_and_merge(&MergeConfig::try_from(args).unwrap(), &quiet())?;
    assert_sums(&report);
    Ok(report)
}

/// One file of each source, with prompts that several of them share.
fn four_sources(folder: &Folder, output: &str) -> MergeArgs {
    let prompt = |text: &str| json!({"instruction": text, "input": "", "output": ""});
    let dolly = |text: &str| json!({"instruction": text, "context": "", "category": "open_qa"});
    let message = |id: &str, parent: Option<&str>, text: &str| json!({"message_id": id, "parent_id": parent, "text": text});
    MergeArgs {
        dolly: vec![folder.lines("d.jsonl", &[dolly("Simplify 6/8"), dolly("shared one")])],
        oasst: vec![folder.lines(
            "a.jsonl",
            &[
                message("1", None, "Shared one"),
                message("2", Some("1"), "yes"),
                message("3", None, "x"),
            ],
        )],
        sharegpt_prompt_path: vec![
            folder.write(
                "s.json",
                json!([
                    prompt("1 / 1\n\nWhy?\n\nShare Prompt"),
                    prompt("Share Prompt"),
                    prompt("a b")
                ])
                .to_string(),
            ),
        ],
        openorca_prompt_path: vec![
            folder.write("o.json", json!([prompt("24/7 support"), prompt("Why?")]).to_string()),
        ],
        output_file: Some(folder.path(output)),
        ..MergeArgs::default()
    }
}

#[test]
fn the_corrected_merge() {
    let folder = Folder::new();
    let report = merge(four_sources(&folder, "out.json")).unwrap();
    let output = folder.path("out.json");
    let expected = ["24/7 support", "Simplify 6/8", "Why?", "a b", "shared one"];
    assert_eq!(instruction_set(&output), expected);
    assert_eq!(dropped(&report, "oasst1", "duplicate"), 1);
    assert_eq!(dropped(&report, "oasst1", "not_a_root"), 1);
    assert_eq!(dropped(&report, "oasst1", "no_reply"), 1);
    assert_eq!(dropped(&report, "openorca", "duplicate"), 1);
    assert_eq!(dropped(&report, "sharegpt", "empty"), 1);
    assert_eq!(report.sources["sharegpt"].edits["leading_counter"], 1);
    for row in array(&output) {
        let fields = row.as_object().unwrap();
        assert_eq!(fields.keys().collect::<Vec<_>>(), ["id", "input", "instruction", "source"]);
        assert_eq!(row["id"].as_str().unwrap().len(), 32);
    }
}

#[test]
fn dromedarys_merge() {
    let folder = Folder::new();
    let args = MergeArgs {
        shared: following(Some(Compat::Dromedary)),
        ..four_sources(&folder, "out.json")
    };
    merge(args).unwrap();
    let expected = ["Shared one", "Simplify", "Why?", "a b", "shared one", "support"];
    assert_eq!(instruction_set(&folder.path("out.json")), expected);
}

#[test]
fn a_sources_rows_may_be_missing_but_not_all() {
    let folder = Folder::new();
    let all = four_sources(&folder, "out.json");
    let args =
        MergeArgs { dolly: vec![], oasst: vec![], sharegpt_prompt_path: vec![], ..all.clone() };
    assert_eq!(merge(args.clone()).unwrap().sources.len(), 1);
    let none = MergeArgs { openorca_prompt_path: vec![], ..args };
    let error = MergeConfig::try_from(none).unwrap_err().to_string();
    assert!(error.contains("--dolly"), "{error}");
}

#[test]
fn no_row_left_is_an_error_and_no_file() {
    let folder = Folder::new();
    let input = folder.lines("o.jsonl", &questions("niv", &["premise", "hypothesis"]));
    let output = folder.path("out.json");
    let error = subsample(sample_of(&input, &output)).unwrap_err();
    let Error::NoneLeft { rows: 2, dropped, .. } = &error else { panic!("{error}") };
    assert_eq!(dropped, "2 nli_task");
    assert_eq!(folder.names(), ["o.jsonl"]);
}

#[test]
fn an_empty_file_is_an_error() {
    let folder = Folder::new();
    for (name, content) in [("o.jsonl", ""), ("o.jsonl", "\n\n"), ("o.json", "[]")] {
        let input = folder.write(name, content);
        let error = subsample(sample_of(&input, &folder.path("out.json"))).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert!(!folder.path("out.json").exists());
    }
}

#[test]
fn bad_rows_are_tolerated_up_to_the_share() {
    let folder = Folder::new();
    let texts: Vec<String> = (0..2000).map(|n| format!("question {n}")).collect();
    let mut rows = questions("flan", &texts.iter().map(String::as_str).collect::<Vec<_>>());
    rows[7] = json!({"id": "flan.1"});
    rows[8] = json!({"id": "alien.1", "question": "q"});
    let output = folder.path("out.json");
    let report = subsample(sample_of(&folder.lines("o.jsonl", &rows), &output)).unwrap();
    assert_eq!(report.inputs[0].bad_rows, 2);
    assert_eq!(dropped(&report, "openorca", "bad_row"), 2);
    assert_eq!(report.rows_out, 1998);
    rows[9] = json!(null);
    fs::remove_file(&output).unwrap();
    let input = folder.lines("o.jsonl", &rows);
    let error = subsample(sample_of(&input, &output)).unwrap_err();
    assert!(matches!(error, Error::BadRows { row: 8, bad: 3, rows: 2000, .. }), "{error}");
    assert!(error.to_string().contains("o.jsonl: row 8 has no `question`"), "{error}");
    assert!(!output.exists());
    let tolerant = SubsampleArgs {
        shared: SharedArgs { max_bad_rows: Some(0.01), ..SharedArgs::default() },
        ..sample_of(&input, &output)
    };
    assert_eq!(subsample(tolerant).unwrap().rows_out, 1997);
}

#[test]
fn a_stop_leaves_nothing_behind() {
    let folder = Folder::new();
    let input = folder.lines("o.jsonl", &questions("niv", &["q"]));
    let output = folder.write("out.json", "older");
    let config = SubsampleConfig::try_from(sample_of(&input, &output)).unwrap();
    let stop = StopFlag::default();
    stop.set();
    let session = Session { stop, ..quiet() };
    let error = subsample_openorca(&config, &session).unwrap_err();
    assert!(matches!(error, Error::Interrupted { .. }), "{error}");
    assert_eq!(dromedary_command::exit_code(&error.into()), 75);
    assert_eq!(fs::read_to_string(&output).unwrap(), "older");
    assert_eq!(folder.names(), ["o.jsonl", "out.json"]);
}

#[test]
fn the_report_is_written_beside_the_rows() {
    let folder = Folder::new();
    let args = MergeArgs {
        shared: SharedArgs { report: Some(folder.path("report")), ..SharedArgs::default() },
        ..four_sources(&folder, "out.json")
    };
    let report = merge(args).unwrap();
    let text = fs::read_to_string(folder.path("report").join("report.json")).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    assert_eq!(report.settings["seed"], 42);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..Default::default() })]

    /// Against the rules in their plainest form, one row after the other.
    #[test]
    fn dromedarys_sample_is_that_of_a_naive_program(
        rows in prop::collection::vec(("niv|flan|t0|cot", "[aA ]{0,2}|premises|(long ){0,9}"), 1..60)
    ) {
        let folder = Folder::new();
        let tokenizer = dromedary_tokenizer::Tokenizer::open(small_tokenizer()).unwrap();
        let mut seen = BTreeSet::new();
        let mut expected = Vec::new();
        for stratum in ["niv", "flan", "t0", "cot"] {
            for (_, text) in rows.iter().filter(|(of, _)| of == stratum) {
                let text = text.trim().to_owned();
                let fits = tokenizer.len_with_bos(&format!("{text}\n\n")) <= 12;
                if seen.insert(text.clone()) && fits && !text.contains("premise") {
                    expected.push(text);
                }
            }
        }
        expected.sort();
        let lines: Vec<Value> =
            rows.iter().map(|(id, text)| json!({"id": id, "question": text})).collect();
        let output = folder.path("out.json");
        let args = SubsampleArgs {
            shared: following(Some(Compat::Dromedary)),
            judge: JudgeArgs { max_prompt_len: Some(12), ..JudgeArgs::default() },
            ..sample_of(&folder.lines("o.jsonl", &lines), &output)
        };
        match subsample(args) {
            Ok(_) => prop_assert_eq!(instruction_set(&output), expected),
            Err(Error::NoneLeft { .. }) => prop_assert!(expected.is_empty()),
            Err(error) => return Err(TestCaseError::fail(error.to_string())),
        }
    }
}
