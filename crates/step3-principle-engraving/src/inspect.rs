//! A data set as training would read it, for people to look at before any step.

use std::fmt;

use anstyle::{AnsiColor, Style};
use dromedary_tokenizer::Tokenizer;

use crate::{
    audit::{Audit, Side, percent},
    collate::Example,
    dataset::Dataset,
};

/// Classes of the histogram, at most.
const CLASSES: usize = 12;
/// Characters of the longest bar.
const BAR: usize = 40;
/// Rows without a target that are named.
const NAMED: usize = 5;
const LEARNED: Style = AnsiColor::Green.on_default();
const MARK: Style = Style::new().dimmed();
const HEADING: Style = Style::new().bold();

/// The audit of a data set and three of its rows, decoded from the tokens that the model reads: the
/// shortest, the one of middle length and the longest.
///
/// On a terminal the learned tokens are green and special tokens dim; elsewhere learned stretches stand between
/// `>>>` and `<<<`, special tokens in brackets.
pub struct Inspection<'a> {
    dataset: &'a Dataset,
    tokenizer: &'a Tokenizer,
    color: bool,
}

impl<'a> Inspection<'a> {
    /// Of `dataset`, which `tokenizer` encoded.
    pub fn new(dataset: &'a Dataset, tokenizer: &'a Tokenizer, color: bool) -> Self {
        Self { dataset, tokenizer, color }
    }

    fn heading(&self, f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
        writeln!(f, "\n{}", self.styled(HEADING, text))
    }

    fn styled(&self, style: Style, text: &str) -> String {
        if self.color { format!("{style}{text}{style:#}") } else { text.to_owned() }
    }

    /// Row numbers in order of length: shortest, middle, longest; fewer where there are fewer.
    fn shown(&self) -> Vec<usize> {
        let examples = &self.dataset.examples;
        let mut order: Vec<usize> = (0..examples.len()).collect();
        order.sort_by_key(|&row| (examples[row].input_ids.len(), row));
        let mut shown = match order[..] {
            [] => vec![],
            [shortest, .., longest] => vec![shortest, order[order.len() / 2], longest],
            [only] => vec![only],
        };
        shown.dedup();
        shown
    }

    fn row(&self, f: &mut fmt::Formatter<'_>, example: &Example) -> fmt::Result {
        let Example { example_id, input_ids, truncated_left, truncated_right, .. } = example;
        self.heading(
            f,
            &format!(
                "example_id {example_id}: {} tokens, {} learned",
                input_ids.len(),
                example.num_targets()
            ),
        )?;
        if *truncated_left > 0 {
            writeln!(f, "{}", self.mark(&format!("{truncated_left} tokens cut off")))?;
        }
        let mut done = 0;
        for learned in &example.learned {
            write!(f, "{}", self.spelled(&input_ids[done..learned.start], None, done == 0))?;
            if !self.color {
                write!(f, ">>>")?;
            }
            write!(f, "{}", self.spelled(&input_ids[learned.clone()], Some(LEARNED), false))?;
            if !self.color {
                write!(f, "<<<")?;
            }
            done = learned.end;
        }
        writeln!(f, "{}", self.spelled(&input_ids[done..], None, done == 0))?;
        if *truncated_right > 0 {
            writeln!(f, "{}", self.mark(&format!("{truncated_right} tokens cut off")))?;
        }
        Ok(())
    }

    fn mark(&self, text: &str) -> String {
        self.styled(MARK, &format!("[{text}]"))
    }

    /// The text of `ids` with special tokens by name; `first` where nothing stands before them.
    fn spelled(&self, ids: &[u32], style: Option<Style>, first: bool) -> String {
        let mut text = String::new();
        let mut at_start = first;
        for run in
            ids.chunk_by(|&a, &b| !self.tokenizer.is_special(a) && !self.tokenizer.is_special(b))
        {
            if self.tokenizer.is_special(run[0]) {
                let name = self.tokenizer.token(run[0]).unwrap_or_default();
                text += &self.styled(style.unwrap_or_default().dimmed(), &format!("[{name}]"));
                continue;
            }
            let decoded = match at_start {
                true => self.tokenizer.decode(run),
                false => self.tokenizer.decode_continuation(run),
            };
            at_start = false;
            let printable = printable(&decoded);
            text += &match style {
                Some(style) => self.styled(style, &printable),
                None => printable,
            };
        }
        text
    }
}

/// A row's text must not command the terminal.
fn printable(text: &str) -> String {
    let is_shown = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
    text.chars()
        .flat_map(|c| if is_shown(c) { vec![c] } else { c.escape_default().collect() })
        .collect()
}

impl fmt::Display for Inspection<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let audit = &self.dataset.audit;
        write_counts(f, audit)?;
        self.heading(f, "tokens of a row")?;
        write_histogram(f, &audit.lengths)?;
        for row in self.shown() {
            self.row(f, &self.dataset.examples[row])?;
        }
        Ok(())
    }
}

fn write_counts(f: &mut fmt::Formatter<'_>, audit: &Audit) -> fmt::Result {
    writeln!(f, "rows              {:>10}  {}", audit.rows, audit.format)?;
    let empty = audit.without_target.len();
    write!(f, "  without target  {empty:>10}")?;
    for (index, (row, example_id)) in audit.without_target.iter().take(NAMED).enumerate() {
        write!(f, "{}row {row} (example_id {example_id})", if index == 0 { "  " } else { ", " })?;
    }
    writeln!(f, "{}", if empty > NAMED { ", ..." } else { "" })?;
    for (name, count) in &audit.meta_prompts {
        writeln!(f, "  meta prompt     {count:>10}  {name}")?;
    }
    writeln!(f, "tokens            {:>10}", audit.tokens())?;
    if audit.has_conversations() {
        write_side(f, "conversation", "right", &audit.conversation)?;
    } else {
        write_side(f, "source", "left", &audit.source)?;
        write_side(f, "target", "right", &audit.target)?;
    }
    let share = percent(audit.learned_tokens, audit.tokens());
    let Audit { learned_tokens, stretches, .. } = audit;
    write!(f, "  learned         {learned_tokens:>10}  {share:.1} % of all")?;
    if audit.has_conversations() {
        write!(f, ", in {stretches} stretches")?;
    }
    writeln!(f)?;
    writeln!(
        f,
        "stop marks        {:>10}  {:.1} % of the targets end in one",
        audit.stop_marks,
        audit.stop_mark_percent()
    )
}

fn write_side(f: &mut fmt::Formatter<'_>, name: &str, end: &str, side: &Side) -> fmt::Result {
    let Side { tokens, longest, max_len, truncated_rows, truncated_tokens } = side;
    writeln!(f, "  {name:<14}  {tokens:>10}  longest {longest} of {max_len}")?;
    writeln!(
        f,
        "    truncated     {truncated_rows:>10}  rows on the {end}, {truncated_tokens} tokens"
    )
}

/// Bars of `#`, a class a line; the width of a class is a power of two.
fn write_histogram(f: &mut fmt::Formatter<'_>, lengths: &[usize]) -> fmt::Result {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let width = longest.div_ceil(CLASSES).next_power_of_two();
    let mut classes = vec![0_usize; longest.div_ceil(width)];
    for &length in lengths {
        classes[length.saturating_sub(1) / width] += 1;
    }
    let highest = classes.iter().copied().max().unwrap_or(1);
    for (class, &count) in classes.iter().enumerate() {
        let (low, high) = (class * width + 1, (class + 1) * width);
        let bar = "#".repeat((count * BAR).div_ceil(highest));
        writeln!(f, "  {low:>6} to {high:>6}  {count:>8}  {bar}")?;
    }
    Ok(())
}
