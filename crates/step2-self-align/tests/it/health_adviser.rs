use std::fs;

use dromedary_records::{AlignedResponse, FinishReason, TrainingRow, read_rows};

use crate::support::{root, run, run_to, write_rows};

/// A row as the health adviser's model writes it.
fn row(instruction: &str, answer: &str) -> AlignedResponse {
    AlignedResponse {
        id: dromedary_records::row_id("health", instruction, "", 0),
        source: "health".to_owned(),
        instruction: instruction.to_owned(),
        input: String::new(),
        output: format!(
            " I am a careful, honest, and kind health adviser. By rule 6 (small steps), I should \
             help.\n\nSalva: {answer}\n\nUser:"
        ),
        finish_reason: FinishReason::Stop,
        prompt_tokens: 1200,
        output_tokens: 60,
        seed: 1,
    }
}

/// The way of somebody with principles of their own, as README.md shows it; there a real model writes
/// the rows.
#[test]
fn principles_of_ones_own_go_from_the_edit_to_the_training_rows() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let example = fs::read_to_string(root().join("prompts/health_adviser.toml")).unwrap();
    let edited = example
        .replace("product = \"Salva\"", "product = \"Vita\"")
        .replace("the team of this example", "the Lakeside clinic");
    fs::write(folder.join("health.toml"), edited).unwrap();

    let check = run(folder, "check --meta-prompt-file health.toml");
    let said = String::from_utf8(check.stdout).unwrap();
    assert_eq!(check.status.code(), Some(0), "{said}");
    assert_eq!(said, "nothing is wrong with them\n");
    let text =
        String::from_utf8(run(folder, "render --meta-prompt-file health.toml").stdout).unwrap();
    assert!(text.starts_with("# Salva\n\n## General Rules\n\n"), "{text}");
    assert!(
        text.contains("\n6 (small steps). Salva should offer") && text.ends_with("\n\nUser:\n")
    );

    let walk = "Salva says: walk for ten minutes after each meal, and drink a glass of water.";
    write_rows(
        &folder.join("aligned.jsonl"),
        &[
            row("How do I begin to move more?", walk),
            row("My knee hurts.", "You ran on a gravel path, I guess."),
            row("What is a nap?", "By rule 4 (plain words), a short sleep."),
        ],
    );
    fs::copy(root().join("dummy_data/identity.json"), folder.join("identity.json")).unwrap();
    run_to(
        0,
        folder,
        "merge-and-filter --meta-prompt-file health.toml --data-file-pattern aligned.jsonl \
         --dummy-data-file identity.json --max-identity-rows 20 --allow-unfinished --output-file \
         sft.json",
    );
    let rows: Vec<TrainingRow> =
        read_rows(folder.join("sft.json")).unwrap().map(Result::unwrap).collect();
    assert_eq!(rows.len(), 21);
    let kept = rows.iter().find(|row| row.instruction == "How do I begin to move more?").unwrap();
    assert_eq!(kept.output, walk.replace("Salva", "Vita") + "\n\n### User\n");
    let names: Vec<&TrainingRow> =
        rows.iter().filter(|row| row.output.contains("the Lakeside clinic")).collect();
    assert!(!names.is_empty());
    assert!(rows.iter().all(|row| !row.output.contains("Dromedary")), "{rows:?}");
    let dropped = fs::read_to_string(folder.join("dropped.jsonl")).unwrap();
    let rules: Vec<&str> = ["black_list", "thoughts"]
        .into_iter()
        .filter(|rule| dropped.contains(&format!("\"rule\":\"{rule}\"")))
        .collect();
    assert_eq!(rules, ["black_list", "thoughts"], "{dropped}");
}
