//! What a domain XML of libvirt tells of the QEMU that it would start.

use super::facts::{Cpu, Device, Facts};
use roxmltree::{Document, Node, ParsingOptions};
use std::collections::BTreeMap;

/// Nodes that are read: domains have some hundred.
const MAX_NODES: u32 = 1 << 18;

/// Reads the definition of a domain.
pub(super) fn facts(text: &[u8]) -> Result<Facts, String> {
    let text = std::str::from_utf8(text).map_err(|error| format!("is no text in UTF-8: {error}"))?;
    let options = ParsingOptions { nodes_limit: MAX_NODES, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options).map_err(|error| format!("is no XML: {error}"))?;
    // What libvirt keeps of a running domain has it inside of its status.
    let domain = document.descendants().find(|node| node.has_tag_name("domain"));
    let domain = domain.ok_or("has no domain in it, expected a domain XML of libvirt")?;
    let kind = child(domain, &["os", "type"]);
    let machine = kind.and_then(|kind| kind.attribute("machine")).map(str::to_owned);
    let arch =
        kind.and_then(|kind| kind.attribute("arch")).map(|arch| if arch == "i686" { "i386" } else { arch }.to_owned());
    let max = text_of(child(domain, &["vcpu"])).and_then(|count| count.parse().ok());
    let current =
        child(domain, &["vcpu"]).and_then(|vcpu| vcpu.attribute("current")).and_then(|count| count.parse().ok());
    let devices = child(domain, &["devices"]);
    // DIMMs are part of the memory that is told.
    let dimms = devices.is_some_and(|devices| devices.children().any(|device| device.has_tag_name("memory")));
    Ok(Facts {
        accelerator: domain
            .attribute("type")
            .map(|kind| if kind == "kvm" { kind } else { "another than kvm" }.to_owned()),
        uuid: text_of(child(domain, &["uuid"])).map(str::to_owned),
        memory: child(domain, &["memory"]).filter(|_| !dimms).and_then(bytes),
        cpu: max.map(|max| Cpu { count: current.unwrap_or(max), max: Some(max), ..Cpu::default() }),
        devices: devices.map(|devices| placed(devices, machine.as_deref().unwrap_or_default())),
        only_placed: true,
        machine,
        arch,
        ..Facts::default()
    })
}

fn child<'a, 'input>(node: Node<'a, 'input>, path: &[&str]) -> Option<Node<'a, 'input>> {
    path.iter().try_fold(node, |node, name| node.children().find(|child| child.has_tag_name(*name)))
}

fn text_of<'a>(node: Option<Node<'a, '_>>) -> Option<&'a str> {
    node?.text().map(str::trim)
}

/// A size with its unit, which is KiB if none is told.
fn bytes(node: Node<'_, '_>) -> Option<u64> {
    let unit = match node.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        _ => return None,
    };
    text_of(Some(node))?.parse::<u64>().ok()?.checked_mul(unit)
}

/// Devices on PCI buses, by the name of the bus and the address. libvirt names bridges after their index.
fn placed(devices: Node<'_, '_>, machine: &str) -> BTreeMap<String, Device> {
    let root = if machine.contains("q35") || machine.starts_with("virt") { "pcie.0" } else { "pci.0" };
    let place = |device: Node<'_, '_>| {
        let address =
            device.children().find(|node| node.has_tag_name("address") && node.attribute("type") == Some("pci"))?;
        let number = |name| {
            let text = address.attribute(name)?;
            text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |digits| u64::from_str_radix(digits, 16).ok())
        };
        let (bus, slot, function) = (number("bus")?, number("slot")?, number("function").unwrap_or(0));
        let bus = if bus == 0 { root.to_owned() } else { format!("pci.{bus}") };
        let kind = kind(device).unwrap_or_default().to_owned();
        Some((format!("{bus} {slot:02x}.{function:x}"), Device { kind, pci: true, ..Device::default() }))
    };
    devices.children().filter_map(place).collect()
}

/// QEMU's name for a device, where there is only one.
fn kind(device: Node<'_, '_>) -> Option<&'static str> {
    let model = device.attribute("model").or_else(|| child(device, &["model"])?.attribute("type"));
    let bus = child(device, &["target"]).and_then(|target| target.attribute("bus"));
    Some(match (device.tag_name().name(), device.attribute("type"), model) {
        ("interface", _, Some("virtio")) => "virtio-net-pci",
        ("interface", _, Some("e1000e")) => "e1000e",
        ("disk", ..) if bus == Some("virtio") => "virtio-blk-pci",
        ("memballoon", _, Some("virtio")) => "virtio-balloon-pci",
        ("rng", _, Some("virtio")) => "virtio-rng-pci",
        ("controller", Some("virtio-serial"), _) => "virtio-serial-pci",
        ("controller", Some("scsi"), Some("virtio-scsi")) => "virtio-scsi-pci",
        ("controller", Some("usb"), Some("qemu-xhci")) => "qemu-xhci",
        ("controller", Some("pci"), Some("pcie-root-port")) => "pcie-root-port",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: &[u8] = b"<domain type='kvm'>
  <uuid>2bbd4b29-30a2-43ed-9a0c-8f7c3f3c0b11</uuid>
  <memory unit='MiB'>64</memory>
  <vcpu placement='static' current='1'>2</vcpu>
  <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>
  <devices>
    <interface type='user'><model type='virtio'/><address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></interface>
    <controller type='pci' index='1' model='pcie-root-port'><address type='pci' domain='0x0000' bus='0x00' slot='0x02' function='0x1'/></controller>
    <serial type='pty'><target port='0'/></serial>
  </devices>
</domain>";

    #[test]
    fn a_domain_tells_of_machine_memory_processors_and_places() {
        let facts = facts(DOMAIN).unwrap();
        assert_eq!((facts.machine.as_deref(), facts.arch.as_deref()), (Some("pc-q35-10.0"), Some("x86_64")));
        assert_eq!((facts.memory, facts.accelerator.as_deref()), (Some(64 << 20), Some("kvm")));
        let cpu = facts.cpu.unwrap();
        assert_eq!((cpu.count, cpu.max), (1, Some(2)));
        let devices: Vec<_> =
            facts.devices.iter().flatten().map(|(at, device)| (at.as_str(), device.kind.as_str())).collect();
        assert_eq!(devices, [("pci.1 00.0", "virtio-net-pci"), ("pcie.0 02.1", "pcie-root-port")]);
    }

    #[test]
    fn what_is_no_domain_is_refused() {
        for (text, words) in [(&b"<domain"[..], "no XML"), (b"<network/>", "no domain"), (b"\xff", "UTF-8")] {
            assert!(super::facts(text).unwrap_err().contains(words));
        }
    }
}
