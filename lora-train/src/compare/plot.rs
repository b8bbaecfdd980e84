//! The scores over trainable parameters, as a picture.

use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{Line, Spread, Table};
use crate::metrics::Metric;

const SIZE: (u32, u32) = (960, 600);
const FONT: &str = "sans-serif";

/// How a metric (or the loss) is called in tables and pictures.
pub(super) fn title(name: &str) -> String {
    Metric::find(name).map_or(name.to_owned(), |m| m.title().to_owned())
}

/// In the units of the paper's tables.
pub(super) fn scaled(name: &str, spread: &Spread) -> Spread {
    spread.scaled(Metric::find(name).map_or(1.0, Metric::scale))
}

/// A point of the picture.
struct Point<'a> {
    name: &'a str,
    trainable: f64,
    score: Spread,
}

/// The main score over the trainable parameters, which are on a logarithmic scale, with bars of one standard deviation;
/// `None` while there are no scores.
pub(super) fn svg(table: &Table) -> Option<String> {
    let metric = &table.lines.iter().find_map(|line| line.scores.first())?.0;
    let point = |line: &Line| {
        let (_, score) = line.scores.iter().find(|(name, _)| name == metric)?;
        Some((line.trainable? as f64, scaled(metric, score)))
    };
    let points: Vec<Point> = table
        .lines
        .iter()
        .filter_map(|line| point(line).map(|(trainable, score)| Point { name: &line.name, trainable, score }))
        // Scores beyond f32 come from no run, and from axes that nothing can draw.
        .filter(|p| p.trainable > 0.0 && (p.score.mean.abs() + p.score.sd.unwrap_or(0.0)) < f32::MAX.into())
        .collect();
    if points.is_empty() {
        return None;
    }
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        // Drawing into a string fails for nothing but coordinates that are no numbers, which are left out above.
        draw(&root, &title(metric), &points)?;
        root.present().ok()?;
    }
    Some(text)
}

fn draw(root: &DrawingArea<SVGBackend<'_>, Shift>, metric: &str, points: &[Point]) -> Option<()> {
    root.fill(&WHITE).ok()?;
    let (mut left, mut right) = (f64::INFINITY, 0.0f64);
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    for p in points {
        let sd = p.score.sd.unwrap_or(0.0);
        (left, right) = (left.min(p.trainable), right.max(p.trainable));
        (low, high) = (low.min(p.score.mean - sd), high.max(p.score.mean + sd));
    }
    let room = ((high - low) * 0.12).max(1e-3 * high.abs()).max(1e-6);
    // About ten labels, each another.
    let decimals = (-((high - low + 2.0 * room) / 10.0).log10()).ceil().clamp(0.0, 9.0) as usize;
    let mut chart = ChartBuilder::on(root)
        .margin(24)
        .x_label_area_size(56)
        .y_label_area_size(72)
        .build_cartesian_2d((left / 2.5..right * 6.0).log_scale(), low - room..high + room)
        .ok()?;
    chart
        .configure_mesh()
        .x_desc("trainable parameters")
        .y_desc(metric)
        .x_label_formatter(&|x| short(*x))
        .y_label_formatter(&|y| format!("{y:.decimals$}"))
        .label_style((FONT, 16))
        .axis_desc_style((FONT, 18))
        .bold_line_style(BLACK.mix(0.12))
        .light_line_style(TRANSPARENT)
        .draw()
        .ok()?;
    let mut taken: Vec<(i32, i32, i32)> = Vec::new();
    let width = |name: &str| 8 * name.chars().count() as i32 + 16;
    for (i, p) in points.iter().enumerate() {
        let color = Palette99::pick(i).mix(1.0);
        let sd = p.score.sd.unwrap_or(0.0);
        let line = [(p.trainable, p.score.mean - sd), (p.trainable, p.score.mean + sd)];
        chart.draw_series([PathElement::new(line, color.stroke_width(2))]).ok()?;
        chart.draw_series([Circle::new((p.trainable, p.score.mean), 5, color.filled())]).ok()?;
        // The name stands beside its point, on the left where it would leave the picture, and cut where it would there too;
        // where another stands already, at the nearest free height, with a line to its point.
        let (x, at) = chart.backend_coord(&(p.trainable, p.score.mean));
        let (before, after) = (x, SIZE.0 as i32 - x);
        let turned = width(p.name) > after && before > after;
        let name = fitting(p.name, if turned { before } else { after }, width);
        let (from, to) = if turned { (x - width(&name), x) } else { (x, x + width(&name)) };
        let free = |y: i32| !taken.iter().any(|&(f, t, ty)| (ty - y).abs() < 16 && from < t && f < to);
        let near = (0..SIZE.1 as i32).flat_map(|off| [at - off, at + off]);
        let y = near.into_iter().find(|y| (16..SIZE.1 as i32 - 80).contains(y) && free(*y)).unwrap_or(at);
        if (y - at).abs() > 6 {
            root.draw(&PathElement::new([(x, at), (x + if turned { -9 } else { 9 }, y)], color.stroke_width(1)))
                .ok()?;
        }
        taken.push((from, to, y));
        let (side, off) = if turned { (HPos::Right, -11) } else { (HPos::Left, 11) };
        let style = (FONT, 15).into_font().color(&BLACK).pos(Pos::new(side, VPos::Center));
        root.draw(&Text::new(name, (x + off, y), style)).ok()?;
    }
    Some(())
}

/// A name, cut at its end where it is wider than the room.
fn fitting(name: &str, room: i32, width: impl Fn(&str) -> i32) -> String {
    let mut cut = name.to_owned();
    while width(&cut) > room && cut.chars().count() > 2 {
        cut = cut.chars().take(cut.chars().count() - 2).chain(['…']).collect();
    }
    cut
}

/// 1.2K, 35M, 175B.
fn short(n: f64) -> String {
    let (value, unit) = match n {
        n if n >= 1e9 => (n / 1e9, "B"),
        n if n >= 1e6 => (n / 1e6, "M"),
        n if n >= 1e3 => (n / 1e3, "K"),
        n => (n, ""),
    };
    format!("{value}{unit}")
}
