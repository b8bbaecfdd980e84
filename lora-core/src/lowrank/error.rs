//! What can be wrong with the arrays.

/// The result of a function of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a function of this module refused its input.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two matrices do not fit together.
    #[error("{left} is {left_shape:?} but {right} is {right_shape:?}: {rule}")]
    Shape {
        /// The first matrix.
        left: &'static str,
        /// Its rows and columns.
        left_shape: [usize; 2],
        /// The second matrix.
        right: &'static str,
        /// Its rows and columns.
        right_shape: [usize; 2],
        /// The rule they break.
        rule: &'static str,
    },

    /// The rank is 0, or larger than what is cut to it can have.
    #[error("rank {rank} is impossible for a ΔW of shape {shape:?}: {}", choice(*most))]
    Rank {
        /// The rank that was asked for.
        rank: usize,
        /// The highest rank there is, where there is one: min(out, in), or the number of singular values of an
        /// [`Svd`](super::Svd).
        most: Option<usize>,
        /// The shape of ΔW, [out, in].
        shape: [usize; 2],
    },

    /// A matrix holds NaN or an infinity, or (for a merged weight) the sum overflows its type.
    #[error("{what} is {value} at [{row}, {col}]: every element must be finite")]
    NonFinite {
        /// The matrix.
        what: &'static str,
        /// Row of the first such element.
        row: usize,
        /// Its column.
        col: usize,
        /// Its value.
        value: f64,
    },

    /// The scale s is NaN or infinite.
    #[error("the scale {scale} is not a finite number")]
    Scale {
        /// The scale.
        scale: f64,
    },

    /// The α is NaN or infinite, or a scale was asked for at rank 0.
    #[error("alpha {alpha} at rank {rank} gives no finite scale: alpha must be finite and the rank at least 1")]
    Alpha {
        /// The α.
        alpha: f64,
        /// The rank.
        rank: usize,
    },

    /// There are no updates to combine.
    #[error("there are no updates to combine; give at least one")]
    Nothing,

    /// A share of elements that cannot be kept.
    #[error("the density {density} is not above 0 and at most 1: it is the share of elements that stay")]
    Density {
        /// The share.
        density: f64,
    },

    /// A matrix is zero, so it has no singular direction to compare.
    #[error("{what} is zero and has no singular directions (an untrained adapter has B = 0: train it first)")]
    Zero {
        /// The matrix.
        what: &'static str,
    },

    /// The singular value decomposition did not converge. Finite input gets here only by overflow.
    #[error(
        "the SVD of a {rows}×{cols} matrix did not converge: its elements are so large that f64 overflows; scale it down"
    )]
    Svd {
        /// Rows of the matrix.
        rows: usize,
        /// Its columns.
        cols: usize,
    },
}

fn choice(most: Option<usize>) -> String {
    match most {
        None => "a rank is at least 1".to_owned(),
        Some(0) => "it holds nothing".to_owned(),
        Some(1) => "only rank 1 is possible".to_owned(),
        Some(most) => format!("choose one from 1 to {most}"),
    }
}
