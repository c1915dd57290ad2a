//! `curves.svg`: loss, learning rate and gradient norm over the steps.

use std::ops::Range;

use plotters::{coord::Shift, prelude::*};

use crate::metrics::Line;

const WIDTH: u32 = 860;
const PANEL_HEIGHT: u32 = 240;
/// Points of a curve: more are not told apart at this width.
const MAX_POINTS: usize = 800;
/// Told apart by people who do not see red and green (Okabe and Ito's palette).
const BLUE: RGBColor = RGBColor(0x00, 0x72, 0xb2);
const ORANGE: RGBColor = RGBColor(0xd5, 0x5e, 0x00);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawResult = Result<(), DrawingAreaErrorKind<std::io::Error>>;

struct Curve {
    name: &'static str,
    color: RGBColor,
    points: Vec<(f64, f64)>,
    /// Points are few and apart: each is marked.
    marked: bool,
}

struct Panel {
    title: &'static str,
    curves: Vec<Curve>,
}

/// The drawing of a run's steps so far.
pub(crate) fn draw(lines: &[Line]) -> String {
    let mut svg = String::new();
    let panels = panels(lines);
    let size = (WIDTH, PANEL_HEIGHT * panels.len() as u32);
    let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    draw_panels(area, &panels).expect("drawing into memory does not fail");
    svg
}

fn panels(lines: &[Line]) -> [Panel; 3] {
    let of_steps = |value: fn(&Line) -> f64| -> Vec<(f64, f64)> {
        thinned(&lines.iter().map(|line| (line.step.step as f64, value(line))).collect::<Vec<_>>())
    };
    let held_out = |line: &Line| line.eval_loss.map(|loss| (line.step.step as f64, loss));
    let held_out: Vec<_> = lines.iter().filter_map(held_out).filter(is_finite).collect();
    let curve = |name, points| Curve { name, color: BLUE, points, marked: false };
    let mut losses = vec![curve("training rows", of_steps(|line| line.step.loss))];
    if !held_out.is_empty() {
        losses.push(Curve { name: "held-out rows", color: ORANGE, points: held_out, marked: true });
    }
    let single = |title, value| Panel { title, curves: vec![curve(title, of_steps(value))] };
    [
        Panel { title: "loss", curves: losses },
        single("gradient norm before clipping", |line| line.step.grad_norm),
        single("learning rate", |line| line.step.learning_rate),
    ]
}

fn is_finite((_, value): &(f64, f64)) -> bool {
    value.is_finite()
}

/// Means over neighbours where there are too many points; those of skipped steps are left out.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let points: Vec<_> = points.iter().copied().filter(is_finite).collect();
    let mean = |points: &[(f64, f64)]| {
        let count = points.len() as f64;
        let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), point| (x + point.0, y + point.1));
        (x / count, y / count)
    };
    points.chunks(points.len().div_ceil(MAX_POINTS).max(1)).map(mean).collect()
}

fn draw_panels(area: Area<'_>, panels: &[Panel]) -> DrawResult {
    area.fill(&WHITE)?;
    let last_step = panels
        .iter()
        .flat_map(|panel| &panel.curves)
        .filter_map(|curve| curve.points.last())
        .map(|(step, _)| *step)
        .fold(1.0, f64::max);
    for (part, panel) in area.split_evenly((panels.len(), 1)).iter().zip(panels) {
        draw_panel(part, panel, last_step)?;
    }
    area.present()
}

fn draw_panel(area: &Area<'_>, panel: &Panel, last_step: f64) -> DrawResult {
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .caption(panel.title, ("sans-serif", 16))
        .x_label_area_size(36)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..last_step, value_range(&panel.curves))?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("step")
        .y_labels(6)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|value| label(*value))
        .draw()?;
    for curve in &panel.curves {
        let color = curve.color;
        chart
            .draw_series([PathElement::new(curve.points.clone(), color.stroke_width(2))])?
            .label(curve.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
        if curve.marked || curve.points.len() == 1 {
            let dot = |&point: &(f64, f64)| Circle::new(point, 3, color.filled());
            chart.draw_series(curve.points.iter().map(dot))?;
        }
    }
    if panel.curves.len() > 1 {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()?;
    }
    Ok(())
}

/// From 0 to a little above the highest value: curves of several runs compare by their height.
fn value_range(curves: &[Curve]) -> Range<f64> {
    let values = curves.iter().flat_map(|curve| &curve.points).map(|(_, value)| *value);
    let highest = values.fold(0.0, f64::max);
    0.0..if highest > 0.0 { 1.05 * highest } else { 1.0 }
}

/// Four digits are enough, and small rates must not all read 0.
fn label(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        0.01..10_000.0 => format!("{}", (value * 1e4).round() / 1e4),
        _ => format!("{value:.1e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::line;

    fn run(steps: u64) -> Vec<Line> {
        (1..=steps).map(|step| line(step, 4.0 / step as f64, None)).collect()
    }

    #[test]
    fn a_long_run_stays_a_small_file() {
        let (short, long) = (draw(&run(1_000)).len(), draw(&run(200_000)).len());
        assert!(long < 2 * short && long < 200_000, "{short} {long}");
    }

    #[test]
    fn held_out_losses_have_a_curve_of_their_own() {
        let mut lines = run(20);
        assert!(!draw(&lines).contains("held-out"));
        lines[9].eval_loss = Some(1.5);
        lines[19].eval_loss = Some(1.2);
        let svg = draw(&lines);
        assert!(svg.contains("held-out rows") && svg.contains("training rows"));
        assert_eq!(svg.matches("<circle").count(), 2);
    }

    #[test]
    fn skipped_steps_no_steps_and_one_step_can_be_drawn() {
        let mut lines = run(4);
        lines[1].step.loss = f64::NAN;
        lines[2].step.grad_norm = f64::INFINITY;
        for lines in [&lines[..], &[], &lines[..1], &lines[1..2]] {
            let svg = draw(lines);
            assert!(svg.contains("</svg>") && !svg.contains("NaN") && !svg.contains("inf"));
        }
    }

    #[test]
    fn labels_tell_small_numbers_apart() {
        assert_eq!(
            [0.0, 2.5, 0.05, 1e-4, 5e-5].map(label),
            ["0", "2.5", "0.05", "1.0e-4", "5.0e-5"]
        );
    }
}
