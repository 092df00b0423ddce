//! Aligned columns for people.

use std::borrow::Cow;
use std::fmt;

/// How a column is aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table with a header line, printed with two spaces between its columns and none after the last.
#[derive(Debug)]
pub struct Table {
    columns: Vec<(String, Align)>,
    /// The cells of all rows, one after the other, and where each ends: a table of many short cells takes little more
    /// than their text.
    text: String,
    ends: Vec<usize>,
    rows: usize,
    indent: usize,
    /// Characters that a line may have.
    most: usize,
}

impl Table {
    /// A table without rows. A column whose name starts with `>` is right-aligned.
    pub fn new(columns: &[&str]) -> Self {
        let column = |name: &&str| match name.strip_prefix('>') {
            Some(name) => (name.to_owned(), Align::Right),
            None => ((*name).to_owned(), Align::Left),
        };
        Table {
            columns: columns.iter().map(column).collect(),
            text: String::new(),
            ends: Vec::new(),
            rows: 0,
            indent: 2,
            most: usize::MAX,
        }
    }

    /// Limits lines to `most` characters: the longest cells of text columns are cut in the middle, as far as that
    /// helps.
    #[must_use]
    pub fn within(self, most: usize) -> Self {
        Table { most, ..self }
    }

    /// Adds a row; missing cells are empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let mut cells = cells.into_iter();
        for _ in 0..self.columns.len() {
            self.text.push_str(&cells.next().unwrap_or_default());
            self.ends.push(self.text.len());
        }
        self.rows += 1;
    }

    fn cell(&self, row: usize, column: usize) -> &str {
        let index = row * self.columns.len() + column;
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.text[start..self.ends[index]]
    }

    /// True if there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |(column, (name, _)): (usize, &(String, Align))| {
            let cells = (0..self.rows).map(|row| self.cell(row, column)).chain([name.as_str()]);
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let mut widths: Vec<usize> = self.columns.iter().enumerate().map(width).collect();
        narrow(&mut widths, &self.columns, self.most.saturating_sub(self.indent));
        // The header, then the rows.
        for row in std::iter::once(None).chain((0..self.rows).map(Some)) {
            let mut line = " ".repeat(self.indent);
            for (i, (width, (name, align))) in widths.iter().zip(&self.columns).enumerate() {
                let cell = cut(row.map_or(name.as_str(), |row| self.cell(row, i)), *width);
                let gap = if i == 0 { "" } else { "  " };
                match align {
                    Align::Left => line += &format!("{gap}{cell:<width$}"),
                    Align::Right => line += &format!("{gap}{cell:>width$}"),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// A column of text is not made narrower than this.
const NARROWEST: usize = 12;

/// Takes from the widest columns of text until all of them fit.
fn narrow(widths: &mut [usize], columns: &[(String, Align)], most: usize) {
    loop {
        let line =
            widths.iter().fold(0usize, |sum, width| sum.saturating_add(*width)) + 2 * widths.len().saturating_sub(1);
        let text = (0..widths.len()).filter(|column| columns[*column].1 == Align::Left && widths[*column] > NARROWEST);
        let Some(widest) = text.max_by_key(|column| widths[*column]).filter(|_| line > most) else { return };
        // Down to the next one at once, or only as far as needed.
        let others = (0..widths.len()).filter(|column| *column != widest && columns[*column].1 == Align::Left);
        let next = others.map(|column| widths[column]).filter(|width| *width < widths[widest]).max().unwrap_or(0);
        widths[widest] = (widths[widest] - 1).min(next.max(widths[widest].saturating_sub(line - most))).max(NARROWEST);
    }
}

/// `cell` in at most `width` characters, without its middle if it is longer.
fn cut(cell: &str, width: usize) -> Cow<'_, str> {
    let len = cell.chars().count();
    if len <= width || width < 3 {
        return cell.into();
    }
    let (head, tail) = ((width - 1) / 2, width / 2);
    cell.chars().take(head).chain(['…']).chain(cell.chars().skip(len - tail)).collect()
}

/// A count with a thin separator between its thousands.
///
/// ```
/// assert_eq!(qevm::table::count(1234567), "1 234 567");
/// ```
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_end_clean() {
        let mut table = Table::new(&["name", ">pages", "note"]);
        table.row(["pc.ram".into(), "8192".into()]);
        table.row(["a".into(), "1".into(), "x".into()]);
        assert_eq!(table.to_string(), "  name    pages  note\n  pc.ram   8192\n  a           1  x\n");
    }

    #[test]
    fn lines_fit_where_they_have_to() {
        let long = |text: &str, len: usize| text.chars().cycle().take(len).collect::<String>();
        for most in [40, 60, 80, 200] {
            let mut table = Table::new(&["what", "where", "first", ">n"]);
            table.row(["field".into(), long("abc", 90), long("xyz", 50), "7".into()]);
            table.row(["page".into(), "short".into(), long("é", 30), "12345".into()]);
            let text = table.within(most).to_string();
            assert!(text.lines().all(|line| line.chars().count() <= most.max(45)), "{most}: {text}");
            assert_eq!(text.contains('…'), most < 160, "{most}: {text}");
            assert!(text.contains("short") && text.contains("12345"));
        }
        assert_eq!(cut("abcdefghij", 5), "ab…ij");
        assert_eq!(cut("abcdefghij", 10), "abcdefghij");
    }
}
