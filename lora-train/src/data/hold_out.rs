//! A share of the data kept from training.

use std::collections::HashMap;

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::{Dataset, Error, Result, Sequence};

impl Dataset {
    /// Splits off about `share` of the sequences, at least one: what is left, and what is held out, each in its order.
    ///
    /// Completions of the same prompt stay together, so that nothing held out is seen in training (but where all have the
    /// same); a prompt that has more of them than the share trains, unless every prompt has. Which they are depends on the data
    /// alone, not on a run's seed: runs that are to be compared hold out the same.
    ///
    /// # Errors
    /// [`Error::HoldOut`] when nothing would be left on one of the sides.
    pub fn hold_out(self, share: f64) -> Result<(Dataset, Dataset)> {
        let count = self.sequences.len();
        let wanted = ((share * count as f64).round() as usize).max(1);
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut of_prompt: HashMap<&[u32], usize> = HashMap::new();
        for (i, sequence) in self.sequences.iter().enumerate() {
            let group = match prompt(sequence) {
                Some(prompt) => *of_prompt.entry(prompt).or_insert(groups.len()),
                None => groups.len(),
            };
            match groups.get_mut(group) {
                Some(members) => members.push(i),
                None => groups.push(vec![i]),
            }
        }
        if groups.len() == 1 {
            // Of a prompt that all have nothing is to be kept from training.
            groups = (0..count).map(|i| vec![i]).collect();
        }
        let mut key = [0; 32];
        key[..8].copy_from_slice(b"hold out");
        groups.shuffle(&mut ChaCha8Rng::from_seed(key));
        let small = |group: &&Vec<usize>| group.len() <= wanted;
        let least = groups.iter().min_by_key(|group| group.len());
        let chosen: Vec<&Vec<usize>> = match groups.iter().any(|group| small(&group)) {
            true => groups.iter().filter(small).collect(),
            false => least.into_iter().collect(),
        };
        let (mut held, mut taken) = (vec![false; count], 0);
        for group in chosen {
            if taken >= wanted {
                break;
            }
            taken += group.len();
            group.iter().for_each(|&i| held[i] = true);
        }
        let of = |side: bool| -> Vec<Sequence> {
            let kept = self.sequences.iter().zip(&held).filter(|(_, h)| **h == side);
            kept.map(|(sequence, _)| sequence.clone()).collect()
        };
        let (rest, held_out) = (of(false), of(true));
        if rest.is_empty() || held_out.is_empty() {
            return Err(Error::HoldOut { share, sequences: count });
        }
        let (metrics, positive) = (self.metrics, self.positive);
        Ok((Dataset { sequences: rest, ..self }, Dataset { metrics, positive, ..Dataset::new(held_out) }))
    }
}

/// What comes before the first token that is predicted, where that is a prompt.
fn prompt(sequence: &Sequence) -> Option<&[u32]> {
    let first = sequence.predicted().next()?.start;
    (first > 1).then(|| &sequence.tokens[..first])
}
