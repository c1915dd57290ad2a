//! Removes what web pages leave around a prompt. Every rule cuts at an end of the text, so that
//! the result is a slice of it.

use std::sync::{Arc, LazyLock};

use regex::Regex;

use crate::text::{is_space, strip};
use crate::{Lists, Rules, Source};

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
    /// A footer and what follows it, such as the button of a browser extension.
    Footer,
    /// A language selector between blank lines and what follows it.
    LanguageBlock,
    /// A button at the end, such as `Share Prompt`.
    Button,
    /// A final `Language: <name>`.
    LanguageName,
    /// A banner at the start.
    Banner,
}

impl Edit {
    /// Every reason.
    pub const ALL: [Edit; 9] = [
        Edit::Whitespace,
        Edit::LeadingCounter,
        Edit::TrailingCounter,
        Edit::PageMark,
        Edit::Footer,
        Edit::LanguageBlock,
        Edit::Button,
        Edit::LanguageName,
        Edit::Banner,
    ];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Edit::Whitespace => "whitespace",
            Edit::LeadingCounter => "leading_counter",
            Edit::TrailingCounter => "trailing_counter",
            Edit::PageMark => "page_mark",
            Edit::Footer => "footer",
            Edit::LanguageBlock => "language_block",
            Edit::Button => "button",
            Edit::LanguageName => "language_name",
            Edit::Banner => "banner",
        }
    }

    /// What it takes away, in the page of a report.
    pub fn meaning(self) -> &'static str {
        match self {
            Edit::Whitespace => "white space at the ends",
            Edit::LeadingCounter => "a counter of page variants at the start",
            Edit::TrailingCounter => "a counter of page variants at the end",
            Edit::PageMark => "a page's mark and what stands before it",
            Edit::Footer => "a footer and what stands behind it",
            Edit::LanguageBlock => "a choice of languages and what stands behind it",
            Edit::Button => "the text of a button at the end",
            Edit::LanguageName => "the name of a language at the end",
            Edit::Banner => "a banner at the start",
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

/// Removes page chrome.
///
/// Dromedary's rules treat every source as a scraped page, so that `24/7 support` becomes `support`
/// and `Simplify 6/8` becomes `Simplify`. [`Rules::Corrected`] removes page chrome from ShareGPT
/// prompts only, and only where it stands as a page prints it: a counter is a paragraph of its own,
/// a button a line of its own. Cleaning twice is then the same as cleaning once.
///
/// ```
/// use dromedary_prompt_cleaning::{Cleaner, Lists, Rules, Source};
///
/// let corrected = Cleaner::new(Rules::Corrected, Lists::built_in());
/// let page = "1 / 1\n\nWhy is the sea salty?\n\nShare Prompt";
/// assert_eq!(corrected.clean(Source::ShareGpt, page).text, "Why is the sea salty?");
/// let fraction = "Simplify 6/8";
/// assert_eq!(corrected.clean(Source::ShareGpt, fraction).text, fraction);
/// let dromedary = Cleaner::new(Rules::Dromedary, Lists::built_in());
/// assert_eq!(dromedary.clean(Source::ShareGpt, fraction).text, "Simplify");
/// ```
#[derive(Clone, Debug)]
pub struct Cleaner {
    rules: Rules,
    lists: Arc<Lists>,
}

impl Cleaner {
    /// Cleans after these rules, looking for these phrases.
    pub fn new(rules: Rules, lists: Arc<Lists>) -> Cleaner {
        Cleaner { rules, lists }
    }

    /// Cleans a prompt of the source.
    pub fn clean<'t>(&self, source: Source, text: &'t str) -> Cleaned<'t> {
        let mut cleaned = Cleaned::new(text);
        match self.rules {
            Rules::Dromedary => clean_as_dromedary(&self.lists, &mut cleaned),
            Rules::Corrected => {
                cleaned.keep(strip(text), Edit::Whitespace);
                if source == Source::ShareGpt {
                    remove_page_chrome(&self.lists, &mut cleaned);
                }
            }
        }
        cleaned
    }
}

fn clean_as_dromedary(lists: &Lists, cleaned: &mut Cleaned<'_>) {
    if let Some(counter) = LEADING_COUNTER.find(cleaned.text) {
        cleaned.keep(&cleaned.text[counter.end()..], Edit::LeadingCounter);
    }
    // The newline that `$` allows goes with the counter: no later rule can see it before the strip.
    if let Some(counter) = TRAILING_COUNTER.find(cleaned.text) {
        cleaned.keep(&cleaned.text[..counter.start()], Edit::TrailingCounter);
    }
    if let Some((_, rest)) = cleaned.text.split_once(&lists.page_mark) {
        cleaned.keep(rest, Edit::PageMark);
    }
    for footer in &lists.footers {
        if let Some((rest, _)) = cleaned.text.split_once(footer) {
            cleaned.keep(rest, Edit::Footer);
        }
    }
    if let Some((rest, _)) = cleaned.text.split_once(&lists.language_block) {
        cleaned.keep(rest, Edit::LanguageBlock);
    }
    cleaned.keep(strip(cleaned.text), Edit::Whitespace);
    for button in &lists.buttons {
        cleaned.drop_suffix(button, Edit::Button);
    }
    for language in &lists.languages {
        let behind_label = |text: &str| {
            text.strip_suffix(language)?.strip_suffix(&lists.language_label).map(str::len)
        };
        if let Some(len) = behind_label(cleaned.text) {
            cleaned.keep(&cleaned.text[..len], Edit::LanguageName);
            cleaned.strip();
        }
    }
    for banner in &lists.banners {
        if let Some(rest) = cleaned.text.strip_prefix(banner) {
            cleaned.keep(rest, Edit::Banner);
            cleaned.strip();
        }
    }
}

/// Applies the rules until none changes anything: pages print their chrome in several orders.
fn remove_page_chrome(lists: &Lists, cleaned: &mut Cleaned<'_>) {
    loop {
        let len = cleaned.text.len();
        for (rule, edit) in CHROME {
            if let Some(rest) = rule(lists, cleaned.text) {
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
type ChromeRule = for<'t> fn(&Lists, &'t str) -> Option<&'t str>;

const CHROME: [(ChromeRule, Edit); 8] = [
    (without_banner, Edit::Banner),
    (|_, text| without_leading_counter(text), Edit::LeadingCounter),
    (|_, text| without_trailing_counter(text), Edit::TrailingCounter),
    (without_header, Edit::PageMark),
    (without_footer, Edit::Footer),
    (without_language_block, Edit::LanguageBlock),
    (without_button, Edit::Button),
    (without_language_name, Edit::LanguageName),
];

fn without_banner<'t>(lists: &Lists, text: &'t str) -> Option<&'t str> {
    lists.banners.iter().find_map(|banner| text.strip_prefix(banner))
}

fn without_leading_counter(text: &str) -> Option<&str> {
    let (paragraph, rest) = first_paragraph(text);
    is_counter(paragraph).then_some(rest)
}

fn without_trailing_counter(text: &str) -> Option<&str> {
    let (rest, line) = text.rsplit_once('\n')?;
    (is_counter(line) && ends_in_blank_line(rest)).then_some(rest)
}

/// Cuts the name of the author and the page mark, each a paragraph of its own.
fn without_header<'t>(lists: &Lists, text: &'t str) -> Option<&'t str> {
    let (header, behind_header) = first_paragraph(text);
    let (mark, rest) = first_paragraph(behind_header);
    let is_name = header.chars().count() <= MAX_HEADER_LEN
        && !header.contains('\n')
        && !header.ends_with(['.', '?', '!', ':', ',', ';']);
    (is_name && strip(mark) == lists.page_mark && !strip(rest).is_empty()).then_some(rest)
}

fn without_footer<'t>(lists: &Lists, text: &'t str) -> Option<&'t str> {
    let starts_a_line = |start: usize| {
        let before = text[..start].trim_end_matches([' ', '\t']);
        before.is_empty() || before.ends_with('\n')
    };
    lists.footers.iter().find_map(|footer| {
        let mut starts = text.match_indices(footer).map(|(start, _)| start);
        starts.find(|&start| starts_a_line(start)).map(|start| &text[..start])
    })
}

fn without_language_block<'t>(lists: &Lists, text: &'t str) -> Option<&'t str> {
    let names_a_language = |&(start, mark): &(usize, &str)| {
        let behind = &text[start + mark.len()..];
        lists.languages.iter().any(|language| behind.starts_with(language))
    };
    let mut blocks = text.match_indices(&lists.language_block);
    blocks.find(names_a_language).map(|(start, _)| &text[..start])
}

fn without_button<'t>(lists: &Lists, text: &'t str) -> Option<&'t str> {
    let (rest, line) = last_line(text);
    lists.buttons.iter().any(|button| button == line).then_some(rest)
}

fn without_language_name<'t>(lists: &Lists, text: &'t str) -> Option<&'t str> {
    let (rest, line) = last_line(text);
    let name = line.strip_prefix(&lists.language_label)?;
    lists.languages.iter().any(|language| language == name).then_some(rest)
}

/// What precedes the last line, and the line.
fn last_line(text: &str) -> (&str, &str) {
    let (rest, line) = text.rsplit_once('\n').unwrap_or(("", text));
    (rest, strip(line))
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
