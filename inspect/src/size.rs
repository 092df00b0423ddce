//! Sizes as people read them.

/// A size in bytes as people read it: exact below 64 KiB, then with a binary unit.
///
/// ```
/// assert_eq!(qevm_inspect::size::size(4100), "4100 B");
/// assert_eq!(qevm_inspect::size::size(32 << 20), "32 MiB");
/// assert_eq!(qevm_inspect::size::size(1_482_583), "1.41 MiB");
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_choose_their_unit() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(u64::MAX), "16 EiB");
        assert_eq!(size(1 << 30), "1 GiB");
        assert_eq!(size(65536), "64 KiB");
    }
}
