//! Opening what holds a stream: a plain file, a compressed one, a libvirt save image, a snapshot in a qcow2 image.
//!
//! What a file is shows in its first bytes; it need not be said. Offsets in errors and tables count from the start of
//! the file where the stream lies in it as it is, and from the start of the stream where it had to be decompressed or
//! gathered from a disk image.

mod container;
mod decompressed;
mod snapshot;

pub use self::container::Container;

use self::decompressed::{Decompressed, Trailing};
use crate::failure::{Error, Failure};
use crate::source::Source;
use qevm_savevm::container::libvirt::{self, SaveFormat, SaveImage};
use qevm_savevm::container::{Compression, FileKind, Foreign, RECOGNISE_LEN, recognise};
use qevm_wire::{Fault, Limits};
use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::Path;

/// More compressions around one another than any tool makes are an attempt to use up memory.
const MAX_DEPTH: usize = 4;

/// An opened input.
#[derive(Debug)]
pub struct Opened {
    /// As the user wrote it; `-` is shown as `standard input`.
    pub name: String,
    /// Its bytes.
    pub source: Source,
    /// Where in them the stream starts.
    pub offset: u64,
    /// What the stream is wrapped in, outermost first.
    pub containers: Vec<Container>,
}

/// Opens `path` (`-` is standard input), whatever container the stream is in. `snapshot` chooses one by name or ID
/// where a qcow2 image has several. `offset_given`: the caller knows where the stream starts, whatever the file starts
/// with.
///
/// # Errors
/// [`Error::Usage`] if the file cannot be opened or holds no stream that could be meant, [`Error::Bad`] if the
/// container is damaged.
pub fn open(path: &Path, snapshot: Option<&str>, offset_given: bool) -> Result<Opened, Error> {
    if path.as_os_str() == "-" {
        return open_stdin();
    }
    let name = path.display().to_string();
    let cannot = |error: io::Error| Error::Usage(format!("{name}: cannot be opened: {error}"));
    let mut file = File::open(path).map_err(cannot)?;
    if file.metadata().map_err(cannot)?.is_dir() {
        return Err(Error::Usage(format!("{name}: is a directory, expected a stream file")));
    }
    if file.seek(SeekFrom::Start(0)).is_err() {
        return from_pipe(name, file, Vec::new());
    }
    let first = first_bytes(&mut file, RECOGNISE_LEN).map_err(cannot)?;
    file.rewind().map_err(cannot)?;
    let kind = recognise(&first);
    if snapshot.is_some() && kind != Some(FileKind::Qcow2) {
        return Err(Error::Usage(format!("{name}: --snapshot is for qcow2 images, and this is none")));
    }
    match kind {
        Some(FileKind::Libvirt) => open_save_image(name, file),
        Some(FileKind::Qcow2) => {
            let (source, container) = snapshot::open(&name, file, snapshot)?;
            Ok(Opened { name, source, offset: 0, containers: vec![container] })
        }
        Some(FileKind::Compressed(compression)) => decompressed(name, file, compression, Vec::new()),
        Some(FileKind::Foreign(foreign)) if !offset_given => Err(foreign_file(name, foreign)),
        // What is no stream at all is for the decoder to say, with the bytes it found.
        _ => {
            let source = Source::file(file).map_err(cannot)?;
            Ok(Opened { name, source, offset: 0, containers: Vec::new() })
        }
    }
}

/// True if the file is one that snapshots are chosen in. One that cannot be read is for [`open`] to refuse.
pub fn is_disk_image(path: &Path) -> bool {
    let first = |mut file: File| first_bytes(&mut file, RECOGNISE_LEN);
    // A pipe must keep its bytes.
    let regular = path.metadata().is_ok_and(|file| file.is_file());
    regular && File::open(path).and_then(first).is_ok_and(|first| recognise(&first) == Some(FileKind::Qcow2))
}

fn open_stdin() -> Result<Opened, Error> {
    from_pipe("standard input".to_owned(), io::stdin(), Vec::new())
}

/// Opens what comes from a pipe, or out of the `containers` around it.
fn from_pipe(name: String, mut pipe: impl Read + 'static, mut containers: Vec<Container>) -> Result<Opened, Error> {
    let depth = containers.iter().filter(|container| matches!(container, Container::Compressed { .. })).count();
    if depth > MAX_DEPTH {
        return Err(Error::Usage(format!("{name}: is compressed more than {MAX_DEPTH} times")));
    }
    let cannot = |error: io::Error| Error::Usage(format!("{name}: cannot be read: {error}"));
    let first = first_bytes(&mut pipe, RECOGNISE_LEN).map_err(|error| match depth {
        0 => cannot(error),
        // What a decompressor says is the fault of its input.
        _ => Failure::io(&name, 0, &error).into(),
    })?;
    let kind = recognise(&first);
    let mut input = Cursor::new(first).chain(pipe);
    match kind {
        Some(FileKind::Compressed(compression)) => decompressed(name, input, compression, containers),
        Some(FileKind::Foreign(foreign)) => Err(foreign_file(name, foreign)),
        Some(FileKind::Qcow2) if depth > 0 => Err(Error::Usage(format!(
            "{name}: a compressed qcow2 image cannot be read: decompress it into a file first"
        ))),
        Some(FileKind::Qcow2) => {
            Err(Error::Usage(format!("{name}: a qcow2 image cannot be read from a pipe; name the file")))
        }
        Some(FileKind::Libvirt) => {
            let (image, container) = save_image_header(&name, &mut input)?;
            containers.push(container);
            match image.format {
                SaveFormat::Compressed(Compression::Lzop) => Err(lzop_inside(&name, image.stream_offset, depth)),
                SaveFormat::Compressed(compression) => decompressed(name, input, compression, containers),
                SaveFormat::Raw => Ok(Opened { name, source: Source::stream(Box::new(input)), offset: 0, containers }),
                _ => {
                    Err(Error::Usage(format!("{name}: a sparse save image cannot be read from a pipe; name the file")))
                }
            }
        }
        _ => Ok(Opened { name, source: Source::stream(Box::new(input)), offset: 0, containers }),
    }
}

fn open_save_image(name: String, mut file: File) -> Result<Opened, Error> {
    let cannot = |error: io::Error| Error::Usage(format!("{name}: cannot be read: {error}"));
    let (image, container) = save_image_header(&name, &mut file)?;
    let containers = vec![container];
    match image.format {
        SaveFormat::Compressed(Compression::Lzop) => Err(lzop_inside(&name, image.stream_offset, 0)),
        SaveFormat::Compressed(compression) => {
            file.seek(SeekFrom::Start(image.stream_offset)).map_err(cannot)?;
            decompressed(name, file, compression, containers)
        }
        _ => {
            let source = Source::file(file).map_err(cannot)?;
            Ok(Opened { name, source, offset: image.stream_offset, containers })
        }
    }
}

/// Reads what a save image has before the stream. An incomplete one is read all the same: how far it goes is what its
/// owner wants to know, and the decoder will say where it ends.
fn save_image_header(name: &str, input: &mut impl Read) -> Result<(SaveImage, Container), Error> {
    let io = |error: io::Error| Failure::io(name, 0, &error);
    let header = first_bytes(input, libvirt::HEADER_LEN).map_err(io)?;
    let header = SaveImage::parse(&header, &Limits::default()).map_err(|error| Failure::located(name, error))?;
    let mut data = Vec::new();
    let behind_header = header.stream_offset - libvirt::HEADER_LEN as u64;
    input.by_ref().take(behind_header).read_to_end(&mut data).map_err(io)?;
    data.truncate(header.xml_len as usize);
    Ok((header.clone(), Container::SaveImage { header, xml: data }))
}

/// A save image whose payload only `lzop` can unpack: with the image's header before it, that takes it for nothing
/// known.
fn lzop_inside(name: &str, stream_offset: u64, depth: usize) -> Error {
    let unpacked = if depth > 0 { " after decompressing the file" } else { "" };
    Error::Usage(format!(
        "{name}: is a libvirt save image compressed with lzop, which is not supported: use `tail -c +{} FILE | lzop -dc`{unpacked}",
        stream_offset + 1
    ))
}

/// A file of another kind, by its name and with what to do with it.
fn foreign_file(name: String, foreign: Foreign) -> Error {
    let (kind, path) = (Fault::Unsupported.as_str(), String::new());
    Failure { file: name, kind, offset: 0, path, message: foreign.to_string() }.into()
}

/// `containers`: what is around the compressed data.
fn decompressed(
    name: String,
    input: impl Read + 'static,
    compression: Compression,
    mut containers: Vec<Container>,
) -> Result<Opened, Error> {
    let trailing = Trailing::default();
    let opened = Decompressed::new(Box::new(input), compression, trailing.clone());
    let program = compression.as_str();
    let reader = opened.map_err(|error| Failure::io(&name, 0, &error))?.ok_or_else(|| {
        Error::Usage(format!(
            "{name}: is compressed with {program}, which is not supported: decompress it with `{program} -dc` first"
        ))
    })?;
    containers.push(Container::Compressed { program, trailing });
    from_pipe(name, reader, containers)
}

/// Up to `count` bytes from the start; fewer only at the end of the input.
fn first_bytes(input: &mut impl Read, count: usize) -> io::Result<Vec<u8>> {
    let mut first = Vec::with_capacity(count);
    input.by_ref().take(count as u64).read_to_end(&mut first)?;
    Ok(first)
}

#[cfg(test)]
mod tests;
