//! Conversations about who the assistant is, for every model that is trained on the rows.

use std::path::Path;

use dromedary_records::read_rows;
use serde::Deserialize;

use crate::filter::{Compat, END_OF_ANSWER, Kept};
use crate::principles::Names;
use crate::{Error, Result};

/// Names that stand in the identity conversations that Dromedary took over from Vicuna.
const VICUNA: &str = "Vicuna";
const LMSYS: &str = "Large Model Systems Organization (LMSYS)";
const THE_LMSYS: &str = "the Large Model Systems Organization (LMSYS)";

/// What Dromedary puts in their place.
const DROMEDARY: &str = "Dromedary";
const SELF_ALIGN: &str = "the Self-Align team, a joint effort between CMU and IBM";

#[derive(Debug, Deserialize)]
struct Conversation {
    conversations: Vec<Turn>,
}

#[derive(Debug, Deserialize)]
struct Turn {
    from: String,
    value: String,
}

/// Reads conversations and fills in the names: `{product}` and `{maker}`, and those that
/// Dromedary replaces in Vicuna's file.
///
/// The first question and the first answer of each are taken. The answer is complete and ends in
/// the mark of the user's turn; Dromedary's identity rows have none, which teaches the model to
/// go on talking behind them.
pub(crate) fn read(path: &Path, names: &Names, compat: Option<Compat>) -> Result<Vec<Kept>> {
    read_rows::<Conversation>(path)?
        .zip(1..)
        .map(|(conversation, row)| {
            let wrong = |message: &str| Error::Identity {
                path: path.to_owned(),
                row,
                message: message.to_owned(),
            };
            let turns = conversation?.conversations;
            let [question, answer, ..] = turns.as_slice() else {
                return Err(wrong("has fewer than two turns"));
            };
            if question.from != "human" || answer.from != "gpt" {
                return Err(wrong("does not begin with a turn of `human` and one of `gpt`"));
            }
            let output = match compat {
                Some(Compat::Dromedary) => filled(&answer.value, names, compat),
                None => filled(answer.value.trim(), names, compat) + END_OF_ANSWER,
            };
            let instruction = match compat {
                Some(Compat::Dromedary) => question.value.clone(),
                None => filled(question.value.trim(), names, compat),
            };
            Ok(Kept { instruction, input: String::new(), output })
        })
        .collect()
}

fn filled(text: &str, names: &Names, compat: Option<Compat>) -> String {
    let (product, maker) = match compat {
        Some(Compat::Dromedary) => (DROMEDARY, SELF_ALIGN),
        None => (names.product.as_str(), names.maker.as_str()),
    };
    text.replace(THE_LMSYS, maker)
        .replace(LMSYS, maker)
        .replace(VICUNA, product)
        .replace("{product}", product)
        .replace("{maker}", maker)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Principles;
    use std::fs;

    fn rows(text: &str, compat: Option<Compat>) -> Result<Vec<Kept>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity.json");
        fs::write(&path, text).unwrap();
        read(&path, &Principles::built_in().unwrap().names, compat)
    }

    const ROWS: &str = r#"[
        {"id": "1", "conversations": [
            {"from": "human", "value": "Are you {product}?"},
            {"from": "gpt", "value": "Yes, {product} by {maker}. "},
            {"from": "human", "value": "Fine."}]},
        {"id": "2", "conversations": [
            {"from": "human", "value": "Who made Vicuna?"},
            {"from": "gpt", "value": "Vicuna is by the Large Model Systems Organization (LMSYS)."}]}
    ]"#;

    #[test]
    fn names_are_filled_in_and_answers_end() {
        let rows = rows(ROWS, None).unwrap();
        assert_eq!(rows[0].instruction, "Are you Dromedary?");
        assert_eq!(rows[0].output, "Yes, Dromedary by the Self-Align team.\n\n### User\n");
        assert_eq!(rows[1].instruction, "Who made Dromedary?");
        assert_eq!(rows[1].output, "Dromedary is by the Self-Align team.\n\n### User\n");
    }

    #[test]
    fn compat_fills_in_what_the_original_does() {
        let rows = rows(ROWS, Some(Compat::Dromedary)).unwrap();
        assert_eq!(rows[1].instruction, "Who made Vicuna?");
        assert_eq!(
            rows[1].output,
            "Dromedary is by the Self-Align team, a joint effort between CMU and IBM."
        );
    }

    #[test]
    fn a_conversation_without_an_answer_is_named() {
        let text = r#"[{"conversations": [{"from": "human", "value": "x"}]}]"#;
        let message = rows(text, None).unwrap_err().to_string();
        assert!(message.contains("identity.json: conversation 1: has fewer"), "{message}");
        let text = r#"[{"conversations": [{"from": "gpt", "value": "x"},
            {"from": "human", "value": "x"}]}]"#;
        assert!(rows(text, None).unwrap_err().to_string().contains("`human`"));
    }
}
