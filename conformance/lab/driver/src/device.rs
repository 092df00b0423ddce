//! Mediated devices by sysfs.

use crate::plan::Device;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

/// A device that goes when this is dropped.
pub(crate) struct Made(Device);

impl Made {
    pub(crate) fn new(device: &Device) -> Result<Made> {
        let types = format!("/sys/class/mdev_bus/{}/mdev_supported_types/{}/create", device.driver, device.kind);
        fs::write(&types, &device.uuid).with_context(|| format!("making a device by {types}"))?;
        let made = Made(device.clone());
        for (name, value) in &device.settings {
            write(&device.uuid, name, value)?;
        }
        Ok(made)
    }

    pub(crate) fn uuid(&self) -> &str {
        &self.0.uuid
    }

    /// The counters of a `testdev`; none of any other.
    pub(crate) fn counters(&self) -> Option<BTreeMap<String, i64>> {
        let text = fs::read_to_string(folder(&self.0.uuid).join("testdev/counters")).ok()?;
        let pair = |line: &str| line.split_once(' ').and_then(|(name, n)| Some((name.to_owned(), n.parse().ok()?)));
        text.lines().map(pair).collect()
    }

    pub(crate) fn state(&self) -> Option<String> {
        let text = fs::read_to_string(folder(&self.0.uuid).join("testdev/state")).ok()?;
        Some(text.trim().to_owned())
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if let Err(error) = fs::write(folder(&self.0.uuid).join("remove"), "1") {
            println!("driver: device {} stays: {error}", self.0.uuid);
        }
    }
}

/// Writes a setting of a `testdev`.
pub(crate) fn write(uuid: &str, name: &str, value: &str) -> Result<()> {
    let path = folder(uuid).join("testdev").join(name);
    fs::write(&path, value).with_context(|| format!("writing {value:?} to {}", path.display()))
}

fn folder(uuid: &str) -> PathBuf {
    PathBuf::from("/sys/bus/mdev/devices").join(uuid)
}
