use qevm_wire::{CountedString, Reader, WireError, Writer};

/// Interprets the input as a list of reads (an opcode byte before each item) and checks that the reader neither leaves
/// its bounds nor loses its place, and that the writer gives back what was read.
pub fn wire_reader(data: &[u8]) {
    let mut reader: Reader<'_, WireError> = Reader::at(data, 1 << 40);
    let mut again = Writer::new();
    while let Some(op) = reader.peek() {
        let before = reader.offset();
        let read = match op % 6 {
            0 => reader.u8().map(|v| again.u8(v)).map(drop),
            1 => reader.be16().map(|v| again.be16(v)).map(drop),
            2 => reader.be64().map(|v| again.be64(v)).map(drop),
            3 => reader.counted_bytes().map(|v| again.u8(v.len() as u8).bytes(v)).map(drop),
            4 => reader.take(u64::from(op) << 3).map(|v| again.bytes(v)).map(drop),
            _ => reader.be32().map(|v| again.be32(v)).map(drop),
        };
        if read.is_err() {
            assert_eq!(reader.offset(), before, "a failed read moved the reader");
            break;
        }
        assert!(reader.offset() >= before);
    }
    assert_eq!(again.as_bytes(), &data[..reader.position()]);
    if let Some(name) = CountedString::new(data) {
        assert_eq!(name.as_bytes(), data);
        assert!(name.to_string().is_ascii());
    }
}
