use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment};
use plotters::prelude::*;
use serde::Serialize;

use crate::{Error, Result};

const TEMPLATE: &str = include_str!("page.html");
const CHART: (u32, u32) = (860, 320);
/// Told apart by people who do not see red and green (Okabe and Ito's palette, without black).
const COLORS: [&str; 7] =
    ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442"];

/// A report as one HTML file that needs nothing else: figures, tables, bars and excerpts of texts.
///
/// All texts are escaped; none can become a part of the page.
///
/// ```
/// use dromedary_command::{Bars, Cell, ReportPage, Table};
///
/// # fn main() -> dromedary_command::Result<()> {
/// let fruit = Table::new("Fruit", ["tree", "apples"])
///     .row([Cell::text("north"), Cell::count(1200)])
///     .row([Cell::text("<south>"), Cell::count(30)]);
/// let html = ReportPage::new("harvest")
///     .figure("apples", "1,230")
///     .table(fruit)
///     .bars(Bars::new("Weights", "grams", 50).series("north", vec![0, 3, 9]))
///     .facts("Settings", [("year", "2024")])
///     .render()?;
/// assert!(html.contains("&lt;south&gt;") && html.contains("1,200") && html.contains("<svg"));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Serialize)]
pub struct ReportPage {
    title: String,
    figures: Vec<(String, String)>,
    sections: Vec<Section>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Section {
    Table(Table),
    Chart { title: String, note: String, svg: String, legend: Vec<(String, &'static str)> },
    Ranking { title: String, note: String, legend: Vec<(String, &'static str)>, rows: Vec<Ranked> },
    Excerpts(Excerpts),
    Facts { title: String, facts: Vec<(String, String)> },
}

/// A table.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    title: String,
    note: String,
    columns: Vec<String>,
    rows: Vec<Vec<Cell>>,
    has_sum: bool,
}

/// A cell of a [`Table`].
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    text: String,
    class: &'static str,
    share: Option<f64>,
}

/// Bars that stand side by side, each as wide as a class of values and as high as its count; series
/// stand on each other.
#[derive(Clone, Debug)]
pub struct Bars {
    title: String,
    unit: String,
    width: u64,
    series: Vec<(String, Vec<u64>)>,
}

/// Curves over one axis, such as time.
#[derive(Clone, Debug)]
pub struct Lines {
    title: String,
    x: String,
    y: String,
    series: Vec<(String, Vec<(f64, f64)>)>,
}

/// Counts with their names, each with a bar as long as the count; series stand behind each other in a
/// bar.
#[derive(Clone, Debug)]
pub struct Ranking {
    title: String,
    note: String,
    series: Vec<String>,
    rows: Vec<(String, Vec<u64>, String)>,
}

/// A row of a [`Ranking`] as the page shows it.
#[derive(Clone, Debug, Serialize)]
struct Ranked {
    name: String,
    total: String,
    /// What is told before the bar.
    remark: String,
    /// Percent of the width, and the color.
    parts: Vec<(String, &'static str)>,
}

/// Excerpts of texts under captions, in groups; folded away until somebody opens them.
#[derive(Clone, Debug, Serialize)]
pub struct Excerpts {
    title: String,
    groups: Vec<Group>,
}

#[derive(Clone, Debug, Serialize)]
struct Group {
    title: String,
    items: Vec<Excerpt>,
}

/// A caption and labelled texts below it.
#[derive(Clone, Debug, Serialize)]
pub struct Excerpt {
    caption: String,
    texts: Vec<Labelled>,
}

#[derive(Clone, Debug, Serialize)]
struct Labelled {
    label: String,
    parts: Vec<Part>,
}

#[derive(Clone, Debug, Serialize)]
struct Part {
    text: String,
    is_cut: bool,
}

impl ReportPage {
    /// An empty page.
    pub fn new(title: impl Into<String>) -> ReportPage {
        ReportPage { title: title.into(), figures: Vec::new(), sections: Vec::new() }
    }

    /// Adds one of the few figures at the top that sum everything up.
    #[must_use]
    pub fn figure(mut self, name: impl Into<String>, value: impl Into<String>) -> ReportPage {
        self.figures.push((name.into(), value.into()));
        self
    }

    /// Adds a list of names and values.
    #[must_use]
    pub fn facts<N: Into<String>, V: Into<String>>(
        mut self,
        title: impl Into<String>,
        facts: impl IntoIterator<Item = (N, V)>,
    ) -> ReportPage {
        let facts = facts.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        self.sections.push(Section::Facts { title: title.into(), facts });
        self
    }

    /// Adds a table.
    #[must_use]
    pub fn table(mut self, table: Table) -> ReportPage {
        self.sections.push(Section::Table(table));
        self
    }

    /// Adds bars; without any count there is nothing to draw.
    #[must_use]
    pub fn bars(mut self, bars: Bars) -> ReportPage {
        let total: u64 = bars.series.iter().flat_map(|(_, counts)| counts).sum();
        let section = Section::Chart {
            title: bars.title.clone(),
            note: format!("{} in classes of {} {}", grouped(total), bars.width, bars.unit),
            svg: if total == 0 { String::new() } else { drawn(|area| bars.draw_on(area)) },
            legend: legend(bars.series.iter().map(|(name, _)| name)),
        };
        self.sections.push(section);
        self
    }

    /// Adds curves; `note` stands above them. Without two points there is nothing to draw.
    #[must_use]
    pub fn lines(mut self, lines: Lines, note: impl Into<String>) -> ReportPage {
        let points = lines.series.iter().map(|(_, points)| points.len()).max().unwrap_or(0);
        let section = Section::Chart {
            title: lines.title.clone(),
            note: note.into(),
            svg: if points < 2 { String::new() } else { drawn(|area| lines.draw_on(area)) },
            legend: legend(lines.series.iter().map(|(name, _)| name)),
        };
        self.sections.push(section);
        self
    }

    /// Adds a ranking.
    #[must_use]
    pub fn ranking(mut self, ranking: Ranking) -> ReportPage {
        self.sections.push(ranking.section());
        self
    }

    /// Adds excerpts, if there are any.
    #[must_use]
    pub fn excerpts(mut self, excerpts: Excerpts) -> ReportPage {
        if !excerpts.groups.is_empty() {
            self.sections.push(Section::Excerpts(excerpts));
        }
        self
    }

    /// The page as HTML.
    ///
    /// # Errors
    /// [`Error::Page`].
    pub fn render(&self) -> Result<String> {
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| AutoEscape::Html);
        environment
            .render_str(TEMPLATE, Serde(self))
            .map_err(|source| Error::Page { title: self.title.clone(), source })
    }
}

impl Table {
    /// A table without rows.
    pub fn new<C: Into<String>>(
        title: impl Into<String>,
        columns: impl IntoIterator<Item = C>,
    ) -> Table {
        let columns = columns.into_iter().map(Into::into).collect();
        let (title, note) = (title.into(), String::new());
        Table { title, note, columns, rows: Vec::new(), has_sum: false }
    }

    /// The same with a sentence above it.
    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Table {
        self.note = note.into();
        self
    }

    /// The same with one more row.
    #[must_use]
    pub fn row(mut self, cells: impl IntoIterator<Item = Cell>) -> Table {
        self.rows.push(cells.into_iter().collect());
        self
    }

    /// The same with a last row that sums the others up.
    #[must_use]
    pub fn sum(mut self, cells: impl IntoIterator<Item = Cell>) -> Table {
        self.has_sum = true;
        self.row(cells)
    }
}

impl Cell {
    /// A text.
    pub fn text(text: impl Into<String>) -> Cell {
        Cell { text: text.into(), class: "", share: None }
    }

    /// Digits that nobody reads as a number, such as a hash.
    pub fn hash(text: impl Into<String>) -> Cell {
        Cell { class: "hash", ..Cell::text(text) }
    }

    /// A number of things.
    pub fn count(count: u64) -> Cell {
        Cell { class: "number", ..Cell::text(grouped(count)) }
    }

    /// A part of a whole, drawn beside its percentage; nothing where there is no whole.
    pub fn share(part: u64, whole: u64) -> Cell {
        let share = (whole > 0).then(|| part as f64 / whole as f64);
        let text = share.map_or_else(String::new, |share| format!("{:.1} %", 100.0 * share));
        Cell { text, class: "number", share }
    }
}

/// The number with commas between its thousands.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

impl Bars {
    /// Classes of so many units each, the first from 0.
    pub fn new(title: impl Into<String>, unit: impl Into<String>, width: u64) -> Bars {
        Bars { title: title.into(), unit: unit.into(), width: width.max(1), series: Vec::new() }
    }

    /// The same with the counts of one more series.
    #[must_use]
    pub fn series(mut self, name: impl Into<String>, counts: Vec<u64>) -> Bars {
        self.series.push((name.into(), counts));
        self
    }

    fn draw_on(&self, area: Area<'_>) -> Drawn {
        let classes = self.series.iter().map(|(_, counts)| counts.len()).max().unwrap_or(0);
        let mut heights = vec![0_u64; classes];
        for (_, counts) in &self.series {
            heights.iter_mut().zip(counts).for_each(|(height, count)| *height += count);
        }
        let top = heights.iter().copied().max().unwrap_or(0).max(1);
        let mut chart = ChartBuilder::on(&area)
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0..classes as u64 * self.width, 0..top + top.div_ceil(20))?;
        chart.configure_mesh().disable_x_mesh().x_desc(&self.unit).y_desc("rows").draw()?;
        let mut bottoms = vec![0_u64; classes];
        for ((_, counts), color) in self.series.iter().zip(COLORS.into_iter().cycle()) {
            let style = color_of(color).filled();
            let bars =
                counts.iter().enumerate().zip(&mut bottoms).map(|((class, count), bottom)| {
                    let left = class as u64 * self.width;
                    let low = *bottom;
                    *bottom += count;
                    Rectangle::new([(left, low), (left + self.width, *bottom)], style)
                });
            chart.draw_series(bars)?;
        }
        area.present()
    }
}

type Area<'s> = DrawingArea<SVGBackend<'s>, plotters::coord::Shift>;
type Drawn = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;

fn drawn(draw: impl FnOnce(Area<'_>) -> Drawn) -> String {
    let mut svg = String::new();
    draw(SVGBackend::with_string(&mut svg, CHART).into_drawing_area())
        .expect("drawing into memory does not fail");
    svg
}

fn legend<'n>(names: impl Iterator<Item = &'n String>) -> Vec<(String, &'static str)> {
    names.cloned().zip(COLORS.into_iter().cycle()).collect()
}

impl Lines {
    /// Curves over `x`; what they show is `y`.
    pub fn new(title: impl Into<String>, x: impl Into<String>, y: impl Into<String>) -> Lines {
        Lines { title: title.into(), x: x.into(), y: y.into(), series: Vec::new() }
    }

    /// The same with one more curve.
    #[must_use]
    pub fn series(mut self, name: impl Into<String>, points: Vec<(f64, f64)>) -> Lines {
        self.series.push((name.into(), points));
        self
    }

    fn draw_on(&self, area: Area<'_>) -> Drawn {
        let points = || self.series.iter().flat_map(|(_, points)| points);
        let largest = |value: fn(&(f64, f64)) -> f64| points().map(value).fold(0.0, f64::max);
        let right = largest(|point| point.0).max(f64::MIN_POSITIVE);
        let top = largest(|point| point.1).max(f64::MIN_POSITIVE) * 1.05;
        let mut chart = ChartBuilder::on(&area)
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..right, 0.0..top)?;
        let mut mesh = chart.configure_mesh();
        mesh.disable_x_mesh().max_light_lines(0).x_desc(&self.x).y_desc(&self.y).draw()?;
        for ((_, points), color) in self.series.iter().zip(COLORS.into_iter().cycle()) {
            let style = color_of(color).stroke_width(2);
            chart.draw_series([PathElement::new(points.clone(), style)])?;
        }
        area.present()
    }
}

impl Ranking {
    /// A ranking without rows, whose bars have one part for each series.
    pub fn new<N: Into<String>>(
        title: impl Into<String>,
        note: impl Into<String>,
        series: impl IntoIterator<Item = N>,
    ) -> Ranking {
        let series = series.into_iter().map(Into::into).collect();
        Ranking { title: title.into(), note: note.into(), series, rows: Vec::new() }
    }

    /// The same with one more row: its counts by series, and what is told before its bar.
    #[must_use]
    pub fn row(
        mut self,
        name: impl Into<String>,
        counts: Vec<u64>,
        remark: impl Into<String>,
    ) -> Ranking {
        self.rows.push((name.into(), counts, remark.into()));
        self
    }

    fn section(self) -> Section {
        let longest = self.rows.iter().map(|(_, counts, _)| counts.iter().sum::<u64>()).max();
        let longest = longest.unwrap_or(0).max(1);
        let rows = self.rows.into_iter().map(|(name, counts, remark)| {
            let percent = |count: u64| format!("{:.2}", count as f64 * 100.0 / longest as f64);
            let total = grouped(counts.iter().sum());
            let parts = counts.into_iter().map(percent).zip(COLORS.into_iter().cycle()).collect();
            Ranked { name, total, remark, parts }
        });
        Section::Ranking {
            title: self.title,
            note: self.note,
            rows: rows.collect(),
            legend: legend(self.series.iter()),
        }
    }
}

/// The color of `#rrggbb`.
fn color_of(hex: &str) -> RGBColor {
    let part = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap_or(0);
    RGBColor(part(1), part(3), part(5))
}

impl Excerpts {
    /// No excerpts yet.
    pub fn new(title: impl Into<String>) -> Excerpts {
        Excerpts { title: title.into(), groups: Vec::new() }
    }

    /// Adds one to the group of that title, which is new if it is not the last one.
    pub fn push(&mut self, group: &str, excerpt: Excerpt) {
        match self.groups.last_mut().filter(|last| last.title == group) {
            Some(last) => last.items.push(excerpt),
            None => self.groups.push(Group { title: group.to_owned(), items: vec![excerpt] }),
        }
    }
}

impl Excerpt {
    /// A caption with no text yet.
    pub fn new(caption: impl Into<String>) -> Excerpt {
        Excerpt { caption: caption.into(), texts: Vec::new() }
    }

    /// The same with one more text.
    #[must_use]
    pub fn text(self, label: impl Into<String>, text: impl Into<String>) -> Excerpt {
        self.parts(label, vec![Part { text: text.into(), is_cut: false }])
    }

    /// The same with a text of which `kept` alone is left: the rest is marked, where `kept` is a
    /// part of it.
    #[must_use]
    pub fn cut_text(self, label: impl Into<String>, text: &str, kept: &str) -> Excerpt {
        let Some(start) = text.find(kept) else {
            return self.text(label, text);
        };
        let part = |text: &str, is_cut| Part { text: text.to_owned(), is_cut };
        let parts = vec![
            part(&text[..start], true),
            part(kept, false),
            part(&text[start + kept.len()..], true),
        ];
        self.parts(label, parts)
    }

    fn parts(mut self, label: impl Into<String>, mut parts: Vec<Part>) -> Excerpt {
        parts.retain(|part| !part.text.is_empty());
        self.texts.push(Labelled { label: label.into(), parts });
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_becomes_a_part_of_the_page() {
        let evil = "</pre><script>alert(1)</script>{{ title }}'\"&";
        let mut excerpts = Excerpts::new(evil);
        let excerpt = Excerpt::new(evil).text(evil, evil).cut_text(evil, &evil.repeat(3), evil);
        excerpts.push(evil, excerpt);
        let cells = || [Cell::text(evil), Cell::hash(evil)];
        let html = ReportPage::new(evil)
            .figure(evil, evil)
            .facts(evil, [(evil, evil)])
            .table(Table::new(evil, [evil, evil]).note(evil).row(cells()).sum(cells()))
            .bars(Bars::new(evil, evil, 1).series(evil, vec![1]))
            .lines(Lines::new(evil, evil, evil).series(evil, vec![(0.0, 1.0), (2.0, 3.0)]), evil)
            .ranking(Ranking::new(evil, evil, [evil]).row(evil, vec![1], evil))
            .excerpts(excerpts)
            .render()
            .unwrap();
        assert!(!html.contains("<script"), "{html}");
        assert_eq!(html.matches("</pre>").count(), 2, "{html}");
        assert!(html.contains("&lt;script&gt;alert(1)&lt;"), "{html}");
        assert!(html.contains("{{ title }}"));
    }

    #[test]
    fn a_bar_is_as_high_as_its_count() {
        let heights = |counts: Vec<u64>| -> Vec<f64> {
            let page = ReportPage::new("t").bars(Bars::new("b", "tokens", 8).series("s", counts));
            let html = page.render().unwrap();
            // The bars are the rectangles of the first color.
            let bars = html.split("<rect").filter(|rect| rect.contains("#0072B2"));
            let height = |rect: &str| -> f64 {
                let behind = rect.split_once("height=\"").unwrap().1;
                behind.split('"').next().unwrap().parse().unwrap()
            };
            bars.map(height).collect()
        };
        let drawn = heights(vec![10, 40, 20]);
        assert_eq!(drawn.len(), 3, "{drawn:?}");
        assert!((drawn[1] / drawn[0] - 4.0).abs() < 0.2, "{drawn:?}");
        assert!((drawn[1] / drawn[2] - 2.0).abs() < 0.1, "{drawn:?}");
        assert!(heights(vec![0, 0]).is_empty());
    }

    #[test]
    fn numbers_are_written_for_people() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), text);
        }
        assert_eq!(Cell::share(1, 3).text, "33.3 %");
        assert_eq!((Cell::share(0, 0).text.as_str(), Cell::share(0, 0).share), ("", None));
    }

    #[test]
    fn what_is_cut_is_marked() {
        let shown = |text: &str, kept: &str| {
            let mut excerpts = Excerpts::new("t");
            excerpts.push("g", Excerpt::new("c").cut_text("before", text, kept));
            let html = ReportPage::new("t").excerpts(excerpts).render().unwrap();
            let (_, behind) = html.split_once("<pre>").unwrap();
            behind.split_once("</pre>").unwrap().0.to_owned()
        };
        assert_eq!(shown("1 / 1 why? ", "why?"), "<del>1 &#x2f; 1 </del>why?<del> </del>");
        assert_eq!(shown("a", "b"), "a");
    }

    #[test]
    fn a_ranking_has_bars_as_long_as_their_counts() {
        let ranking = Ranking::new("r", "n", ["a", "b"]).row("first", vec![3, 1], "").row(
            "second",
            vec![0, 2],
            "half",
        );
        let html = ReportPage::new("t").ranking(ranking).render().unwrap();
        for width in ["75.00%", "25.00%", "50.00%"] {
            assert!(html.contains(&format!("width: {width}")), "{width} in {html}");
        }
        assert!(html.contains("half") && html.contains(">4<"));
    }

    #[test]
    fn the_page_refers_to_nothing_outside() {
        let html = ReportPage::new("t").bars(Bars::new("b", "u", 1).series("s", vec![1])).render();
        let html = html.unwrap().replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
        for part in ["http:", "https:", "src=", "@import", "url("] {
            assert!(!html.contains(part), "{part}");
        }
    }
}
