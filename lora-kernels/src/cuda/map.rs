//! The host's half of `map.cuh`: over which rows and columns a map goes, and by how many blocks.

use crate::{DType, Mat};

/// Threads of a block, `MAP_THREADS` there.
pub(crate) const THREADS: usize = 256;

/// Elements that fill 128 bits of the smaller of two types, `vector_of` there.
pub(crate) fn vector_of(x: DType, y: DType) -> usize {
    16 / x.size().min(y.size())
}

/// The shape that all matrices of an element-wise kernel have. Matrices without gaps become one row, as long as its
/// columns can be counted with some distance from an `int`'s end.
///
/// # Panics
/// When the shapes differ.
pub(crate) fn extent(kernel: &str, mats: &[Mat]) -> (usize, usize) {
    let (rows, cols) = (mats[0].rows(), mats[0].cols());
    assert!(
        mats.iter().all(|m| (m.rows(), m.cols(), m.is_transposed()) == (rows, cols, false)),
        "{kernel}: all matrices are {rows}×{cols}"
    );
    let flat = mats.iter().all(|m| rows <= 1 || m.ld() == cols) && rows * cols < 1 << 30;
    if flat { (usize::from(rows * cols > 0), rows * cols) } else { (rows, cols) }
}

/// Checks that matrices have the type that a kernel is called for.
pub(crate) fn typed(kernel: &str, dtype: DType, mats: &[Mat]) {
    assert!(mats.iter().all(|m| m.dtype() == dtype && !m.is_transposed()), "{kernel}: all matrices are {dtype:?}");
}

/// The blocks of a map over a shape that is not empty, in runs of `run` columns: two runs per thread.
pub(crate) fn grid((rows, cols): (usize, usize), run: usize) -> [usize; 3] {
    let runs = cols.div_ceil(run);
    let width = runs.next_power_of_two().min(THREADS);
    [runs.div_ceil(2 * width), rows.div_ceil(THREADS / width).min(65_535), 1]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, Device};

    #[test]
    fn grids_cover_the_matrix_once() {
        // As map.cuh counts: 2^w runs side by side, 256 / 2^w rows, and two runs per thread.
        for (rows, cols, run) in
            [(1, 1, 8), (1, 4096, 8), (8192, 768, 8), (3, 768, 4), (1, 1 << 29, 4), (100_000, 7, 1)]
        {
            let [x, y, z] = grid((rows, cols), run);
            let runs = cols.div_ceil(run);
            let width = (0..=8).map(|w| 1 << w).find(|&w| w >= runs).unwrap_or(256);
            assert!(x * 2 * width >= runs && (x - 1) * 2 * width < runs, "{rows}×{cols}: {x} blocks a row");
            assert!(y == 65_535 || y * (256 / width) >= rows, "{rows}×{cols}: {y} blocks of rows");
            assert!((y - 1) * (256 / width) < rows && z == 1);
        }
    }

    #[test]
    fn matrices_without_gaps_are_one_row() {
        let buf = Buffer::zeros(&Device::Cpu, DType::F32, 60).unwrap();
        let m = Mat::new(&buf, 0, 6, 10);
        assert_eq!(extent("test", &[m, m]), (1, 60));
        assert_eq!(extent("test", &[m.cols_in(0..9), m.cols_in(1..10)]), (6, 9));
        assert_eq!(extent("test", &[m.rows_in(2..3).cols_in(1..4)]), (1, 3));
        assert_eq!(extent("test", &[m.rows_in(2..2)]), (0, 0));
    }

    #[test]
    #[should_panic(expected = "test: all matrices are 6×10")]
    fn other_shapes_are_refused() {
        let buf = Buffer::zeros(&Device::Cpu, DType::F32, 60).unwrap();
        extent("test", &[Mat::new(&buf, 0, 6, 10), Mat::new(&buf, 0, 10, 6)]);
    }
}
