//! A context-free grammar in tables, and how it is written out.

use rand::{Rng, seq::IndexedRandom};

/// A rule: its name, and what it may become.
///
/// `{name}` in an alternative stands for an expansion of the rule `name`, a new one each time. With a capital, `{Name}`
/// or `{Name2}`, it is drawn once for the whole text and then stays the same: that is how a paragraph keeps to its
/// subject.
pub(super) type Rule = (&'static str, &'static [&'static str]);

/// One text from `template`: articles agree and sentences start with a capital, if it is made of sentences and not of
/// `key : value` fields.
///
/// # Panics
/// On a name without a rule, which is a mistake in the tables.
pub(super) fn write(template: &str, rules: &[&[Rule]], rng: &mut impl Rng) -> String {
    let mut bound = Vec::new();
    let text = expand(template, rules, &mut bound, rng);
    if text.contains(" | ") { text } else { finish(&text) }
}

/// One expansion of the rule `name`, as it stands.
pub(super) fn draw(name: &str, rules: &[&[Rule]], rng: &mut impl Rng) -> String {
    expand(pick(name, rules, rng), rules, &mut Vec::new(), rng)
}

fn expand(template: &str, rules: &[&[Rule]], bound: &mut Vec<(String, String)>, rng: &mut impl Rng) -> String {
    let mut out = String::new();
    let mut rest = template;
    while let Some((before, name, after)) = next(rest) {
        out.push_str(before);
        rest = after;
        if let Some((_, text)) = bound.iter().find(|(n, _)| n == name) {
            out.push_str(text);
            continue;
        }
        let stays = name.starts_with(|c: char| c.is_uppercase());
        let rule = match stays {
            true => name.trim_end_matches(|c: char| c.is_ascii_digit()).to_lowercase(),
            false => name.to_owned(),
        };
        // Two different names of one rule should differ in what they stand for: try a few times.
        let mut text = String::new();
        for _ in 0..32 {
            text = expand(pick(&rule, rules, rng), rules, bound, rng);
            if !stays || bound.iter().all(|(_, other)| *other != text) {
                break;
            }
        }
        if stays {
            bound.push((name.to_owned(), text.clone()));
        }
        out.push_str(&text);
    }
    out + rest
}

/// Splits off what comes before the next `{name}`, the name, and the rest.
fn next(template: &str) -> Option<(&str, &str, &str)> {
    let (before, tail) = template.split_once('{')?;
    let (name, after) = tail.split_once('}')?;
    Some((before, name, after))
}

fn pick<'a>(name: &str, rules: &[&'a [Rule]], rng: &mut impl Rng) -> &'a str {
    let rule = rules.iter().flat_map(|table| table.iter()).find(|rule| rule.0 == name);
    let alternatives = rule.unwrap_or_else(|| panic!("the grammar has no rule '{name}'")).1;
    alternatives.choose(rng).expect("a rule has alternatives")
}

/// `a(n)` becomes `a` or `an` by what follows, and each sentence starts with a capital.
pub(super) fn finish(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("a(n) ") {
        out.push_str(before);
        // By sound: "one" starts with that of "won".
        let vowel = after.starts_with(['a', 'e', 'i', 'o', 'u', 'A', 'E', 'I', 'O', 'U']) && !after.starts_with("one");
        out.push_str(if vowel { "an " } else { "a " });
        rest = after;
    }
    out.push_str(rest);

    let (mut sentence_starts, mut last) = (true, ' ');
    out.chars()
        .map(|c| {
            let capital = sentence_starts && c.is_alphabetic();
            sentence_starts = match c {
                '.' | '!' | '?' => true,
                // The sentence goes on behind a quoted question: "where?" asked Wren.
                '"' if matches!(last, '!' | '?') => false,
                ' ' | '"' => sentence_starts,
                _ => false,
            };
            last = c;
            if capital { c.to_ascii_uppercase() } else { c }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const RULES: &[Rule] = &[("thing", &["apple", "pear", "old {fruit}"]), ("fruit", &["plum", "egg"])];

    #[test]
    fn articles_capitals_and_bindings() {
        let text = finish("a(n) egg. it is a(n) pear! \"why?\" asked a(n) Otter. \"a(n) one-star inn.\" so");
        assert_eq!(text, "An egg. It is a pear! \"Why?\" asked an Otter. \"A one-star inn.\" So");
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for _ in 0..50 {
            let text = write("{Fruit},{Fruit},{Fruit2}", &[RULES], &mut rng).to_lowercase();
            let parts: Vec<&str> = text.split(',').collect();
            assert!(parts[0] == parts[1] && parts[1] != parts[2], "{text}");
            assert!(["apple", "pear", "old plum", "old egg"].contains(&draw("thing", &[RULES], &mut rng).as_str()));
        }
    }

    #[test]
    #[should_panic(expected = "no rule 'cat'")]
    fn a_missing_rule_is_a_mistake() {
        write("{cat}", &[RULES], &mut ChaCha8Rng::seed_from_u64(0));
    }
}
