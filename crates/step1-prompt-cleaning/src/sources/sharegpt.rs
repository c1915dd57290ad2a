use std::path::Path;

use super::{Fault, Row, Value, is_parquet, rows};
use crate::text::strip;
use crate::{DropReason, Result};

const HUMAN_MARK: &str = "<human>:";
const BOT_MARK: &str = "<bot>:";

/// The first turn of a ShareGPT conversation, or why it is no prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShareGptOpening {
    /// What the human asks.
    Prompt(String),
    /// The conversation does not open with a question and an answer.
    Unfit(DropReason),
}

impl ShareGptOpening {
    /// The openings of a file. A row has `conversations`, a list of turns with `from` and the text
    /// under `value` or `markdown`, or `text` with the marks `<human>:` and `<bot>:`.
    ///
    /// # Errors
    /// As [`rows`].
    pub fn open(path: &Path) -> Result<impl Iterator<Item = Result<Row<ShareGptOpening>>> + use<>> {
        let columns: &[&str] = if is_parquet(path) { &["conversations"] } else { &[] };
        let rows = rows(path, columns)?;
        Ok(rows.map(|row| Ok(row?.read(ShareGptOpening::read))))
    }

    fn read(mut row: Value) -> std::result::Result<ShareGptOpening, Fault> {
        match row.take("conversations") {
            Value::List { first, len } => opening_turn(*first, len),
            Value::Absent => row
                .take_text("text")
                .map(|text| between_marks(&text))
                .map_err(|fault| Fault(format!("has no `conversations`, and {}", fault.0))),
            other => Err(Fault(format!("`conversations` is {}, not a list", other.kind()))),
        }
    }
}

fn opening_turn(mut turn: Value, turns: usize) -> std::result::Result<ShareGptOpening, Fault> {
    if turns < 2 {
        return Ok(ShareGptOpening::Unfit(DropReason::SingleTurn));
    }
    let of_first_turn = |fault: Fault| Fault(format!("the first turn {}", fault.0));
    if turn.take_text("from").map_err(of_first_turn)? != "human" {
        return Ok(ShareGptOpening::Unfit(DropReason::NotHumanFirst));
    }
    let text = match turn.take_optional_text("value").map_err(of_first_turn)? {
        Some(value) => value,
        None => turn.take_text("markdown").map_err(|_| {
            Fault("the first turn has neither a `value` nor a `markdown` text".to_owned())
        })?,
    };
    Ok(ShareGptOpening::Prompt(text))
}

fn between_marks(text: &str) -> ShareGptOpening {
    let Some((_, behind_human)) = text.split_once(HUMAN_MARK) else {
        return ShareGptOpening::Unfit(DropReason::NotHumanFirst);
    };
    match behind_human.split_once(BOT_MARK) {
        Some((prompt, _)) => ShareGptOpening::Prompt(strip(prompt).to_owned()),
        None => ShareGptOpening::Unfit(DropReason::SingleTurn),
    }
}
