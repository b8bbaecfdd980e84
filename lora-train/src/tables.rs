//! Numbers and columns for people.

/// Rows of cells in columns: the first to the left, numbers after it to the right, a line after the first row.
pub fn columns(rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    for (n, row) in aligned(rows, 1).iter().enumerate() {
        let line = row.join("  ");
        text += &format!("{}\n", line.trim_end());
        if n == 0 {
            text += &format!("{}\n", "─".repeat(line.chars().count()));
        }
    }
    text
}

/// The cells of each column as wide as its widest, the first `left` columns to the left, the others to the right.
pub(crate) fn aligned(rows: &[Vec<String>], left: usize) -> Vec<Vec<String>> {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |i: usize| rows.iter().filter_map(|row| row.get(i)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count).map(width).collect();
    let cell = |i: usize, cell: &str| {
        // More is no width of the standard library's.
        let width = widths[i].min(u16::MAX.into());
        if i < left { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
    };
    let padded = |row: &Vec<String>| (0..count).map(|i| cell(i, row.get(i).map_or("", String::as_str))).collect();
    rows.iter().map(padded).collect()
}

/// Bytes in the paper's units: powers of ten.
pub fn bytes(n: u64) -> String {
    let size = n as f64;
    let (unit, one) = match size {
        _ if size >= 1e15 => ("PB", 1e15),
        _ if size >= 1e12 => ("TB", 1e12),
        _ if size >= 1e9 => ("GB", 1e9),
        _ if size >= 1e6 => ("MB", 1e6),
        _ if size >= 1e3 => ("kB", 1e3),
        _ => return format!("{n} B"),
    };
    let digits = if size / one >= 100.0 { 0 } else { 1 };
    format!("{:.digits$} {unit}", size / one)
}

/// With a comma before every third digit.
pub fn count(n: usize) -> String {
    let digits = n.to_string();
    let comma = |i: usize| i > 0 && (digits.len() - i).is_multiple_of(3);
    digits.char_indices().flat_map(|(i, digit)| comma(i).then_some(',').into_iter().chain([digit])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_stand_in_threes() {
        let numbers = [0, 7, 123, 1_234, 12_345, 1_234_567, 100_000_000];
        let shown = ["0", "7", "123", "1,234", "12,345", "1,234,567", "100,000,000"];
        assert_eq!(numbers.map(count), shown);
    }

    #[test]
    fn words_stand_left_and_numbers_right() {
        let rows = [vec!["name", "φ"], vec!["a", "10.5"], vec!["b"]];
        let rows: Vec<Vec<String>> = rows.map(|row| row.into_iter().map(str::to_owned).collect()).to_vec();
        assert_eq!(columns(&rows), "name     φ\n──────────\na     10.5\nb\n");
    }

    #[test]
    fn sizes_are_decimal() {
        for (n, shown) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_500, "1.5 kB"),
            (37_748_736, "37.7 MB"),
            (350_000_000_000, "350 GB"),
            (1_200_000_000_000, "1.2 TB"),
            (u64::MAX, "18447 PB"),
        ] {
            assert_eq!(bytes(n), shown);
        }
    }
}
