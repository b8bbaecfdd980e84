//! Tables on the terminal.

/// Rows of cells in columns: the first to the left, numbers after it to the right, a line after the first row.
pub(crate) fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cell = |row: &[String], i: usize| row.get(i).map_or(0, |c| c.chars().count());
    let widths: Vec<usize> = (0..count).map(|i| rows.iter().map(|row| cell(row, i)).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for (n, row) in rows.iter().enumerate() {
        for (i, cell) in row.iter().enumerate() {
            let room = " ".repeat(widths[i] - cell.chars().count());
            text += &if i == 0 { format!("{cell}{room}") } else { format!("  {room}{cell}") };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
        if n == 0 {
            text += &format!("{}\n", "─".repeat(widths.iter().sum::<usize>() + 2 * (count.max(1) - 1)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stand_left_and_numbers_right() {
        let rows: Vec<Vec<String>> = [["name", "φ"], ["a", "10.5"]].map(|row| row.map(str::to_owned).to_vec()).to_vec();
        assert_eq!(columns(&rows), "name     φ\n──────────\na     10.5\n");
    }
}
