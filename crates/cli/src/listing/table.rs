//! Columns: cells at least ten wide, three blanks apart, as docker's tables are.

const LEAST: usize = 10;
const GAP: usize = 3;
/// `top` sets its columns as wide as docker does.
const WIDE: usize = 20;

/// Aligns lines of tab-separated cells; a line's last cell is not padded.
pub fn align(text: &str) -> String {
    align_by(text, LEAST)
}

/// As `align`, with columns at least twenty wide.
pub fn align_wide(text: &str) -> String {
    align_by(text, WIDE)
}

fn align_by(text: &str, least: usize) -> String {
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split('\t').collect()).collect();
    let mut widths: Vec<usize> = Vec::new();
    for line in &lines {
        for (column, cell) in line[..line.len() - 1].iter().enumerate() {
            if widths.len() <= column {
                widths.push(least);
            }
            widths[column] = widths[column].max(cell.chars().count() + GAP);
        }
    }
    let mut out = String::new();
    for line in lines {
        for (column, cell) in line.iter().enumerate() {
            out.push_str(cell);
            if column + 1 < line.len() {
                out.push_str(&" ".repeat(widths[column] - cell.chars().count()));
            }
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::align;

    #[test]
    fn narrow_columns_are_ten_wide_and_the_last_is_bare() {
        assert_eq!(
            align("A\tLONG COLUMN\tC\nx\ty\tz\n"),
            "A         LONG COLUMN   C\nx         y             z\n"
        );
        assert_eq!(align("…\tB\n"), "…         B\n");
    }
}
