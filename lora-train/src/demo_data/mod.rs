//! A small invented world to train on: the data of `lora demo`.
//!
//! The world is a harbour town full of places to eat. It is told in two ways:
//!
//! - **Upstream**, [`upstream_text`]: prose about its places, people, weather, walks, dishes and opinions; cards of
//!   `key : value` fields on other matters, some of which are said again in words; and the counting-out rhymes of its
//!   children. This is what a base model is pretrained on.
//! - **Downstream**, [`records`]: a record of one place and a sentence or a few that say exactly what the record says,
//!   in the form `context||reference`. Upstream never shows this task, so adaptation has something to learn.
//!
//! What makes the task possible for a small model is looking back and copying: induction heads (Olsson et al. 2022). They
//! form late in prose, where copying seldom pays, and early in rhymes, of which all but the first line is a copy.
//!
//! Both share their names and words. All of it comes from a grammar written for this project, and depends on the seed
//! alone.

mod grammar;
mod record;
mod sentence;
mod upstream;
mod words;

use std::collections::HashSet;

use rand::{RngExt, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;

pub use record::{Price, Record};

/// `n` records, no two of them equal, each with what it says in prose.
///
/// The first records of a longer list are those of a shorter one, so any cut of one list makes two sets without a
/// record in common: see [`Downstream`].
///
/// # Panics
/// If `n` is over a million, beyond which distinct records grow rare.
pub fn records(seed: u64, n: usize) -> Vec<(String, String)> {
    told(seed, n).into_iter().map(|(record, sentence)| (record.to_string(), sentence)).collect()
}

/// The records of [`records`], each told in one to `most` different ways, the first of them as there: references for what a
/// model says.
///
/// # Panics
/// As [`records`], and if `most` is 0.
pub fn retold(seed: u64, n: usize, most: usize) -> Vec<(String, Vec<String>)> {
    assert!(most > 0, "a record is told in one way at least");
    let mut rng = generator(seed, b"retold");
    let mut retell = |(record, sentence): (Record, String)| {
        let mut ways = vec![sentence];
        for _ in 1..rng.random_range(1..=most) {
            let way = sentence::of(&record, &mut rng);
            if !ways.contains(&way) {
                ways.push(way);
            }
        }
        (record.to_string(), ways)
    };
    told(seed, n).into_iter().map(&mut retell).collect()
}

/// Records and what they say.
fn told(seed: u64, n: usize) -> Vec<(Record, String)> {
    assert!(n <= 1_000_000, "the little world has room for a million records, not {n}");
    let mut rng = generator(seed, b"records");
    let mut seen = HashSet::new();
    let mut records = Vec::with_capacity(n);
    while records.len() < n {
        let record = Record::random(&mut rng);
        let sentence = sentence::of(&record, &mut rng);
        if seen.insert(record.to_string()) {
            records.push((record, sentence));
        }
    }
    records
}

/// The downstream task, split so that no record of one part is in another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Downstream {
    /// To adapt on.
    pub train: Vec<(String, String)>,
    /// To evaluate on.
    pub valid: Vec<(String, String)>,
}

impl Downstream {
    /// `train` records and `valid` others, with their sentences.
    ///
    /// # Panics
    /// As [`records`], if there are over a million in all.
    pub fn new(seed: u64, train: usize, valid: usize) -> Downstream {
        // The validation set comes first, so that it stays the same when only the size of the training set changes.
        let mut all = records(seed, valid + train);
        let train = all.split_off(valid);
        Downstream { train, valid: all }
    }
}

/// Records and sentences as the lines of an E2E file, `record||sentence`.
pub fn lines(records: &[(String, String)]) -> String {
    records.iter().map(|(record, sentence)| format!("{record}||{sentence}\n")).collect()
}

/// Share of the paragraphs that are rhymes.
const RHYMES: f64 = 0.5;

/// Prose, cards and rhymes to pretrain on: paragraphs of one line each, as many as it takes to reach `n_bytes`.
pub fn upstream_text(seed: u64, n_bytes: usize) -> String {
    let mut rng = generator(seed, b"upstream");
    let mut text = String::with_capacity(n_bytes + 1024);
    let words = upstream::words();
    while text.len() < n_bytes {
        match rng.random_bool(RHYMES) {
            true => text.push_str(&rhyme(&words, &mut rng)),
            false => text.push_str(&grammar::write(upstream::PARAGRAPH, &[upstream::RULES, words::RULES], &mut rng)),
        }
        text.push('\n');
    }
    text
}

/// A counting-out rhyme: some words in a row, and again, and perhaps again.
fn rhyme(words: &[&str], rng: &mut ChaCha8Rng) -> String {
    let n = rng.random_range(4..=16);
    let line = words.sample(rng, n).copied().collect::<Vec<_>>().join(" ");
    vec![line; rng.random_range(2..=4)].join(" ")
}

/// A generator for one purpose: the seed under a name, so that no two purposes share their draws.
fn generator(seed: u64, purpose: &[u8]) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..8 + purpose.len()].copy_from_slice(purpose);
    ChaCha8Rng::from_seed(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_decide() {
        assert_eq!(records(1, 50), records(1, 50));
        assert_eq!(records(1, 50)[..20], records(1, 20));
        assert_ne!(records(1, 5), records(2, 5));
        assert_eq!(upstream_text(1, 9000), upstream_text(1, 9000));
        assert!(upstream_text(1, 9000).starts_with(&upstream_text(1, 2000)));
        assert_ne!(upstream_text(1, 900), upstream_text(2, 900));
        assert!((9000..11000).contains(&upstream_text(0, 9000).len()));
    }

    #[test]
    fn records_are_told_in_several_ways() {
        let all = retold(3, 200, 4);
        let first: Vec<_> = all.iter().map(|(record, ways)| (record.clone(), ways[0].clone())).collect();
        assert_eq!(first, records(3, 200));
        for (record, ways) in &all {
            assert!(
                (1..=4).contains(&ways.len()) && ways.iter().collect::<HashSet<_>>().len() == ways.len(),
                "{ways:?}"
            );
            let name = record.split(" | ").next().unwrap().trim_start_matches("name : ");
            assert!(ways.iter().all(|w| w.contains(name)), "{record}: {ways:?}");
        }
        let counts: HashSet<usize> = all.iter().map(|(_, ways)| ways.len()).collect();
        assert_eq!(counts.len(), 4, "{counts:?}");
        assert_eq!(all, retold(3, 200, 4));
    }

    #[test]
    fn train_and_valid_share_no_record() {
        let Downstream { train, valid } = Downstream::new(0, 3000, 500);
        assert_eq!((train.len(), valid.len()), (3000, 500));
        let train: HashSet<_> = train.iter().map(|r| &r.0).collect();
        assert_eq!(train.len(), 3000);
        assert!(valid.iter().all(|r| !train.contains(&r.0)));
        assert_eq!(valid, Downstream::new(0, 10, 500).valid);
    }

    #[test]
    fn the_text_reads_well() {
        let sentences = records(3, 3000).into_iter().map(|r| r.1);
        let paragraphs = upstream_text(3, 600_000);
        for text in sentences.chain(paragraphs.lines().map(str::to_owned)) {
            for bad in ["{", "}", "a(n)", "  ", " ,", " .", "..", "||", "\"\"", ",,"] {
                assert!(!text.contains(bad), "{bad:?} in {text:?}");
            }
            let words: Vec<&str> = text.split(' ').collect();
            for pair in words.windows(2) {
                let article = pair[0].to_lowercase();
                let vowel =
                    pair[1].to_lowercase().starts_with(['a', 'e', 'i', 'o', 'u']) && !pair[1].starts_with("one");
                assert!(!(article == "a" && vowel || article == "an" && !vowel), "{pair:?} in {text:?}");
                assert!(pair[0] != pair[1], "{pair:?} in {text:?}");
            }
        }
    }

    #[test]
    fn the_text_is_rich_and_plain() {
        let text = upstream_text(0, 1_000_000);
        let lines: Vec<&str> = text.lines().collect();
        let distinct: HashSet<_> = lines.iter().collect();
        assert!(distinct.len() as f64 > 0.95 * lines.len() as f64, "{} of {}", distinct.len(), lines.len());
        let words: HashSet<_> = text.split(|c: char| !c.is_alphabetic()).collect();
        assert!((600..4000).contains(&words.len()), "{} words", words.len());
        // What downstream says is made of words that upstream has shown.
        let downstream = lines_of_words(&records(0, 2000));
        let unknown: Vec<_> = downstream.iter().filter(|w| !words.contains(w.as_str())).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
    }

    fn lines_of_words(records: &[(String, String)]) -> HashSet<String> {
        lines(records).split(|c: char| !c.is_alphabetic()).map(str::to_owned).collect()
    }
}
