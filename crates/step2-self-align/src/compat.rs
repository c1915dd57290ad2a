//! The filter of Dromedary's `merge_and_fileter_self_align_with_dummy.py`, row for row.
//!
//! Its texts are fixed here: `--compat dromedary` compares with rows that it made with its own
//! prompt, so that other principles must not change the result.

use std::collections::BTreeSet;

use dromedary_records::{AlignedResponse, FinishReason};

use crate::filter::{END_OF_ANSWER, Kept, Rule, SHORT_PROMPT, Verdict};
use crate::text::python_strip;

const AFFIRMATION: &str = "I am a helpful, ethical, and reliable assistant.";
const ANSWER: &str = "\n\nWatson:";
const NEXT_TURN: &str = "\n\nUser:";

/// Complete answers below this many characters are dropped, the end mark counted.
const SHORT_ANSWER: usize = 160;

/// Substrings that drop a row: marks of the form, then words of the original's exemplars.
const BLACK_LIST: [&str; 15] = [
    "User:",
    "Good job! Clear context",
    "Watson (auto reply):",
    "Could you please provide more details or context so I can try to assist you better?",
    "president",
    "President",
    "Zhiqing",
    "\u{5b59}\u{4e4b}\u{6e05}",
    "1, 1, 4",
    "weather",
    "or by watching the news or checking your local",
    "alpaca",
    "Alpaca",
    "birthday party",
    "Birthday party",
];

pub(crate) fn judge(row: &AlignedResponse) -> Verdict {
    match filter(row) {
        Ok(kept) => Verdict::Kept(kept),
        Err(rule) => Verdict::Dropped(rule),
    }
}

fn filter(row: &AlignedResponse) -> Result<Kept, Rule> {
    let output = as_the_original_has_it(row);
    if !output.starts_with(AFFIRMATION) {
        return Err(Rule::NoAffirmation);
    }
    let (_, answer) = output.split_once(ANSWER).ok_or(Rule::NoAnswer)?;
    let answer = without_repeats(python_strip(answer));
    let answer = match answer.split_once(NEXT_TURN) {
        Some((answer, _)) => {
            let answer = python_strip(answer).to_owned() + END_OF_ANSWER;
            if answer.chars().count() < SHORT_ANSWER {
                return Err(Rule::Short);
            }
            answer
        }
        None => match answer.rsplit_once(' ') {
            Some((before, _)) => before.to_owned(),
            None => answer,
        },
    };
    let long = |text: &str| text.chars().count() > SHORT_PROMPT;
    for text in [&row.instruction, &row.input] {
        if long(text) && answer.contains(text.as_str()) {
            return Err(Rule::Echo);
        }
    }
    if BLACK_LIST.iter().any(|word| answer.contains(word)) {
        return Err(Rule::BlackList);
    }
    if answer.is_empty() {
        return Err(Rule::Empty);
    }
    let (instruction, input) = if long(&row.input) {
        (row.input.clone(), String::new())
    } else {
        (row.instruction.clone(), row.input.clone())
    };
    Ok(Kept { instruction, input, output: answer.replace("Watson", "Dromedary") })
}

/// Sentencepiece drops the space before the first word when it decodes, and the original never
/// stops at the user's turn: its text goes on behind the mark that ended ours.
fn as_the_original_has_it(row: &AlignedResponse) -> String {
    let mut output = row.output.strip_prefix(' ').unwrap_or(&row.output).to_owned();
    if row.finish_reason == FinishReason::Stop && !output.contains(NEXT_TURN) {
        output.push_str(NEXT_TURN);
    }
    output
}

/// Ends the text before the first clause that occurred before.
fn without_repeats(answer: &str) -> String {
    let is_mark =
        |character: char| matches!(character, '\n' | '.' | '?' | '!' | ';' | ':' | ',' | '`');
    let mut seen = BTreeSet::new();
    let mut kept = String::with_capacity(answer.len());
    for clause in answer.split_inclusive(is_mark) {
        let only_a_mark = clause.len() == 1 && clause.chars().all(is_mark);
        if !seen.insert(clause) && !only_a_mark {
            break;
        }
        kept.push_str(clause);
    }
    python_strip(&kept).to_owned()
}
