//! Migration parameters, with QEMU's names, defaults and ranges (QMP reference of QEMU 11.1).

use std::time::Duration;

/// What `migrate-set-parameters` sets. It may change while a migration runs.
///
/// ```
/// use reference_vmm::migration::Parameters;
///
/// let mut parameters = Parameters::default();
/// assert_eq!(parameters.max_bandwidth, 128 << 20);
/// parameters.set("downtime-limit", 50)?;
/// assert_eq!(parameters.downtime_limit().as_millis(), 50);
/// assert!(parameters.set("downtime-limit", 3_000_000).is_err());
/// # Ok::<(), reference_vmm::migration::BadParameter>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Parameters {
    /// `max-bandwidth`: bytes per second while the guest runs; 0 is unlimited.
    pub max_bandwidth: u64,
    /// `downtime-limit`: the longest the guest may stand still, in milliseconds.
    pub downtime_limit_ms: u64,
    /// `avail-switchover-bandwidth`: bytes per second to reckon with for the switchover; 0 takes what is measured (8.2).
    pub avail_switchover_bandwidth: u64,
}

/// A parameter that cannot be set so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadParameter {
    /// The value is outside the parameter's range.
    #[error("Parameter '{name}' expects an integer in the range of {min} to {max}")]
    Range {
        /// The parameter.
        name: &'static str,
        /// Smallest value.
        min: u64,
        /// Largest value.
        max: u64,
    },
    /// No parameter of that name can be changed here.
    #[error("Parameter '{0}' is unexpected")]
    Unknown(String),
}

/// Largest `downtime-limit` in milliseconds.
const MAX_DOWNTIME_LIMIT_MS: u64 = 2_000_000;

impl Default for Parameters {
    fn default() -> Self {
        Parameters { max_bandwidth: 128 << 20, downtime_limit_ms: 300, avail_switchover_bandwidth: 0 }
    }
}

impl Parameters {
    /// Every parameter by its QMP name, in the order QEMU lists them.
    pub fn list(&self) -> [(&'static str, u64); 3] {
        [
            ("max-bandwidth", self.max_bandwidth),
            ("avail-switchover-bandwidth", self.avail_switchover_bandwidth),
            ("downtime-limit", self.downtime_limit_ms),
        ]
    }

    /// Sets a parameter by its QMP name.
    ///
    /// # Errors
    /// [`BadParameter`]; nothing is changed then.
    pub fn set(&mut self, name: &str, value: u64) -> Result<(), BadParameter> {
        match name {
            "max-bandwidth" => self.max_bandwidth = value,
            "avail-switchover-bandwidth" => self.avail_switchover_bandwidth = value,
            "downtime-limit" if value > MAX_DOWNTIME_LIMIT_MS => {
                return Err(BadParameter::Range { name: "downtime-limit", min: 0, max: MAX_DOWNTIME_LIMIT_MS });
            }
            "downtime-limit" => self.downtime_limit_ms = value,
            _ => return Err(BadParameter::Unknown(name.into())),
        }
        Ok(())
    }

    /// `downtime-limit` as a duration.
    pub fn downtime_limit(&self) -> Duration {
        Duration::from_millis(self.downtime_limit_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_set_what_they_list() {
        let mut parameters = Parameters::default();
        for (i, (name, _)) in Parameters::default().list().into_iter().enumerate() {
            parameters.set(name, 1000 + i as u64).unwrap();
        }
        assert_eq!(parameters.list().map(|(_, value)| value), [1000, 1001, 1002]);
        assert_eq!(parameters.set("max-bandwith", 1), Err(BadParameter::Unknown("max-bandwith".into())));
    }

    #[test]
    fn a_bad_value_changes_nothing() {
        let mut parameters = Parameters::default();
        assert!(matches!(parameters.set("downtime-limit", 2_000_001), Err(BadParameter::Range { max: 2_000_000, .. })));
        assert_eq!(parameters, Parameters::default());
    }
}
