//! Step 1 as a library: the rules of the pipeline with one of our own, and no near-duplicates.
//!
//! ```sh
//! cargo run --release --workspace --example own_rules -- dummy_data/dolly.jsonl prompts.json
//! ```

use std::path::Path;

use dromedary_prompt_cleaning::sources::{Offer, dolly};
use dromedary_prompt_cleaning::{
    Cleaner, Draft, Effect, LengthRule, Lists, NearDuplicates, NotEmpty, Pipeline, Result, Rule,
    Rules, Sketcher, TokenCounter,
};
use dromedary_records::RowWriter;

/// Ends every question with a question mark.
struct QuestionMark;

impl Rule for QuestionMark {
    fn name(&self) -> &'static str {
        "question mark"
    }

    fn apply(&self, draft: &mut Draft) -> Effect {
        let asks = ["what", "why", "how", "who"];
        let first = draft.instruction.split(' ').next().unwrap_or_default().to_lowercase();
        if asks.contains(&first.as_str()) && draft.instruction.ends_with(char::is_alphanumeric) {
            draft.instruction.push('?');
        }
        Effect::Untouched
    }
}

/// Reads Dolly's rows, and writes the prompts that the rules leave; gives their number.
pub fn prepare(input: &Path, output: &Path) -> Result<usize> {
    let lists = Lists::built_in();
    let counter = TokenCounter::open(None)?.into();
    let pipeline = Pipeline::new()
        .with(Cleaner::new(Rules::Corrected, lists.clone()))
        .with(QuestionMark)
        .with(NotEmpty)
        .with(LengthRule { counter, min: 2, max: 256, suffix: "" });
    let sketcher = Sketcher::new(0.8);
    let mut seen = NearDuplicates::new(0.8, &std::env::temp_dir())?;
    let mut writer = RowWriter::create(output)?;
    let mut written = 0;
    for row in dolly(input, lists)? {
        let Ok(Offer::Draft(draft)) = row?.content else { continue };
        let judged = pipeline.judge(draft);
        if judged.dropped.is_some() {
            continue;
        }
        if seen.admit(sketcher.sketch(&judged.draft.instruction))?.is_none() {
            writer.write(&judged.draft.into_prompt())?;
            written += 1;
        }
    }
    writer.finish()?;
    Ok(written)
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, input, output] = &args[..] else {
        return Err("usage: own_rules DOLLY.jsonl PROMPTS.json".into());
    };
    let written = prepare(Path::new(input), Path::new(output))?;
    std::io::Write::write_all(&mut std::io::stdout(), format!("{written} prompts\n").as_bytes())?;
    Ok(())
}
