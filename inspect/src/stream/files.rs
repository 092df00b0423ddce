//! All files of a migration in their order.

use super::analysis::Analysis;
use super::bodies::Bodies;
use super::channels::Channels;
use super::checkpoints::Checkpoints;
use super::connection::Connection;
use super::halt::{Halt, Outcome};
use super::inputs::{Inputs, Named};
use super::memory::Memory;
use super::observer::Observer;
use super::return_path;
use super::settings::Settings;
use super::walk::Walk;
use crate::failure::{Failure, printable};
use crate::open::Container;
use qevm_savevm::{Decoder, DecoderOptions, Encoder};
use qevm_wire::{Decode, PageGeometry, Writer};
use std::collections::HashMap;

/// Reads all files of a migration, with the checkpoints that were found when they were read before.
pub(super) fn run(
    inputs: &mut Inputs,
    settings: &Settings,
    observer: &mut dyn Observer,
    checkpoints: Option<Checkpoints>,
) -> Outcome {
    let mut walk = Walk {
        analysis: Analysis { reencoded_identical: settings.reencode, page_size: 4096, ..Analysis::default() },
        memory: None,
        channels: Channels::default(),
        settings,
        observer,
        open: HashMap::new(),
        record: None,
        bodies: Bodies::new(!settings.live, settings.strict, settings.layouts.clone(), settings.spool.clone()),
        pings: HashMap::new(),
        pages_untold: false,
        ended: false,
        // The pages of checkpoints come after those of the stream.
        copy_asked: checkpoints.is_some(),
        own_devices: None,
        may_restart: inputs.is_seekable() && checkpoints.is_none(),
        checkpoints,
        flush_seen: false,
        first_flush: None,
        bytes_before: 0,
    };
    let result = all(&mut walk, inputs);
    let Walk { mut analysis, memory, channels, .. } = walk;
    analysis.ram = memory.map(Memory::into_ram);
    analysis.channels = channels.describe();
    analysis.reencoded_identical &= settings.reencode;
    match result {
        Ok(()) => {}
        Err(Halt::NeedsImage) => return Outcome::NeedsImage,
        Err(Halt::Checkpoints(found)) => return Outcome::Checkpoints(found),
        Err(Halt::Failure(failure)) => {
            // What was not read to its end is not known to be identical.
            analysis.reencoded_identical = false;
            analysis.failure = Some(failure);
        }
    }
    Outcome::Done(Box::new(analysis))
}

fn all(walk: &mut Walk<'_>, inputs: &mut Inputs) -> Result<(), Halt> {
    let Inputs { main, offset, containers, pages, channels, recovery, return_path } = inputs;
    walk.channels = Channels::open(channels, walk.settings.reencode)?;
    let can_break = !recovery.is_empty();
    let skipped = main.source.skip(*offset).map_err(|e| Failure::io(&main.name, 0, &e))?;
    if skipped < *offset {
        let kind = "truncated";
        let message = format!("the file ends here, before the stream's start at --offset {offset}");
        let file = main.name.clone();
        return Err(Failure { file, kind, offset: skipped, path: String::new(), message }.into());
    }
    let looked = walk.bodies.look_ahead(&mut main.source);
    looked.map_err(|error| Failure::io(&main.name, *offset, &error))?;
    let told = pages.or_else(|| walk.bodies.page_size().and_then(PageGeometry::from_size));
    let pages = told.unwrap_or(PageGeometry::X86);
    walk.pages_untold = told.is_none() && !walk.settings.live;
    walk.analysis.page_size = pages.size();
    let options = DecoderOptions { offset: *offset, pages, live: walk.settings.live, ..DecoderOptions::default() };
    let (mut last, mut encoder) = connection(walk, main, Decoder::new(options), Encoder::new(pages), can_break)?;
    walk.analysis.main_bytes = walk.analysis.bytes;
    containers.iter().filter_map(Container::remark).for_each(|remark| walk.analysis.note(remark));
    let resumed = recovery.len();
    for (number, named) in recovery.iter_mut().enumerate() {
        let (decoder, resumed_encoder) = (last.recovery(), encoder.recovery());
        (last, encoder) = connection(walk, named, decoder, resumed_encoder, number + 1 < resumed)?;
    }
    if let Some(at) = walk.first_flush.filter(|_| !walk.settings.live) {
        walk.analysis.incomplete_ram = true;
        let missing = "the main channel waits for multifd channels, but none was given (--channel)";
        match walk.settings.complete {
            true => return Err(Failure::mismatch(&main.name, at, "section 'ram'", missing).into()),
            false => walk.analysis.note(format!("{missing}: pages that came on them are missing here")),
        }
    }
    if let Some(memory) = &mut walk.memory {
        walk.channels.finish(memory, &last, walk.analysis.postcopy, can_break)?;
    }
    walk.analysis.device_bytes += walk.channels.device_bytes();
    for (configurations, notes) in walk.channels.configurations() {
        configurations.iter().for_each(|(header, fields)| walk.observer.configuration_of(header, fields));
        notes.into_iter().for_each(|note| walk.analysis.note(note));
    }
    let absent: Vec<String> = walk.memory.iter().flat_map(|memory| walk.analysis.ignored(&memory.ram)).collect();
    for name in absent {
        let name = printable(&name);
        walk.analysis.note(format!(
            "RAM block '{name}' is not in the stream (capability x-ignore-shared): the file behind its backend has its pages"
        ));
    }
    walk.bytes_before += walk.channels.bytes();
    walk.analysis.bytes = walk.bytes_before;
    for (number, named) in return_path.iter_mut().enumerate() {
        let mut context = return_path::Context {
            pings: &mut walk.pings,
            blocks: last.ram_blocks(),
            pages: last.page_geometry(),
            can_break: number < resumed,
            reencode: walk.settings.reencode,
        };
        let read = return_path::read(named, &mut context)?;
        walk.analysis.return_path.push(read.description);
        walk.bytes_before += read.bytes;
        walk.analysis.bytes = walk.bytes_before;
    }
    Ok(())
}

/// Reads one connection to its end and returns its decoder.
fn connection(
    walk: &mut Walk<'_>,
    named: &mut Named,
    decoder: Decoder,
    encoder: Encoder,
    can_break: bool,
) -> Result<(Decoder, Encoder), Halt> {
    let start = decoder.offset();
    let mut connection = Connection {
        file: named.name.clone(),
        source: &mut named.source,
        decoders: vec![decoder],
        encoder,
        writer: Writer::new(),
    };
    let result = connection.read(walk);
    let Connection { mut decoders, encoder, .. } = connection;
    let end = decoders.last().map_or(start, Decoder::offset);
    let outermost = decoders.swap_remove(0);
    walk.bytes_before += end - start;
    walk.analysis.bytes = walk.bytes_before;
    walk.bodies.finish(&mut walk.analysis, walk.observer);
    match result {
        Err(Halt::Failure(failure)) if can_break && failure.kind == "truncated" && failure.file == named.name => {
            let note = format!("{}: the connection broke at byte {end}, as a resumed postcopy's does", named.name);
            walk.analysis.note(note);
            walk.record = None;
        }
        Err(Halt::Failure(mut failure)) => {
            walk.close_record(end);
            failure.offset = failure.offset.max(start);
            return Err(failure.into());
        }
        Err(halt) => return Err(halt),
        Ok(()) => {}
    }
    Ok((outermost, encoder))
}
