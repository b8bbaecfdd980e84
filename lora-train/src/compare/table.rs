//! The table of a comparison, and the files that it is written to.

use std::path::Path;

use lora_model::files;
use serde::Serialize;

use super::{
    Row, Spread,
    cell::{Cell, Made},
    plot,
};
use crate::{
    Result,
    latency::Quartiles,
    tables::{bytes, columns, count},
};

/// The table of a comparison.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Table {
    /// When and on what the cells were made: each once, in the order of the rows.
    pub made: Vec<Made>,
    /// A line for each row, in the order of the comparison.
    pub lines: Vec<Line>,
}

/// A row's results.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// The row's name.
    pub name: String,
    /// Its method.
    pub method: String,
    /// The learning rate, once it is chosen.
    pub lr: Option<f64>,
    /// Seeds to run.
    pub seeds: usize,
    /// Seeds that are finished, those that diverged included.
    pub finished: usize,
    /// Seeds that diverged.
    pub diverged: usize,
    /// Whether training diverged with every learning rate that was to be tried.
    pub every_rate_diverged: bool,
    /// Trainable scalars.
    pub trainable: Option<usize>,
    /// The metrics on the test data, the main one first; without any the loss.
    pub scores: Vec<(String, Spread)>,
    /// Tokens per second in training, the median of the seeds.
    pub tokens_per_s: Option<f64>,
    /// Most resident memory in training, in bytes, the largest of the seeds.
    pub peak_memory: Option<u64>,
    /// Bytes of what was trained, on the disk.
    pub checkpoint_bytes: Option<u64>,
}

impl Table {
    /// Adds a row with its finished cells; without a learning rate where it is not chosen yet, or where there is none to choose.
    pub(super) fn push(&mut self, row: &Row, lr: Option<f64>, every_rate_diverged: bool, cells: &[Cell]) {
        for made in cells.iter().filter_map(|c| c.made.as_ref()) {
            if !self.made.contains(made) {
                self.made.push(made.clone());
            }
        }
        let trained: Vec<_> = cells.iter().filter_map(|c| c.trained.as_ref()).collect();
        let mut scores: Vec<(String, Vec<f64>)> = Vec::new();
        for t in &trained {
            let own: Vec<(&str, f64)> = t.judged.scores().collect();
            let loss = t.judged.loss().map(|loss| ("loss", loss));
            for (name, score) in if own.is_empty() { loss.into_iter().collect() } else { own } {
                match scores.iter_mut().find(|(n, _)| n == name) {
                    Some((_, all)) => all.push(score),
                    None => scores.push((name.to_owned(), vec![score])),
                }
            }
        }
        let rates: Vec<f64> = trained.iter().filter_map(|t| t.tokens_per_s).collect();
        self.lines.push(Line {
            name: row.name.clone(),
            method: row.config.method.clone(),
            lr,
            seeds: row.seeds.len(),
            finished: cells.len(),
            diverged: cells.len() - trained.len(),
            every_rate_diverged,
            trainable: trained.first().map(|t| t.trainable),
            scores: scores.into_iter().filter_map(|(name, all)| Some((name, Spread::of(all)?))).collect(),
            tokens_per_s: Quartiles::of(&rates).map(|q| q.median),
            peak_memory: trained.iter().filter_map(|t| t.peak_memory).max(),
            checkpoint_bytes: trained.iter().find_map(|t| t.checkpoint_bytes),
        });
    }

    /// The names of the metrics, in the order of the first row that has some.
    fn metrics(&self) -> Vec<&str> {
        let first = self.lines.iter().find(|line| !line.scores.is_empty());
        first.map_or(Vec::new(), |line| line.scores.iter().map(|(name, _)| name.as_str()).collect())
    }

    /// Headings and rows as people read them; the first column is text, the others are numbers.
    fn shown(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let metrics = self.metrics();
        let mut head: Vec<String> = ["method", "trainable", "lr", "seeds"].map(str::to_owned).to_vec();
        for (i, name) in metrics.iter().enumerate() {
            head.push(plot::title(name));
            // The paper's tables give the spread of the main one.
            head.extend((i == 0).then(|| "95% interval".to_owned()));
        }
        head.extend(["tokens/s", "peak memory", "checkpoint"].map(str::to_owned));
        let rows = self.lines.iter().map(|line| {
            let mut row =
                vec![line.name.clone(), or_dash(line.trainable, count), or_dash(line.lr, |lr| format!("{lr:e}"))];
            let diverged = match line.diverged {
                _ if line.every_rate_diverged => ", diverged with every rate".to_owned(),
                0 => String::new(),
                n => format!(", {n} diverged"),
            };
            row.push(format!("{}/{}{diverged}", line.finished, line.seeds));
            for (i, name) in metrics.iter().enumerate() {
                let spread = line.scores.iter().find(|(n, _)| n == name).map(|(_, s)| plot::scaled(name, s));
                row.push(or_dash(spread.as_ref(), |s| match s.sd {
                    Some(sd) => format!("{} ± {}", digits(s.mean), digits(sd)),
                    None => digits(s.mean),
                }));
                if i == 0 {
                    let interval = spread.as_ref().and_then(|s| Some((s.mean, s.interval?)));
                    row.push(or_dash(interval, |(mean, half)| {
                        format!("{} – {}", digits(mean - half), digits(mean + half))
                    }));
                }
            }
            row.push(or_dash(line.tokens_per_s, |rate| count(rate.round() as usize)));
            row.push(or_dash(line.peak_memory, bytes));
            row.push(or_dash(line.checkpoint_bytes, bytes));
            row
        });
        (head, rows.collect())
    }

    /// For a terminal: columns under each other.
    pub fn text(&self) -> String {
        let (head, mut rows) = self.shown();
        rows.insert(0, head);
        columns(&rows)
    }

    /// As a Markdown table.
    pub fn markdown(&self) -> String {
        let (head, rows) = self.shown();
        let line = |fields: &[String]| {
            let fields: Vec<String> = fields.iter().map(|f| f.replace('|', "\\|")).collect();
            format!("| {} |\n", fields.join(" | "))
        };
        let rule = format!("|---|{}\n", "---:|".repeat(head.len() - 1));
        let rows: String = rows.iter().map(|row| line(row)).collect();
        let made = self.made.iter().map(|m| format!("{}: {}, lora {}", m.date, m.machine, m.version));
        let made = made.collect::<Vec<_>>().join("; ");
        let made = if made.is_empty() { made } else { format!("\nMade {made}.\n") };
        format!("{}{rule}{rows}{made}", line(&head))
    }

    /// As comma-separated values with all digits (RFC 4180).
    pub fn csv(&self) -> String {
        let metrics = self.metrics();
        let mut head: Vec<String> =
            ["name", "method", "trainable", "lr", "seeds", "finished", "diverged"].map(str::to_owned).to_vec();
        for name in &metrics {
            head.extend([name.to_string(), format!("{name}_sd"), format!("{name}_interval95")]);
        }
        head.extend(["tokens_per_s", "peak_memory", "checkpoint_bytes"].map(str::to_owned));
        let record = |fields: &[String]| {
            let field = |f: &String| {
                if f.contains([',', '"', '\n', '\r']) { format!("\"{}\"", f.replace('"', "\"\"")) } else { f.clone() }
            };
            fields.iter().map(field).collect::<Vec<_>>().join(",") + "\r\n"
        };
        let mut text = record(&head);
        for line in &self.lines {
            let own = |x: Option<f64>| x.map_or(String::new(), |x| x.to_string());
            let mut row = vec![line.name.clone(), line.method.clone()];
            row.push(line.trainable.map_or(String::new(), |n| n.to_string()));
            row.push(own(line.lr));
            row.extend([line.seeds, line.finished, line.diverged].map(|n| n.to_string()));
            for name in &metrics {
                let spread = line.scores.iter().find(|(n, _)| n == name).map(|(_, s)| s);
                row.extend([
                    own(spread.map(|s| s.mean)),
                    own(spread.and_then(|s| s.sd)),
                    own(spread.and_then(|s| s.interval)),
                ]);
            }
            row.push(own(line.tokens_per_s));
            row.extend([line.peak_memory, line.checkpoint_bytes].map(|n| n.map_or(String::new(), |n| n.to_string())));
            text += &record(&row);
        }
        text
    }

    /// Writes `table.md`, `table.csv`, `table.json` and, once there are scores, `table.svg` into a folder.
    ///
    /// # Errors
    /// What writing can cause.
    pub fn write(&self, dir: &Path) -> Result<()> {
        files::create_folder(dir)?;
        let json = serde_json::to_string_pretty(self).expect("numbers and names");
        let files = [("table.md", self.markdown()), ("table.csv", self.csv()), ("table.json", format!("{json}\n"))];
        for (name, text) in files.into_iter().chain(plot::svg(self).map(|svg| ("table.svg", svg))) {
            files::write_bytes(&dir.join(name), text.as_bytes())?;
        }
        Ok(())
    }
}

fn or_dash<T>(value: Option<T>, shown: impl FnOnce(T) -> String) -> String {
    value.map_or("–".to_owned(), shown)
}

/// Two digits after the point for what is about 100, more for what is about 1.
fn digits(x: f64) -> String {
    if x.abs() >= 10.0 { format!("{x:.2}") } else { format!("{x:.3}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows as of a finished comparison; the last has not begun.
    fn table() -> Table {
        let line = |name: &str, trainable: usize, scores: &[f64]| Line {
            name: name.into(),
            method: name.split(' ').next().unwrap_or_default().into(),
            lr: Some(3e-4),
            seeds: 3,
            finished: scores.len(),
            diverged: 0,
            every_rate_diverged: false,
            trainable: (trainable > 0).then_some(trainable),
            scores: Spread::of(scores.to_vec()).map(|s| ("accuracy".to_owned(), s)).into_iter().collect(),
            tokens_per_s: (trainable > 0).then_some(1234.4),
            peak_memory: Some(412_300_000),
            checkpoint_bytes: Some(295_936),
        };
        Table {
            made: Vec::new(),
            lines: vec![
                line("lora rank=8 targets=q,v", 73_728, &[0.912, 0.915, 0.911]),
                line("full", 22_713_216, &[0.914, 0.913, 0.916]),
                line("bitfit", 38_000, &[0.9]),
                line("adapter-p", 0, &[]),
            ],
        }
    }

    #[test]
    fn the_same_numbers_in_every_form() {
        let table = table();
        let markdown = table.markdown();
        let second = markdown.lines().nth(3).unwrap();
        assert_eq!(
            second,
            "| full | 22,713,216 | 3e-4 | 3/3 | 91.43 ± 0.153 | 91.05 – 91.81 | 1,234 | 412 MB | 296 kB |"
        );
        assert!(markdown.contains("| bitfit | 38,000 | 3e-4 | 1/3 | 90.00 | – |"), "{markdown}");
        assert!(markdown.contains("| adapter-p | – | 3e-4 | 0/3 | – | – | – |"), "{markdown}");
        let text = table.text();
        let widths: Vec<usize> = text.lines().map(|l| l.chars().count()).collect();
        assert!(widths.iter().all(|w| *w == widths[0]), "{text}");
        let csv = table.csv();
        assert!(csv.contains("\r\n\"lora rank=8 targets=q,v\",lora,73728,"), "{csv}");
        assert!(csv.lines().last().unwrap().starts_with("adapter-p,adapter-p,,0.0003,3,0,0,,,,"), "{csv}");
        let json: serde_json::Value = serde_json::to_value(&table).unwrap();
        assert_eq!(json["lines"][1]["scores"][0][1]["values"][2], 0.916);
    }

    #[test]
    fn the_picture_names_every_row_that_has_a_score() {
        let svg = plot::svg(&table()).unwrap();
        for part in ["<svg", "full", "bitfit", "lora rank=8", "accuracy", "trainable parameters"] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        assert!(!svg.contains("adapter-p"));
        assert_eq!(plot::svg(&Table::default()), None);
    }

    #[test]
    fn a_row_of_which_no_rate_came_through_says_so() {
        let mut table = table();
        table.lines[3].every_rate_diverged = true;
        assert!(table.text().contains("0/3, diverged with every rate"), "{}", table.text());
    }

    /// What the picture writes, and where: x, the end of the text that stands there, and the text.
    fn texts(svg: &str) -> Vec<(i32, String, String)> {
        let tag = |at: usize| &svg[at..at + svg[at..].find('>').unwrap()];
        let value = |tag: &str, key: &str| {
            let from = tag.find(&format!("{key}=\"")).unwrap() + key.len() + 2;
            tag[from..from + tag[from..].find('"').unwrap()].to_owned()
        };
        let starts = svg.match_indices("<text").map(|(at, _)| at);
        let of = |at: usize| {
            let (tag, rest) = (tag(at), &svg[at + tag(at).len() + 1..]);
            let text = rest[..rest.find("</text>").unwrap()].trim().to_owned();
            (value(tag, "x").parse().unwrap(), value(tag, "text-anchor"), text)
        };
        starts.map(of).collect()
    }

    #[test]
    fn names_stay_within_the_picture() {
        let mut table = table();
        let long = "a long name of a row, ".repeat(5);
        for (line, name) in table.lines.iter_mut().zip([&long, &format!("{long}!"), "short", "none"]) {
            line.name = name.into();
        }
        let texts = texts(&plot::svg(&table).unwrap());
        let names: Vec<_> = texts.iter().filter(|(_, _, text)| text.contains("long") || text == "short").collect();
        assert_eq!(names.len(), 3, "{texts:?}");
        for (x, anchor, text) in names {
            let width = 8 * text.chars().count() as i32;
            let (from, to) = if anchor == "end" { (x - width, *x) } else { (*x, x + width) };
            assert!(from >= 0 && to <= 960, "{text} from {from} to {to}");
        }
    }

    #[test]
    fn the_scale_of_the_picture_has_no_number_twice() {
        for scores in [&[0.637214][..], &[0.9, 0.912], &[0.001, 0.99], &[0.5, 0.500001]] {
            let mut table = table();
            table.lines.truncate(scores.len());
            for (line, score) in table.lines.iter_mut().zip(scores) {
                line.scores = vec![("accuracy".into(), Spread::of(vec![*score]).unwrap())];
            }
            let texts = texts(&plot::svg(&table).unwrap());
            let numbers = texts.iter().map(|(_, _, text)| text).filter(|t| t.parse::<f64>().is_ok());
            let mut numbers: Vec<&String> = numbers.collect();
            let count = numbers.len();
            numbers.sort();
            numbers.dedup();
            assert!(count > 3 && numbers.len() == count, "{scores:?}: {texts:?}");
        }
    }
}
