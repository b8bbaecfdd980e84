use std::{ops::Range, sync::Arc};

/// Neighbouring rows that have the same adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// The rows.
    pub rows: Range<usize>,
    /// Which of the adapters.
    pub adapter: usize,
}

/// Which rows of a pass have which adapter, where its sequences have different ones. Rows without one are in no share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Of all rows.
    rows: Arc<[Share]>,
    /// Of those that go on after the last layer's attention, see [`crate::Tape::go_on_with_target_rows`].
    targets: Arc<[Share]>,
    on_targets: bool,
}

impl Shares {
    /// For sequences with the adapters `of`, so many rows each, and so many that go on in the end.
    ///
    /// # Panics
    /// When there is not one number per sequence.
    pub fn new(of: &[Option<usize>], rows: &[usize], targets: &[usize]) -> Shares {
        Shares { rows: joined(of, rows), targets: joined(of, targets), on_targets: false }
    }

    /// The shares of the rows that are computed now.
    pub fn current(&self) -> &Arc<[Share]> {
        if self.on_targets { &self.targets } else { &self.rows }
    }

    pub(crate) fn go_on_with_targets(&mut self) {
        self.on_targets = true;
    }
}

/// Rows of neighbouring sequences with the same adapter make one share.
fn joined(of: &[Option<usize>], rows: &[usize]) -> Arc<[Share]> {
    assert_eq!(of.len(), rows.len(), "an adapter, or none, for each sequence");
    let (mut shares, mut at): (Vec<Share>, usize) = (Vec::new(), 0);
    for (&adapter, &n) in of.iter().zip(rows) {
        let rows = at..at + n;
        at += n;
        let Some(adapter) = adapter.filter(|_| n > 0) else { continue };
        match shares.last_mut() {
            Some(last) if last.adapter == adapter && last.rows.end == rows.start => last.rows.end = rows.end,
            _ => shares.push(Share { rows, adapter }),
        }
    }
    shares.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_with_one_adapter_share() {
        let of = [Some(1), Some(1), None, Some(0), Some(0), Some(1)];
        let mut shares = Shares::new(&of, &[2, 3, 1, 0, 4, 2], &[1, 0, 1, 1, 1, 1]);
        let ranges = |shares: &Shares| -> Vec<(usize, usize, usize)> {
            shares.current().iter().map(|s| (s.rows.start, s.rows.end, s.adapter)).collect()
        };
        assert_eq!(ranges(&shares), [(0, 5, 1), (6, 10, 0), (10, 12, 1)]);
        shares.go_on_with_targets();
        assert_eq!(ranges(&shares), [(0, 1, 1), (2, 4, 0), (4, 5, 1)]);
    }
}
