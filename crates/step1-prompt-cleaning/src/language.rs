use std::sync::Arc;

use whatlang::Lang;

use crate::{Draft, DropReason, Dropped, Effect, Error, Lists, Result, Rule};

/// Leaves out prompts that are surely in another language.
///
/// Short texts and programs give the detector little to go by: what it is not sure of stays.
#[derive(Clone, Debug)]
pub struct LanguageRule {
    kept: Vec<Lang>,
}

impl LanguageRule {
    /// Keeps these languages: codes of the lists such as `en`, or the detector's own such as `eng`.
    ///
    /// # Errors
    /// A code that is in neither.
    pub fn new(codes: &[String], lists: &Arc<Lists>) -> Result<LanguageRule> {
        let language = |code: &String| {
            let name = lists.language_codes.get(code).unwrap_or(code);
            Lang::from_code(name).ok_or_else(|| Error::UnknownLanguage {
                code: code.clone(),
                known: lists.language_codes.keys().cloned().collect(),
            })
        };
        Ok(LanguageRule { kept: codes.iter().map(language).collect::<Result<_>>()? })
    }
}

impl Rule for LanguageRule {
    fn name(&self) -> &'static str {
        "language"
    }

    fn apply(&self, draft: &mut Draft) -> Effect {
        let detected = whatlang::detect(&draft.instruction);
        let foreign =
            detected.filter(|info| info.is_reliable() && !self.kept.contains(&info.lang()));
        foreign.map(|info| Dropped::with(DropReason::OtherLanguage, info.lang().eng_name())).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_language_of_the_detector_has_a_code_and_every_code_a_language() {
        let lists = Lists::built_in();
        for name in lists.language_codes.values() {
            assert!(Lang::from_code(name).is_some(), "{name}");
        }
        for language in Lang::all() {
            assert!(
                lists.language_codes.values().any(|name| name == language.code()),
                "{language:?}"
            );
        }
    }
}
