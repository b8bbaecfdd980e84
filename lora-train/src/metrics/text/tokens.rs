//! Texts to words, and words to n-grams.

use std::collections::{HashMap, hash_map::Entry};

/// The words of a text: in small letters, split as `mteval-v13a` and sacrebleu's `13a` split it. Punctuation stands alone;
/// apostrophes, hyphens between letters, and points and commas between digits stay in their words.
pub fn words(text: &str) -> Vec<String> {
    let text = text.to_lowercase();
    let mut text = text.trim_end_matches(is_space).replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    for (entity, character) in [("&quot;", "\""), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")] {
        text = text.replace(entity, character);
    }
    let text: Vec<char> = format!(" {text} ").chars().collect();
    let mut apart = Vec::with_capacity(2 * text.len());
    for c in text {
        match c {
            '!'..='&' | '('..='+' | '/' | ':'..='@' | '['..='`' | '{'..='~' => apart.extend([' ', c, ' ']),
            _ => apart.push(c),
        }
    }
    let point = |c: char| c == '.' || c == ',';
    let apart = pairs(&apart, |a, b| (!a.is_ascii_digit() && point(b)).then_some([a, ' ', b, ' ']));
    let apart = pairs(&apart, |a, b| (point(a) && !b.is_ascii_digit()).then_some([' ', a, ' ', b]));
    let apart = pairs(&apart, |a, b| (a.is_ascii_digit() && b == '-').then_some([a, ' ', b, ' ']));
    let apart: String = apart.into_iter().collect();
    apart.split(is_space).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// Replaces pairs of neighbours from left to right; what was replaced is not looked at again.
fn pairs(text: &[char], replace: impl Fn(char, char) -> Option<[char; 4]>) -> Vec<char> {
    let mut out = Vec::with_capacity(text.len() + 16);
    let mut i = 0;
    while i < text.len() {
        match text.get(i + 1).and_then(|&next| replace(text[i], next)) {
            Some(four) => {
                out.extend(four);
                i += 2;
            }
            None => {
                out.push(text[i]);
                i += 1;
            }
        }
    }
    out
}

/// White space as Python's `split` has it: that of Unicode, and the separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// How often each n-gram occurs, in the order in which they first do: sums over them are the same in every run.
pub(super) struct Counts<'a> {
    index: HashMap<&'a [u32], usize>,
    items: Vec<(&'a [u32], u32)>,
}

impl<'a> Counts<'a> {
    /// The n-grams of `order` words.
    pub(super) fn of(words: &'a [u32], order: usize) -> Counts<'a> {
        let mut counts = Counts { index: HashMap::new(), items: Vec::new() };
        for ngram in words.windows(order) {
            match counts.index.entry(ngram) {
                Entry::Occupied(at) => counts.items[*at.get()].1 += 1,
                Entry::Vacant(free) => {
                    free.insert(counts.items.len());
                    counts.items.push((ngram, 1));
                }
            }
        }
        counts
    }

    pub(super) fn get(&self, ngram: &[u32]) -> u32 {
        self.index(ngram).map_or(0, |i| self.items[i].1)
    }

    /// Where it stands in [`Counts::iter`].
    pub(super) fn index(&self, ngram: &[u32]) -> Option<usize> {
        self.index.get(ngram).copied()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'a [u32], u32)> {
        self.items.iter().copied()
    }
}
