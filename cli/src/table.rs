//! Aligned columns for people.

use std::fmt;

/// How a column is aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table with a header line, printed with two spaces between its columns and none behind the last.
#[derive(Debug)]
pub struct Table {
    columns: Vec<(String, Align)>,
    /// The cells of all rows, one after the other, and where each ends: a table of many short cells takes little more than
    /// their text.
    text: String,
    ends: Vec<usize>,
    rows: usize,
    indent: usize,
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
        }
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
        let widths: Vec<usize> = self.columns.iter().enumerate().map(width).collect();
        // The header, then the rows.
        for row in std::iter::once(None).chain((0..self.rows).map(Some)) {
            let mut line = " ".repeat(self.indent);
            for (i, (width, (name, align))) in widths.iter().zip(&self.columns).enumerate() {
                let cell = row.map_or(name.as_str(), |row| self.cell(row, i));
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

/// A size in bytes as people read it: exact below 64 KiB, then with a binary unit.
///
/// ```
/// assert_eq!(qevm::table::size(4100), "4100 B");
/// assert_eq!(qevm::table::size(32 << 20), "32 MiB");
/// assert_eq!(qevm::table::size(1_482_583), "1.41 MiB");
/// ```
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 64 << 10 {
        return format!("{bytes} B");
    }
    let exponent = (bytes.ilog2() / 10) as usize;
    let unit = UNITS[exponent - 1];
    let scaled = bytes as f64 / (1u64 << (10 * exponent)) as f64;
    match scaled {
        s if s.fract() == 0.0 => format!("{s:.0} {unit}"),
        s if s < 10.0 => format!("{s:.2} {unit}"),
        s => format!("{s:.1} {unit}"),
    }
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
    fn sizes_choose_their_unit() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(u64::MAX), "16 EiB");
        assert_eq!(size(1 << 30), "1 GiB");
        assert_eq!(size(65536), "64 KiB");
    }
}
