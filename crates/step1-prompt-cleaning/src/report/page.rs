use std::collections::BTreeMap;

use dromedary_command::{Bars, Cell, Excerpt, Excerpts, ReportPage, Table, grouped};
use serde_json::Value;

use super::{Report, Sample, SourceCounts};
use crate::{DropReason, Edit};

impl Report {
    /// The report as a page for people.
    pub(super) fn page(&self) -> ReportPage {
        let all = self.all();
        let mut page = ReportPage::new(format!("step 1: {}", self.command))
            .figure("rows read", grouped(all.rows))
            .figure("edited", grouped(all.edited))
            .figure("left out", grouped(all.dropped_rows()))
            .figure("kept", grouped(all.kept))
            .table(self.rows_table(&all));
        if !all.dropped.is_empty() {
            let note = "Each row that is left out has one reason.";
            page = page.table(self.reasons("Left out", note, &all, |counts| &counts.dropped));
        }
        if !all.edits.is_empty() {
            let note = "A row may be edited for several reasons, and be left out afterwards.";
            page = page.table(self.reasons("Edited", note, &all, |counts| &counts.edits));
        }
        if !self.token_lengths.sources.is_empty() {
            page = page.bars(self.lengths());
        }
        page.excerpts(self.excerpts("Samples of rows left out", |sample| sample.drop.as_deref()))
            .excerpts(self.excerpts("Samples of edits", |sample| sample.edit.as_deref()))
            .table(self.files())
            .facts("Settings", self.settings())
    }

    fn rows_table(&self, all: &SourceCounts) -> Table {
        let cells = |name: &str, counts: &SourceCounts| {
            [
                Cell::text(name),
                Cell::count(counts.rows),
                Cell::count(counts.edited),
                Cell::count(counts.dropped_rows()),
                Cell::count(counts.kept),
                Cell::share(counts.kept, counts.rows),
            ]
        };
        let columns = ["source", "read", "edited", "left out", "kept", "share kept"];
        let sources = self.sources.iter();
        sources
            .fold(Table::new("Rows", columns), |table, (name, counts)| {
                table.row(cells(name, counts))
            })
            .sum(cells("all", all))
    }

    /// How many rows of each source every reason has.
    fn reasons(
        &self,
        title: &str,
        note: &str,
        all: &SourceCounts,
        of: fn(&SourceCounts) -> &BTreeMap<String, u64>,
    ) -> Table {
        let sources = self.sources.keys().map(String::as_str);
        let columns = ["reason", "meaning"].into_iter().chain(sources);
        let columns = columns.chain(["all", "share of rows read"]);
        let rows = |counts: &SourceCounts, reason| of(counts).get(reason).copied().unwrap_or(0);
        of(all).keys().fold(Table::new(title, columns).note(note), |table, reason| {
            let mut row = vec![Cell::text(reason), Cell::text(meaning(reason))];
            row.extend(self.sources.values().map(|counts| Cell::count(rows(counts, reason))));
            row.push(Cell::count(rows(all, reason)));
            row.push(Cell::share(rows(all, reason), all.rows));
            table.row(row)
        })
    }

    fn files(&self) -> Table {
        let table = Table::new("Files", ["file", "rows", "bad rows", "BLAKE3"]);
        let hash = |hash: &Option<String>| Cell::hash(hash.clone().unwrap_or_default());
        let table = self.inputs.iter().fold(table, |table, input| {
            let (rows, bad_rows) = (Cell::count(input.rows), Cell::count(input.bad_rows));
            let path = Cell::text(input.path.display().to_string());
            table.row([path, rows, bad_rows, hash(&input.blake3)])
        });
        self.references.iter().fold(table, |table, file| {
            let path = Cell::text(file.path.display().to_string());
            table.row([path, Cell::text(""), Cell::text(""), hash(&file.blake3)])
        })
    }

    fn lengths(&self) -> Bars {
        let lengths = &self.token_lengths;
        let bars = Bars::new("Lengths of the prompts kept", "tokens", lengths.width.into());
        lengths.sources.iter().fold(bars, |bars, (name, rows)| bars.series(name, rows.clone()))
    }

    /// The samples that `reason` gives a reason of, those of each together.
    fn excerpts(&self, title: &str, reason: fn(&Sample) -> Option<&str>) -> Excerpts {
        let mut samples: Vec<(&str, &Sample)> =
            self.samples.iter().filter_map(|sample| Some((reason(sample)?, sample))).collect();
        samples.sort_by_key(|&(reason, _)| reason);
        let mut excerpts = Excerpts::new(title);
        for (reason, sample) in samples {
            excerpts.push(&format!("{reason}: {}", meaning(reason)), sample.excerpt());
        }
        excerpts
    }

    fn settings(&self) -> Vec<(String, String)> {
        let given = self.settings.as_object().into_iter().flatten();
        let given = given.filter(|(_, value)| !value.is_null() && **value != Value::Array(vec![]));
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let version = ("version".to_owned(), self.version.clone());
        std::iter::once(version)
            .chain(given.map(|(name, value)| (name.clone(), text(value))))
            .collect()
    }
}

impl Sample {
    fn excerpt(&self) -> Excerpt {
        let start: String = self.after.as_ref().unwrap_or(&self.before).chars().take(80).collect();
        let what = if self.detail.is_empty() { start } else { self.detail.clone() };
        let excerpt = Excerpt::new(format!("{} {what}", self.row));
        match &self.after {
            None => excerpt.text("text", &*self.before),
            Some(after) => {
                excerpt.cut_text("before", &self.before, after).text("after", after.as_str())
            }
        }
    }
}

/// What the name of a reason means.
fn meaning(reason: &str) -> &'static str {
    let dropped = DropReason::ALL.into_iter().map(|drop| (drop.name(), drop.meaning()));
    let edited = Edit::ALL.into_iter().map(|edit| (edit.name(), edit.meaning()));
    dropped.chain(edited).find(|(name, _)| *name == reason).map_or("", |(_, meaning)| meaning)
}
