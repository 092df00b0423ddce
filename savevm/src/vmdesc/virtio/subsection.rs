//! The subsections after a virtio device's own part.

use super::super::ScalarKind;
use super::super::fields::Input;
use super::super::tree::SUBSECTION;
use super::Fields;
use super::common::QUEUES_MAX;
use crate::Error;
use qevm_wire::Limits;

/// What every subsection's name starts with.
const PREFIX: &[u8] = b"virtio/";

/// Bytes from here to the first subsection, from which on nothing but subsections follows.
pub(super) fn start(fields: &mut Fields<'_, '_>) -> Result<u64, Error> {
    let rest = fields.input.reader.rest();
    let starts = rest.windows(2 + PREFIX.len()).enumerate();
    let starts = starts.filter(|(_, w)| w[0] == SUBSECTION && w[2..] == *PREFIX).map(|(at, _)| at as u64);
    let end = rest.len() as u64;
    for at in starts.chain([end]) {
        let reader = fields.input.reader.clone();
        fields.input.reader.take(at)?;
        let mut all = false;
        fields.attempt(|fields| {
            chain(fields)?;
            all = fields.input.reader.is_empty();
            // Only to know that it can be read: the nodes are made when it is.
            Err(fields.unexpected("subsections", 0, 0))
        });
        fields.input.reader = reader;
        if all {
            return Ok(at);
        }
    }
    Err(fields.unexpected("subsections of a virtio device", 0, 1))
}

/// Where chains of subsections in `rest` end, in ascending order, each once.
pub(super) fn ends(rest: &[u8]) -> Vec<usize> {
    let starts = rest.windows(2 + PREFIX.len()).enumerate();
    let starts = starts.filter(|(_, w)| w[0] == SUBSECTION && w[2..] == *PREFIX).map(|(at, _)| at);
    let mut ends: Vec<usize> = Vec::new();
    for start in starts {
        // A subsection inside a chain that was followed is no start of another.
        if ends.last().is_some_and(|end| start < *end) {
            continue;
        }
        let mut input = Input::new(&rest[start..], 0, &Limits::default());
        let mut fields = Fields::new(&mut input);
        if chain(&mut fields).is_ok() {
            ends.push(start + fields.offset() as usize);
        }
    }
    ends
}

/// Reads subsections until there are no more.
pub(super) fn chain(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    while fields.input.reader.peek() == Some(SUBSECTION) {
        let mut header = fields.input.reader.clone();
        header.u8()?;
        let name = header.counted_bytes()?;
        let version = header.be32()?;
        let Some((name, content)) = LAYOUTS.iter().find(|(known, _)| known.as_bytes() == name) else {
            return Err(fields.unexpected("subsection of a virtio device", name.len() as u64, 0));
        };
        fields.subsection(name, version, *content)?;
    }
    Ok(())
}

type Layout = fn(&mut Fields<'_, '_>) -> Result<(), Error>;

/// The subsections, QEMU 5.2 to 11.1. (`virtio/128bit_features` is new in 11.x.)
const LAYOUTS: &[(&str, Layout)] = &[
    ("virtio/device_endian", |f| f.u8("device_endian").map(drop)),
    ("virtio/64bit_features", |f| f.u64("guest_features").map(drop)),
    ("virtio/128bit_features", |f| f.u64("guest_features[1]").map(drop)),
    ("virtio/virtqueues", |f| {
        queues(f, "virtqueue_state", |f| {
            f.u64("vring.avail")?;
            f.u64("vring.used").map(drop)
        })
    }),
    ("virtio/ringsize", |f| f.scalars("num_default", "uint32", ScalarKind::U32, QUEUES_MAX.into())),
    ("virtio/broken", |f| f.bool("broken").map(drop)),
    ("virtio/started", |f| f.bool("started").map(drop)),
    ("virtio/disabled", |f| f.bool("disabled").map(drop)),
    ("virtio/packed_virtqueues", |f| {
        queues(f, "packed_virtqueue_state", |f| {
            f.u16("last_avail_idx")?;
            f.bool("last_avail_wrap_counter")?;
            f.u16("used_idx")?;
            f.bool("used_wrap_counter")?;
            f.u32("inuse").map(drop)
        })
    }),
    ("virtio/extra_state", |f| {
        f.structure("extra_state", "virtio_extra_state", "", 0, |f| {
            // A PCI device with `disable-modern=on` has none.
            if f.input.reader.peek() != Some(SUBSECTION) {
                return Ok(());
            }
            let mut header = f.input.reader.clone();
            header.u8()?;
            match header.counted_bytes()? {
                b"virtio_pci/modern_state" => modern_pci(f),
                b"virtio_mmio/state" => modern_mmio(f),
                // The next of the device's subsections.
                name if name.starts_with(PREFIX) => Ok(()),
                found => Err(f.unexpected("extra state of a virtio transport", found.len() as u64, 0)),
            }
        })
    }),
];

fn queues(fields: &mut Fields<'_, '_>, vmsd_name: &'static str, content: Layout) -> Result<(), Error> {
    (0..QUEUES_MAX).try_for_each(|queue| fields.structure(format!("vq[{queue}]"), "struct", vmsd_name, 1, content))
}

/// A PCI transport's state since virtio 1.0.
fn modern_pci(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    fields.subsection("virtio_pci/modern_state", 1, |fields| {
        fields.u32("dfselect")?;
        fields.u32("gfselect")?;
        fields.scalars("guest_features", "uint32", ScalarKind::U32, 2)?;
        queues(fields, "virtio_pci/modern_queue_state", |fields| {
            fields.u16("num")?;
            // What is a flag here was a 16-bit number once.
            fields.leaf("unused", "unused_buffer", 1, |b| super::super::Value::Unused(b.into()))?;
            fields.bool("enabled")?;
            rings(fields)
        })
    })
}

/// A memory-mapped transport's state since virtio 1.0 (`virtio-mmio.force-legacy=off`).
fn modern_mmio(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    fields.subsection("virtio_mmio/state", 1, |fields| {
        fields.scalars("guest_features", "uint32", ScalarKind::U32, 2)?;
        queues(fields, "virtio_mmio/queue_state", |fields| {
            fields.u16("num")?;
            fields.bool("enabled")?;
            rings(fields)
        })
    })
}

/// The guest-physical addresses of a queue's rings, low word first.
fn rings(fields: &mut Fields<'_, '_>) -> Result<(), Error> {
    for ring in ["desc", "avail", "used"] {
        fields.scalars(ring, "uint32", ScalarKind::U32, 2)?;
    }
    Ok(())
}
