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
    rows: Vec<Vec<String>>,
    indent: usize,
}

impl Table {
    /// A table without rows. A column whose name starts with `>` is right-aligned.
    pub fn new(columns: &[&str]) -> Self {
        let column = |name: &&str| match name.strip_prefix('>') {
            Some(name) => (name.to_owned(), Align::Right),
            None => ((*name).to_owned(), Align::Left),
        };
        Table { columns: columns.iter().map(column).collect(), rows: Vec::new(), indent: 2 }
    }

    /// Adds a row; missing cells are empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// True if there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let header: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        let width = |column: usize| {
            let cells = std::iter::once(&header).chain(&self.rows).filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        for row in std::iter::once(&header).chain(&self.rows) {
            let mut line = " ".repeat(self.indent);
            for (i, (width, (_, align))) in widths.iter().zip(&self.columns).enumerate() {
                let cell = row.get(i).map_or("", String::as_str);
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
