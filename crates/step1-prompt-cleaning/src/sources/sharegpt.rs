use std::path::Path;

use super::{Fault, Offer, Offers, SourceRows, Value, is_parquet, rows};
use crate::text::strip;
use crate::{DropReason, Result, Source};

const HUMAN_MARK: &str = "<human>:";
const BOT_MARK: &str = "<bot>:";

/// The first turns of the conversations of a file. A row has `conversations`, a list of turns with
/// `from` and the text under `value` or `markdown`, or `text` with the marks `<human>:` and `<bot>:`.
///
/// # Errors
/// As [`rows`].
pub fn sharegpt(path: &Path) -> Result<Offers> {
    let columns: &[&str] = if is_parquet(path) { &["conversations"] } else { &[] };
    Ok(SourceRows::new(rows(path, columns)?, read))
}

fn read(mut row: Value) -> std::result::Result<Offer, Fault> {
    match row.take("conversations") {
        Value::List { first, len } => opening_turn(*first, len),
        Value::Absent => row
            .take_text("text")
            .map(|text| between_marks(&text))
            .map_err(|fault| Fault(format!("has no `conversations`, and {}", fault.0))),
        other => Err(Fault(format!("`conversations` is {}, not a list", other.kind()))),
    }
}

fn opening_turn(mut turn: Value, turns: usize) -> std::result::Result<Offer, Fault> {
    if turns < 2 {
        return Ok(Offer::unfit(DropReason::SingleTurn, shown_text(turn)));
    }
    let of_first_turn = |fault: Fault| Fault(format!("the first turn {}", fault.0));
    if turn.take_text("from").map_err(of_first_turn)? != "human" {
        return Ok(Offer::unfit(DropReason::NotHumanFirst, shown_text(turn)));
    }
    let text = match turn.take_optional_text("value").map_err(of_first_turn)? {
        Some(value) => value,
        None => turn.take_text("markdown").map_err(|_| {
            Fault("the first turn has neither a `value` nor a `markdown` text".to_owned())
        })?,
    };
    Ok(Offer::prompt(Source::ShareGpt, text))
}

/// The text of a turn that is no prompt, as far as it has one.
fn shown_text(mut turn: Value) -> String {
    ["value", "markdown"]
        .into_iter()
        .find_map(|field| turn.take_text(field).ok())
        .unwrap_or_default()
}

fn between_marks(text: &str) -> Offer {
    let Some((_, behind_human)) = text.split_once(HUMAN_MARK) else {
        return Offer::unfit(DropReason::NotHumanFirst, text);
    };
    match behind_human.split_once(BOT_MARK) {
        Some((prompt, _)) => Offer::prompt(Source::ShareGpt, strip(prompt).to_owned()),
        None => Offer::unfit(DropReason::SingleTurn, text),
    }
}
