//! Inputs of several files: for each of them a byte that says what it is, its length (32 bits, big-endian), and its
//! bytes.

/// The parts of an input; what is cut off counts as far as it goes.
pub(crate) fn parts(mut data: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let (&[kind, a, b, c, d], rest) = data.split_first_chunk::<5>()?;
        let len = (u32::from_be_bytes([a, b, c, d]) as usize).min(rest.len());
        let (part, rest) = rest.split_at(len);
        data = rest;
        Some((kind, part))
    })
}
