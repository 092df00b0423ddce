//! What a migration is to use, found out before anything is sent.

use super::PageChannels;
use crate::connections::Reader;
use crate::core::DeviceOptions;
use crate::core::source::{Answers, PageRoute, SourceOptions};
use crate::differences::Differences;
use crate::multifd::{Queue, Settings, Transfers};
use crate::page_file::Saving;
use crate::return_path::ReturnPath;
use crate::{Capabilities, Guest, IterativeDevice, Job, MigrationError, Mode, Outgoing, Parameters, Refused};
use qevm_wire::profile::ZeroPageDetection;
use qevm_wire::{PageGeometry, Profile};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// What goes which way.
pub(super) struct Setup<'g> {
    /// The file that pages have places in.
    pub(super) saving: Option<Saving>,
    /// How pages travel on page channels, or are written by threads.
    pub(super) settings: Option<Settings>,
    pub(super) iterative: Vec<&'g dyn IterativeDevice>,
    /// What the core has to know of the iterative devices.
    pub(super) devices: Vec<DeviceOptions>,
    pub(super) differences: Option<Differences>,
    /// Of each block, whether the destination has its pages already.
    shared: Vec<bool>,
}

impl<'g> Setup<'g> {
    pub(super) fn new(
        guest: &'g dyn Guest,
        connections: &Outgoing,
        job: &Job,
        parameters: &Parameters,
        profile: &Profile,
    ) -> Result<Self, MigrationError> {
        let capabilities = job.capabilities();
        let saving = connections.file.clone().map(|file| {
            // Without page channels of its own nobody else looks for zero pages, as on a connection.
            let holes = !capabilities.multifd || parameters.zero_page_detection != ZeroPageDetection::None;
            Saving::new(file, holes)
        });
        let settings = Settings::of(capabilities, parameters, profile)
            .filter(|_| !connections.pages.is_empty() || saving.is_some())
            .map(|settings| Settings {
                greeted: connections.greeted,
                uuid: job.uuid().unwrap_or_default(),
                ..settings
            });
        if settings.as_ref().is_some_and(|settings| settings.zero_copy) {
            let in_place = connections.pages.iter().try_for_each(|channel| channel.send_in_place());
            in_place.map_err(|source| MigrationError::NoZeroCopy { source })?;
        }
        let shared = shared(guest, capabilities, parameters.mode);
        if capabilities.background_snapshot && shared.contains(&true) {
            // The file goes on changing, and is no snapshot. QEMU's words for memory that it cannot take one of.
            let why = "Background-snapshot is not compatible with guest memory configuration";
            return Err(Refused::Blocked(why.into()).into());
        }
        let iterative = guest.devices().iterative();
        let transfers = saving.is_none() && settings.as_ref().is_some_and(|settings| settings.device_state);
        let devices = iterative.iter().map(|device| DeviceOptions::of(*device, transfers));
        let devices = devices.collect::<Result<Vec<_>, _>>()?;
        if let Some(device) = devices.first().filter(|_| capabilities.background_snapshot) {
            return Err(in_parts(device));
        }
        let differences = match capabilities.xbzrle && settings.is_none() && saving.is_none() {
            true => {
                let lengths = guest.ram().into_iter().map(|view| view.memory.len() as u64).collect::<Vec<_>>();
                Some(Differences::new(lengths.into_iter(), parameters.xbzrle_cache_size, PageGeometry::X86)?)
            }
            false => None,
        };
        Ok(Setup { saving, settings, iterative, devices, differences, shared })
    }

    /// The page channels, or the threads that write pages to a file.
    pub(super) fn page_channels(&self) -> Option<PageChannels<'g>> {
        let named = self.devices.iter().zip(&self.iterative);
        self.settings.as_ref().map(|settings| PageChannels {
            queue: Queue::new(settings.channels),
            legacy: settings.zero_pages == ZeroPageDetection::Legacy && self.saving.is_none(),
            packets: AtomicU64::new(0),
            transfers: Transfers::new(named.map(|(options, device)| (options.idstr.clone(), *device)).collect()),
        })
    }

    /// What the core has to know.
    pub(super) fn options(
        &self,
        guest: &dyn Guest,
        job: &Job,
        reader: Reader,
        parameters: &Parameters,
        profile: &Profile,
    ) -> SourceOptions {
        SourceOptions {
            profile: profile.clone(),
            capabilities: job.capabilities(),
            machine_type: guest.machine_type().into(),
            uuid: job.uuid().map(|uuid| uuid.0),
            blocks: guest.ram().iter().map(|view| (view.name.into(), view.memory.len() as u64)).collect(),
            host_page_sizes: (0..guest.ram().len()).map(|block| guest.hooks().host_page_size(block)).collect(),
            shared: self.shared.clone(),
            devices: self.devices.clone(),
            route: match (&self.settings, &self.saving) {
                (None, None) => PageRoute::Main,
                (None, Some(_)) => PageRoute::File,
                (Some(_), None) => PageRoute::Channels,
                (Some(_), Some(_)) => PageRoute::FileByThreads,
            },
            reader,
            patience: parameters.timeouts.switchover(),
        }
    }
}

/// Of each block, whether its pages are not sent, because the destination has them.
fn shared(guest: &dyn Guest, capabilities: Capabilities, mode: Mode) -> Vec<bool> {
    let shared = |block| match mode {
        Mode::CprTransfer => true,
        _ => capabilities.ignore_shared && guest.hooks().shares(block),
    };
    (0..guest.ram().len()).map(shared).collect()
}

/// What a device that runs on had at one instant cannot be known.
fn in_parts(device: &DeviceOptions) -> MigrationError {
    let why = format!("Device '{}' sends its state in parts, and cannot be in a background snapshot", device.idstr);
    MigrationError::Refused(Refused::Blocked(why))
}

/// What reads the return path, where the destination answers.
pub(super) fn return_path(capabilities: Capabilities, reader: Reader, profile: &Profile) -> Option<Arc<ReturnPath>> {
    let flow = profile.switchover_ack.filter(|_| capabilities.switchover_ack);
    // The destination answers a source that asks it to, whatever its own capability says, and in postcopy it requests
    // pages. A snapshot is a copy, of which no other process here has to know.
    let answers = capabilities.return_path
        || (reader == Reader::Answers && !capabilities.background_snapshot)
        || (capabilities.postcopy_ram && reader != Reader::Nobody);
    answers.then(|| Arc::new(ReturnPath::new(Answers::new(flow, capabilities.return_path))))
}
