//! The sections of virtio devices that have a model.

use crate::state::{
    VirtioDeviceState, VirtioNetFilter, VirtioNetState, VirtioPortState, VirtioQueueState, VirtioRequest, VirtioState,
};
use crate::virtio::{CTRL_GUEST_OFFLOADS, MAX_PORTS, MRG_RXBUF, VirtioDevice};
use qevm_devices::DeviceState;
use qevm_devices::virtio::block::{Block, BlockRequest};
use qevm_devices::virtio::console::{Console, Port, PortElement};
use qevm_devices::virtio::element::{IoVec, Le, MAX_DESCRIPTORS, VirtQueueElement};
use qevm_devices::virtio::net::{Net, TxWaiting, Ufo, Vnet};
use qevm_devices::virtio::subsections::{Broken, Features64Bit, RingSize, RingSizeState, Started};
use qevm_devices::virtio::{
    DevicePart, MmioVirtio, NoDevicePart, VirtQueue, Virtio, VirtioBlk, VirtioConsole, VirtioNet, VirtioRng,
};
use qevm_savevm::vmstate::{Buffer, QTailQ, Table, Tmp};
use qevm_wire::QemuVersion;

/// From here on a destination refuses queues that are longer than its own (seen in 11.1, not in 10.0), and no source
/// sends `virtio/ringsize`.
const OWN_SIZES_ONLY: QemuVersion = QemuVersion::new(11, 0);
/// From here to [`OWN_SIZES_ONLY`] a device's queues are [`LONG_QUEUE`] entries long after a reset (seen in 10.0.13,
/// not in 7.2).
const LONG_QUEUES: QemuVersion = QemuVersion::new(10, 0);
const LONG_QUEUE: u32 = 1024;

/// The section of a device, made of `base`, the section as it came.
///
/// # Errors
/// Why this release cannot take it.
pub(super) fn save(
    device: VirtioDevice,
    state: &VirtioState,
    base: Option<&DeviceState>,
    qemu: QemuVersion,
) -> Result<DeviceState, String> {
    match (device, &state.device) {
        (VirtioDevice::Block, VirtioDeviceState::Block(requests)) => {
            let base = match base {
                Some(DeviceState::VirtioBlk(base)) => base.virtio.clone(),
                _ => MmioVirtio::default(),
            };
            let requests = requests.iter().map(|request| BlockRequest { queue: None, element: element(request) });
            let part = Block { requests: QTailQ(requests.collect()) };
            Ok(DeviceState::VirtioBlk(VirtioBlk { virtio: common(state, base, part, qemu)? }))
        }
        (VirtioDevice::Rng, VirtioDeviceState::Rng) => {
            let base = match base {
                Some(DeviceState::VirtioRng(base)) => base.virtio.clone(),
                _ => MmioVirtio::default(),
            };
            Ok(DeviceState::VirtioRng(VirtioRng { virtio: common(state, base, NoDevicePart {}, qemu)? }))
        }
        (VirtioDevice::Serial, VirtioDeviceState::Serial(ports)) => {
            let base = match base {
                Some(DeviceState::VirtioConsole(base)) => base.virtio.clone(),
                _ => MmioVirtio::default(),
            };
            let part = Console {
                max_nr_ports: MAX_PORTS,
                ports_map: vec![ports.iter().fold(0, |map, port| map | 1 << port.id)],
                nr_ports: ports.len() as u32,
                ports: ports.iter().map(port).collect(),
                ..base.device.clone()
            };
            Ok(DeviceState::VirtioConsole(VirtioConsole { virtio: common(state, base, part, qemu)? }))
        }
        (VirtioDevice::Net, VirtioDeviceState::Net(net)) => {
            let base = match base {
                Some(DeviceState::VirtioNet(base)) => base.virtio.clone(),
                _ => MmioVirtio::default(),
            };
            let part = net_part(net, state.guest_features, &base.device);
            Ok(DeviceState::VirtioNet(VirtioNet { virtio: common(state, base, part, qemu)? }))
        }
        _ => Err(format!("the state is not that of {device}")),
    }
}

/// What a section says of its device.
///
/// # Errors
/// What the model cannot be.
pub(super) fn load(section: &DeviceState) -> Result<VirtioState, String> {
    match section {
        DeviceState::VirtioBlk(section) => {
            let requests =
                section.virtio.device.requests.iter().map(|r| request(&r.element)).collect::<Result<_, _>>()?;
            uncommon(&section.virtio, VirtioDeviceState::Block(requests))
        }
        DeviceState::VirtioRng(section) => uncommon(&section.virtio, VirtioDeviceState::Rng),
        DeviceState::VirtioNet(section) => {
            uncommon(&section.virtio, VirtioDeviceState::Net(Box::new(net_state(&section.virtio.device))))
        }
        DeviceState::VirtioConsole(section) => {
            let ports = section.virtio.device.ports.iter().map(port_state).collect::<Result<_, _>>()?;
            uncommon(&section.virtio, VirtioDeviceState::Serial(ports))
        }
        _ => Err("the device has no model".into()),
    }
}

/// What all devices have.
fn common<D: DevicePart + Default>(
    state: &VirtioState,
    base: MmioVirtio<D>,
    device: D,
    qemu: QemuVersion,
) -> Result<MmioVirtio<D>, String> {
    let queues = state.queues.iter().zip(&state.default_nums);
    if qemu >= OWN_SIZES_ONLY
        && let Some((queue, own)) = queues.clone().find(|(queue, own)| queue.num > **own)
    {
        return Err(format!(
            "the guest uses a queue of {} entries, which QEMU {qemu} refuses: its queues have at most {own}",
            queue.num
        ));
    }
    let default = |own: u32| if qemu >= LONG_QUEUES { LONG_QUEUE } else { own };
    let resized = qemu < OWN_SIZES_ONLY && queues.clone().any(|(queue, own)| queue.num != default(*own));
    let ringsize = resized.then(|| RingSize {
        vq: Table::from_fn(|i| RingSizeState { num_default: state.default_nums.get(i).map_or(0, |own| default(*own)) }),
    });
    let queue = |queue: &VirtioQueueState| VirtQueue {
        num: queue.num,
        align: queue.align,
        desc: queue.desc,
        last_avail_idx: queue.last_avail_idx,
    };
    let mut virtio = base;
    *virtio.0 = Virtio {
        host_features_sel: state.host_features_sel,
        guest_features_sel: state.guest_features_sel,
        guest_page_shift: state.guest_page_shift,
        status: state.status,
        isr: state.isr,
        queue_sel: state.queue_sel,
        guest_features: state.guest_features as u32,
        config: qevm_devices::virtio::Counted(state.config.clone()),
        queues: qevm_devices::virtio::Counted(state.queues.iter().map(queue).collect()),
        device,
        features_64bit: Some(Features64Bit { guest_features: state.guest_features }),
        // A QEMU sends them if its device has any; no model has, and older releases do not know the subsection.
        features_128bit: None,
        ringsize,
        broken: state.broken.then_some(Broken { broken: true }),
        started: state.started.then_some(Started { started: true }),
        ..std::mem::take(&mut *virtio.0)
    };
    Ok(virtio)
}

fn uncommon<D: DevicePart>(virtio: &Virtio<D>, device: VirtioDeviceState) -> Result<VirtioState, String> {
    if virtio.virtqueues.is_some() || virtio.extra_state.is_some() || virtio.packed_virtqueues.is_some() {
        return Err("the source's transport is no legacy one (force-legacy=off), as those of this machine are".into());
    }
    if let Some(found) = virtio.features_128bit.as_ref().map(|sub| sub.guest_features).filter(|found| *found != 0) {
        return Err(format!("the guest uses features that no device of this machine has: bits {found:#x} from 64 on"));
    }
    let queue = |queue: &VirtQueue| VirtioQueueState {
        num: queue.num,
        align: queue.align,
        desc: queue.desc,
        last_avail_idx: queue.last_avail_idx,
    };
    Ok(VirtioState {
        host_features_sel: virtio.host_features_sel,
        guest_features_sel: virtio.guest_features_sel,
        guest_page_shift: virtio.guest_page_shift,
        status: virtio.status,
        isr: virtio.isr,
        queue_sel: virtio.queue_sel,
        guest_features: virtio.features_64bit.as_ref().map_or(virtio.guest_features.into(), |f| f.guest_features),
        config: virtio.config.to_vec(),
        queues: virtio.queues.iter().map(queue).collect(),
        // Those are the model's own.
        default_nums: Vec::new(),
        started: virtio.started.is_some(),
        broken: virtio.broken.is_some(),
        device,
    })
}

fn net_part(net: &VirtioNetState, features: u64, base: &Net) -> Net {
    let VirtioNetFilter { promisc, allmulti, alluni, nomulti, nouni, nobcast, multi_overflow, uni_overflow, .. } =
        net.filter;
    let offloads = features & CTRL_GUEST_OFFLOADS != 0;
    Net {
        mac: net.mac,
        tx_waiting: TxWaiting { tx_waiting: net.transmit_waits.into() },
        mergeable_rx_bufs: (features & MRG_RXBUF != 0).into(),
        status: net.status,
        promisc: promisc.into(),
        allmulti: allmulti.into(),
        mac_table_in_use: net.filter.macs.len() as u32,
        mac_table: net.filter.macs.iter().map(|mac| Buffer(*mac)).collect(),
        vlans: Buffer(net.filter.vlans),
        vnet: Tmp(Vnet { has_vnet_hdr: net.header.into() }),
        multi_overflow: multi_overflow.into(),
        uni_overflow: uni_overflow.into(),
        alluni: alluni.into(),
        nomulti: nomulti.into(),
        nouni: nouni.into(),
        nobcast: nobcast.into(),
        // A tap interface does UFO.
        ufo: Tmp(Ufo { has_ufo: net.header.into() }),
        curr_guest_offloads: offloads.then_some(net.guest_offloads),
        ..base.clone()
    }
}

fn net_state(net: &Net) -> VirtioNetState {
    VirtioNetState {
        mac: net.mac,
        status: net.status,
        transmit_waits: net.tx_waiting.tx_waiting != 0,
        header: net.vnet.has_vnet_hdr != 0,
        guest_offloads: net.curr_guest_offloads.unwrap_or(0),
        filter: VirtioNetFilter {
            promisc: net.promisc != 0,
            allmulti: net.allmulti != 0,
            alluni: net.alluni != 0,
            nomulti: net.nomulti != 0,
            nouni: net.nouni != 0,
            nobcast: net.nobcast != 0,
            multi_overflow: net.multi_overflow != 0,
            uni_overflow: net.uni_overflow != 0,
            macs: net.mac_table.iter().map(|mac| mac.0).collect(),
            vlans: net.vlans.0,
        },
    }
}

fn port(port: &VirtioPortState) -> Port {
    let pending = port.pending.as_ref().map(|(request, done)| {
        // The piece that is being consumed, and how much of it was.
        let (mut iov_idx, mut iov_offset) = (0, *done);
        for (_, len) in &request.readable {
            match iov_offset.checked_sub((*len).into()) {
                Some(behind) => (iov_idx, iov_offset) = (iov_idx + 1, behind),
                None => break,
            }
        }
        PortElement { iov_idx, iov_offset, element: element(request) }
    });
    Port {
        id: port.id,
        guest_connected: port.guest_connected.into(),
        host_connected: port.host_connected.into(),
        elem_popped: pending.is_some().into(),
        element: pending,
    }
}

fn port_state(port: &Port) -> Result<VirtioPortState, String> {
    let pending = port.element.as_ref().map(|consumed| {
        let request = request(&consumed.element)?;
        let before =
            request.readable.iter().take(consumed.iov_idx as usize).map(|(_, len)| u64::from(*len)).sum::<u64>();
        let done = before.checked_add(consumed.iov_offset).ok_or("a buffer is consumed beyond its end")?;
        Ok::<_, String>((request, done))
    });
    Ok(VirtioPortState {
        id: port.id,
        guest_connected: port.guest_connected != 0,
        host_connected: port.host_connected != 0,
        pending: pending.transpose()?,
    })
}

/// A request in flight, as QEMU keeps it in memory.
fn element(request: &VirtioRequest) -> VirtQueueElement {
    let address = |list: &[(u64, u32)], i: usize| Le(list.get(i).map_or(0, |(gpa, _)| *gpa));
    let length = |list: &[(u64, u32)], i: usize| IoVec {
        base: Le(0),
        len: Le(list.get(i).map_or(0, |(_, len)| u64::from(*len))),
    };
    let (readable, writable) = (&request.readable, &request.writable);
    VirtQueueElement {
        ndescs: None,
        head: Le(request.head.into()),
        out_num: Le(readable.len() as u32),
        in_num: Le(writable.len() as u32),
        padding: Le(0),
        in_addr: Table::from_fn(|i| address(writable, i)),
        out_addr: Table::from_fn(|i| address(readable, i)),
        in_sg: Table::from_fn(|i| length(writable, i)),
        out_sg: Table::from_fn(|i| length(readable, i)),
    }
}

fn request(element: &VirtQueueElement) -> Result<VirtioRequest, String> {
    let list = |count: u32, addresses: &[Le<u64>], lengths: &[IoVec]| {
        let count = usize::try_from(count).ok().filter(|count| *count <= MAX_DESCRIPTORS);
        let count = count.ok_or_else(|| format!("a request in flight has more than {MAX_DESCRIPTORS} buffers"))?;
        let pairs = addresses.iter().zip(lengths).take(count).map(|(address, length)| {
            let len = u32::try_from(length.len.0).map_err(|_| format!("a buffer of {} bytes", length.len.0))?;
            Ok((address.0, len))
        });
        pairs.collect::<Result<Vec<_>, String>>()
    };
    Ok(VirtioRequest {
        head: u16::try_from(element.head.0).map_err(|_| format!("descriptor {} in flight", element.head.0))?,
        readable: list(element.out_num.0, &element.out_addr[..], &element.out_sg[..])?,
        writable: list(element.in_num.0, &element.in_addr[..], &element.in_sg[..])?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use qevm_devices::virtio::subsections::Features128Bit;

    /// What QEMU 11.1 sends of a network device on a tap interface, whose host side has features beyond 64.
    fn on_tap(guest_features: u64) -> DeviceState {
        let mut section = VirtioNet::default();
        section.virtio.features_128bit = Some(Features128Bit { guest_features });
        DeviceState::VirtioNet(section)
    }

    #[test]
    fn features_beyond_64_are_refused_if_used_and_else_forgotten() {
        let came = on_tap(0);
        let state = load(&came).unwrap();
        for qemu in [QemuVersion::new(7, 2), QemuVersion::NEWEST] {
            let DeviceState::VirtioNet(sent) = save(VirtioDevice::Net, &state, Some(&came), qemu).unwrap() else {
                panic!("no network device");
            };
            assert_eq!(sent.virtio.features_128bit, None, "{qemu}");
        }
        assert!(load(&on_tap(4)).unwrap_err().contains("bits 0x4 from 64 on"));
    }
}
