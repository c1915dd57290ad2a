use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use crate::{
    job::{BINARY, Job, computed, file, stderr, succeeded},
    support::stories260k,
};

#[test]
fn training_lowers_the_loss_and_leaves_an_adapter() {
    let job = Job::new(12);
    succeeded(job.train("out", &["--num-train-epochs", "4"]));
    let metrics = job.metrics("out");
    assert_eq!(metrics.len(), 24);
    let mean = |steps: &[Value]| {
        steps.iter().map(|step| computed(step).1).sum::<f64>() / steps.len() as f64
    };
    let (first, last) = (mean(&metrics[..4]), mean(&metrics[20..]));
    assert!(last < 0.7 * first, "{first} {last}");
    let adapter = job.path("out/adapter");
    assert!(adapter.join("adapter_model.safetensors").exists());
    let config: Value = serde_json::from_slice(&file(&adapter, "adapter_config.json")).unwrap();
    assert_eq!((&config["r"], &config["peft_type"]), (&json!(4), &json!("LORA")));
}

#[test]
fn a_sentencepiece_model_trains_as_the_tokenizer_json_made_of_it() {
    let job = Job::new(4);
    let [json, model] = ["tokenizer.json", "tokenizer.model"].map(|name| {
        let tokenizer = stories260k().join(name).display().to_string();
        succeeded(job.train(name, &["--max-steps", "1", "--tokenizer", &tokenizer]));
        file(&job.path(name), "adapter/adapter_model.safetensors")
    });
    assert!(json == model);
}

/// Hugging Face's default of -1, and any number that is no number of steps.
#[test]
fn epochs_decide_where_no_steps_are_given() {
    let job = Job::new(4);
    for (dir, steps) in [("unset", "-1"), ("zero", "0")] {
        succeeded(job.train(dir, &["--max-steps", steps]));
        assert_eq!(job.metrics(dir).len(), 2, "{steps}");
    }
}

#[test]
fn a_cause_is_named_once() {
    let job = Job::new(4);
    let refused = job.train_on("/nonexistent", "out", &[]);
    let text = stderr(&refused);
    assert_eq!(refused.status.code(), Some(1), "{text}");
    assert_eq!(text.matches("/nonexistent").count(), 1, "{text}");
    assert_eq!(text.matches("No such file").count(), 1, "{text}");
}

#[test]
fn a_checkpoint_of_other_steps_is_refused_with_what_must_be_equal() {
    let job = Job::new(8);
    let flags = ["--max-steps", "2", "--save-steps", "1"];
    succeeded(job.train("out", &flags));
    let other = ["--per-device-train-batch-size", "2"];
    let text = stderr(&job.train("out", &[&flags[..], &other].concat()));
    for words in
        ["--per-device-train-batch-size must be the same", "--gradient-accumulation-steps x dp"]
    {
        assert!(text.contains(words), "{text}");
    }
}

/// What a job that Slurm has put back into the queue has done is not done again, wherever its flags have it start.
#[test]
fn a_job_that_was_requeued_goes_on_whatever_resume_says() {
    let job = Job::new(8);
    let flags = ["--max-steps", "4", "--save-steps", "1"];
    succeeded(job.train("first", &flags));
    let first = job.path("first/checkpoint-2").display().to_string();
    for (dir, resume, begun) in [("never", "never", 0), ("from", first.as_str(), 2)] {
        let flags = [&flags[..], &["--resume", resume]].concat();
        let start = |restarts: &str, fault: &str| {
            let mut command = job.command(dir, &flags);
            command.env("SLURM_RESTART_COUNT", restarts);
            if !fault.is_empty() {
                command.env("DROMEDARY_FAULT", fault);
            }
            let output = command.output().unwrap();
            (output.status.code(), stderr(&output))
        };
        // Killed before it has a checkpoint, then behind its first.
        for (restarts, point, at) in
            [("0", "after-shard", begun + 1), ("1", "after-shard", begun + 2)]
        {
            let (code, text) = start(restarts, &format!("rank=0,point={point}{at},how=kill"));
            assert_eq!(code, None, "{text}");
            let goes_on = format!("going on behind step {begun}");
            assert_eq!(text.contains(&goes_on), begun > 0, "{text}");
        }
        let (code, text) = start("2", "");
        assert_eq!(code, Some(0), "{text}");
        assert!(text.contains(&format!("going on behind step {}", begun + 1)), "{text}");
        assert!(text.contains("SLURM_RESTART_COUNT is 2"), "{text}");
        assert_eq!(job.metrics(dir).len() as u64, 4 - if begun > 0 { 2 } else { 0 }, "{text}");
    }
}

#[test]
fn a_stopped_run_says_how_it_is_taken_up() {
    let job = Job::new(40);
    for (resume, words) in
        [("auto", "the next run goes on from"), ("never", "--resume auto, as a job")]
    {
        let flags = ["--max-steps", "400", "--save-steps", "1000", "--resume", resume];
        let child = job.command(resume, &flags).stderr(Stdio::piped()).spawn().unwrap();
        job.wait_for_metrics(resume);
        let id = child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(75));
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
}

#[test]
fn a_resumed_run_computes_the_same_bits() {
    let job = Job::new(16);
    let flags = ["--max-steps", "8", "--save-steps", "3"];
    succeeded(job.train("whole", &flags));
    // What a kill behind step 3 leaves: the first checkpoint, later metrics, a torn line.
    succeeded(job.train("cut", &flags));
    for name in ["checkpoint-6", "checkpoint-8", "adapter"] {
        fs::remove_dir_all(job.path("cut").join(name)).unwrap();
    }
    let metrics = job.path("cut/metrics.jsonl");
    let mut text = fs::read(&metrics).unwrap();
    text.truncate(text.len() - 20);
    fs::write(&metrics, text).unwrap();
    succeeded(job.train("cut", &flags));

    let steps = |dir| job.metrics(dir).iter().map(computed).collect::<Vec<_>>();
    assert_eq!(steps("whole"), steps("cut"));
    for name in ["adapter/adapter_model.safetensors", "checkpoint-8/optimizer.safetensors"] {
        assert_eq!(file(&job.path("whole"), name), file(&job.path("cut"), name), "{name}");
    }
}

#[test]
fn a_checkpoint_of_other_settings_is_refused() {
    let job = Job::new(6);
    succeeded(job.train("out", &["--max-steps", "2"]));
    for other in [["--max-steps", "3", "--dtype", "f32"], ["--max-steps", "2", "--dtype", "bf16"]] {
        let output = job.train("out", &other);
        assert_eq!(output.status.code(), Some(1), "{other:?}");
        assert!(stderr(&output).contains("other settings"), "{}", stderr(&output));
    }
}

#[test]
fn a_damaged_checkpoint_falls_back_loudly_and_is_refused_by_name() {
    let job = Job::new(8);
    let flags = ["--max-steps", "4", "--save-steps", "2"];
    succeeded(job.train("out", &flags));
    let newest = job.path("out/checkpoint-4");
    let path = newest.join("optimizer.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();

    let explicit = job.train("out", &["--max-steps", "4", "--resume", newest.to_str().unwrap()]);
    assert_eq!(explicit.status.code(), Some(1));
    assert!(stderr(&explicit).contains("optimizer.safetensors"), "{}", stderr(&explicit));

    let automatic = job.train("out", &flags);
    let text = stderr(&automatic);
    succeeded(automatic);
    assert!(text.contains("optimizer.safetensors") && text.contains("checkpoint-2"), "{text}");
}

#[test]
fn a_run_that_starts_over_keeps_its_own_checkpoints_and_loses_none() {
    let job = Job::new(8);
    succeeded(job.train("out", &["--max-steps", "6", "--save-steps", "2"]));
    let over = ["--resume-from-training", "False", "--max-steps", "4", "--save-steps", "1"];
    succeeded(job.train("out", &[&over[..], &["--save-total-limit", "2"]].concat()));
    let names = job.names("out");
    let kept: Vec<&str> = names.iter().map(String::as_str).collect();
    assert_eq!(
        kept.iter().filter(|name| name.contains("checkpoint")).copied().collect::<Vec<_>>(),
        [
            "checkpoint-3",
            "checkpoint-4",
            "set-aside-checkpoint-2",
            "set-aside-checkpoint-4",
            "set-aside-checkpoint-6"
        ]
    );
    assert_eq!(job.metrics("out").len(), 4);
}

#[test]
fn a_second_run_on_the_same_output_is_refused() {
    let job = Job::new(40);
    let flags = ["--max-steps", "4000", "--save-steps", "10000"];
    let mut first = job.command("out", &flags).stderr(Stdio::null()).spawn().unwrap();
    job.wait_for_metrics("out");
    let second = job.train("out", &flags);
    first.kill().unwrap();
    first.wait().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let text = stderr(&second);
    assert!(text.contains("metrics.jsonl") && text.contains(&first.id().to_string()), "{text}");
}

#[test]
fn only_so_many_checkpoints_are_kept() {
    let job = Job::new(8);
    succeeded(
        job.train("out", &["--max-steps", "6", "--save-steps", "1", "--save-total-limit", "2"]),
    );
    let mut names = job.names("out");
    names.retain(|name| name.starts_with("checkpoint-"));
    assert_eq!(names, ["checkpoint-5", "checkpoint-6"]);
}

#[test]
fn bad_input_is_named() {
    let job = Job::new(3);
    let empty = job.path("empty.json");
    fs::write(&empty, "[]").unwrap();
    let no_target = job.path("no_target.jsonl");
    fs::write(
        &no_target,
        "{\"example_id\": 5, \"instruction\": \"Hi\", \"input\": \"\", \"output\": \"\"}\n",
    )
    .unwrap();
    let broken = job.path("broken.jsonl");
    fs::write(&broken, "{\"example_id\": 1, \"instruction\": \"Hi\", \"inp").unwrap();
    let cases: [(&[&str], &[&str], i32); 6] = [
        (&["--dataset", empty.to_str().unwrap()], &["empty.json", "no row"], 1),
        (&["--dataset", no_target.to_str().unwrap()], &["no_target.jsonl", "example_id 5"], 1),
        (&["--dataset", broken.to_str().unwrap()], &["broken.jsonl"], 1),
        (&["--dataset", "/nonexistent.json"], &["/nonexistent.json"], 1),
        (&["--meta-prompt-pattern", "/none*"], &["/none*"], 1),
        (&["--lora-modules", "wq"], &["wq", "q_proj"], 2),
    ];
    for (flags, words, code) in cases {
        let mut command = Command::new(BINARY);
        command.arg("train").arg("--checkpoint").arg(stories260k());
        for (flag, value) in [
            ("--dataset", job.path("sft.json")),
            ("--meta-prompt-pattern", job.path("dromedary_*prompt_distill.txt")),
        ] {
            if !flags.contains(&flag) {
                command.arg(flag).arg(value);
            }
        }
        let output = command.arg("--output-dir").arg(job.path("out")).args(flags).output().unwrap();
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{words:?}: {text}");
        assert!(!job.path("out/adapter").exists());
    }
}

/// A limit on the size of files stands in for a disk that fills: the checkpoint does not fit.
#[test]
fn a_full_disk_is_named_and_leaves_no_checkpoint() {
    let job = Job::new(6);
    let command = job.command("out", &["--max-steps", "2"]);
    let words: Vec<&str> = command.get_args().map(|word| word.to_str().unwrap()).collect();
    let limited = |blocks: &str| {
        Command::new("bash")
            .args(["-c", "ulimit -f $0; exec \"$@\"", blocks, BINARY])
            .args(&words)
            .output()
            .unwrap()
    };
    let full = limited("16");
    let text = stderr(&full);
    assert_eq!(full.status.code(), Some(1), "{text}");
    assert!(text.contains("checkpoint-2"), "{text}");
    assert!(job.names("out").iter().all(|name| !name.starts_with("checkpoint")), "{text}");
    succeeded(limited("unlimited"));
    assert!(job.path("out/adapter/adapter_model.safetensors").exists());
}

#[test]
fn rows_without_a_target_can_be_left_out() {
    let job = Job::new(3);
    let path = job.path("some.jsonl");
    let row = |id, output: &str| {
        json!({"example_id": id, "instruction": "Hi", "input": "", "output": output}).to_string()
    };
    fs::write(&path, [row(1, "Hello."), row(2, " "), row(3, "Good day.")].join("\n")).unwrap();
    let output = Command::new(BINARY)
        .args(["train", "--drop-empty", "--lora-r", "2", "--gradient-accumulation-steps", "1"])
        .arg("--checkpoint")
        .arg(stories260k())
        .arg("--dataset")
        .arg(&path)
        .arg("--meta-prompt-pattern")
        .arg(job.path("dromedary_*prompt_distill.txt"))
        .arg("--output-dir")
        .arg(job.path("out"))
        .output()
        .unwrap();
    succeeded(output);
    assert_eq!(job.metrics("out").len(), 2);
}

/// The command line of Dromedary's README, with program name and paths changed.
#[test]
fn the_original_command_line_runs() {
    let job = Job::new(6);
    let typed = "--per_device_train_batch_size 4 --gradient_accumulation_steps 4 \
        --model_name_or_path MODEL --learning_rate 1e-4 --source_max_len 512 --target_max_len 512 \
        --dataset sft.json --dataset_format dromedary \
        --meta_prompt_pattern dromedary_*prompt_distill.txt --double_quant True --quant_type nf4 \
        --bits 4 --lora_r 64 --output_dir out --num_train_epochs 1 --group_by_length False \
        --evaluation_strategy no --save_strategy steps --save_steps 500 --save_total_limit 3 \
        --weight_decay 0.0 --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 5 \
        --report_to tensorboard --ddp_backend nccl --bf16 True --ddp_find_unused_parameters False \
        --resume_from_training True --add_eos_to_target False";
    let model = stories260k();
    let words = typed.split_whitespace().map(|word| match word {
        "MODEL" => model.to_str().unwrap(),
        word => word,
    });
    let output =
        Command::new(BINARY).arg("train").args(words).current_dir(job.dir.path()).output().unwrap();
    let text = stderr(&output);
    succeeded(output);
    assert!(text.contains("--ddp-backend") && text.contains("--bits 4"), "{text}");
    assert!(job.path("out/adapter/adapter_model.safetensors").exists());
}

#[test]
fn settings_of_each_configuration_file_are_understood() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for name in ["step3_demo", "step3_llama2_70b", "step3_llama2_7b"] {
        let output = Command::new(BINARY)
            .args(["train", "--print-config", "--seed", "7", "--config"])
            .arg(root.join(format!("configs/{name}.toml")))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        succeeded(output);
        assert!(text.starts_with("[train]") && text.contains("seed = 7"), "{text}");
        assert!(text.contains("source_max_len = 512"), "{text}");
    }
}
