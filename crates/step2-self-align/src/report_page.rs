//! The report as a page that people read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dromedary_command::{
    Bars, Cell, Excerpt, Excerpts, Lines, Ranking, ReportPage, Table, grouped,
};
use dromedary_files::write_atomic;
use dromedary_records::FinishReason;

use crate::Result;
use crate::merge::MergeConfig;
use crate::metrics::{Beat, Line};
use crate::report::{CitedRule, Report, Sample, SourceReport, Tally};
use crate::shards::{metrics_path, whole_rows};

/// The curves of a run have no more points than this.
const POINTS: usize = 240;

/// Writes `report.html`: what the filter kept and dropped of these files, and how they were made.
pub(crate) fn write(tally: &Tally, config: &MergeConfig, shards: &[PathBuf]) -> Result<()> {
    let html = page(tally, config, &Beats::read(shards)?).render()?;
    Ok(write_atomic(&config.page_file, html.as_bytes())?)
}

fn page(tally: &Tally, config: &MergeConfig, beats: &Beats) -> ReportPage {
    let report = &tally.report;
    let share = 100.0 * report.kept as f64 / report.rows.max(1) as f64;
    let mut page = ReportPage::new("step 2: what was kept of the answers")
        .figure("rows", grouped(report.rows))
        .figure("kept", format!("{} ({share:.1} %)", grouped(report.kept)))
        .figure("dropped", grouped(report.rows - report.kept))
        .figure("identity rows added", grouped(report.identity))
        .table(rules_table(report))
        .excerpts(samples(tally));
    if !report.citations.is_empty() {
        page = page.ranking(citations(report));
    }
    page = page.bars(lengths(report)).table(finish_reasons(report));
    beats.add_to(page).facts("Settings and files", facts(config))
}

fn facts(config: &MergeConfig) -> [(&'static str, String); 5] {
    let built_in = || "built in".to_owned();
    let principles = config.meta_prompt_file.as_ref().map(|path| path.display().to_string());
    [
        ("files", config.data_file_pattern.clone()),
        ("training rows", config.output_file.display().to_string()),
        ("dropped rows", config.dropped_file.display().to_string()),
        ("filter", config.compat.map_or_else(built_in, |_| "that of Dromedary".to_owned())),
        ("meta prompt", principles.unwrap_or_else(built_in)),
    ]
}

/// Rules by source; those that dropped nothing are left out.
fn rules_table(report: &Report) -> Table {
    let mut columns = vec!["rows".to_owned()];
    columns.extend(report.sources.keys().cloned());
    columns.extend(["all".to_owned(), "share".to_owned()]);
    let table = Table::new("Kept and dropped", columns)
        .note("By rule and by the source of the prompts. The first rule that fails drops a row.");
    let line = |name: String, of: &dyn Fn(&SourceReport) -> u64, all: u64| {
        let mut cells = vec![Cell::text(name)];
        cells.extend(report.sources.values().map(|source| Cell::count(of(source))));
        cells.extend([Cell::count(all), Cell::share(all, report.rows)]);
        cells
    };
    let table = table.row(line("kept".to_owned(), &|source| source.kept, report.kept));
    let table = report.dropped.iter().fold(table, |table, (rule, &count)| {
        let of_rule = |source: &SourceReport| source.rules.get(rule).copied().unwrap_or(0);
        table.row(line(format!("dropped: {rule}"), &of_rule, count))
    });
    table.sum(line("all".to_owned(), &|source| source.kept + source.dropped, report.rows))
}

fn samples(tally: &Tally) -> Excerpts {
    let mut excerpts = Excerpts::new("Samples");
    let dropped = tally.report.dropped.keys().copied().map(Some);
    for rule in dropped.chain([None]) {
        let title = rule.map_or_else(|| "kept".to_owned(), |rule| format!("dropped: {rule}"));
        for sample in tally.samples(rule) {
            excerpts.push(&title, excerpt(sample));
        }
    }
    excerpts
}

fn excerpt(sample: &Sample) -> Excerpt {
    let mut caption = format!("{} ({})", sample.source, sample.id);
    if let Some(reason) = &sample.reason {
        caption.push_str(": ");
        caption.push_str(reason);
    }
    let excerpt = Excerpt::new(caption).text("prompt", &sample.prompt);
    if sample.output.is_empty() {
        return excerpt;
    }
    excerpt.text("thoughts and answer", &sample.output)
}

fn citations(report: &Report) -> Ranking {
    let sources: Vec<&String> = report.sources.keys().collect();
    let never: Vec<String> = (1..)
        .zip(&report.citations)
        .filter(|(_, rule)| rule.rows == 0)
        .map(|(number, rule)| format!("{number} ({})", rule.name))
        .collect();
    let never = match never.as_slice() {
        [] => "Every rule is cited.".to_owned(),
        never => format!("Never cited: {}.", never.join(", ")),
    };
    let note = format!(
        "Rows whose thoughts cite a rule by number and name. {} rows cite none. {never}",
        report.citing_nothing
    );
    let mut ranking =
        Ranking::new("Principles in the thoughts", note, sources.iter().map(|name| name.as_str()));
    let mut rules: Vec<(usize, &CitedRule)> = (1..).zip(&report.citations).collect();
    rules.sort_by_key(|(number, rule)| (std::cmp::Reverse(rule.rows), *number));
    for (number, rule) in rules {
        let counts =
            sources.iter().map(|name| rule.sources.get(*name).copied().unwrap_or(0)).collect();
        let mut remark = format!("{} kept", rule.kept);
        if rule.misnumbered > 0 {
            remark.push_str(&format!(", {} with another number", rule.misnumbered));
        }
        ranking = ranking.row(format!("{number} ({})", rule.name), counts, remark);
    }
    ranking
}

fn lengths(report: &Report) -> Bars {
    let lengths = &report.answer_words;
    Bars::new("Lengths of the answers", "words", lengths.width)
        .series("kept", lengths.kept.clone())
        .series("dropped", lengths.dropped.clone())
}

fn finish_reasons(report: &Report) -> Table {
    let name = |reason: &FinishReason| match reason {
        FinishReason::Eos => "the model ended its text",
        FinishReason::Stop => "a stop string appeared",
        FinishReason::Length => "cut by length",
        FinishReason::Rejected => "rejected, nothing was generated",
    };
    let table = Table::new("Why generation ended", ["reason", "rows", "share"]);
    report.finish_reasons.iter().fold(table, |table, (reason, &rows)| {
        table.row([Cell::text(name(reason)), Cell::count(rows), Cell::share(rows, report.rows)])
    })
}

/// Minutes and values.
type Curve = Vec<(f64, f64)>;

/// What the groups' metrics tell over time.
#[derive(Debug, Default)]
struct Beats {
    beats: Vec<Beat>,
}

impl Beats {
    /// Of the files of metrics that stand beside the shards; none where there are none.
    fn read(shards: &[PathBuf]) -> Result<Self> {
        let mut beats = Vec::new();
        let mut paths: Vec<PathBuf> = shards.iter().map(|shard| metrics_path(shard)).collect();
        paths.dedup();
        for path in paths.iter().filter(|path| path.is_file()) {
            for line in whole_rows::<Line>(path)? {
                if let Line::Beat(beat) = line? {
                    beats.push(beat);
                }
            }
        }
        Ok(Self { beats })
    }

    fn add_to(&self, page: ReportPage) -> ReportPage {
        if self.beats.is_empty() {
            return page;
        }
        let tokens: u64 = self.beats.iter().map(|beat| beat.tokens).sum();
        let seconds: f64 = self.beats.iter().map(|beat| beat.seconds).sum();
        let rate = tokens as f64 / seconds.max(f64::MIN_POSITIVE);
        let used: f64 = self.beats.iter().map(|beat| beat.slots_in_use * beat.seconds).sum();
        let had: f64 = self.beats.iter().map(|beat| beat.slots as f64 * beat.seconds).sum();
        let share = 100.0 * used / had.max(f64::MIN_POSITIVE);
        let (speed, slots) = self.curves();
        let hours = seconds / 3600.0;
        page.lines(
            Lines::new("Speed over time", "minutes", "tokens/s").series("all groups", speed),
            format!(
                "{} tokens in {hours:.2} hours of groups: {rate:.1} tokens/s a group",
                grouped(tokens)
            ),
        )
        .lines(
            Lines::new("Slot use over time", "minutes", "percent of the slots")
                .series("all groups", slots),
            format!("{share:.1} % of the slots had a row"),
        )
    }

    /// Tokens a second and percent of slots in use, each over the minutes of all runs behind each
    /// other: what passed between them is left out.
    fn curves(&self) -> (Curve, Curve) {
        let mut of_second: BTreeMap<u64, [f64; 3]> = BTreeMap::new();
        for beat in &self.beats {
            let seconds = (beat.seconds.round() as u64).max(1);
            for second in beat.at.saturating_sub(seconds)..beat.at {
                let [tokens, used, slots] = of_second.entry(second).or_default();
                *tokens += beat.tokens as f64 / seconds as f64;
                *used += beat.slots_in_use;
                *slots += beat.slots as f64;
            }
        }
        let values: Vec<[f64; 3]> = of_second.into_values().collect();
        let width = values.len().div_ceil(POINTS).max(1);
        let (mut speed, mut slots) = (Vec::new(), Vec::new());
        for (class, values) in values.chunks(width).enumerate() {
            let sum = |part: usize| values.iter().map(|value| value[part]).sum::<f64>();
            let minutes = (class * width) as f64 / 60.0;
            speed.push((minutes, sum(0) / values.len() as f64));
            slots.push((minutes, 100.0 * sum(1) / sum(2).max(f64::MIN_POSITIVE)));
        }
        (speed, slots)
    }
}

/// Where the page stands if nobody says otherwise.
pub(crate) fn default_path(output_file: &Path) -> PathBuf {
    output_file.with_file_name("report.html")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(at: u64, seconds: f64, tokens: u64, slots_in_use: f64) -> Beat {
        Beat { beat: 0.0, seconds, rows: 0, tokens, slots_in_use, slots: 4, at }
    }

    #[test]
    fn groups_are_added_and_pauses_are_left_out() {
        let beats = vec![beat(102, 2.0, 20, 4.0), beat(102, 2.0, 40, 2.0), beat(500, 1.0, 5, 1.0)];
        let (speed, slots) = Beats { beats }.curves();
        let values = |curve: &[(f64, f64)]| curve.iter().map(|point| point.1).collect::<Vec<_>>();
        assert_eq!(values(&speed), [30.0, 30.0, 5.0]);
        assert_eq!(values(&slots), [75.0, 75.0, 25.0]);
        assert_eq!(speed[2].0, 2.0 / 60.0);
    }

    #[test]
    fn a_long_run_has_few_points() {
        let beats = (0..5000).map(|at| beat(at * 10, 10.0, 10, 4.0)).collect();
        let (speed, _) = Beats { beats }.curves();
        assert!(speed.len() <= POINTS && speed.len() > POINTS / 2, "{}", speed.len());
        assert!((speed[100].1 - 1.0).abs() < 1e-9, "{:?}", speed[100]);
    }
}
