use qevm_multifd::mapped_ram::PageArea;
use qevm_wire::PageGeometry;

/// The input is page size, place of the pages in the file, length of the block (64 bits each), threads (a byte), length
/// of the bitmap (32 bits), the bitmap, and offsets of pages to write (64 bits each).
///
/// The threads' shares must be the block, and each page with a bit be read once, at its place; what is written must be
/// what was asked for.
pub fn multifd_page_area(data: &[u8]) {
    let Some((numbers, rest)) = data.split_first_chunk::<29>() else { return };
    let number = |at: usize| u64::from_be_bytes(numbers[at..at + 8].try_into().expect("eight bytes"));
    let (page_size, file_offset, used_length, threads) = (number(0), number(8), number(16), numbers[24]);
    let bitmap_len = u32::from_be_bytes(numbers[25..].try_into().expect("four bytes")) as usize;
    let (bitmap, offsets) = rest.split_at(bitmap_len.min(rest.len()));
    let Some(pages) = PageGeometry::from_size(page_size) else { return };
    let Some(area) = PageArea::new(file_offset, used_length, pages) else { return };
    let (mut next, mut read) = (0, Vec::new());
    for thread in 0..threads {
        let share = area.share(thread, threads);
        assert_eq!(share.start, next, "shares follow each other");
        next = share.end;
        for run in area.reads(bitmap, share.clone()) {
            assert!(run.len > 0 && run.block_offset >= share.start && run.block_offset + run.len <= share.end);
            assert_eq!(run.file_offset, file_offset + run.block_offset);
            read.extend((run.block_offset..run.block_offset + run.len).step_by(page_size as usize));
        }
    }
    if threads > 0 {
        assert_eq!(next, used_length, "all shares together are the block");
        let set = |page: &u64| bitmap[(page / 8) as usize] >> (page % 8) & 1 == 1;
        let known = (bitmap.len() as u64 * 8).min(used_length / page_size);
        assert!(read.iter().copied().eq((0..known).filter(set).map(|page| page * page_size)));
    }
    let (offsets, _) = offsets.as_chunks::<8>();
    let offsets: Vec<u64> = offsets.iter().map(|bytes| u64::from_be_bytes(*bytes)).collect();
    if let Ok(runs) = area.writes(&offsets) {
        let written = runs.flat_map(|run| {
            assert_eq!(run.file_offset, file_offset + run.block_offset);
            (run.block_offset..run.block_offset + run.len).step_by(page_size as usize)
        });
        assert!(written.eq(offsets.iter().copied()));
    }
}
