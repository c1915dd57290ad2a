//! Removes what web pages leave around a prompt. Every rule cuts at an end of the text, so that
//! the result is a slice of it.

use std::sync::LazyLock;

use regex::Regex;

use crate::text::{is_space, strip};
use crate::{Rules, Source};

const PAGE_MARK: &str = "1 / 1";
/// "Translate now", the button of a Korean browser extension.
const KOREAN_BUTTON: &str = "\u{c9c0}\u{ae08} \u{bc88}\u{c5ed}\u{d558}\u{ae30}";
const LANGUAGE_BLOCK: &str = "\n \n Language: ";
const SHARE_PROMPT: &str = "Share Prompt";
const TRANSLATE_NOW: &str = "Translate now";
const LANGUAGE_LABEL: &str = "Language: ";
const BING_BANNER: &str = "~The following is a conversation with Bing, not ChatGPT.~";

/// The order matters under [`Rules::Dromedary`]: each name is tried once, in turn.
pub const LANGUAGES: [&str; 30] = [
    "Italian",
    "Polish",
    "Russian",
    "Slovak",
    "Portuguese",
    "Romanian",
    "Danish",
    "Swedish",
    "Norwegian",
    "English",
    "Spanish",
    "French",
    "Czech",
    "German",
    "Finnish",
    "Estonian",
    "Latvian",
    "Lithuanian",
    "Persian",
    "Hungarian",
    "Hebrew",
    "Greek",
    "Arabic",
    "Korean",
    "Japanese",
    "Chinese",
    "Chinese (Traditional)",
    "Chinese (Simplified)",
    "Thai",
    "Vietnamese",
];

/// The name of a page's author above `1 / 1` is no longer than this many characters.
const MAX_HEADER_LEN: usize = 40;
/// A page counts its variants with no more digits than this.
const MAX_COUNTER_DIGITS: usize = 4;

/// A counter at the start, with Python's `\d` (decimal digits of every script) and `\s`.
static LEADING_COUNTER: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"\A\p{Nd}+[\s\x1c-\x1f]*/[\s\x1c-\x1f]*\p{Nd}+"));
/// A counter at the end; Python's `$` also matches before one final newline.
static TRAILING_COUNTER: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"\p{Nd}+[\s\x1c-\x1f]*/[\s\x1c-\x1f]*\p{Nd}+\n?\z"));

fn pattern(pattern: &str) -> Regex {
    Regex::new(pattern).expect("the pattern is a literal that the tests compile")
}

/// Why a text was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Edit {
    /// White space at the ends.
    Whitespace,
    /// A counter of page variants, `2 / 3`, at the start.
    LeadingCounter,
    /// Such a counter at the end.
    TrailingCounter,
    /// What precedes a page's `1 / 1`, and that mark.
    PageMark,
    /// The Korean button "translate now" and what follows it.
    KoreanButton,
    /// A language selector between blank lines and what follows it.
    LanguageBlock,
    /// A final `Share Prompt`.
    SharePrompt,
    /// A final `Translate now`.
    TranslateNow,
    /// A final `Language: <name>`.
    LanguageName,
    /// The banner of a page that recorded a conversation with Bing.
    BingBanner,
}

impl Edit {
    /// Every reason.
    pub const ALL: [Edit; 10] = [
        Edit::Whitespace,
        Edit::LeadingCounter,
        Edit::TrailingCounter,
        Edit::PageMark,
        Edit::KoreanButton,
        Edit::LanguageBlock,
        Edit::SharePrompt,
        Edit::TranslateNow,
        Edit::LanguageName,
        Edit::BingBanner,
    ];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Edit::Whitespace => "whitespace",
            Edit::LeadingCounter => "leading_counter",
            Edit::TrailingCounter => "trailing_counter",
            Edit::PageMark => "page_mark",
            Edit::KoreanButton => "korean_button",
            Edit::LanguageBlock => "language_block",
            Edit::SharePrompt => "share_prompt",
            Edit::TranslateNow => "translate_now",
            Edit::LanguageName => "language_name",
            Edit::BingBanner => "bing_banner",
        }
    }
}

/// A text without its page chrome, and the rules that changed it, each named once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cleaned<'t> {
    /// What is left: a slice of the text, without white space at its ends.
    pub text: &'t str,
    /// In the order of first use.
    pub edits: Vec<Edit>,
}

impl<'t> Cleaned<'t> {
    fn new(text: &'t str) -> Cleaned<'t> {
        Cleaned { text, edits: Vec::new() }
    }

    fn keep(&mut self, kept: &'t str, edit: Edit) {
        if kept.len() != self.text.len() && !self.edits.contains(&edit) {
            self.edits.push(edit);
        }
        self.text = kept;
    }

    /// Strips behind another cut, which already counts as the edit.
    fn strip(&mut self) {
        self.text = strip(self.text);
    }

    fn drop_suffix(&mut self, suffix: &str, edit: Edit) {
        if let Some(rest) = self.text.strip_suffix(suffix) {
            self.keep(rest, edit);
            self.strip();
        }
    }
}

/// Cleans a prompt of `source`.
///
/// Dromedary's rules treat every source as a scraped page, so that `24/7 support` becomes `support`
/// and `Simplify 6/8` becomes `Simplify`. [`Rules::Corrected`] removes page chrome from ShareGPT
/// prompts only, and only where it stands as a page prints it: a counter is a paragraph of its own,
/// a button a line of its own. Cleaning twice is then the same as cleaning once.
///
/// ```
/// use dromedary_prompt_cleaning::{Rules, Source, clean};
///
/// let page = "1 / 1\n\nWhy is the sea salty?\n\nShare Prompt";
/// assert_eq!(clean(Rules::Corrected, Source::ShareGpt, page).text, "Why is the sea salty?");
/// let fraction = "Simplify 6/8";
/// assert_eq!(clean(Rules::Corrected, Source::ShareGpt, fraction).text, fraction);
/// assert_eq!(clean(Rules::Dromedary, Source::ShareGpt, fraction).text, "Simplify");
/// ```
pub fn clean(rules: Rules, source: Source, text: &str) -> Cleaned<'_> {
    let mut cleaned = Cleaned::new(text);
    match rules {
        Rules::Dromedary => clean_as_dromedary(&mut cleaned),
        Rules::Corrected => {
            cleaned.keep(strip(text), Edit::Whitespace);
            if source == Source::ShareGpt {
                remove_page_chrome(&mut cleaned);
            }
        }
    }
    cleaned
}

fn clean_as_dromedary(cleaned: &mut Cleaned<'_>) {
    if let Some(counter) = LEADING_COUNTER.find(cleaned.text) {
        cleaned.keep(&cleaned.text[counter.end()..], Edit::LeadingCounter);
    }
    // The newline that `$` allows goes with the counter: no later rule can see it before the strip.
    if let Some(counter) = TRAILING_COUNTER.find(cleaned.text) {
        cleaned.keep(&cleaned.text[..counter.start()], Edit::TrailingCounter);
    }
    if let Some((_, rest)) = cleaned.text.split_once(PAGE_MARK) {
        cleaned.keep(rest, Edit::PageMark);
    }
    for (mark, edit) in [(KOREAN_BUTTON, Edit::KoreanButton), (LANGUAGE_BLOCK, Edit::LanguageBlock)]
    {
        if let Some((rest, _)) = cleaned.text.split_once(mark) {
            cleaned.keep(rest, edit);
        }
    }
    cleaned.keep(strip(cleaned.text), Edit::Whitespace);
    cleaned.drop_suffix(SHARE_PROMPT, Edit::SharePrompt);
    cleaned.drop_suffix(TRANSLATE_NOW, Edit::TranslateNow);
    for language in LANGUAGES {
        if cleaned.text.strip_suffix(language).is_some_and(|rest| rest.ends_with(LANGUAGE_LABEL)) {
            let rest_len = cleaned.text.len() - language.len() - LANGUAGE_LABEL.len();
            cleaned.keep(&cleaned.text[..rest_len], Edit::LanguageName);
            cleaned.strip();
        }
    }
    if let Some(rest) = cleaned.text.strip_prefix(BING_BANNER) {
        cleaned.keep(rest, Edit::BingBanner);
        cleaned.strip();
    }
}

/// Applies the rules until none changes anything: pages print their chrome in several orders.
fn remove_page_chrome(cleaned: &mut Cleaned<'_>) {
    loop {
        let len = cleaned.text.len();
        for (rule, edit) in CHROME {
            if let Some(rest) = rule(cleaned.text) {
                cleaned.keep(rest, edit);
                cleaned.strip();
            }
        }
        if cleaned.text.len() == len {
            return;
        }
    }
}

/// What a rule leaves of a text that it applies to.
type ChromeRule = fn(&str) -> Option<&str>;

const CHROME: [(ChromeRule, Edit); 9] = [
    (|text| text.strip_prefix(BING_BANNER), Edit::BingBanner),
    (without_leading_counter, Edit::LeadingCounter),
    (without_trailing_counter, Edit::TrailingCounter),
    (without_header, Edit::PageMark),
    (without_korean_button, Edit::KoreanButton),
    (without_language_block, Edit::LanguageBlock),
    (|text| without_last_line(text, |line| line == SHARE_PROMPT), Edit::SharePrompt),
    (|text| without_last_line(text, |line| line == TRANSLATE_NOW), Edit::TranslateNow),
    (|text| without_last_line(text, is_language_name), Edit::LanguageName),
];

fn without_leading_counter(text: &str) -> Option<&str> {
    let (paragraph, rest) = first_paragraph(text);
    is_counter(paragraph).then_some(rest)
}

fn without_trailing_counter(text: &str) -> Option<&str> {
    let (rest, line) = text.rsplit_once('\n')?;
    (is_counter(line) && ends_in_blank_line(rest)).then_some(rest)
}

/// Cuts the name of the author and `1 / 1`, each a paragraph of its own.
fn without_header(text: &str) -> Option<&str> {
    let (header, behind_header) = first_paragraph(text);
    let (mark, rest) = first_paragraph(behind_header);
    let is_name = header.chars().count() <= MAX_HEADER_LEN
        && !header.contains('\n')
        && !header.ends_with(['.', '?', '!', ':', ',', ';']);
    (is_name && strip(mark) == PAGE_MARK && !strip(rest).is_empty()).then_some(rest)
}

fn without_korean_button(text: &str) -> Option<&str> {
    let starts_a_line = |&(start, _): &(usize, &str)| {
        text[..start].trim_end_matches([' ', '\t']).is_empty()
            || text[..start].trim_end_matches([' ', '\t']).ends_with('\n')
    };
    text.match_indices(KOREAN_BUTTON).find(starts_a_line).map(|(start, _)| &text[..start])
}

fn without_language_block(text: &str) -> Option<&str> {
    let names_a_language = |&(start, mark): &(usize, &str)| {
        let behind = &text[start + mark.len()..];
        LANGUAGES.iter().any(|language| behind.starts_with(language))
    };
    text.match_indices(LANGUAGE_BLOCK).find(names_a_language).map(|(start, _)| &text[..start])
}

fn without_last_line(text: &str, is_chrome: impl Fn(&str) -> bool) -> Option<&str> {
    let (rest, line) = text.rsplit_once('\n').unwrap_or(("", text));
    is_chrome(strip(line)).then_some(rest)
}

fn is_language_name(line: &str) -> bool {
    line.strip_prefix(LANGUAGE_LABEL).is_some_and(|name| LANGUAGES.contains(&name))
}

/// Whether the line is `i / n` with spaces, as pages print it, and i is no more than n.
fn is_counter(line: &str) -> bool {
    let Some((variant, count)) = strip(line).split_once('/') else {
        return false;
    };
    let number = |digits: &str| -> Option<u32> {
        let plain =
            digits.len() <= MAX_COUNTER_DIGITS && digits.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| digits.parse().ok()).flatten()
    };
    let spaced = variant.ends_with(is_space) && count.starts_with(is_space);
    match (number(strip(variant)), number(strip(count))) {
        (Some(variant), Some(count)) => spaced && 1 <= variant && variant <= count,
        _ => false,
    }
}

/// Splits behind the first paragraph: at the first line of nothing but white space.
fn first_paragraph(text: &str) -> (&str, &str) {
    let mut end = 0;
    for line in text.split_inclusive('\n') {
        if end > 0 && strip(line).is_empty() {
            return (strip(&text[..end]), &text[end..]);
        }
        end += line.len();
    }
    (strip(text), "")
}

fn ends_in_blank_line(text: &str) -> bool {
    let (_, last) = text.rsplit_once('\n').unwrap_or(("", text));
    strip(last).is_empty()
}
