use qevm_savevm::mapped_ram::{MappedBlock, PageBitmap};
use qevm_savevm::ram::MappedRamHeader;
use qevm_wire::PageGeometry;

/// The input is page size, offset of the bitmap, offset of the pages, length of the block, length of the file (64 bits
/// each) and the bitmap. Ranges to read must lie in the file and name each present page once.
pub fn savevm_mapped_ram(data: &[u8]) {
    let Some((numbers, bitmap)) = data.split_first_chunk::<40>() else { return };
    let number = |i: usize| u64::from_be_bytes(numbers[8 * i..8 * i + 8].try_into().expect("eight bytes"));
    let header = MappedRamHeader { page_size: number(0), bitmap_offset: number(1), pages_offset: number(2) };
    let block = MappedBlock { header, used_length: number(3) };
    let file_len = number(4);
    let pages = PageGeometry::from_size(header.page_size);
    let place = |pages| MappedBlock::place(header.bitmap_offset, block.used_length, pages);
    if let Some(placed) = pages.and_then(place) {
        assert!(placed.header.pages_offset >= placed.header.bitmap_offset + placed.bitmap_len());
        assert_eq!(placed.end() - placed.header.pages_offset, block.used_length);
    }
    let Ok(present) = PageBitmap::from_bytes(bitmap.to_vec(), block.pages()) else { return };
    assert_eq!(present.as_bytes(), bitmap);
    if block.check_file_len(&present, file_len).is_err() {
        return;
    }
    let mut pages = 0;
    for range in block.present_ranges(&present, number(4) & 0xffff) {
        assert!(range.len > 0 && range.file_offset.checked_add(range.len).is_some_and(|end| end <= file_len));
        assert_eq!(range.file_offset - header.pages_offset, range.block_offset);
        pages += range.len / header.page_size;
    }
    assert_eq!(pages, present.count());
}
