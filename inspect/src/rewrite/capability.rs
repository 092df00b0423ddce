//! Capabilities in the configuration section that only concern the form of a stream.

use qevm_savevm::configuration::{Configuration, ConfigurationSubsection};
use qevm_wire::CountedString;

pub(super) const MAPPED_RAM: &str = "mapped-ram";

pub(super) fn without_capability(mut configuration: Configuration, name: &str) -> Configuration {
    for subsection in &mut configuration.subsections {
        if let ConfigurationSubsection::Capabilities(capabilities) = subsection {
            capabilities.retain(|capability| capability != name);
        }
    }
    configuration
        .subsections
        .retain(|subsection| !matches!(subsection, ConfigurationSubsection::Capabilities(c) if c.is_empty()));
    configuration
}

pub(super) fn with_capability(mut configuration: Configuration, name: &str) -> Configuration {
    let Some(name) = CountedString::new(name) else { return configuration };
    for subsection in &mut configuration.subsections {
        if let ConfigurationSubsection::Capabilities(capabilities) = subsection {
            capabilities.push(name);
            return configuration;
        }
    }
    // QEMU writes the page size before and the UUID after the capabilities.
    let before = |s: &ConfigurationSubsection| matches!(s, ConfigurationSubsection::TargetPageBits(_));
    let place = configuration.subsections.iter().take_while(|s| before(s)).count();
    configuration.subsections.insert(place, ConfigurationSubsection::Capabilities(vec![name]));
    configuration
}
