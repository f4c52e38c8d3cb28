//! Line charts as inline SVG: axes, ticks, faint raw values with a strong smoothed line, optionally a log axis.
//!
//! Colours and type come from the page's style sheet, so that a chart follows the reader's light or dark setting.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// A named line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Its name in the legend.
    pub name: String,
    /// (x, y) in order of x. Values that are not finite leave a gap.
    pub points: Vec<(f64, f64)>,
}

/// Several curves over one pair of axes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Chart {
    /// What is shown.
    pub title: String,
    /// The horizontal axis, with its unit.
    pub x_label: String,
    /// The vertical axis, with its unit.
    pub y_label: String,
    /// Whether the vertical axis is logarithmic; values that are not positive are then left out.
    pub log_y: bool,
    /// Length of the smoothing in points, see [`smoothed`]; 0 draws the raw values strong.
    pub smoothing: usize,
    /// The lines.
    pub curves: Vec<Curve>,
}

/// The size a chart is drawn at, in the units of its type: a page shows the one that fits the window.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame {
    /// Its class in the style sheet.
    class: &'static str,
    width: f64,
    height: f64,
}

/// For windows wider than a phone.
pub(crate) const WIDE: Frame = Frame { class: "wide", width: 600.0, height: 280.0 };
/// For phones, where [`WIDE`] would shrink its type below what can be read.
pub(crate) const NARROW: Frame = Frame { class: "narrow", width: 340.0, height: 240.0 };
/// Around the plot, room for tick labels and axis names.
const LEFT: f64 = 62.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 44.0;
/// Points drawn of one line; more than the plot has pixels would only make the page larger.
const MAX_POINTS: usize = 500;
/// Distinct line colours in the style sheet.
pub(crate) const COLOURS: usize = 6;

/// The exponential moving average of `values` over about `length` points, corrected for its start (the first value is
/// itself, not a step from zero). Values that are not finite are kept and do not enter the average.
pub fn smoothed(values: &[f64], length: usize) -> Vec<f64> {
    let keep = 1.0 - 1.0 / (length.max(1) as f64);
    let (mut sum, mut weight) = (0.0, 0.0);
    let mut next = |value: &f64| {
        if !value.is_finite() {
            return *value;
        }
        sum = keep * sum + value;
        weight = keep * weight + 1.0;
        sum / weight
    };
    values.iter().map(&mut next).collect()
}

impl Chart {
    /// The chart as an `<svg>` element; empty when no point can be drawn. The legend is the caller's.
    ///
    /// `data-x` holds the horizontal axis, for scripts: its first and last value, and where they are drawn.
    pub(crate) fn svg(&self, frame: Frame) -> String {
        let Some((x, y)) = self.axes(frame) else { return String::new() };
        let Frame { class, width, height } = frame;
        let mut svg = format!(
            r#"<svg class="{class}" viewBox="0 0 {width} {height}" role="img" aria-label="{}" data-x="{} {} {} {}">"#,
            escape(&self.title),
            x.low,
            x.high,
            x.pixels.start,
            x.pixels.end,
        );
        draw_ticks(&mut svg, &x, &y);
        self.draw_labels(&mut svg, frame);
        for (index, curve) in self.curves.iter().enumerate() {
            let class = format!("c{}", index % COLOURS);
            let raw = |points: &[(f64, f64)], class: &str| {
                format!(r#"<path class="{class}" d="{}"/>"#, path(points, &x, &y))
            };
            if self.smoothing > 1 {
                svg += &raw(&curve.points, &format!("raw {class}"));
            }
            svg += &raw(&curve.smoothed(self.smoothing), &class);
        }
        svg + "</svg>"
    }

    fn axes(&self, frame: Frame) -> Option<(Axis, Axis)> {
        let drawable = |(x, y): &&(f64, f64)| x.is_finite() && y.is_finite() && (!self.log_y || *y > 0.0);
        let points: Vec<(f64, f64)> =
            self.curves.iter().flat_map(|curve| curve.points.iter().filter(drawable).copied()).collect();
        let x = Axis::over(points.iter().map(|point| point.0), LEFT..frame.width - RIGHT, false)?;
        let y = Axis::over(points.iter().map(|point| point.1), frame.height - BOTTOM..TOP, self.log_y)?;
        Some((x, y))
    }

    fn draw_labels(&self, svg: &mut String, frame: Frame) {
        let middle = (LEFT + frame.width - RIGHT) / 2.0;
        let _ = write!(
            svg,
            r#"<text class="axis" x="{middle}" y="{}" text-anchor="middle">{}</text><text class="axis" x="4" y="13">{}{}</text>"#,
            frame.height - 6.0,
            escape(&self.x_label),
            escape(&self.y_label),
            if self.log_y { " (log)" } else { "" },
        );
    }
}

impl Curve {
    fn smoothed(&self, length: usize) -> Vec<(f64, f64)> {
        let values: Vec<f64> = self.points.iter().map(|point| point.1).collect();
        self.points.iter().zip(smoothed(&values, length)).map(|(point, y)| (point.0, y)).collect()
    }
}

/// A range of values laid out over a range of picture coordinates.
struct Axis {
    low: f64,
    high: f64,
    pixels: std::ops::Range<f64>,
    log: bool,
}

impl Axis {
    /// The axis that holds all values; none without values.
    fn over(
        values: impl Iterator<Item = f64> + Clone,
        pixels: std::ops::Range<f64>,
        log: bool,
    ) -> Option<Self> {
        let low = values.clone().min_by(f64::total_cmp)?;
        let high = values.max_by(f64::total_cmp)?;
        // A single value gets some room on both sides.
        let (low, high) = match (low < high, log) {
            (true, _) => (low, high),
            (false, true) => (low / 2.0, high * 2.0),
            (false, false) => (low - 1.0, high + 1.0),
        };
        Some(Self { low, high, pixels, log })
    }

    /// The picture coordinate of a value.
    fn at(&self, value: f64) -> f64 {
        let scale = |value: f64| if self.log { value.ln() } else { value };
        let share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low));
        self.pixels.start + share * (self.pixels.end - self.pixels.start)
    }

    /// Round values inside the range, at least three of them where it holds that many.
    fn ticks(&self) -> Vec<f64> {
        if self.log { self.log_ticks() } else { self.linear_ticks() }
    }

    fn linear_ticks(&self) -> Vec<f64> {
        let rough = (self.high - self.low) / 6.0;
        let decade = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .map(|m| m * decade)
            .into_iter()
            .find(|step| *step >= rough)
            .unwrap_or(rough);
        let (first, last) = ((self.low / step).ceil() as i64, (self.high / step).floor() as i64);
        (first..=last).map(|index| index as f64 * step).collect()
    }

    fn log_ticks(&self) -> Vec<f64> {
        let decades = (self.low.log10().floor() as i32)..=(self.high.log10().ceil() as i32);
        let inside = |tick: &f64| (self.low..=self.high).contains(tick);
        let with = |digits: &[f64]| -> Vec<f64> {
            let all =
                decades.clone().flat_map(|decade| digits.iter().map(move |digit| digit * 10f64.powi(decade)));
            all.filter(inside).collect()
        };
        let candidates = [with(&[1.0]), with(&[1.0, 2.0, 5.0]), with(&[1.0, 2.0, 3.0, 5.0, 7.0])];
        // A narrow range holds too few round ratios; equal steps are close to even there.
        candidates.into_iter().find(|ticks| ticks.len() >= 3).unwrap_or_else(|| self.linear_ticks())
    }
}

fn draw_ticks(svg: &mut String, x: &Axis, y: &Axis) {
    let (right, base) = (x.pixels.end, y.pixels.start);
    for tick in y.ticks() {
        let at = y.at(tick);
        let _ = write!(
            svg,
            r#"<path class="grid" d="M{LEFT} {at:.1}H{right}"/><text x="{}" y="{:.1}" text-anchor="end">{}</text>"#,
            LEFT - 7.0,
            at + 4.0,
            number(tick),
        );
    }
    for tick in x.ticks() {
        let at = x.at(tick);
        let _ = write!(
            svg,
            r#"<path class="tick" d="M{at:.1} {base}v4"/><text x="{at:.1}" y="{}" text-anchor="middle">{}</text>"#,
            base + 17.0,
            number(tick),
        );
    }
    let _ = write!(svg, r#"<path class="tick" d="M{LEFT} {base}H{right}"/>"#);
}

/// Path data through the [`thinned`] points, interrupted where a point cannot be drawn.
fn path(points: &[(f64, f64)], x: &Axis, y: &Axis) -> String {
    let mut data = String::new();
    let mut pen = 'M';
    for (px, py) in thinned(points) {
        let (at_x, at_y) = (x.at(px), y.at(py));
        if at_x.is_finite() && at_y.is_finite() {
            let _ = write!(data, "{pen}{at_x:.1} {at_y:.1}");
            pen = 'L';
        } else {
            pen = 'M';
        }
    }
    data
}

/// At most [`MAX_POINTS`] of the points and the last: of each stretch the lowest and the highest, so that no spike is
/// lost.
pub(crate) fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let Some(last) = points.last().filter(|_| points.len() > MAX_POINTS) else { return points.to_vec() };
    let stretch = points.len().div_ceil(MAX_POINTS / 2);
    let extremes = |stretch: &[(f64, f64)]| {
        let by_height = |a: &(usize, f64), b: &(usize, f64)| a.1.total_cmp(&b.1);
        let heights = || stretch.iter().map(|point| point.1).enumerate();
        let (low, high) = (heights().min_by(by_height)?.0, heights().max_by(by_height)?.0);
        Some([stretch[low.min(high)], stretch[low.max(high)]])
    };
    points.chunks(stretch).filter_map(extremes).flatten().chain([*last]).collect()
}

/// A tick's value, short: 25000 as 25k, 0.0004 as 4e-4.
fn number(value: f64) -> String {
    let size = value.abs();
    let rounded = |value: f64| format!("{}", (value * 1e6).round() / 1e6);
    match size {
        0.0 => "0".to_owned(),
        1e6.. => format!("{}M", rounded(value / 1e6)),
        1e4.. => format!("{}k", rounded(value / 1e3)),
        1e-3.. => rounded(value),
        _ => format!("{:e}", format!("{value:.3e}").parse::<f64>().unwrap_or(value)),
    }
}

/// Text as it stands between or inside HTML tags.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(low: f64, high: f64, log: bool) -> Axis {
        Axis { low, high, pixels: 100.0..0.0, log }
    }

    fn chart(log_y: bool, points: &[(f64, f64)]) -> Chart {
        Chart {
            title: "a < b".into(),
            x_label: "step".into(),
            y_label: "loss".into(),
            log_y,
            smoothing: 0,
            curves: vec![Curve { name: "a".into(), points: points.to_vec() }],
        }
    }

    #[test]
    fn a_linear_axis_is_proportional_and_a_log_axis_to_the_logarithm() {
        assert_eq!(axis(10.0, 20.0, false).at(12.5), 75.0);
        assert!((axis(1.0, 100.0, true).at(10.0) - 50.0).abs() < 1e-9);
        assert!((axis(0.01, 1.0, true).at(0.1) - 50.0).abs() < 1e-9);
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(axis(0.0, 1000.0, false).ticks(), [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]);
        assert_eq!(axis(-3.0, 11.0, false).ticks(), [0.0, 5.0, 10.0]);
        assert_eq!(axis(0.016, 0.11, true).ticks(), [0.02, 0.05, 0.1]);
        assert_eq!(axis(0.5, 5e3, true).ticks(), [1.0, 10.0, 100.0, 1000.0]);
        assert_eq!(axis(0.15, 2.5, true).ticks(), [0.2, 0.5, 1.0, 2.0]);
        assert_eq!(axis(1.0, 1.55, true).ticks().len(), 6);
    }

    #[test]
    fn smoothing_is_the_weighted_mean_of_what_came_before() {
        // Weights 1/2, 1 and 1/4, 1/2, 1, divided by their sums.
        let expected = [8.0, (4.0 + 2.0) / 1.5, (2.0 + 1.0 + 4.0) / 1.75];
        let actual = smoothed(&[8.0, 2.0, 4.0], 2);
        assert!(actual.iter().zip(expected).all(|(a, e)| (a - e).abs() < 1e-12), "{actual:?}");
        assert_eq!(smoothed(&[3.0, -1.0], 0), [3.0, -1.0]);
        assert_eq!(smoothed(&[3.0, f64::INFINITY, 3.0], 4)[2], 3.0);
    }

    #[test]
    fn the_first_point_is_low_left_and_the_last_high_right() {
        let svg = chart(false, &[(0.0, 1.0), (10.0, 5.0)]).svg(WIDE);
        let line = format!("M{LEFT:.1} {:.1}L{:.1} {TOP:.1}", WIDE.height - BOTTOM, WIDE.width - RIGHT);
        assert!(svg.contains(&line), "{svg}");
        assert!(svg.contains("a &lt; b"), "{svg}");
    }

    #[test]
    fn what_cannot_be_drawn_leaves_a_gap_and_not_a_broken_axis() {
        let svg =
            chart(true, &[(0.0, 1.0), (1.0, 0.0), (2.0, 10.0), (3.0, f64::NAN), (4.0, 100.0)]).svg(WIDE);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let line = svg.split("c0").nth(1).unwrap();
        assert_eq!(line.matches('M').count(), 3, "{line}");
        assert_eq!(chart(true, &[(0.0, -1.0)]).svg(WIDE), "");
    }

    #[test]
    fn long_curves_are_thinned_and_keep_their_end_and_their_spikes() {
        let mut points: Vec<(f64, f64)> =
            (0..10_000).map(|index| (index as f64, 1.0 + index as f64)).collect();
        let svg = chart(false, &points).svg(WIDE);
        assert!(svg.matches('L').count() <= MAX_POINTS, "{}", svg.len());
        assert!(svg.contains(&format!("L{:.1} {TOP:.1}", WIDE.width - RIGHT)));
        points[5_555].1 = 1e6;
        points[7_777].1 = -1e6;
        let kept = thinned(&points);
        assert!(kept.contains(&points[5_555]) && kept.contains(&points[7_777]));
        assert!(kept.len() <= MAX_POINTS + 1 && kept.is_sorted_by(|a, b| a.0 <= b.0));
    }

    #[test]
    fn ticks_read_short() {
        let texts = [0.0, 1500.0, 25_000.0, 3e6, 0.30000000000000004, 0.0004, -2.5].map(number);
        assert_eq!(texts, ["0", "1500", "25k", "3M", "0.3", "4e-4", "-2.5"]);
    }
}
