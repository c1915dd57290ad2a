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

/// A report as one HTML file that needs nothing else: tables, bars and excerpts of texts.
///
/// All texts are escaped; none can become a part of the page.
///
/// ```
/// use dromedary_command::{Bars, ReportPage, Table};
///
/// # fn main() -> dromedary_command::Result<()> {
/// let html = ReportPage::new("harvest")
///     .fact("year", "2024")
///     .table(Table::new("Fruit", ["tree", "apples"]).row(["north", "12"]).row(["<south>", "30"]))
///     .bars(Bars::new("Weights", "grams", 50).series("north", vec![0, 3, 9]))
///     .render()?;
/// assert!(html.contains("&lt;south&gt;") && html.contains("<svg"));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Serialize)]
pub struct ReportPage {
    title: String,
    facts: Vec<(String, String)>,
    sections: Vec<Section>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Section {
    Table(Table),
    Bars { title: String, note: String, svg: String, legend: Vec<(String, &'static str)> },
    Excerpts(Excerpts),
}

/// A table; cells that are numbers stand to the right.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    title: String,
    columns: Vec<String>,
    rows: Vec<Vec<Cell>>,
}

#[derive(Clone, Debug, Serialize)]
struct Cell {
    text: String,
    is_number: bool,
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

/// Excerpts of texts under captions, folded away until somebody opens them.
#[derive(Clone, Debug, Serialize)]
pub struct Excerpts {
    title: String,
    items: Vec<Excerpt>,
}

/// A caption and texts below it, each behind its label.
#[derive(Clone, Debug, Serialize)]
pub struct Excerpt {
    /// Stands above.
    pub caption: String,
    /// Label and text.
    pub texts: Vec<(String, String)>,
}

impl ReportPage {
    /// An empty page.
    pub fn new(title: impl Into<String>) -> ReportPage {
        ReportPage { title: title.into(), facts: Vec::new(), sections: Vec::new() }
    }

    /// Adds a line to the facts at the top.
    #[must_use]
    pub fn fact(mut self, name: impl Into<String>, value: impl Into<String>) -> ReportPage {
        self.facts.push((name.into(), value.into()));
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
        let names = bars.series.iter().map(|(name, _)| name.clone());
        let section = Section::Bars {
            title: bars.title.clone(),
            note: format!("{total} in classes of {} {}", bars.width, bars.unit),
            svg: if total == 0 { String::new() } else { bars.draw() },
            legend: names.zip(COLORS.into_iter().cycle()).collect(),
        };
        self.sections.push(section);
        self
    }

    /// Adds excerpts.
    #[must_use]
    pub fn excerpts(mut self, excerpts: Excerpts) -> ReportPage {
        self.sections.push(Section::Excerpts(excerpts));
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
        Table { title: title.into(), columns, rows: Vec::new() }
    }

    /// The same with one more row.
    #[must_use]
    pub fn row<C: Into<String>>(mut self, cells: impl IntoIterator<Item = C>) -> Table {
        let cell = |text: String| Cell { is_number: text.parse::<f64>().is_ok(), text };
        self.rows.push(cells.into_iter().map(|text| cell(text.into())).collect());
        self
    }
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

    fn draw(&self) -> String {
        let mut svg = String::new();
        let drawn = self.draw_on(SVGBackend::with_string(&mut svg, CHART).into_drawing_area());
        drawn.expect("drawing into memory does not fail");
        svg
    }

    fn draw_on(
        &self,
        area: DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    ) -> std::result::Result<(), DrawingAreaErrorKind<std::io::Error>> {
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

/// The color of `#rrggbb`.
fn color_of(hex: &str) -> RGBColor {
    let part = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap_or(0);
    RGBColor(part(1), part(3), part(5))
}

impl Excerpts {
    /// No excerpts yet.
    pub fn new(title: impl Into<String>) -> Excerpts {
        Excerpts { title: title.into(), items: Vec::new() }
    }

    /// Adds one.
    pub fn push(&mut self, excerpt: Excerpt) {
        self.items.push(excerpt);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_becomes_a_part_of_the_page() {
        let evil = "</pre><script>alert(1)</script>{{ title }}'\"&";
        let mut excerpts = Excerpts::new(evil);
        excerpts.push(Excerpt {
            caption: evil.to_owned(),
            texts: vec![(evil.to_owned(), evil.to_owned())],
        });
        let html = ReportPage::new(evil)
            .fact(evil, evil)
            .table(Table::new(evil, [evil]).row([evil]))
            .bars(Bars::new(evil, evil, 1).series(evil, vec![1]))
            .excerpts(excerpts)
            .render()
            .unwrap();
        assert!(!html.contains("<script") && !html.contains("</pre><"), "{html}");
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
    fn the_page_refers_to_nothing_outside() {
        let html = ReportPage::new("t").bars(Bars::new("b", "u", 1).series("s", vec![1])).render();
        let html = html.unwrap().replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
        for part in ["http:", "https:", "src=", "@import", "url("] {
            assert!(!html.contains(part), "{part}");
        }
    }
}
