use dromedary_command::{Bars, Excerpt, Excerpts, ReportPage, Table};

use super::{Report, Sample, SourceCounts};

impl Report {
    /// The report as a page for people.
    pub(super) fn page(&self) -> ReportPage {
        let mut page = ReportPage::new(format!("step 1: {}", self.command))
            .fact("version", &self.version)
            .fact("output", self.output.display().to_string())
            .fact("rows written", self.rows_out.to_string());
        if let Some(settings) = self.settings.as_object() {
            for (name, value) in settings.iter().filter(|(_, value)| !value.is_null()) {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                page = page.fact(name, text);
            }
        }
        page = page.table(self.counts_table()).table(self.reasons_table()).table(self.files());
        if !self.token_lengths.sources.is_empty() {
            page = page.bars(self.lengths());
        }
        let edits: Vec<&Sample> = self.samples.iter().filter(|s| s.edit.is_some()).collect();
        let drops: Vec<&Sample> = self.samples.iter().filter(|s| s.drop.is_some()).collect();
        page.excerpts(excerpts("Samples of edits", &edits))
            .excerpts(excerpts("Samples of rows left out", &drops))
    }

    fn counts_table(&self) -> Table {
        let table = Table::new("Rows", ["source", "in", "edited", "left out", "kept"]);
        let row = |name: &str, counts: &SourceCounts| {
            [
                name.to_owned(),
                counts.rows.to_string(),
                counts.edited.to_string(),
                counts.dropped_rows().to_string(),
                counts.kept.to_string(),
            ]
        };
        let mut all = SourceCounts::default();
        for counts in self.sources.values() {
            all.add(counts);
        }
        let table =
            self.sources.iter().fold(table, |table, (name, counts)| table.row(row(name, counts)));
        table.row(row("all", &all))
    }

    fn reasons_table(&self) -> Table {
        let mut all = SourceCounts::default();
        for counts in self.sources.values() {
            all.add(counts);
        }
        let mut columns = vec!["reason".to_owned()];
        columns.extend(self.sources.keys().cloned());
        columns.push("all".to_owned());
        let mut table = Table::new("Reasons", columns);
        let of = |counts: &SourceCounts, dropped: bool, reason: &String| {
            let reasons = if dropped { &counts.dropped } else { &counts.edits };
            reasons.get(reason).copied().unwrap_or(0).to_string()
        };
        let edits = all.edits.keys().map(|reason| (false, reason));
        for (dropped, reason) in edits.chain(all.dropped.keys().map(|reason| (true, reason))) {
            let what = if dropped { "left out" } else { "edited" };
            let mut row = vec![format!("{what}: {reason}")];
            row.extend(self.sources.values().map(|counts| of(counts, dropped, reason)));
            row.push(of(&all, dropped, reason));
            table = table.row(row);
        }
        table
    }

    fn files(&self) -> Table {
        let table = Table::new("Files", ["file", "rows", "bad rows", "BLAKE3"]);
        let hash = |hash: &Option<String>| hash.clone().unwrap_or_default();
        let table = self.inputs.iter().fold(table, |table, input| {
            let (rows, bad_rows) = (input.rows.to_string(), input.bad_rows.to_string());
            table.row([input.path.display().to_string(), rows, bad_rows, hash(&input.blake3)])
        });
        self.references.iter().fold(table, |table, file| {
            let (none, path) = (String::new, file.path.display().to_string());
            table.row([path, none(), none(), hash(&file.blake3)])
        })
    }

    fn lengths(&self) -> Bars {
        let lengths = &self.token_lengths;
        let bars = Bars::new("Lengths of the prompts kept", "tokens", lengths.width.into());
        lengths.sources.iter().fold(bars, |bars, (name, rows)| bars.series(name, rows.clone()))
    }
}

fn excerpts(title: &str, samples: &[&Sample]) -> Excerpts {
    let mut excerpts = Excerpts::new(title);
    for sample in samples {
        let reason = sample.edit.as_ref().or(sample.drop.as_ref());
        let mut caption = format!("{}: {} ", sample.source, reason.map_or("", String::as_str));
        caption.push_str(&format!("({})", sample.row));
        if !sample.detail.is_empty() {
            caption.push_str(&format!(": {}", sample.detail));
        }
        let before = if sample.after.is_some() { "before" } else { "text" };
        let mut texts = vec![(before.to_owned(), sample.before.clone())];
        texts.extend(sample.after.clone().map(|after| ("after".to_owned(), after)));
        excerpts.push(Excerpt { caption, texts });
    }
    excerpts
}
