use super::*;
use proptest::prelude::*;
use qevm_wire::PageGeometry;

fn refused(data: &[u8], page: usize) -> (XbzrleError, u64) {
    let error = decode(data, 100, &mut vec![0; page]).unwrap_err();
    (error.kind, error.offset)
}

#[test]
fn every_illegal_form_is_refused_where_it_starts() {
    assert_eq!(refused(&[1], 16), (XbzrleError::Incomplete { needed: 2, available: 1 }, 100));
    assert_eq!(refused(&[1, 1], 16), (XbzrleError::Incomplete { needed: 2, available: 1 }, 101));
    assert_eq!(refused(&[1, 3, 7, 7], 16), (XbzrleError::Incomplete { needed: 3, available: 2 }, 102));
    assert_eq!(refused(&[1, 0, 7], 16), (XbzrleError::EmptyRun { what: "new" }, 101));
    assert_eq!(refused(&[0, 1, 7, 0, 1, 7], 16), (XbzrleError::EmptyRun { what: "unchanged" }, 103));
    assert_eq!(refused(&[0x80, 0x80, 1, 1, 7], 16), (XbzrleError::CountTooLong, 100));
    assert_eq!(refused(&[0, 0xff, 0xff, 7], 16), (XbzrleError::CountTooLong, 101));
    assert_eq!(refused(&[17, 1, 7], 16), (XbzrleError::OutsidePage { found: 17, left: 16 }, 100));
    assert_eq!(refused(&[15, 2, 7, 7], 16), (XbzrleError::OutsidePage { found: 2, left: 1 }, 101));
    // The end of the page is found before the end of the data, whatever follows.
    assert_eq!(refused(&[0x80, 0x7f, 1], 16), (XbzrleError::OutsidePage { found: 0x3f80, left: 16 }, 100));
}

#[test]
fn legal_borders_are_accepted() {
    let mut page = [0; 16];
    decode(&[], 0, &mut page).unwrap();
    decode(&[0, 1, 7], 0, &mut page).unwrap();
    decode(&[15, 1, 8], 0, &mut page).unwrap();
    // Two bytes where one would do: QEMU's loader takes it.
    decode(&[0x81, 0, 0x81, 0, 9], 0, &mut page).unwrap();
    assert_eq!(page, [7, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8]);
}

#[test]
fn a_difference_longer_than_the_page_is_not_made() {
    let old = [0; 64];
    let new: Vec<u8> = (0..64).map(|i| if i % 4 == 0 { 1 } else { 0 }).collect();
    let mut data = vec![1, 2, 3];
    assert_eq!(encode(&old, &new, &mut data), Some(16 * 3));
    data.truncate(3);
    assert_eq!(encode(&[0; 8], &[1; 8], &mut data), None);
    assert_eq!(data, [1, 2, 3]);
    assert_eq!(encode(&vec![0; MAX_PAGE + 1], &vec![0; MAX_PAGE + 1], &mut data), None);
}

#[test]
fn counts_of_128_and_more_take_two_bytes() {
    let old = vec![0; 4096];
    let mut new = old.clone();
    new[200] = 1;
    let mut data = Vec::new();
    assert_eq!(encode(&old, &new, &mut data), Some(4));
    assert_eq!(data, [0xc8, 0x01, 1, 1]);
}

fn cache(entries: u64) -> Cache {
    Cache::new(entries * 4096, PageGeometry::X86).unwrap()
}

#[test]
fn cache_sizes_are_those_that_qemu_takes() {
    for bad in [0, 4095, 2048, 12288, (1 << 20) + 1] {
        assert_eq!(Cache::new(bad, PageGeometry::X86).unwrap_err(), CacheError { found: bad, page_size: 4096 });
    }
    assert!(Cache::new(4096, PageGeometry::X86).is_ok());
}

#[test]
fn a_recent_entry_is_not_replaced_by_another_page() {
    let (mut cache, mut data) = (cache(2), Vec::new());
    let (a, b) = (0x2000, 0x6000); // the same entry
    let page = [1; 4096];
    assert_eq!(cache.page(a, &page, 5, false, &mut data), Outcome::Miss);
    assert_eq!(cache.page(b, &page, 6, false, &mut data), Outcome::Miss);
    assert!(cache.contains(a) && !cache.contains(b));
    assert_eq!(cache.page(b, &page, 7, false, &mut data), Outcome::Miss);
    assert!(cache.contains(b) && !cache.contains(a));
}

#[test]
fn the_last_round_remembers_no_new_pages() {
    let (mut cache, mut data) = (cache(2), Vec::new());
    assert_eq!(cache.page(0, &[1; 4096], 1, true, &mut data), Outcome::Miss);
    assert!(!cache.contains(0));
}

#[test]
fn a_page_after_an_overflow_is_compared_with_what_was_sent() {
    let (mut cache, mut data) = (cache(2), Vec::new());
    cache.page(0, &[1; 4096], 1, false, &mut data);
    assert_eq!(cache.page(0, &[2; 4096], 2, false, &mut data), Outcome::Overflow);
    assert!(data.is_empty());
    assert_eq!(cache.page(0, &[2; 4096], 3, false, &mut data), Outcome::Unchanged);
    cache.zero_page(0, 4);
    assert_eq!(cache.page(0, &[0; 4096], 5, false, &mut data), Outcome::Unchanged);
}

/// Two versions of a page that differ in stretches, as real ones do.
fn versions() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let edits = prop::collection::vec((0usize..4096, prop::collection::vec(any::<u8>(), 1..300)), 0..12);
    (any::<u8>(), edits).prop_map(|(fill, edits)| {
        let old = vec![fill; 4096];
        let mut new = old.clone();
        for (at, bytes) in edits {
            let len = bytes.len().min(4096 - at);
            new[at..at + len].copy_from_slice(&bytes[..len]);
        }
        (old, new)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn a_difference_turns_the_old_page_into_the_new((old, new) in versions()) {
        let mut data = Vec::new();
        let encoded = encode(&old, &new, &mut data);
        prop_assert_eq!(encoded == Some(0), old == new);
        if let Some(len) = encoded {
            prop_assert_eq!(len, data.len());
            prop_assert!(len <= new.len());
            let mut page = old;
            decode(&data, 0, &mut page)?;
            prop_assert_eq!(page, new);
        }
    }

    #[test]
    fn any_data_are_applied_or_refused(data in prop::collection::vec(any::<u8>(), 0..64), len in 0usize..300) {
        let mut page = vec![0; len];
        if let Err(error) = decode(&data, 7, &mut page) {
            prop_assert!((7..=7 + data.len() as u64).contains(&error.offset));
        }
    }

    /// What a destination holds is what the source sent last, whatever pages share an entry.
    #[test]
    fn a_destination_follows_the_cache(writes in prop::collection::vec((0u64..8, 0usize..4096, any::<u8>(), any::<bool>()), 1..60)) {
        let mut cache = cache(4);
        let mut source = vec![[0u8; 4096]; 8];
        let mut destination = vec![[0xffu8; 4096]; 8];
        let mut data = Vec::new();
        for (generation, (number, at, value, zero)) in writes.into_iter().enumerate() {
            let (page, copy) = (&mut source[number as usize], &mut destination[number as usize]);
            if zero {
                page.fill(0);
                cache.zero_page(number << 12, generation as u64 / 3);
                copy.fill(0);
                continue;
            }
            page[at] = value;
            match cache.page(number << 12, page, generation as u64 / 3, false, &mut data) {
                Outcome::Difference => decode(&data, 0, copy)?,
                Outcome::Unchanged => {}
                Outcome::Miss | Outcome::Overflow => *copy = *page,
            }
            prop_assert_eq!(&copy[..], &page[..]);
        }
    }
}
