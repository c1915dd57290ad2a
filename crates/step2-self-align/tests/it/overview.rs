use std::fs;
use std::path::Path;

use dromedary_command::StopFlag;
use dromedary_files::{Lock, LockOptions};
use dromedary_self_align::GenerateArgs;

use crate::support::{
    folder_of, generate_args, generate_with, lines, root, run, run_to, stories260k,
};

fn shown(folder: &Path, command: &str) -> String {
    let output = run(folder, command);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}\n{stderr}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn check_counts_tokens_and_ends_with_1_where_generation_would_be_refused() {
    let model = stories260k().display().to_string();
    let output = run(&root(), &format!("check --checkpoint {model}"));
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(" of 2816 tokens stand before a prompt"), "{text}");
    assert!(text.contains("exemplar 6 (a subject to be recited)"), "{text}");
    let context = "the context has 512";
    assert!(text.contains("error: ") && text.contains(context), "{text}");
    assert!(!text.contains("warning: "), "{text}");
}

#[test]
fn check_warns_of_what_makes_principles_weak() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    assert_eq!(shown(folder, "check"), "nothing is wrong with them\n");
    let built_in = fs::read_to_string(root().join("prompts/self_align_principles.toml")).unwrap();
    let uncited = built_in.replace(", 1 (ethical)", "");
    assert_ne!(uncited, built_in);
    fs::write(folder.join("uncited.toml"), uncited).unwrap();
    let text = shown(folder, "check --meta-prompt-file uncited.toml");
    assert!(text.contains("warning: no exemplar cites rule 1 (ethical)"), "{text}");
    let json = shown(folder, "check --json --meta-prompt-file uncited.toml");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(json["tokens"].is_null());
    assert_eq!(json["findings"][0]["finding"], "rule_not_cited");
}

#[test]
fn a_plan_tells_rows_tokens_memory_and_hours() {
    let folder = folder_of(&["Once upon a time", "", "Tim had a dog", &"word ".repeat(400)]);
    let folder = folder.path();
    let prompts = fs::read_to_string(folder.join("prompts.json")).unwrap();
    fs::write(folder.join("prompts.json"), prompts.replacen('[', "[{\"instruction\": 5},", 1))
        .unwrap();
    let model = stories260k().display().to_string();
    let flags = format!(
        "plan --checkpoint {model} --input-file prompts.json --meta-prompt-file prompt.txt \
         --max-seq-len 200 --max-gen-len 40 --max-batch-size 4 --device cpu"
    );
    let text = shown(folder, &flags);
    assert!(text.contains("prompts    5, 3 of them to be rejected"), "{text}");
    assert!(text.contains("groups     1, up to 2 rows each"), "{text}");
    assert!(text.contains("40 of answers, 20 each (assumed: half of --max-gen-len)"), "{text}");
    assert!(text.contains("time       unknown"), "{text}");
    let text = shown(folder, &format!("{flags} --tokens-per-second 0.01 --output-tokens 36"));
    // Two rows of 36 tokens, a token in 100 seconds.
    assert!(text.contains("time       2.00 hours at 0.0 tokens/s"), "{text}");
    let text = shown(folder, &format!("{flags} --group-size 5 --ranks 4 --tp 2"));
    assert!(text.contains("groups     10, up to 1 rows each"), "{text}");
    assert!(text.contains("rank 0: ") && text.contains("rank 1: ") && !text.contains("rank 2: "));
    // A GPU need not be where the plan is made.
    let gpu = flags.replace("--device cpu", "--device cuda:1");
    assert!(shown(folder, &gpu).contains("rank 0: "), "{gpu}");

    // What a run was like tells what the next one will be.
    generate_with(
        GenerateArgs { max_seq_len: Some(200), ..generate_args(folder) },
        &StopFlag::default(),
    )
    .unwrap();
    let text = shown(folder, &format!("{flags} --measured metrics.jsonl"));
    let rows = lines(&folder.join("metrics.jsonl"));
    let tokens: Vec<f64> =
        rows.iter().filter_map(|row| row["output_tokens"].as_f64()).filter(|&n| n > 0.0).collect();
    let mean = tokens[..2].iter().sum::<f64>() / 2.0;
    assert!(text.contains(&format!("{mean:.0} each (measured)")), "{text}");
    assert!(!text.contains("unknown"), "{text}");
    run_to(1, folder, &format!("{flags} --measured aligned.jsonl"));
    let message = run_to(2, folder, &format!("{flags} --output-tokens 0"));
    assert!(message.contains("--output-tokens must be above 0"), "{message}");
}

#[test]
fn plan_has_a_help_and_a_table_of_its_own() {
    let folder = folder_of(&["Once"]);
    let folder = folder.path();
    let help = shown(folder, "plan --help");
    assert!(help.starts_with("Show what a generation will take"), "{help}");
    assert!(shown(folder, "generate --help").starts_with("Answer prompts behind"));
    fs::write(
        folder.join("run.toml"),
        "[plan]\ncheckpoint = 'm'\ninput_file = 'p'\nranks = 3\nmax_gen_len = 7\ntemperature = 0.5\n",
    )
    .unwrap();
    let text = shown(folder, "plan --config run.toml --print-config");
    for line in ["ranks = 3", "max_gen_len = 7", "temperature = 0.5"] {
        assert!(text.contains(line), "{line} in {text}");
    }
    fs::write(folder.join("run.toml"), "[plan]\nrankz = 3\n").unwrap();
    let message = run_to(2, folder, "plan --config run.toml");
    assert!(message.contains("unknown key rankz, did you mean ranks?"), "{message}");
}

#[test]
fn the_memory_of_a_plan_is_the_sum_of_its_parts() {
    let folder = folder_of(&["Once"]);
    let model = stories260k().display().to_string();
    let plan = |more: &str| {
        let flags = "--input-file prompts.json --meta-prompt-file prompt.txt --max-batch-size 1000 \
                     --max-seq-len 400 --max-gen-len 10 --device cpu";
        shown(folder.path(), &format!("plan --checkpoint {model} {flags} {more}"))
    };
    let text = plan("--print-config");
    assert!(text.contains("max_batch_size = 1000") && text.contains("ranks = 1"), "{text}");
    // Five layers, four key/value heads of eight numbers, keys and values, four bytes each.
    let slots = |tokens: f64| format!("{:.2} slots", tokens * f64::from(5 * 4 * 8 * 2 * 4) / 1e9);
    let text = plan("");
    assert!(text.contains(&slots(400_000.0)), "{text}");
    // Short rows may fill all of the room at once.
    let text = plan("--max-kv-tokens 150000");
    assert!(text.contains(&slots(150_000.0)), "{text}");
}

/// What `generate` rejects or refuses, `plan` says before.
#[test]
fn a_plan_rejects_and_refuses_what_generation_does() {
    let prompts: Vec<String> = (1..12).map(|words| vec!["word"; 3 * words].join(" ")).collect();
    let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
    let folder = folder_of(&prompts);
    let forced = "Yes,and,so,on,".repeat(2);
    let args = GenerateArgs {
        max_seq_len: Some(90),
        force_prefix: Some(forced.clone()),
        ..generate_args(folder.path())
    };
    let report = generate_with(args, &StopFlag::default()).unwrap();
    assert!(report.rejected > 0 && report.answered > 0, "{report:?}");
    let flags = format!(
        "plan --checkpoint {} --input-file prompts.json --max-gen-len 24 --device cpu",
        stories260k().display()
    );
    let of_prompt = |more: &str| format!("{flags} --meta-prompt-file prompt.txt {more}");
    let plan = |more: &str| shown(folder.path(), &of_prompt(more));
    let of_them = |rejected| format!("prompts    11, {rejected} of them to be rejected");
    let text = plan(&format!("--max-seq-len 90 --force-prefix={forced}"));
    assert!(text.contains(&of_them(report.rejected)), "{report:?} {text}");
    let text = plan("--max-seq-len 90");
    assert!(!text.contains(&of_them(report.rejected)), "{text}");

    // The context has 512 tokens: rows get what the prefix leaves.
    let output = run(folder.path(), &of_prompt("--max-seq-len 600"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("not --max-seq-len 600") && said.contains("context 512"), "{said}");
    fs::write(folder.path().join("long.txt"), "Be good. ".repeat(200) + "\n\nUser:").unwrap();
    let long = format!("{flags} --meta-prompt-file long.txt");
    let generate = long.replace("plan", "generate --output-file long.jsonl");
    for command in [long, generate] {
        let message = run_to(1, folder.path(), &command);
        assert!(
            message.contains("leaves no room for a row in the model's context of 512"),
            "{message}"
        );
    }
    assert!(!folder.path().join("long.jsonl.run.json").exists());
}

#[test]
fn the_status_of_a_folder_tells_rows_groups_and_who_is_at_work() {
    let folder = folder_of(&["Once upon a time", "Tim had a dog", "", "The sun was"]);
    let folder = folder.path();
    let message = run_to(1, folder, "status");
    assert!(message.contains("no file matches"), "{message}");
    let group = |rank| GenerateArgs {
        group_rank: Some(rank),
        group_size: Some(2),
        max_seq_len: Some(200),
        ..generate_args(folder)
    };
    generate_with(group(0), &StopFlag::default()).unwrap();
    let text = shown(folder, "status .");
    assert!(text.contains("aligned: 2 of 4 rows (50.0 %), 1 of them rejected, "), "{text}");
    assert!(text.contains(" rows/s, ") && text.contains(" tokens/s"), "{text}");
    assert!(text.contains("aligned_2shards_0.jsonl") && text.contains("2 rows  done"), "{text}");

    generate_with(group(1), &StopFlag::default()).unwrap();
    let second = folder.join("aligned_2shards_1.jsonl");
    let rows = fs::read_to_string(&second).unwrap();
    fs::write(&second, &rows[..rows.len() - 5]).unwrap();
    fs::remove_file(folder.join("aligned_2shards_1.jsonl.done")).unwrap();
    let lock = Lock::acquire(&second, &LockOptions::default()).unwrap();
    let text = shown(&root(), &format!("status {}", folder.display()));
    assert!(text.contains("3 of 4 rows (75.0 %)") && text.contains(" left\n"), "{text}");
    let holder = format!("running (host {}", lock_host(&second));
    assert!(text.contains("1 rows  ") && text.contains(&holder), "{text}");
    drop(lock);
    let json = shown(folder, "status --json");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json[0]["files"][1]["state"], "stopped");
    assert_eq!((&json[0]["rows"], &json[0]["doubled"]), (&3.into(), &0.into()));
}

fn lock_host(output: &Path) -> String {
    let text = fs::read_to_string(format!("{}.lock", output.display())).unwrap();
    let lock: serde_json::Value = serde_json::from_str(&text).unwrap();
    lock["host"].as_str().unwrap().to_owned()
}

/// Every number of the page is one of `merge_report.json`; a test of xtask looks at it in a browser.
#[test]
fn the_page_has_the_numbers_of_the_report() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let rows = root().join("dummy_data/aligned.jsonl").display().to_string();
    run_to(
        0,
        folder,
        &format!(
            "merge-and-filter --data-file-pattern {rows} --allow-unfinished --output-file sft.json"
        ),
    );
    let html = fs::read_to_string(folder.join("report.html")).unwrap();
    let report = fs::read_to_string(folder.join("merge_report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    let dropped = report["dropped"].as_object().unwrap();
    assert!(dropped.len() > 8, "{report}");
    for rule in dropped.keys() {
        assert!(html.contains(&format!("<td>dropped: {rule}</td>")), "{rule}");
        assert!(html.contains(&format!("<h3>dropped: {rule}</h3>")), "no sample of {rule}");
    }
    assert!(html.contains("<h3>kept</h3>"));
    let citations = report["citations"].as_array().unwrap();
    assert_eq!(citations.len(), 17);
    let of = |cited: bool| citations.iter().filter(move |rule| (rule["rows"] != 0) == cited);
    assert!(of(true).count() > 3 && of(false).count() > 0);
    let never = html.split("Never cited: ").nth(1).unwrap().split('<').next().unwrap();
    for rule in of(false) {
        let name = rule["name"].as_str().unwrap().replace('&', "&amp;");
        assert!(never.contains(&format!("({name})")), "{name} in {never}");
    }
    let page = html.replace("http://www.w3.org/2000/svg", "");
    assert!(["http:", "https:", "src=", "<script"].iter().all(|part| !page.contains(part)));
}
