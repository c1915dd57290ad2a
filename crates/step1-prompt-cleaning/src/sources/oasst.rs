use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use super::{Fault, Offer, Offers, RawRows, SourceRows, Value, is_parquet, rows};
use crate::{DropReason, Result, Rules, Source, dedup::Fingerprint};

const COLUMNS: [&str; 3] = ["message_id", "parent_id", "text"];

/// The messages of a flat export (`message_id`, `parent_id`, `text`), or the trees of a tree export
/// (`prompt` with `text` and `replies`); root messages that have an answer are prompts.
///
/// # Errors
/// As [`rows`].
pub fn oasst(path: &Path) -> Result<Offers> {
    oasst_part(path, Arc::new(AnsweredMessages::of([path])?))
}

/// One file of an export in several, as [`oasst`]; the answers may be in another one.
///
/// # Errors
/// As [`rows`].
pub fn oasst_part(path: &Path, answered: Arc<AnsweredMessages>) -> Result<Offers> {
    Ok(SourceRows::new(messages(path)?, move |message| read(message, &answered)))
}

/// The messages of a flat export that somebody answered.
///
/// In a flat export the answer to a message is another row, so its files are read twice.
#[derive(Clone, Debug, Default)]
pub struct AnsweredMessages {
    ids: BTreeSet<Fingerprint>,
}

impl AnsweredMessages {
    /// Collects them; none are found in a tree export, which does not need them.
    ///
    /// # Errors
    /// As [`rows`].
    pub fn of(paths: impl IntoIterator<Item = impl AsRef<Path>>) -> Result<AnsweredMessages> {
        let mut ids = BTreeSet::new();
        for path in paths {
            for row in messages(path.as_ref())? {
                if let Ok(mut message) = row?.parse().content
                    && let Value::Text(parent) = message.take("parent_id")
                {
                    ids.insert(id_fingerprint(&parent));
                }
            }
        }
        Ok(AnsweredMessages { ids })
    }
}

fn messages(path: &Path) -> Result<RawRows> {
    rows(path, if is_parquet(path) { &COLUMNS } else { &[] })
}

fn read(mut message: Value, answered: &AnsweredMessages) -> std::result::Result<Offer, Fault> {
    match message.take("prompt") {
        Value::Absent => read_flat(message, answered),
        tree @ Value::Object(_) => read_tree(tree),
        other => Err(Fault(format!("`prompt` is {}, not an object", other.kind()))),
    }
}

fn read_flat(mut message: Value, answered: &AnsweredMessages) -> std::result::Result<Offer, Fault> {
    let id = message.take_text("message_id")?;
    let text = message.take_text("text")?;
    Ok(if message.take_optional_text("parent_id")?.is_some() {
        Offer::unfit(DropReason::NotARoot, text)
    } else if !answered.ids.contains(&id_fingerprint(&id)) {
        Offer::unfit(DropReason::NoReply, text)
    } else {
        Offer::prompt(Source::Oasst1, text)
    })
}

fn read_tree(mut prompt: Value) -> std::result::Result<Offer, Fault> {
    let text =
        prompt.take_text("text").map_err(|fault| Fault(format!("the prompt {}", fault.0)))?;
    match prompt.take("replies") {
        Value::List { len: 1.., .. } => Ok(Offer::prompt(Source::Oasst1, text)),
        Value::List { .. } | Value::Absent | Value::Null => {
            Ok(Offer::unfit(DropReason::NoReply, text))
        }
        other => Err(Fault(format!("`replies` is {}, not a list", other.kind()))),
    }
}

fn id_fingerprint(id: &str) -> Fingerprint {
    Fingerprint::of(Rules::Dromedary, id)
}
