//! Rules that a text cites, as `12 (dated knowledge)`.

use crate::principles::PrincipleRule;

/// A rule that a text cites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Citation {
    /// Place of the rule of that name, from 0.
    pub(crate) rule: usize,
    /// The number that the text gives it, from 1: models get it wrong more often than the name.
    pub(crate) number: Option<usize>,
}

impl Citation {
    /// Whether number and name are of one rule.
    pub(crate) fn is_right(self) -> bool {
        self.number == Some(self.rule + 1)
    }
}

/// All citations of a text, in the order of the rules. The name decides which rule is meant; before
/// it stands any number.
pub(crate) fn citations(text: &str, rules: &[PrincipleRule]) -> Vec<Citation> {
    let mut found = Vec::new();
    for (rule, PrincipleRule { name, .. }) in rules.iter().enumerate() {
        for (at, _) in text.match_indices(&format!(" ({name})")) {
            if let Some(digits) = last_digits(&text[..at]) {
                found.push(Citation { rule, number: digits.parse().ok() });
            }
        }
    }
    found
}

/// What looks like a citation and names no rule, as it stands.
pub(crate) fn unknown_citations<'t>(text: &'t str, rules: &[PrincipleRule]) -> Vec<&'t str> {
    let citation = |(at, _)| {
        let digits = last_digits(&text[..at])?;
        let behind = &text[at + 2..];
        let name = &behind[..behind.find(')')?];
        let known = rules.iter().any(|rule| rule.name == name);
        (!known).then(|| &text[at - digits.len()..at + 2 + name.len() + 1])
    };
    text.match_indices(" (").filter_map(citation).collect()
}

fn last_digits(text: &str) -> Option<&str> {
    let before = text.trim_end_matches(|character: char| character.is_ascii_digit());
    let digits = &text[before.len()..];
    (!digits.is_empty()).then_some(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Vec<PrincipleRule> {
        let rule = |name: &str| PrincipleRule { name: name.to_owned(), text: String::new() };
        ["ethical", "dated knowledge"].map(rule).to_vec()
    }

    #[test]
    fn names_decide_and_numbers_are_checked() {
        let text = "By rules 2 (dated knowledge), 7 (ethical) and fair (ethical) I answer.";
        let found = citations(text, &rules());
        let expected = [(0, Some(7)), (1, Some(2))];
        assert_eq!(found, expected.map(|(rule, number)| Citation { rule, number }));
        assert!(found[1].is_right() && !found[0].is_right());
    }

    #[test]
    fn what_names_no_rule_is_shown() {
        let text = "By rules 1 (ethical), 13 (kind) and exit (west), 5 (open";
        assert_eq!(unknown_citations(text, &rules()), ["13 (kind)"]);
    }
}
