//! Small multiples: a panel for every module, a row of panels for every layer.

use std::collections::{BTreeMap, BTreeSet};

use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{Measures, Similarity};

const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(40, 44, 52);
const GREY: RGBColor = RGBColor(120, 126, 136);
const FAINT: RGBColor = RGBColor(232, 234, 238);
const PANEL: i32 = 132;
const GAP: i32 = 44;
const LEFT: i32 = 96;
const TOP: i32 = 118;
/// Room below the panels, and on the right.
const BOTTOM: i32 = 40;
const RIGHT: i32 = 116;

/// Where the panels of modules stand: rows are layers, columns kinds of modules.
struct Grid<'a> {
    rows: Vec<Option<usize>>,
    columns: Vec<&'a str>,
}

/// The layer of a module, and its name within it.
fn place(module: &str) -> (Option<usize>, &str) {
    let mut rest = module;
    let mut found = (None, module);
    while let Some((head, tail)) = rest.split_once('.') {
        if let Ok(layer) = head.parse() {
            found = (Some(layer), tail);
        }
        rest = tail;
    }
    found
}

impl<'a> Grid<'a> {
    fn of(modules: impl Iterator<Item = &'a String>) -> Grid<'a> {
        let (mut rows, mut columns) = (BTreeSet::new(), BTreeSet::new());
        for (layer, name) in modules.map(|m| place(m)) {
            rows.insert(layer);
            columns.insert(name);
        }
        Grid { rows: rows.into_iter().collect(), columns: columns.into_iter().collect() }
    }

    fn size(&self) -> (u32, u32) {
        let along = |n: usize| n as i32 * (PANEL + GAP) - GAP;
        let width = (LEFT + along(self.columns.len()) + RIGHT).max(420);
        (width as u32, (TOP + along(self.rows.len()) + BOTTOM) as u32)
    }

    /// The upper left corner of a module's panel.
    fn corner(&self, module: &str) -> Option<(i32, i32)> {
        let (layer, name) = place(module);
        let row = self.rows.iter().position(|r| *r == layer)? as i32;
        let column = self.columns.iter().position(|c| *c == name)? as i32;
        Some((LEFT + column * (PANEL + GAP), TOP + row * (PANEL + GAP)))
    }

    /// Title, and the names of rows and columns.
    fn frame(&self, root: &Area, title: &str, about: &str) -> Drawn {
        root.fill(&WHITE).ok()?;
        text(root, title, (LEFT, 30), 22, INK, HPos::Left)?;
        text(root, about, (LEFT, 54), 14, GREY, HPos::Left)?;
        for (i, name) in self.columns.iter().enumerate() {
            let x = LEFT + i as i32 * (PANEL + GAP) + PANEL / 2;
            text(root, name, (x, TOP - 18), 14, INK, HPos::Center)?;
        }
        for (i, layer) in self.rows.iter().enumerate() {
            let y = TOP + i as i32 * (PANEL + GAP) + PANEL / 2;
            let name = layer.map_or(String::new(), |n| format!("layer {n}"));
            text(root, &name, (LEFT - 34, y), 14, INK, HPos::Right)?;
        }
        Some(())
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// Drawing into a string fails for nothing but numbers that are none.
type Drawn = Option<()>;

fn text(root: &Area, text: &str, at: (i32, i32), size: i32, color: RGBColor, side: HPos) -> Drawn {
    let style = (FONT, size).into_font().color(&color).pos(Pos::new(side, VPos::Center));
    root.draw(&Text::new(text.to_owned(), at, style)).ok()
}

fn picture(size: (u32, u32), draw: impl FnOnce(&Area) -> Drawn) -> Option<String> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        draw(&root)?;
        root.present().ok()?;
    }
    Some(text)
}

/// The singular values of every module, as bars over their number; all panels have one scale.
pub(super) fn spectra(modules: &BTreeMap<String, Measures>) -> Option<String> {
    let grid = Grid::of(modules.keys());
    let largest = modules.values().flat_map(|m| &m.singular_values).fold(0f64, |a, b| a.max(*b));
    if !(largest > 0.0 && largest.is_finite()) {
        return None;
    }
    picture(grid.size(), |root| {
        grid.frame(root, "Singular values of ΔW", "σ₁ … σᵣ from left to right; all panels to one scale")?;
        for (module, measures) in modules {
            let (x, y) = grid.corner(module)?;
            root.draw(&Rectangle::new([(x, y), (x + PANEL, y + PANEL)], FAINT.filled())).ok()?;
            let count = measures.singular_values.len().max(1) as f64;
            let width = f64::from(PANEL) / count;
            for (i, sigma) in measures.singular_values.iter().enumerate() {
                let height = (f64::from(PANEL) * sigma / largest).round() as i32;
                let gap = if width > 4.0 { 1 } else { 0 };
                let from = x + (i as f64 * width).round() as i32;
                let to = x + ((i + 1) as f64 * width).round() as i32 - gap;
                let bar = [(from, y + PANEL - height), (to.max(from + 1), y + PANEL)];
                root.draw(&Rectangle::new(bar, shade(0.72).filled())).ok()?;
            }
            let about = format!("effective rank {:.1} of {}", measures.effective_rank, measures.rank);
            text(root, &about, (x, y + PANEL + 12), 12, GREY, HPos::Left)?;
        }
        // The scale, once.
        let (x, y) = (LEFT - 8, TOP);
        text(root, &format!("{largest:.3}"), (x, y), 12, GREY, HPos::Right)?;
        text(root, "0", (x, y + PANEL), 12, GREY, HPos::Right)
    })
}

/// φ(i, j) of every module that both adapters have, as maps of heat; `None` where there are none.
pub(super) fn similarities(
    modules: &BTreeMap<String, Measures>,
    factor: &str,
    phi: fn(&Similarity) -> &Vec<Vec<f64>>,
) -> Option<String> {
    let maps: BTreeMap<&String, &Vec<Vec<f64>>> = modules
        .iter()
        .filter_map(|(name, m)| Some((name, phi(m.similarity.as_ref()?))))
        .filter(|(_, phi)| phi.first().is_some_and(|row| !row.is_empty()))
        .collect();
    if maps.is_empty() {
        return None;
    }
    let grid = Grid::of(maps.keys().copied());
    let size = grid.size();
    picture(size, |root| {
        let side = if factor == "A" { "directions in the input" } else { "directions in the output" };
        let title = format!("Subspace similarity φ(i, j) of {factor}");
        let about = format!("i of this adapter's {side}, j of the other's");
        grid.frame(root, &title, &about)?;
        for (module, phi) in &maps {
            let corner = grid.corner(module)?;
            map(root, corner, phi)?;
        }
        legend(root, (size.0 as i32 - RIGHT + 36, TOP))
    })
}

/// Most cells of a map in a direction: a panel has not much more dots, and every cell costs its bytes.
const MOST_CELLS: usize = 64;

/// Which of n directions a map shows: all, or as many as it has cells, up to the last.
fn shown(n: usize) -> impl Iterator<Item = usize> + Clone {
    let cells = n.min(MOST_CELLS);
    (1..=cells).map(move |cell| cell * n / cells - 1)
}

/// One map: i downwards, j to the right.
fn map(root: &Area, (x, y): (i32, i32), phi: &[Vec<f64>]) -> Drawn {
    let (rows, cols) = (phi.len(), phi[0].len());
    let edge = |cell: usize, n: usize| (f64::from(PANEL) * cell as f64 / n.min(MOST_CELLS) as f64).round() as i32;
    for (a, i) in shown(rows).enumerate() {
        for (b, j) in shown(cols).enumerate() {
            let cell = [(x + edge(b, cols), y + edge(a, rows)), (x + edge(b + 1, cols), y + edge(a + 1, rows))];
            root.draw(&Rectangle::new(cell, shade(phi[i][j]).filled())).ok()?;
        }
    }
    let tick = |n: usize, at: (i32, i32), side| text(root, &n.to_string(), at, 12, GREY, side);
    let middle = |n: usize| PANEL / (2 * n as i32);
    tick(1, (x + middle(cols), y + PANEL + 10), HPos::Center)?;
    tick(1, (x - 6, y + middle(rows)), HPos::Right)?;
    if cols > 1 {
        tick(cols, (x + PANEL - middle(cols), y + PANEL + 10), HPos::Center)?;
    }
    if rows > 1 {
        tick(rows, (x - 6, y + PANEL - middle(rows)), HPos::Right)?;
    }
    text(root, "j", (x + PANEL / 2, y + PANEL + 10), 12, GREY, HPos::Center)?;
    text(root, "i", (x - 6, y + PANEL / 2), 12, GREY, HPos::Right)
}

/// The shades from 0 to 1.
fn legend(root: &Area, (x, y): (i32, i32)) -> Drawn {
    const WIDTH: i32 = 14;
    for i in 0..PANEL {
        let value = 1.0 - f64::from(i) / f64::from(PANEL - 1);
        root.draw(&Rectangle::new([(x, y + i), (x + WIDTH, y + i + 1)], shade(value).filled())).ok()?;
    }
    text(root, "φ", (x + WIDTH / 2, y - 14), 14, INK, HPos::Center)?;
    for (value, label) in [(1.0, "1"), (0.5, "0.5"), (0.0, "0")] {
        let at = (x + WIDTH + 8, y + (f64::from(PANEL) * (1.0 - value)).round() as i32);
        text(root, label, at, 12, GREY, HPos::Left)?;
    }
    Some(())
}

/// From nearly white over blue to nearly black: its lightness falls evenly, so it reads in print too.
fn shade(value: f64) -> RGBColor {
    const STOPS: [(u8, u8, u8); 6] =
        [(247, 251, 255), (208, 225, 242), (148, 196, 223), (74, 152, 201), (23, 100, 171), (8, 48, 107)];
    let at = value.clamp(0.0, 1.0) * (STOPS.len() - 1) as f64;
    let i = (at as usize).min(STOPS.len() - 2);
    let mix = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * (at - i as f64)).round() as u8;
    let (a, b) = (STOPS[i], STOPS[i + 1]);
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_shows_all_directions_or_some_up_to_the_last() {
        assert!(shown(5).eq(0..5) && shown(64).eq(0..64));
        let many: Vec<usize> = shown(1000).collect();
        assert_eq!((many.len(), many[63]), (64, 999));
        assert!(many.windows(2).all(|w| (15..=16).contains(&(w[1] - w[0]))), "{many:?}");
    }

    #[test]
    fn modules_have_a_layer_and_a_name_in_it() {
        for (module, expected) in [
            ("transformer.h.11.attn.c_attn", (Some(11), "attn.c_attn")),
            ("model.layers.0.self_attn.q_proj", (Some(0), "self_attn.q_proj")),
            ("lm_head", (None, "lm_head")),
        ] {
            assert_eq!(place(module), expected);
        }
    }

    #[test]
    fn shades_grow_darker() {
        let light = |v: f64| shade(v).0 as u32 + shade(v).1 as u32 + shade(v).2 as u32;
        assert!((0..100).all(|i| light(f64::from(i) / 100.0) > light(f64::from(i + 1) / 100.0)));
        assert_eq!((shade(-0.1), shade(1.1)), (shade(0.0), shade(1.0)));
    }
}
