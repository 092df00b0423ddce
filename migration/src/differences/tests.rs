use super::*;
use qevm_savevm::Encoder;
use qevm_savevm::configuration::Configuration;
use qevm_savevm::framing::SectionHeader;
use qevm_savevm::ram::{self, RamBlock};
use qevm_wire::CountedString;

const PAGE: usize = 4096;

fn stream() -> StreamWriter {
    let name = |name: &str| CountedString::new(name).unwrap();
    let mut stream = StreamWriter::new(Encoder::new(PageGeometry::X86), true);
    stream.header(Some(&Configuration::new("microvm"))).unwrap();
    let idstr = name("ram");
    let header = SectionHeader { section_id: 1, idstr, instance_id: 0, version_id: ram::SECTION_VERSION };
    stream.section_start(&header).unwrap();
    let block = |(block, pages): (&str, u64)| RamBlock::new(name(block), pages * PAGE as u64);
    stream.ram_setup([("microvm.ram", 16), ("pc.bios", 2)].map(block)).unwrap();
    stream.clear();
    stream
}

/// Sends a page of `microvm.ram`, and gives how many bytes went.
fn send(differences: &mut Differences, stream: &mut StreamWriter, page: &[u8], pass: u64, at_secs: u64) -> usize {
    let (mut page, mut sent) = (page.to_vec(), Sent::default());
    let pass = DifferencePass { number: pass, last: false };
    differences.begin_pass(pass, Duration::from_secs(at_secs));
    differences.add(stream, (0, 0x3000), &VolatileSlice::from(&mut page[..]), pass, &mut sent).unwrap();
    assert_eq!(sent.normal + sent.zero + sent.differences, 1);
    let bytes = stream.bytes().len();
    stream.clear();
    bytes
}

/// Of a guest that had changed one byte of each of 1843 pages, and nothing of 125, QEMU 11.1.3 sent 5857 bytes of data
/// and told of 1968 pages and 11386 bytes: three go with each. Those 1536 of its second pass were misses; there were
/// none in the first.
#[test]
fn what_is_told_counts_as_a_qemu_counts() {
    let mut stream = stream();
    let mut differences =
        Differences::new([16, 2].map(|n| n * PAGE as u64).into_iter(), 1 << 20, PageGeometry::X86).unwrap();
    let mut page = vec![7; PAGE];
    // The name goes with the first record of a block.
    let whole = 8 + PAGE;
    assert_eq!(send(&mut differences, &mut stream, &page, 2, 1), whole + 1 + "microvm.ram".len());
    let told = |differences: &Differences| {
        let XbzrleStatistics { bytes, pages, cache_miss, overflow, .. } = differences.statistics();
        (bytes, pages, cache_miss, overflow)
    };
    assert_eq!(told(&differences), (0, 0, 1, 0));
    page[0] = 8;
    // `00 01 08`, its length and the encoding.
    assert_eq!(send(&mut differences, &mut stream, &page, 3, 1), 8 + 3 + 3);
    assert_eq!(told(&differences), (6, 1, 1, 0));
    assert_eq!(send(&mut differences, &mut stream, &page, 4, 1), 0);
    assert_eq!(told(&differences), (6, 2, 1, 0));
    page.iter_mut().for_each(|byte| *byte ^= 0xff);
    assert_eq!(send(&mut differences, &mut stream, &page, 4, 1), whole);
    assert_eq!(told(&differences), (6 + 4096, 2, 1, 1));
    // What was sent as zeroes differs from zeroes.
    assert_eq!(send(&mut differences, &mut stream, &[0; PAGE], 5, 1), 8 + 1);
    let mut few = vec![0; PAGE];
    few[4095] = 1;
    assert_eq!(send(&mut differences, &mut stream, &few, 6, 1), 8 + 3 + 4);
    assert_eq!(told(&differences), (6 + 4096 + 7, 3, 1, 1));
    let rates = |differences: &Differences| {
        let told = differences.statistics();
        (told.cache_miss_rate, told.encoding_rate)
    };
    // The first period was over when the first page came, and the next one is not.
    assert_eq!(rates(&differences), (0.0, 0.0));
    few[4095] = 2;
    send(&mut differences, &mut stream, &few, 7, 2);
    assert_eq!(rates(&differences), (1.0 / 6.0, 3.0 * 4096.0 / 4109.0));
    send(&mut differences, &mut stream, &few, 8, 3);
    assert_eq!(rates(&differences), (0.0, 4096.0 / 7.0), "4096 bytes of one page went as 7");
}

/// Of another size the cache begins anew; the same it may be told of with every batch.
#[test]
fn a_cache_of_another_size_knows_nothing() {
    let mut stream = stream();
    let mut differences = Differences::new([16 * PAGE as u64].into_iter(), 1 << 20, PageGeometry::X86).unwrap();
    let page = [7; PAGE];
    send(&mut differences, &mut stream, &page, 2, 1);
    differences.resize(1 << 20);
    assert_eq!(send(&mut differences, &mut stream, &page, 3, 1), 0);
    differences.resize(1 << 21);
    assert_eq!(differences.statistics().cache_size, 1 << 21);
    assert_eq!(send(&mut differences, &mut stream, &page, 4, 1), 8 + PAGE);
    // There is no memory for this one.
    differences.resize(1 << 63);
    assert_eq!(differences.statistics().cache_size, 1 << 21);
    assert_eq!(send(&mut differences, &mut stream, &page, 5, 1), 0);
    assert!(Differences::new([0].into_iter(), 1 << 63, PageGeometry::X86).is_err());
}
