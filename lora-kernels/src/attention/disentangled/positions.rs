use std::ops::Range;

/// Which row of the tables of relative positions says how far a key lies from a query.
///
/// At distance δ = i − j of query i from key j it is
/// ```text
/// row(δ)    = clamp(span + bucket(δ), 0, 2·span − 1)
/// bucket(δ) = δ                                                    for |δ| ≤ m, or without buckets
///           = sign(δ)·(m + ⌈ln(|δ|/m) / ln((max − 1)/m) · (m − 1)⌉) beyond,         m = ⌊buckets/2⌋
/// ```
/// with span = buckets, or max without them: near positions have rows of their own, farther ones share rows that widen as
/// their logarithm. He et al. 2021 ("DeBERTa"), equation 3; the logarithms are those of DeBERTa-v2, in f32 as Transformers
/// computes them, so that no position falls into another row than it was trained with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelativePositions {
    buckets: usize,
    max: usize,
}

impl RelativePositions {
    /// `buckets` logarithmic buckets to either side, for distances below `max`; with 0 buckets each distance below `max`
    /// has its own row. `None` where the formula has no value: `max` of 0 or, with buckets, fewer than 2 of them or a `max`
    /// of at most ⌊buckets/2⌋ + 1.
    pub fn new(buckets: usize, max: usize) -> Option<RelativePositions> {
        let sound = max > 0 && (buckets == 0 || buckets > 1 && max > buckets / 2 + 1);
        sound.then_some(RelativePositions { buckets, max })
    }

    /// Half of the tables' rows.
    pub fn span(self) -> usize {
        if self.buckets > 0 { self.buckets } else { self.max }
    }

    /// The row of distance δ.
    pub fn row(self, distance: isize) -> usize {
        let (span, far) = (self.span() as f64, distance.unsigned_abs());
        let middle = self.buckets / 2;
        let bucket = if self.buckets == 0 || far <= middle {
            distance as f64
        } else {
            let m = middle as f32;
            let octaves = (far as f32 / m).ln() / (((self.max - 1) as f64 / middle as f64) as f32).ln();
            f64::from((octaves * (m - 1.0)).ceil() + m) * distance.signum() as f64
        };
        (span + bucket).clamp(0.0, 2.0 * span - 1.0) as usize
    }
}

/// The rows of all distances in sequences of up to `longest` tokens.
pub(super) struct Rows {
    /// By descending distance, longest − 1 to 1 − longest: those of one query run along its keys.
    rows: Vec<u32>,
    longest: usize,
}

impl Rows {
    pub(super) fn new(positions: RelativePositions, longest: usize) -> Rows {
        let end = longest as isize;
        let rows = (1 - end..end).rev().map(|d| positions.row(d) as u32).collect();
        Rows { rows, longest }
    }

    /// The rows of query `i` for keys 0 to n − 1.
    #[inline(always)]
    pub(super) fn of(&self, i: usize, n: usize) -> &[u32] {
        let start = self.longest - 1 - i;
        &self.rows[start..start + n]
    }

    /// The rows that a sequence of `n` tokens uses, n > 0.
    pub(super) fn used(&self, n: usize) -> Range<usize> {
        self.of(0, n)[n - 1] as usize..self.of(n - 1, n)[0] as usize + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_positions_are_themselves_and_far_ones_share_buckets() {
        // deberta-v3: Transformers' make_log_bucket_position(δ, 256, 512) + 256, clamped.
        let p = RelativePositions::new(256, 512).unwrap();
        assert_eq!(p.span(), 256);
        for (distance, row) in [
            (0, 256),
            (1, 257),
            (-1, 255),
            (128, 384),
            (-128, 128),
            (129, 385),
            (130, 386),
            (131, 387),
            (200, 425),
            (300, 463),
            (-300, 49),
            (510, 511),
            (511, 511),
            (-511, 1),
            (512, 511),
            (-512, 0),
            (5000, 511),
            (-5000, 0),
        ] {
            assert_eq!(p.row(distance), row, "distance {distance}");
        }
    }

    #[test]
    fn without_buckets_every_distance_has_its_row() {
        let p = RelativePositions::new(0, 4).unwrap();
        assert_eq!((-6..=6).map(|d| p.row(d)).collect::<Vec<_>>(), [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7]);
    }

    #[test]
    fn rows_of_a_query_run_along_its_keys() {
        let p = RelativePositions::new(4, 9).unwrap();
        let rows = Rows::new(p, 7);
        for n in 1..=7 {
            let mut all: Vec<usize> = Vec::new();
            for i in 0..n {
                let of: Vec<usize> = (0..n).map(|j| p.row(i as isize - j as isize)).collect();
                assert_eq!(rows.of(i, n).iter().map(|&r| r as usize).collect::<Vec<_>>(), of);
                all.extend(of);
            }
            assert_eq!(rows.used(n), *all.iter().min().unwrap()..all.iter().max().unwrap() + 1);
        }
    }

    #[test]
    fn buckets_without_a_value_are_refused() {
        for (buckets, max) in [(0, 0), (1, 512), (256, 129), (2, 2), (8, 0)] {
            assert_eq!(RelativePositions::new(buckets, max), None, "{buckets} {max}");
        }
        assert!(RelativePositions::new(256, 130).is_some() && RelativePositions::new(2, 3).is_some());
    }
}
