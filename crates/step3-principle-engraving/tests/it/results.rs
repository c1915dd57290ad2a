use std::fs;

use dromedary_files::{Manifest, hash_file};
use serde_json::{Value, json};

use crate::job::{Job, computed, file, stderr, succeeded};

const EVALUATED: [&str; 6] = ["--eval-dataset-size", "3", "--eval-steps", "2", "--max-steps", "6"];

fn eval_losses(job: &Job, output_dir: &str) -> Vec<(u64, f64)> {
    job.metrics(output_dir)
        .iter()
        .filter_map(|step| Some((computed(step).0, step["eval_loss"].as_f64()?)))
        .collect()
}

fn text(job: &Job, name: &str) -> String {
    fs::read_to_string(job.path(name)).unwrap()
}

#[test]
fn a_run_leaves_curves_events_and_a_card() {
    let job = Job::new(12);
    succeeded(job.train("out", &EVALUATED));
    let losses = eval_losses(&job, "out");
    assert_eq!(losses.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [2, 4, 6]);

    let svg = text(&job, "out/curves.svg");
    assert!(svg.contains("training rows") && svg.contains("held-out rows"));
    assert_eq!(job.names("out/tensorboard").len(), 1);

    let card = text(&job, "out/adapter/README.md");
    let dataset = hash_file(job.path("sft.json")).unwrap();
    let meta_prompt = hash_file(job.path("dromedary_a_prompt_distill.txt")).unwrap();
    let held_out = format!("| held-out loss at the end | {:.4} |", losses[2].1);
    for part in
        [&dataset, &meta_prompt, &held_out, "| rows trained on | 9 |", "| r, alpha | 4, 16 |"]
    {
        assert!(card.contains(part), "{part}: {card}");
    }
    let front: Vec<&str> = card.split("---\n").collect();
    assert!(front[0].is_empty() && front[1].contains("base_model: \""), "{card}");
    assert_eq!(text(&job, "out/adapter/curves.svg"), svg);
    let adapter = job.path("out/adapter");
    let manifest = Manifest::read(&adapter).unwrap();
    manifest.verify(&adapter).unwrap();
    assert!(manifest.files.contains_key("README.md"));
}

#[test]
fn events_can_be_left_out() {
    let job = Job::new(4);
    succeeded(job.train("out", &["--max-steps", "1", "--report-to", "none"]));
    assert!(!job.path("out/tensorboard").exists());
}

#[test]
fn held_out_rows_are_not_trained_on() {
    let job = Job::new(12);
    let drawn = ["--eval-dataset-size", "3", "--evaluation-strategy", "epoch"];
    succeeded(job.train("out", &[&drawn[..], &["--num-train-epochs", "2"]].concat()));
    let metrics = job.metrics("out");
    let ids = |steps: &[Value]| -> Vec<u64> {
        let ids = steps.iter().flat_map(|step| step["example_ids"].as_array().unwrap());
        let mut ids: Vec<_> = ids.map(|id| id.as_u64().unwrap()).collect();
        ids.sort_unstable();
        ids
    };
    let epoch = metrics.len() / 2;
    let first = ids(&metrics[..epoch]);
    assert_eq!(first.len(), 9);
    assert_eq!(first, ids(&metrics[epoch..]));
    let due = [epoch as u64, 2 * epoch as u64];
    assert_eq!(eval_losses(&job, "out").iter().map(|(step, _)| *step).collect::<Vec<_>>(), due);
}

#[test]
fn the_held_out_loss_is_the_loss_of_training_and_changes_nothing() {
    let job = Job::new(8);
    let rows = job.path("sft.json").display().to_string();
    let evaluated = ["--eval-dataset", &rows, "--eval-steps", "1", "--max-steps", "4"];
    succeeded(job.train("evaluated", &evaluated));
    succeeded(job.train("plain", &["--max-steps", "4"]));
    let adapter = "adapter/adapter_model.safetensors";
    assert!(file(&job.path("evaluated"), adapter) == file(&job.path("plain"), adapter));

    // All rows in one step whose rate is 0, as warm-up begins with: the same model on the same rows.
    let whole = ["--max-steps", "1", "--per-device-train-batch-size", "4"];
    let evaluated = ["--eval-dataset", &rows, "--per-device-eval-batch-size", "3"];
    succeeded(job.train("whole", &[&whole[..], &evaluated].concat()));
    let (step, eval_loss) = eval_losses(&job, "whole")[0];
    let loss = computed(&job.metrics("whole")[0]).1;
    assert!(step == 1 && (eval_loss - loss).abs() < 1e-5 * loss, "{eval_loss} {loss}");
}

#[test]
fn a_killed_run_leaves_the_curves_of_a_whole_one() {
    let job = Job::new(12);
    let flags = [&EVALUATED[..], &["--save-steps", "2"]].concat();
    succeeded(job.train("whole", &flags));
    let fault = "rank=0,point=before-manifest4,how=kill";
    let killed = job.command("cut", &flags).env("DROMEDARY_FAULT", fault).output().unwrap();
    assert_eq!(killed.status.code(), None, "{}", stderr(&killed));
    succeeded(job.train("cut", &flags));
    assert_eq!(eval_losses(&job, "cut"), eval_losses(&job, "whole"));
    assert_eq!(text(&job, "cut/curves.svg"), text(&job, "whole/curves.svg"));
    assert_eq!(job.names("cut/tensorboard").len(), 1);
}

#[test]
fn files_that_were_moved_are_the_same_files() {
    let job = Job::new(6);
    succeeded(job.train("out", &["--max-steps", "2"]));
    // The same rows and meta prompts in another folder.
    let moved = Job::new(6);
    let again = moved.train(job.path("out").to_str().unwrap(), &["--max-steps", "2"]);
    assert!(stderr(&again).contains("going on behind step 2"), "{}", stderr(&again));
    succeeded(again);
}

#[test]
fn training_can_start_from_an_adapter() {
    let job = Job::new(6);
    succeeded(job.train("first", &["--max-steps", "4"]));
    let adapter = job.path("first/adapter").display().to_string();
    let from = |output_dir: &str, flags: &[&str]| {
        job.train(output_dir, &[&["--adapter", &adapter], flags].concat())
    };
    // Warm-up begins with a rate of 0.
    succeeded(from("still", &["--max-steps", "1"]));
    let weights = "adapter/adapter_model.safetensors";
    assert!(file(&job.path("still"), weights) == file(&job.path("first"), weights));

    succeeded(from("second", &["--max-steps", "2"]));
    let loss = |output_dir: &str| computed(&job.metrics(output_dir)[0]).1;
    assert!(loss("second") < loss("first"), "{} {}", loss("second"), loss("first"));

    let refused = from("refused", &["--lora-alpha", "7"]);
    let text = stderr(&refused);
    assert_eq!(refused.status.code(), Some(2), "{text}");
    assert!(text.contains("--lora-alpha 7") && text.contains("has 16"), "{text}");
    let none = job.train("refused", &["--adapter", "/nonexistent"]);
    assert!(stderr(&none).contains("/nonexistent"), "{}", stderr(&none));
}

#[test]
fn the_learning_rate_has_the_shape_that_was_asked_for() {
    let job = Job::new(6);
    let wsd = ["--lr-scheduler-type", "wsd", "--warmup-steps", "2", "--decay-steps", "2"];
    succeeded(job.train("wsd", &[&wsd[..], &["--max-steps", "6"]].concat()));
    let rates: Vec<f64> = job.metrics("wsd").iter().map(|step| computed(step).3).collect();
    let expected = [0.0, 5e-3, 1e-2, 1e-2, 1e-2, 5e-3];
    assert!(rates.iter().zip(expected).all(|(got, want)| (got - want).abs() < 1e-12), "{rates:?}");

    let refused: [(&[&str], &[&str], i32); 4] = [
        (&["--decay-steps", "2"], &["--decay-steps", "wsd"], 2),
        (&["--lr-scheduler-type", "wsd", "--decay-steps", "9", "--max-steps", "8"], &["9", "8"], 1),
        (&["--warmup-steps", "9", "--max-steps", "8"], &["--warmup-steps", "9", "8"], 1),
        (&["--evaluation-strategy", "steps"], &["--eval-dataset"], 2),
    ];
    for (flags, words, code) in refused {
        let output = job.train("refused", flags);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{words:?}: {text}");
    }
}

#[test]
fn no_row_is_lost_where_rows_do_not_fill_the_last_step() {
    for rows in [1, 5] {
        let job = Job::new(rows);
        let flags = ["--per-device-train-batch-size", "2", "--num-train-epochs", "2"];
        succeeded(job.train("out", &flags));
        let metrics = job.metrics("out");
        let steps_per_epoch = rows.div_ceil(4);
        assert_eq!(metrics.len(), 2 * steps_per_epoch);
        for epoch in metrics.chunks(steps_per_epoch) {
            let ids = epoch.iter().flat_map(|step| step["example_ids"].as_array().unwrap().clone());
            let mut ids: Vec<_> = ids.map(|id| id.as_u64().unwrap()).collect();
            ids.sort_unstable();
            assert_eq!(ids, (1..=rows as u64).collect::<Vec<_>>());
        }
        assert!(metrics.iter().all(|step| step["loss"].as_f64().unwrap() > 0.0));
        assert_eq!(metrics.last().unwrap()["skipped"], json!(false));
    }
}
