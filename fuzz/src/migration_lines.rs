use qevm_migration::{Address, parse_size};

/// Reads the input as an address of a migration and as a size.
///
/// An address that is taken is the same when it is written and read again; what is refused is refused at a character of
/// the line, or at its end.
pub fn migration_lines(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match text.parse::<Address>() {
        Ok(address) => assert_eq!(address.to_string().parse::<Address>().as_ref(), Ok(&address)),
        Err(error) => assert!(is_in(text, error.offset), "{error:?}"),
    }
    match parse_size(text, 1) {
        // A unit never makes it less.
        Ok(bytes) => assert!(parse_size(text, 1 << 20).map_or(true, |more| more >= bytes)),
        Err(error) => assert!(is_in(text, error.offset), "{error:?}"),
    }
}

fn is_in(text: &str, offset: u64) -> bool {
    usize::try_from(offset).is_ok_and(|offset| text.is_char_boundary(offset))
}
