//! The parameters of multifd: what each release takes, and why it refuses the rest.
//!
//! Which capabilities go together is in [`qevm_wire::capability`].

use crate::compression::Compression;
use qevm_wire::QemuVersion;
use qevm_wire::profile::ZeroPageDetection;

/// The parameters that multifd has in QMP. The defaults are those of QEMU 11.1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameters {
    /// `multifd-channels`, equal on both sides.
    pub channels: u32,
    /// `multifd-compression`, equal on both sides.
    pub compression: Compression,
    /// `multifd-zlib-level`.
    pub zlib_level: u32,
    /// `multifd-zstd-level`.
    pub zstd_level: u32,
    /// `multifd-qatzip-level` (9.2).
    pub qatzip_level: u32,
    /// `zero-page-detection` (9.0); `None` where it is not set.
    pub zero_page_detection: Option<ZeroPageDetection>,
}

impl Default for Parameters {
    fn default() -> Self {
        Parameters {
            channels: 2,
            compression: Compression::None,
            zlib_level: 1,
            zstd_level: 1,
            qatzip_level: 1,
            zero_page_detection: None,
        }
    }
}

/// A parameter that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParameterError {
    /// A number outside of its range.
    #[error("Parameter '{name}' expects a value between {min} and {max}, found {found}")]
    Range {
        /// QEMU's name of the parameter.
        name: &'static str,
        /// The value found.
        found: u32,
        /// The lowest value.
        min: u32,
        /// The highest value.
        max: u32,
    },
    /// A compression method that the release does not have.
    #[error("Parameter 'multifd-compression' does not accept value '{method}' (QEMU {qemu}; it exists since {})", method.since())]
    Method {
        /// The method.
        method: Compression,
        /// The release.
        qemu: QemuVersion,
    },
    /// A parameter that the release does not have.
    #[error("Parameter '{name}' is unexpected (QEMU {qemu}; it exists since {since})")]
    Missing {
        /// QEMU's name of the parameter.
        name: &'static str,
        /// The release.
        qemu: QemuVersion,
        /// The first release that has it.
        since: QemuVersion,
    },
}

impl Parameters {
    /// Says whether a release takes these parameters. Whether its build has a compression method is another question:
    /// Debian's have none of `qpl`, `uadk` and `qatzip`, and its 5.2 has no `zstd`.
    ///
    /// # Errors
    /// The first parameter that is refused. The levels of `zlib` and `zstd` are checked as 10.0 and 11.1 do (5.2 and
    /// 7.2 take any level, and fail later).
    ///
    /// ```
    /// use qevm_multifd::rules::{ParameterError, Parameters};
    /// use qevm_wire::QemuVersion;
    ///
    /// let parameters = Parameters { channels: 0, ..Parameters::default() };
    /// let refused = parameters.check(QemuVersion::new(10, 0));
    /// assert!(matches!(refused, Err(ParameterError::Range { name: "multifd-channels", min: 1, max: 255, .. })));
    /// ```
    pub fn check(&self, qemu: QemuVersion) -> Result<(), ParameterError> {
        let ranges = [
            ("multifd-channels", self.channels, 1, 255),
            ("multifd-zlib-level", self.zlib_level, 0, 9),
            ("multifd-zstd-level", self.zstd_level, 0, 20),
            ("multifd-qatzip-level", self.qatzip_level, 1, 9),
        ];
        for (name, found, min, max) in ranges {
            if !(min..=max).contains(&found) {
                return Err(ParameterError::Range { name, found, min, max });
            }
        }
        if qemu < self.compression.since() {
            return Err(ParameterError::Method { method: self.compression, qemu });
        }
        let since = QemuVersion::new(9, 0);
        if self.zero_page_detection.is_some() && qemu < since {
            return Err(ParameterError::Missing { name: "zero-page-detection", qemu, since });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The limits that QEMU 10.0 and 11.1 answered with.
    #[test]
    fn numbers_have_their_ranges() {
        type Set = fn(&mut Parameters, u32);
        let rows: [(&str, Set, u32, u32); 4] = [
            ("multifd-channels", |p, v| p.channels = v, 1, 255),
            ("multifd-zlib-level", |p, v| p.zlib_level = v, 0, 9),
            ("multifd-zstd-level", |p, v| p.zstd_level = v, 0, 20),
            ("multifd-qatzip-level", |p, v| p.qatzip_level = v, 1, 9),
        ];
        for (name, set, min, max) in rows {
            let check = |value| {
                let mut parameters = Parameters::default();
                set(&mut parameters, value);
                parameters.check(QemuVersion::new(10, 0))
            };
            assert_eq!((check(min), check(max)), (Ok(()), Ok(())), "{name}");
            for found in [max + 1, min.wrapping_sub(1)] {
                assert_eq!(check(found), Err(ParameterError::Range { name, found, min, max }));
            }
        }
    }

    #[test]
    fn methods_and_modes_exist_since_their_release() {
        let v = QemuVersion::new;
        let with = |compression| Parameters { compression, ..Parameters::default() };
        assert_eq!(with(Compression::Zstd).check(v(7, 2)), Ok(()));
        let refused = Err(ParameterError::Method { method: Compression::Qatzip, qemu: v(9, 1) });
        assert_eq!(with(Compression::Qatzip).check(v(9, 1)), refused);
        assert_eq!(with(Compression::Qatzip).check(v(9, 2)), Ok(()));
        let legacy = Parameters { zero_page_detection: Some(ZeroPageDetection::Legacy), ..Parameters::default() };
        assert_eq!(legacy.check(v(9, 0)), Ok(()));
        assert!(matches!(legacy.check(v(8, 2)), Err(ParameterError::Missing { name: "zero-page-detection", .. })));
    }
}
