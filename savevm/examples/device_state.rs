//! Prints the device state of migration streams down to each field, and checks that the fields encode to the same
//! bytes.
//!
//! `device_state [--quiet] FILE…`: with `--quiet`, one line for each file and one for each section with opaque bytes.

use qevm_savevm::framing::SectionHeader;
use qevm_savevm::vmdesc::{Description, Value};
use qevm_savevm::{Decoder, DecoderOptions};
use qevm_wire::{Decode, Driver, Limits};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let mut files: Vec<String> = std::env::args().skip(1).collect();
    let quiet = files.first().is_some_and(|a| a == "--quiet");
    files.drain(..usize::from(quiet));
    let mut failed = false;
    for file in files {
        if let Err(error) = print_file(&file, quiet) {
            println!("{file}: FAILED: {error}");
            failed = true;
        }
    }
    if failed { Err("some files failed".into()) } else { Ok(()) }
}

fn print_file(name: &str, quiet: bool) -> Result<(), Box<dyn Error>> {
    let stream = std::fs::read(name)?;
    let Some(start) = Description::find_at_end(&stream) else {
        println!("{name}: no description");
        return Ok(());
    };
    let limits = Limits::default();
    let description = Description::parse_at(&stream[start..], start as u64, &limits)?;
    let sections = sections(&stream, &description)?;
    let (mut leaves, mut bytes, mut opaque) = (0, 0, 0);
    for (header, offset, body) in &sections {
        let path = format!("section {} '{}'", header.section_id, header.idstr);
        let Some(device) = description.device(header.idstr.as_bytes(), header.instance_id) else {
            return Err(format!("{path} is not in the description").into());
        };
        let state = device.decode(body, *offset, &limits).map_err(|e| e.within(path.clone()))?;
        let mut copy = Vec::new();
        state.encode(&mut copy)?;
        if copy != *body || state.encoded_len() != body.len() as u64 {
            return Err(format!("{path} does not encode to the bytes it came from").into());
        }
        let mut next = *offset;
        state.leaves(&mut |path, leaf| {
            leaves += 1;
            next = leaf.offset + leaf.len;
            if !quiet {
                println!("{:>10} {:>6} {path} ({}) = {}", leaf.offset, leaf.len, leaf.type_name, show(&leaf.value));
            }
        });
        if state.opaque_bytes() > 0 {
            state.leaves(&mut |path, leaf| {
                if matches!(leaf.value, Value::Opaque(_)) {
                    println!("{name}: {} opaque bytes in {path} ({})", leaf.len, leaf.type_name);
                }
            });
        }
        bytes += body.len();
        opaque += state.opaque_bytes();
    }
    println!("{name}: {} sections, {leaves} fields in {bytes} bytes, {opaque} opaque", sections.len());
    Ok(())
}

fn show(value: &Value) -> String {
    match value {
        Value::Scalar(scalar) => scalar.to_string(),
        Value::Scalars(scalars) => scalars.iter().take(8).map(|s| format!("{s} ")).collect(),
        Value::Buffer(b) | Value::Unused(b) | Value::Bitmap(b) | Value::Opaque(b) => {
            b.iter().take(16).map(|b| format!("{b:02x}")).collect()
        }
        _ => String::new(),
    }
}

/// Header, offset of the body, body.
type Body<'a> = (SectionHeader, u64, &'a [u8]);

/// The device sections of a stream with the offsets of their bodies, whose lengths the description tells.
fn sections<'a>(stream: &'a [u8], description: &Description) -> Result<Vec<Body<'a>>, Box<dyn Error>> {
    let offset = stream.windows(4).position(|w| w == b"QEVM").ok_or("no stream")?;
    let decoder = Decoder::new(DecoderOptions { offset: offset as u64, ..DecoderOptions::default() });
    let mut driver = Driver::new(&stream[offset..], decoder);
    let mut sections = Vec::new();
    while driver.next()?.is_some() {
        let decoder = driver.decoder();
        if let (true, Some(header)) = (decoder.expects_body(), decoder.current_section().cloned()) {
            let device = description.device(header.idstr.as_bytes(), header.instance_id).ok_or("not described")?;
            let (start, len) = (decoder.offset() as usize, device.wire_size() as usize);
            sections.push((header, start as u64, stream.get(start..start + len).ok_or("too short")?));
            driver.fill(len)?;
            driver.decoder_mut().body(len as u64)?;
            driver.consume(len);
        }
    }
    Ok(sections)
}
