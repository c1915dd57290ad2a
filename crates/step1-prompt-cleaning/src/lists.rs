use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use serde::{Deserialize, Serialize};
use toml::Table;

use crate::{Error, Result};

const DEFAULTS: &str = include_str!("../../../configs/step1_lists.toml");

static BUILT_IN: LazyLock<Arc<Lists>> = LazyLock::new(|| {
    Arc::new(toml::from_str(DEFAULTS).expect("the tests read the lists that are built in"))
});

/// The phrases, keywords and names that the rules look for; `configs/step1_lists.toml` has the
/// defaults and says what each is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lists {
    /// Stands before the text of a page.
    pub page_mark: String,
    /// Stand at the very start of a page.
    pub banners: Vec<String>,
    /// They and what is behind them are no text.
    pub footers: Vec<String>,
    /// The same, where one of the languages follows.
    pub language_block: String,
    /// Stand at the very end of a page, in the order in which they are tried.
    pub buttons: Vec<String>,
    /// Stands at the very end of a page before one of the languages.
    pub language_label: String,
    /// The languages of pages, in the order in which they are tried.
    pub languages: Vec<String>,
    /// What gives away tasks of natural-language inference.
    pub nli_keywords: Vec<String>,
    /// The categories of Dolly that are kept.
    pub dolly_categories: Vec<String>,
    /// From the codes of `--languages` to the detector's.
    pub language_codes: BTreeMap<String, String>,
}

impl Lists {
    /// The lists that are built in.
    pub fn built_in() -> Arc<Lists> {
        BUILT_IN.clone()
    }

    /// The lists of a TOML file over those that are built in; without a path, the latter.
    ///
    /// # Errors
    /// A file that cannot be read, unknown lists, values of the wrong type, empty phrases.
    pub fn open(path: Option<&Path>) -> Result<Arc<Lists>> {
        let Some(path) = path else {
            return Ok(Lists::built_in());
        };
        let text = fs::read_to_string(path)
            .map_err(|source| Error::Open { path: path.to_owned(), source })?;
        Lists::parse(&text)
            .map(Arc::new)
            .map_err(|message| Error::Lists { path: path.to_owned(), message })
    }

    fn parse(text: &str) -> std::result::Result<Lists, String> {
        let message = |error: toml::de::Error| error.message().to_owned();
        let mut lists: Table = DEFAULTS.parse().map_err(message)?;
        lists.extend(text.parse::<Table>().map_err(|error| error.to_string())?);
        let lists: Lists = lists.try_into().map_err(message)?;
        lists.check()?;
        Ok(lists)
    }

    /// An empty phrase would stand everywhere.
    fn check(&self) -> std::result::Result<(), String> {
        let Lists { page_mark, language_block, language_label, .. } = self;
        let phrases = [page_mark, language_block, language_label].into_iter();
        let lists =
            [&self.banners, &self.footers, &self.buttons, &self.languages, &self.nli_keywords];
        if phrases.chain(lists.into_iter().flatten()).any(String::is_empty) {
            return Err("a phrase is empty; to look for nothing, leave the list empty".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_leaves_out_keeps_its_default() {
        let lists = Lists::parse("buttons = [\"Like\"]\n").unwrap();
        assert_eq!(lists.buttons, ["Like"]);
        assert_eq!(
            Lists { buttons: Lists::built_in().buttons.clone(), ..lists },
            *BUILT_IN.clone()
        );
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("botons = []", "botons"),
            ("buttons = 3", "expected a sequence"),
            ("buttons = [\"\"]", "a phrase is empty"),
            ("buttons = [", "line 1"),
        ] {
            let message = Lists::parse(text).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
