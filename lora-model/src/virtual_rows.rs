use lora_core::peft::{Adapted, VirtualTokens};

/// Where the virtual tokens of a method stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// There are none.
    Nowhere,
    /// Among the tokens, in all layers.
    Stream(VirtualTokens),
    /// In attention alone, as keys and values.
    Attention(VirtualTokens),
}

impl Place {
    pub(crate) fn of(adapted: &Adapted) -> Place {
        let (stream, attention) = (adapted.stream_tokens(), adapted.attention_tokens());
        match (stream.count(), attention.count()) {
            (0, 0) => Place::Nowhere,
            (_, 0) => Place::Stream(stream),
            (0, _) => Place::Attention(attention),
            _ => panic!("virtual tokens in two places at once"),
        }
    }

    /// The virtual tokens of each sequence.
    pub(crate) fn tokens(self) -> VirtualTokens {
        match self {
            Place::Nowhere => VirtualTokens::default(),
            Place::Stream(tokens) | Place::Attention(tokens) => tokens,
        }
    }
}

/// Sequences with virtual rows between their own, as one flat run: own rows are numbered from 0 over all sequences,
/// and the virtual rows, which all sequences share, follow after the last of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct VirtualRows {
    /// For each row of the run the number of the row that stands there.
    pub(crate) sources: Vec<u32>,
    /// The places of the own rows in the run.
    pub(crate) own: Vec<u32>,
    /// The length of each sequence with its virtual rows.
    pub(crate) lengths: Vec<usize>,
}

impl VirtualRows {
    /// For sequences of `lengths` own rows: `tokens(i)` virtual ones around those of sequence i, the infix before row
    /// `splits[i]`.
    pub(crate) fn new(lengths: &[usize], splits: &[usize], tokens: impl Fn(usize) -> VirtualTokens) -> VirtualRows {
        let own = lengths.iter().sum::<usize>() as u32;
        let (mut rows, mut first) = (VirtualRows::default(), 0u32);
        for (i, (&n, &split)) in lengths.iter().zip(splits).enumerate() {
            assert!(split <= n, "the infix stands within its sequence");
            let VirtualTokens { prefix, infix, .. } = tokens(i);
            let start = rows.sources.len();
            rows.sources.extend(own..own + prefix as u32);
            for r in 0..=n {
                if r == split {
                    let after = own + prefix as u32;
                    rows.sources.extend(after..after + infix as u32);
                }
                if r < n {
                    rows.own.push(rows.sources.len() as u32);
                    rows.sources.push(first + r as u32);
                }
            }
            first += n as u32;
            rows.lengths.push(rows.sources.len() - start);
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_and_infix_stand_where_they_belong() {
        let tokens = |i| {
            if i == 2 {
                VirtualTokens::default()
            } else {
                VirtualTokens { prefix: 2, infix: 1, ..VirtualTokens::default() }
            }
        };
        let rows = VirtualRows::new(&[3, 1, 2], &[1, 1, 0], tokens);
        // Own rows 0 to 5, virtual 6 and 7 before and 8 between.
        assert_eq!(rows.sources, [6, 7, 0, 8, 1, 2, 6, 7, 3, 8, 4, 5]);
        assert_eq!(rows.own, [2, 4, 5, 8, 10, 11]);
        assert_eq!(rows.lengths, [6, 4, 2]);
    }
}
