//! JSON as Python writes it.

use serde_json::{Map, Value};

/// The options of Python's `json.dumps`.
pub(super) struct Json {
    /// Spaces that each depth is moved in by, on lines of its own; all on one line when absent.
    pub(super) indent: Option<usize>,
    /// What stands between items, and between a key and its value.
    pub(super) separators: [String; 2],
    /// Whether characters beyond ASCII are escaped.
    pub(super) ascii: bool,
    /// Whether keys come in their order.
    pub(super) sorted: bool,
}

/// A number as Python's `repr` has it: the fewest digits that tell it, with an exponent below 1e-4 and from 1e16 on.
fn float(v: f64) -> String {
    let short = format!("{v:e}");
    let (digits, exponent) = short.split_once('e').unwrap_or((&short, "0"));
    match exponent.parse::<i32>().unwrap_or_default() {
        e if v != 0.0 && !(-4..16).contains(&e) => {
            format!("{digits}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs())
        }
        _ if v.fract() == 0.0 => format!("{v:.1}"),
        _ => v.to_string(),
    }
}

impl Json {
    pub(super) fn dumps(&self, value: &Value) -> String {
        let mut out = String::new();
        self.write(value, 0, &mut out);
        out
    }

    fn write(&self, value: &Value, depth: usize, out: &mut String) {
        match value {
            Value::String(s) => self.string(s, out),
            Value::Array(items) => self.items(['[', ']'], items, depth, out, |item, out| {
                self.write(item, depth + 1, out);
            }),
            Value::Object(map) => self.object(map, depth, out),
            Value::Number(n) if n.is_f64() => out.push_str(&float(n.as_f64().unwrap_or_default())),
            other => out.push_str(&other.to_string()),
        }
    }

    fn object(&self, map: &Map<String, Value>, depth: usize, out: &mut String) {
        let mut pairs: Vec<(&String, &Value)> = map.iter().collect();
        if self.sorted {
            pairs.sort_by_key(|(key, _)| *key);
        }
        self.items(['{', '}'], &pairs, depth, out, |(key, value), out| {
            self.string(key, out);
            out.push_str(&self.separators[1]);
            self.write(value, depth + 1, out);
        });
    }

    fn items<T>(
        &self,
        around: [char; 2],
        items: &[T],
        depth: usize,
        out: &mut String,
        write: impl Fn(&T, &mut String),
    ) {
        let line = |depth: usize, out: &mut String| {
            if let Some(indent) = self.indent.filter(|_| !items.is_empty()) {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', indent * depth));
            }
        };
        out.push(around[0]);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.separators[0]);
            }
            line(depth + 1, out);
            write(item, out);
        }
        line(depth, out);
        out.push(around[1]);
    }

    fn string(&self, s: &str, out: &mut String) {
        let quoted = Value::from(s).to_string();
        if !self.ascii {
            return out.push_str(&quoted);
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                out.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
            }
        }
    }
}
