//! `report.md`: what went in and out, how fast, and what the two models say.

use std::{
    collections::BTreeMap,
    fmt::Write,
    fs,
    io::{BufRead, BufReader},
    path::Path,
};

use anyhow::{Context, Result};
use serde::{Deserialize, de::DeserializeOwned};

/// Everything that the page tells.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) data: String,
    pub(super) model: String,
    pub(super) seconds: Vec<(String, f64)>,
    pub(super) cleaning: Vec<Cleaning>,
    pub(super) answers: Vec<AnswerRow>,
    pub(super) generation: Vec<RunMetrics>,
    pub(super) filter: Filter,
    pub(super) training: Vec<TrainingStep>,
    pub(super) questions: Vec<Question>,
}

/// `report.json` of a command of step 1.
#[derive(Debug, Deserialize)]
pub(super) struct Cleaning {
    command: String,
    rows_out: u64,
    sources: BTreeMap<String, SourceCounts>,
}

#[derive(Debug, Deserialize)]
struct SourceCounts {
    rows: u64,
    edited: u64,
    kept: u64,
    dropped: BTreeMap<String, u64>,
}

/// A row of step 2, as far as it is counted.
#[derive(Debug, Deserialize)]
pub(super) struct AnswerRow {
    finish_reason: String,
}

/// The closing line of a generation in `metrics.jsonl`; the lines of rows have none of it.
#[derive(Debug, Deserialize)]
pub(super) struct RunMetrics {
    rows: u64,
    output_tokens: u64,
    prefill_seconds: f64,
    decode_seconds: f64,
}

/// `merge_report.json` of step 2.
#[derive(Debug, Deserialize)]
pub(super) struct Filter {
    rows: u64,
    kept: u64,
    dropped: BTreeMap<String, u64>,
    identity: u64,
}

/// A line of step 3's `metrics.jsonl`.
#[derive(Debug, Deserialize)]
pub(super) struct TrainingStep {
    step: u64,
    loss: f64,
    tokens: u64,
    seconds: f64,
}

/// A question and what the models say to it.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) text: String,
    pub(super) base: String,
    pub(super) engraved: String,
}

/// Reads a JSON file.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("cannot understand {}", path.display()))
}

/// Reads the lines of a JSONL file that have the fields of `T`; other lines are of another kind.
pub(super) fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let unread = || format!("cannot read {}", path.display());
    let file = fs::File::open(path).with_context(unread)?;
    let mut rows = Vec::new();
    for line in BufReader::new(file).lines() {
        if let Ok(row) = serde_json::from_str(&line.with_context(unread)?) {
            rows.push(row);
        }
    }
    Ok(rows)
}

impl Report {
    /// The page in Markdown.
    pub(super) fn render(&self) -> String {
        let mut page = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut page);
        page
    }

    fn write(&self, page: &mut String) -> std::fmt::Result {
        writeln!(page, "# Demo\n\nModel: {}. Prompts: {}.\n", self.model, self.data)?;
        self.write_rows(page)?;
        self.write_speed(page)?;
        self.write_losses(page)?;
        self.write_answers(page)
    }

    fn write_rows(&self, page: &mut String) -> std::fmt::Result {
        writeln!(page, "## Rows in and out\n\n### Step 1: prompt cleaning\n")?;
        writeln!(page, "| command | source | in | edited | out | dropped |")?;
        writeln!(page, "|---|---|---:|---:|---:|---|")?;
        for cleaning in &self.cleaning {
            for (source, counts) in &cleaning.sources {
                let SourceCounts { rows, edited, kept, dropped } = counts;
                let (command, dropped) = (&cleaning.command, listed(dropped));
                writeln!(
                    page,
                    "| {command} | {source} | {rows} | {edited} | {kept} | {dropped} |"
                )?;
            }
            writeln!(page, "| {} | all | | | {} | |", cleaning.command, cleaning.rows_out)?;
        }
        let mut finished: BTreeMap<String, u64> = BTreeMap::new();
        for row in &self.answers {
            *finished.entry(row.finish_reason.clone()).or_default() += 1;
        }
        let Filter { rows, kept, dropped, identity } = &self.filter;
        writeln!(page, "\n### Step 2: self-alignment\n\n| | rows | |\n|---|---:|---|")?;
        writeln!(page, "| generate | {} | ended by: {} |", self.answers.len(), listed(&finished))?;
        writeln!(page, "| filter, in | {rows} | |")?;
        writeln!(page, "| filter, kept | {kept} | dropped: {} |", listed(dropped))?;
        writeln!(page, "| identity rows added | {identity} | |")?;
        writeln!(page, "| sft.json | {} | |\n", kept + identity)
    }

    fn write_speed(&self, page: &mut String) -> std::fmt::Result {
        writeln!(page, "## Speed\n\n| what | tokens | seconds | tokens/s |\n|---|---:|---:|---:|")?;
        let sum = |of: fn(&RunMetrics) -> f64| self.generation.iter().map(of).sum::<f64>();
        let tokens: u64 = self.generation.iter().map(|run| run.output_tokens).sum();
        let rows: u64 = self.generation.iter().map(|run| run.rows).sum();
        let decode = sum(|run| run.decode_seconds);
        let name = format!("generation, {rows} rows, decoding");
        writeln!(page, "{}", speed(&name, tokens, decode))?;
        let all = decode + sum(|run| run.prefill_seconds);
        writeln!(page, "{}", speed("the same with prefill", tokens, all))?;
        let tokens = self.training.iter().map(|step| step.tokens).sum();
        let seconds = self.training.iter().map(|step| step.seconds).sum();
        writeln!(page, "{}\n", speed("training, tokens read", tokens, seconds))?;
        writeln!(page, "| step | seconds |\n|---|---:|")?;
        for (step, seconds) in &self.seconds {
            writeln!(page, "| {step} | {seconds:.1} |")?;
        }
        writeln!(page)
    }

    fn write_losses(&self, page: &mut String) -> std::fmt::Result {
        /// So many lines of a longer training are shown.
        const SHOWN: usize = 20;
        writeln!(page, "## Losses\n\n| step | loss |\n|---:|---:|")?;
        let every = self.training.len().div_ceil(SHOWN).max(1);
        let last = self.training.len().saturating_sub(1);
        for (index, step) in self.training.iter().enumerate() {
            if index % every == 0 || index == last {
                writeln!(page, "| {} | {:.4} |", step.step, step.loss)?;
            }
        }
        writeln!(page)
    }

    fn write_answers(&self, page: &mut String) -> std::fmt::Result {
        writeln!(page, "## Answers\n\nBoth models read the same short system prompt; greedy.\n")?;
        writeln!(page, "| question | base | engraved |\n|---|---|---|")?;
        for Question { text, base, engraved } in &self.questions {
            writeln!(page, "| {} | {} | {} |", cell(text), cell(base), cell(engraved))?;
        }
        Ok(())
    }
}

fn speed(what: &str, tokens: u64, seconds: f64) -> String {
    let rate = if seconds > 0.0 { format!("{:.0}", tokens as f64 / seconds) } else { "-".into() };
    format!("| {what} | {tokens} | {seconds:.1} | {rate} |")
}

fn listed(counts: &BTreeMap<String, u64>) -> String {
    if counts.is_empty() {
        return "none".to_owned();
    }
    let counts: Vec<_> = counts.iter().map(|(reason, rows)| format!("{rows} {reason}")).collect();
    counts.join(", ")
}

/// A text as the cell of a table.
fn cell(text: &str) -> String {
    let mut cell = String::new();
    for character in text.trim().chars() {
        match character {
            '\n' => cell.push_str("<br>"),
            '\r' => {}
            '|' => cell.push_str("\\|"),
            '<' => cell.push_str("&lt;"),
            '&' => cell.push_str("&amp;"),
            '`' | '*' | '_' | '#' | '[' => {
                cell.push('\\');
                cell.push(character);
            }
            other => cell.push(other),
        }
    }
    cell
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed<T: DeserializeOwned>(json: &str) -> T {
        serde_json::from_str(json).unwrap()
    }

    fn report() -> Report {
        let step = |step, loss| TrainingStep { step, loss, tokens: 300, seconds: 1.5 };
        Report {
            data: "the first 2 of dummy_data".into(),
            model: "SmolLM2".into(),
            seconds: vec![("generate".into(), 12.34)],
            cleaning: vec![parsed(
                r#"{"command": "clean-and-merge", "rows_out": 5, "other": 1, "sources": {
                    "dolly": {"rows": 9, "edited": 1, "edits": {}, "kept": 5,
                              "dropped": {"empty": 1, "too_long": 3}}}}"#,
            )],
            answers: vec![
                AnswerRow { finish_reason: "stop".into() },
                AnswerRow { finish_reason: "length".into() },
                AnswerRow { finish_reason: "stop".into() },
            ],
            generation: vec![parsed(
                r#"{"run": "end", "rows": 3, "output_tokens": 400, "decode_steps": 200,
                    "prefill_seconds": 2.0, "decode_seconds": 8.0}"#,
            )],
            filter: parsed(
                r#"{"rows": 3, "kept": 2, "dropped": {"affirmation": 1}, "identity": 2}"#,
            ),
            training: (1..=50).map(|number| step(number, 3.0 / number as f64)).collect(),
            questions: vec![Question {
                text: "A | B?".into(),
                base: " one\ntwo <b>".into(),
                engraved: "`x`".into(),
            }],
        }
    }

    #[test]
    fn the_page_tells_rows_reasons_speed_losses_and_answers() {
        let page = report().render();
        for line in [
            "| clean-and-merge | dolly | 9 | 1 | 5 | 1 empty, 3 too_long |",
            "| generate | 3 | ended by: 1 length, 2 stop |",
            "| filter, kept | 2 | dropped: 1 affirmation |",
            "| sft.json | 4 | |",
            "| generation, 3 rows, decoding | 400 | 8.0 | 50 |",
            "| the same with prefill | 400 | 10.0 | 40 |",
            "| training, tokens read | 15000 | 75.0 | 200 |",
            "| generate | 12.3 |",
            "| 1 | 3.0000 |",
            "| 50 | 0.0600 |",
            r"| A \| B? | one<br>two &lt;b> | \`x\` |",
        ] {
            assert!(page.lines().any(|other| other == line), "{line}\n{page}");
        }
        let (_, losses) = page.split_once("## Losses").unwrap();
        let losses = losses.split("##").next().unwrap();
        assert_eq!(losses.lines().filter(|line| line.starts_with("| ")).count(), 1 + 18);
    }

    #[test]
    fn lines_of_another_kind_are_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let run = r#"{"rows": 1, "output_tokens": 2, "prefill_seconds": 0, "decode_seconds": 1}"#;
        fs::write(&path, format!("{{\"id\": \"a\", \"output_tokens\": 2}}\n{run}\n")).unwrap();
        assert_eq!(read_lines::<RunMetrics>(&path).unwrap().len(), 1);
        let error = read_json::<Filter>(&path).unwrap_err();
        assert!(error.to_string().contains("metrics.jsonl"), "{error}");
    }

    #[test]
    fn no_time_is_no_rate() {
        assert_eq!(speed("x", 5, 0.0), "| x | 5 | 0.0 | - |");
    }
}
