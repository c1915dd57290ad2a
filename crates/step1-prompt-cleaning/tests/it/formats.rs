use std::fs;
use std::path::{Path, PathBuf};

use dromedary_prompt_cleaning::{
    AggregateArgs, AggregateConfig, ExportArgs, ExportConfig, MergeArgs, MergeConfig, SharedArgs,
    SubsampleArgs, SubsampleConfig, aggregate_sharegpt, clean_and_merge, export_parquet,
    subsample_openorca,
};
use dromedary_records::{Prompt, RowWriter, read_prompts};
use polars::prelude::{ParquetReader, SerReader};
use serde_json::{Value, json};

use crate::support::{Folder, instruction_set, quiet, real_sample};

fn conversations(prefix: &str) -> Vec<Value> {
    let turn = |from: &str, text: String| json!({"from": from, "value": text});
    (0..5)
        .map(|n| {
            let turns = [turn("human", format!("{prefix} {n}")), turn("gpt", "yes".to_owned())];
            json!({"id": n, "conversations": turns})
        })
        .collect()
}

fn aggregate(files: Vec<PathBuf>, output: &Path) -> Vec<String> {
    let args = AggregateArgs {
        data_files: files,
        output_file: Some(output.to_owned()),
        shared: SharedArgs::default(),
    };
    aggregate_sharegpt(&AggregateConfig::try_from(args).unwrap(), &quiet()).unwrap();
    let prompts = read_prompts(output).unwrap();
    let mut instructions: Vec<String> = prompts.map(|row| row.unwrap().instruction).collect();
    instructions.sort();
    instructions
}

#[test]
fn a_folder_of_every_form_is_one_source() {
    let folder = Folder::new();
    fs::create_dir(folder.path("in")).unwrap();
    for name in ["a.json", "b.jsonl", "c.json.gz", "d.jsonl.gz", "e.json.zst", "f.ndjson.zst"] {
        let mut writer = RowWriter::create(folder.path("in").join(name)).unwrap();
        conversations(name).iter().for_each(|row| writer.write(row).unwrap());
        writer.finish().unwrap();
    }
    let one = serde_json::to_string_pretty(&conversations("one")[0]).unwrap();
    folder.write("in/g.json", one);
    folder.write("in/ignored.txt", "no rows");
    let output = folder.path("out.jsonl.zst");
    let all = aggregate(vec![folder.path("in")], &output);
    assert_eq!(all.len(), 6 * 5 + 1);
    assert!(all.contains(&"c.json.gz 3".to_owned()) && all.contains(&"one 0".to_owned()));
    let by_pattern = aggregate(vec![folder.path("in/[ab].json*")], &folder.path("out.json"));
    assert_eq!(by_pattern.len(), 10);
}

#[test]
fn the_real_file_of_one_conversation_is_read() {
    let Some(path) = real_sample("sharegpt/axolotl_conversation.json") else { return };
    let folder = Folder::new();
    assert_eq!(aggregate(vec![path], &folder.path("out.json")).len(), 1);
}

#[test]
fn answers_may_be_in_another_file_of_the_export() {
    let folder = Folder::new();
    let message = |id: &str, parent: Option<&str>| json!({"message_id": id, "parent_id": parent, "text": format!("text {id}")});
    folder.lines("1.jsonl", &[message("a", None), message("b", None)]);
    folder.lines("2.jsonl", &[message("c", Some("a"))]);
    let output = folder.path("out.json");
    let args = MergeArgs {
        oasst: vec![folder.path("?.jsonl")],
        output_file: Some(output.clone()),
        ..MergeArgs::default()
    };
    clean_and_merge(&MergeConfig::try_from(args).unwrap(), &quiet()).unwrap();
    assert_eq!(instruction_set(&output), ["text a"]);
}

#[test]
fn outputs_in_every_form_have_the_same_rows_for_step_2() {
    let folder = Folder::new();
    let input = folder.write("in.json", json!(conversations("q")).to_string());
    let prompts = |name: &str| -> Vec<Prompt> {
        aggregate(vec![input.clone()], &folder.path(name));
        read_prompts(folder.path(name)).unwrap().map(Result::unwrap).collect()
    };
    let expected = prompts("out.json");
    assert_eq!((expected.len(), expected[0].source.as_str()), (5, "sharegpt"));
    for name in ["out.jsonl", "out.json.gz", "out.jsonl.zst"] {
        assert_eq!(prompts(name), expected, "{name}");
    }
}

#[test]
fn exported_prompts_come_back_from_parquet() {
    let folder = Folder::new();
    let input = folder.write("in.json", json!(conversations("q")).to_string());
    let prompts = folder.path("prompts.json");
    let expected = aggregate(vec![input], &prompts);
    let output = folder.path("prompts.parquet");
    let args = ExportArgs { prompts: vec![prompts], output_file: Some(output.clone()) };
    let rows = export_parquet(&ExportConfig::try_from(args).unwrap(), &quiet()).unwrap();
    assert_eq!(rows, 5);
    let frame = ParquetReader::new(fs::File::open(&output).unwrap()).finish().unwrap();
    let columns: Vec<&str> = frame.get_column_names().iter().map(|name| name.as_str()).collect();
    assert_eq!(columns, ["id", "source", "instruction", "input"]);
    // And the merge reads it as it reads the JSON.
    let merged = folder.path("merged.json");
    let args = MergeArgs {
        sharegpt_prompt_path: vec![output],
        output_file: Some(merged.clone()),
        ..MergeArgs::default()
    };
    clean_and_merge(&MergeConfig::try_from(args).unwrap(), &quiet()).unwrap();
    assert_eq!(instruction_set(&merged), expected);
}

#[test]
fn one_thread_and_two_give_the_same_bytes() {
    let folder = Folder::new();
    let texts: Vec<Value> = (0..9_000_u64)
        .map(|n| {
            let text = format!("question {} of many", n * 7 % 8_000);
            let turns = [json!({"from": "human", "value": text}), json!({"from": "gpt"})];
            let id = format!("{}.{n}", ["flan", "niv", "t0"][n as usize % 3]);
            json!({"id": id, "question": text, "instruction": text, "conversations": turns})
        })
        .collect();
    let input = folder.lines("in.jsonl", &texts);
    let outputs = |threads: usize, run: u32| {
        let name = |command: &str| folder.path(&format!("{command}-{threads}-{run}.json"));
        let shared = SharedArgs { threads: Some(threads), ..SharedArgs::default() };
        let subsample = SubsampleArgs {
            train_data_path: vec![input.clone()],
            output_path: Some(name("subsample")),
            max_samples_per_dataset: Some(1_000),
            shared: shared.clone(),
            ..SubsampleArgs::default()
        };
        subsample_openorca(&SubsampleConfig::try_from(subsample).unwrap(), &quiet()).unwrap();
        let aggregate = AggregateArgs {
            data_files: vec![input.clone()],
            output_file: Some(name("aggregate")),
            shared: shared.clone(),
        };
        aggregate_sharegpt(&AggregateConfig::try_from(aggregate).unwrap(), &quiet()).unwrap();
        let merge = MergeArgs {
            sharegpt_prompt_path: vec![input.clone()],
            openorca_prompt_path: vec![name("subsample")],
            output_file: Some(name("merge")),
            shared,
            ..MergeArgs::default()
        };
        clean_and_merge(&MergeConfig::try_from(merge).unwrap(), &quiet()).unwrap();
        ["subsample", "aggregate", "merge"].map(|command| fs::read(name(command)).unwrap())
    };
    let once = outputs(1, 1);
    assert!(once == outputs(1, 2) && once == outputs(2, 3));
}
