//! Every declared section: whatever has its schema's shape decodes and encodes to the same bytes, and nothing panics.

use super::virtio::block::{Block, BlockRequest};
use super::virtio::console::{Console, Port, PortElement};
use super::virtio::element::{IoVec, Le, VirtQueueElement};
use super::virtio::net::{Net, Rss};
use super::virtio::subsections::{Features64Bit, PackedVirtQueues, RingSize, Started, VirtQueues};
use super::virtio::{Counted, DevicePart, MmioVirtio, VirtQueue, Virtio, VirtioBlk, VirtioConsole, VirtioNet};
use super::{DeviceState, cpu, descriptions, globalstate, serial};
use proptest::prelude::*;
use qevm_savevm::vmstate::{
    self, Accel, Buffer, Context, Count, Description, Layout, QTailQ, Table, VmState, VmStateError,
};
use qevm_savevm::{ErrorKind, Reader};

const RELEASES: [&str; 4] = ["5.2", "7.2", "10.0", "11.1"];

fn context(release: &str) -> Context {
    Context::new(release.parse().unwrap(), "microvm")
}

/// Pseudo-random bytes from a seed that proptest can shrink.
struct Noise(u64);

impl Noise {
    fn byte(&mut self) -> u8 {
        // xorshift64 (Marsaglia 2003)
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u8
    }
}

/// Bytes of the shape that `schema` tells, with about a quarter of the subsections.
fn wire(schema: &Description, noise: &mut Noise, out: &mut Vec<u8>) {
    for field in schema.fields.iter().filter(|field| !field.conditional) {
        let count = match field.count {
            Count::One => 1,
            Count::Fixed(n) => n,
            Count::Variable => 0,
        };
        for _ in 0..count {
            match &field.element.layout {
                Layout::Struct(nested) => wire(nested, noise, out),
                Layout::Bytes(_) if field.element.type_name.as_deref() == Some("bool") => out.push(noise.byte() & 1),
                Layout::Bytes(n) => out.extend((0..*n).map(|_| noise.byte())),
                Layout::Variable | Layout::List(_) => panic!("{} is not fixed", field.name),
            }
        }
    }
    for subsection in &schema.subsections {
        // Its second version has a field that the schema calls conditional.
        if noise.byte() < 0x40 && subsection.name != "timer/icount/shift" {
            out.extend([5, subsection.name.len() as u8]);
            out.extend(subsection.name.bytes());
            out.extend(subsection.version.to_be_bytes());
            wire(subsection, noise, out);
        }
    }
}

/// The sections whose schema is fixed: all but virtio's, `globalstate` whose layout depends on the release, and those
/// with a configuration space, whose length depends on the device, and with numbers that must have one value.
fn fixed_sections(ctx: &Context) -> Vec<Description> {
    let fixed =
        |d: &Description| !d.name.starts_with("virtio-") && !["globalstate", "gpex_root", "PCIBUS"].contains(&&*d.name);
    let sections: Vec<_> = descriptions(ctx).into_iter().filter(fixed).collect();
    assert_eq!(sections.len(), 14);
    sections
}

#[track_caller]
fn survives<T: VmState + PartialEq + std::fmt::Debug>(value: &T, ctx: &Context) {
    let bytes = vmstate::encode(value, ctx).unwrap();
    let decoded: T = vmstate::decode(&bytes, value.wire_version(ctx), ctx).unwrap();
    assert!(decoded == *value, "{} changes on its way", T::NAME);
    assert_eq!(vmstate::encode(&decoded, ctx).unwrap(), bytes);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn sections_of_the_right_shape_survive(seed in 1u64.., release in 0..RELEASES.len()) {
        let ctx = context(RELEASES[release]);
        let mut noise = Noise(seed);
        for schema in fixed_sections(&ctx) {
            let mut bytes = Vec::new();
            wire(&schema, &mut noise, &mut bytes);
            let state = DeviceState::decode(&schema.name, schema.version, &bytes, &ctx).unwrap().unwrap();
            prop_assert_eq!(state.encode(schema.version, &ctx).unwrap(), bytes);
            let (again, described) = state.encode_described(schema.version, &ctx).unwrap();
            prop_assert_eq!(described.wire_size(), again.len() as u64);
            let decoded = DeviceState::decode(&schema.name, schema.version, &again, &ctx).unwrap().unwrap();
            prop_assert_eq!(decoded, state);
        }
    }

    #[test]
    fn damaged_sections_are_errors_or_survive(seed in 1u64.., section in 0usize..13, damage in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 1..4), cut: prop::sample::Index) {
        let ctx = context("11.1");
        let schema = &fixed_sections(&ctx)[section];
        let mut bytes = Vec::new();
        wire(schema, &mut Noise(seed), &mut bytes);
        for (place, value) in damage {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        bytes.truncate(cut.index(bytes.len() * 4).min(bytes.len()));
        if let Ok(state) = DeviceState::decode(&schema.name, schema.version, &bytes, &ctx).unwrap() {
            prop_assert_eq!(state.encode(schema.version, &ctx).unwrap(), bytes);
        } else {
            // A destination may be more lenient, but no less safe.
            let _ = DeviceState::load(&schema.name, schema.version, &mut Reader::new(&bytes), &ctx);
        }
    }

    #[test]
    fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..4096), version in 0u32..14) {
        let ctx = context("11.1");
        for schema in descriptions(&ctx) {
            let idstr = if schema.name.starts_with("virtio-") {
                format!("virtio-mmio@00000000feb02e00/{}", schema.name)
            } else if schema.name == "gpex_root" {
                format!("0000:00:00.0/{}", schema.name)
            } else {
                schema.name
            };
            if let Ok(state) = DeviceState::decode(&idstr, version, &bytes, &ctx).unwrap() {
                prop_assert_eq!(state.encode(version, &ctx).unwrap(), bytes.clone());
            }
        }
    }

    #[test]
    fn run_states_survive(name in "[a-z-]{1,31}", release in 0..RELEASES.len(), suspended: bool) {
        let ctx = context(RELEASES[release]);
        let mut state = globalstate::GlobalState::new(&name, &ctx).unwrap();
        state.vm_was_suspended = state.vm_was_suspended.map(|_| suspended.into());
        survives(&state, &ctx);
        prop_assert_eq!(state.name(), Some(&*name));
        prop_assert_eq!(vmstate::encode(&state, &ctx).unwrap().len(), 104);
    }

    #[test]
    fn block_devices_survive(state in virtio(block), release in 0..RELEASES.len()) {
        survives(&VirtioBlk { virtio: state }, &context(RELEASES[release]));
    }

    #[test]
    fn network_devices_survive(state in virtio(net), release in 0..RELEASES.len()) {
        survives(&VirtioNet { virtio: state }, &context(RELEASES[release]));
    }

    #[test]
    fn consoles_survive(state in virtio(console), release in 0..RELEASES.len()) {
        survives(&VirtioConsole { virtio: state }, &context(RELEASES[release]));
    }
}

/// What the parts of one virtio device must agree on.
#[derive(Debug, Clone, Copy)]
struct Agreed {
    queues: u16,
    packed: bool,
    offloads: bool,
}

type Part<D> = fn(Agreed, u64) -> D;

/// A device whose configuration space, features and subsections agree with its part.
fn virtio<D: DevicePart + Clone + std::fmt::Debug + 'static>(part: Part<D>) -> impl Strategy<Value = MmioVirtio<D>> {
    let agreed = (1u16..4, any::<bool>(), any::<bool>());
    let queues = prop::collection::vec((any::<u32>(), any::<u64>(), any::<u16>()), 0..4);
    (agreed, queues, 1u64.., any::<(bool, bool, bool, bool)>()).prop_map(
        move |((queues, packed, offloads), rings, seed, (rings_known, modern, started, ringsize))| {
            let mut config = vec![0; 40];
            config[8..10].copy_from_slice(&queues.to_le_bytes());
            config[34..36].copy_from_slice(&queues.to_le_bytes());
            let ring = |(num, desc, last_avail_idx)| VirtQueue { num, align: 4096, desc, last_avail_idx };
            MmioVirtio(Box::new(Virtio {
                host_features_sel: 1,
                guest_features_sel: 0,
                guest_page_shift: 12,
                status: 0xf,
                isr: 1,
                queue_sel: 2,
                guest_features: u32::from(offloads) << 2,
                config: Counted(config),
                queues: Counted(rings.into_iter().map(ring).collect()),
                device: part(Agreed { queues, packed, offloads }, seed),
                device_endian: None,
                features_128bit: None,
                features_64bit: modern.then_some(Features64Bit { guest_features: seed }),
                virtqueues: rings_known.then(VirtQueues::default),
                ringsize: ringsize.then(RingSize::default),
                broken: None,
                extra_state: None,
                started: started.then_some(Started { started: true }),
                packed_virtqueues: packed.then(PackedVirtQueues::default),
                disabled: None,
            }))
        },
    )
}

fn element(agreed: Agreed, noise: &mut Noise) -> VirtQueueElement {
    let mut word = || Le(u64::from_le_bytes([0; 8].map(|_: u8| noise.byte())));
    VirtQueueElement {
        ndescs: agreed.packed.then_some(3),
        head: Le(7),
        out_num: Le(1),
        in_num: Le(2),
        padding: Le(0),
        in_addr: Table::from_fn(|i| if i < 2 { word() } else { Le(0) }),
        in_sg: Table::from_fn(|_| IoVec { base: Le(0), len: Le(512) }),
        ..VirtQueueElement::default()
    }
}

fn block(agreed: Agreed, seed: u64) -> Block {
    let mut noise = Noise(seed);
    let request = |_| BlockRequest {
        queue: (agreed.queues > 1).then_some(u32::from(agreed.queues) - 1),
        element: element(agreed, &mut noise),
    };
    Block { requests: QTailQ((0..seed % 3).map(request).collect()) }
}

fn net(agreed: Agreed, seed: u64) -> Net {
    let several = agreed.queues > 1;
    let macs = (seed % 5) as u32;
    let version_2 = seed & 8 != 0;
    Net {
        mac_table_in_use: macs,
        mac_table: (0..macs).map(|i| Buffer([i as u8; 6])).collect(),
        max_queue_pairs: several.then_some(agreed.queues),
        curr_queue_pairs: several.then_some(agreed.queues),
        further_tx_waiting: vec![Default::default(); usize::from(agreed.queues) - 1],
        curr_guest_offloads: agreed.offloads.then_some(seed),
        rss: (seed & 16 != 0).then(|| Rss {
            enabled: true,
            supported_hash_types: version_2.then_some(0x3f),
            indirections_len: 4,
            indirections_table: vec![0, 1, 0, 1],
            ..Rss::default()
        }),
        ..Net::default()
    }
}

fn console(agreed: Agreed, seed: u64) -> Console {
    let mut noise = Noise(seed);
    let ports: Vec<Port> = (0..seed % 3)
        .map(|id| {
            let popped = noise.byte() & 1;
            let element =
                (popped != 0).then(|| PortElement { iov_idx: 1, iov_offset: 7, element: element(agreed, &mut noise) });
            Port { id: id as u32, guest_connected: 1, host_connected: 0, elem_popped: popped.into(), element }
        })
        .collect();
    Console { cols: 80, rows: 25, max_nr_ports: 33, ports_map: vec![1, 0], nr_ports: ports.len() as u32, ports }
}

#[test]
fn both_versions_of_the_icount_shift_are_read() {
    let ctx = context("11.1");
    for (version, payload, last_delta) in [(1, &[0, 3][..], None), (2, &[0, 3, 0, 0, 0, 0, 0, 0, 0, 9][..], Some(9))] {
        let shift: super::timer::IcountShift = vmstate::decode(payload, version, &ctx).unwrap();
        assert_eq!(shift.last_delta, last_delta);
        survives(&shift, &ctx);
    }
}

#[test]
fn version_11_of_the_cpu_ends_before_xcr0() {
    let ctx = context("5.2");
    let cpu = cpu::Cpu { wall_clock_msr: 0x1234, ..cpu::Cpu::default() };
    let bytes = vmstate::encode_version(&cpu, 11, &ctx).unwrap();
    assert_eq!(bytes.len(), 1545);
    assert_eq!(vmstate::decode::<cpu::Cpu>(&bytes, 11, &ctx).unwrap(), cpu);
    assert_eq!(vmstate::encode(&cpu, &ctx).unwrap().len(), 1817);
}

/// The rules of the spec (microvm devices, 5): privilege levels in real mode, pending exceptions, refusals.
#[test]
fn a_cpu_is_tidied_before_it_is_sent_and_checked_when_loaded() {
    let ctx = context("10.0").with_accel(Accel::Kvm);
    let mut cpu = cpu::Cpu { exception_nr: 14, ..cpu::Cpu::default() };
    cpu.segs.iter_mut().for_each(|segment| segment.flags = 0xf300);
    cpu.exception_info =
        Some(cpu::nested::ExceptionInfo { pending: 1, injected: 0, has_payload: 1, payload: 0xdead_b000 });
    vmstate::save(&mut cpu, &ctx).unwrap();
    assert!(cpu.segs.iter().all(|segment| segment.flags == 0x9300));
    assert_eq!((cpu.cr2, cpu.exception_info.is_none()), (0xdead_b000, true));
    assert_eq!(cpu.injected_exception(), Some(14));

    let load = |cpu: &cpu::Cpu| {
        let bytes = vmstate::encode(cpu, &ctx).unwrap();
        vmstate::load::<cpu::Cpu>(&mut Reader::new(&bytes), 12, &ctx)
    };
    for refused in
        [cpu::Cpu { fpregs_format: 1, ..cpu::Cpu::default() }, cpu::Cpu { hflags: 1 << 21, ..cpu::Cpu::default() }]
    {
        assert!(matches!(load(&refused).unwrap_err().kind, ErrorKind::VmState(VmStateError::Refused { .. })));
    }
    load(&cpu::Cpu::default()).unwrap();
}

#[test]
fn what_a_release_cannot_hold_is_not_sent_to_it() {
    let mut cpu = cpu::Cpu { apx: Some(cpu::extended::Apx { value: [1; 16] }), ..cpu::Cpu::default() };
    assert!(vmstate::save(&mut cpu.clone(), &context("11.1")).is_ok());
    let error = vmstate::save(&mut cpu, &context("10.0")).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::VmState(VmStateError::NotInRelease { name: "cpu/apx", .. })), "{error}");
}

#[test]
fn the_uart_sends_its_transmit_interrupt_only_when_iir_hides_it() {
    let ctx = context("10.0");
    let uart = |ier, iir, thr_ipending| {
        let thr_ipending = Some(serial::ThrIpending { thr_ipending });
        let mut port = serial::IsaSerial { state: serial::Uart { ier, iir, thr_ipending, ..serial::Uart::default() } };
        vmstate::save(&mut port, &ctx).unwrap();
        port.state.thr_ipending.is_some()
    };
    assert!(uart(0x02, 0x04, 1), "pending, but receive data has priority in IIR");
    assert!(!uart(0x02, 0x02, 1), "pending and shown");
    assert!(!uart(0x00, 0x04, 1), "not enabled");
}
