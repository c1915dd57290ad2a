use std::fmt;
use std::path::Path;

use super::{Fault, SourceRows, Value, rows};
use crate::Result;

/// The collections that OpenOrca draws from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stratum {
    /// Super-NaturalInstructions.
    Niv,
    /// FLAN 2021.
    Flan,
    /// P3, the prompts of T0.
    T0,
    /// Chain of thought.
    Cot,
}

impl Stratum {
    /// Every stratum, in the order of precedence: in the ids and between equal questions.
    pub const ALL: [Stratum; 4] = [Stratum::Niv, Stratum::Flan, Stratum::T0, Stratum::Cot];

    /// The name, as it stands in the ids.
    pub fn name(self) -> &'static str {
        match self {
            Stratum::Niv => "niv",
            Stratum::Flan => "flan",
            Stratum::T0 => "t0",
            Stratum::Cot => "cot",
        }
    }

    /// The name in reports.
    pub(crate) fn reported_name(self) -> &'static str {
        match self {
            Stratum::Niv => "openorca/niv",
            Stratum::Flan => "openorca/flan",
            Stratum::T0 => "openorca/t0",
            Stratum::Cot => "openorca/cot",
        }
    }

    /// The first stratum whose name is a part of the id.
    pub fn of_id(id: &str) -> Option<Stratum> {
        Stratum::ALL.into_iter().find(|stratum| id.contains(stratum.name()))
    }
}

impl fmt::Display for Stratum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A question of OpenOrca, as it stands in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOrcaQuestion {
    /// Where OpenOrca has it from.
    pub stratum: Stratum,
    /// The question.
    pub question: String,
}

impl OpenOrcaQuestion {
    /// The questions of a file; only its `id` and `question` are read.
    ///
    /// # Errors
    /// As [`rows`].
    pub fn open(path: &Path) -> Result<SourceRows<OpenOrcaQuestion>> {
        Ok(SourceRows::new(rows(path, &["id", "question"])?, OpenOrcaQuestion::read))
    }

    fn read(mut row: Value) -> std::result::Result<OpenOrcaQuestion, Fault> {
        let id = row.take_text("id")?;
        let stratum = Stratum::of_id(&id).ok_or_else(|| {
            Fault(format!("is of an unknown stratum: its id {id:?} has none of niv, flan, t0, cot"))
        })?;
        Ok(OpenOrcaQuestion { stratum, question: row.take_text("question")? })
    }
}
