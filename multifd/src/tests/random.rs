//! decode∘encode on random channels in random pieces, whole and damaged.

use super::*;

#[derive(Debug, Clone)]
enum Item {
    Pages { normal: Vec<u64>, zero: Vec<u64>, name: Vec<u8>, num: u64, compressed: u16 },
    Sync(u64),
    Device { idstr: Vec<u8>, instance: u32, len: u16 },
}

fn item() -> impl Strategy<Value = Item> {
    let offsets = || prop::collection::vec((0..1u64 << 40).prop_map(|page| page * PAGE), 0..64);
    let name = || prop::collection::vec(1u8.., 1..=255);
    prop_oneof![
        3 => (offsets(), offsets(), name(), any::<u64>(), 1u16..).prop_map(|(normal, zero, name, num, compressed)| {
            Item::Pages { normal, zero, name, num, compressed }
        }),
        1 => any::<u64>().prop_map(Item::Sync),
        1 => (name(), any::<u32>(), 1u16..2000).prop_map(|(idstr, instance, len)| Item::Device { idstr, instance, len }),
    ]
}

fn write(options: &EncoderOptions, items: &[Item]) -> Vec<u8> {
    channel(options, |encoder, writer| {
        for item in items {
            match item {
                Item::Pages { normal, zero, name, num, compressed } => {
                    let zero = if options.layout == PacketLayout::ZeroPages { &zero[..] } else { &[] };
                    let len = match options.compression {
                        _ if normal.is_empty() => 0,
                        Compression::None => normal.len() as u64 * PAGE,
                        _ => u64::from(*compressed),
                    };
                    let block = CountedString::new(name).unwrap();
                    encoder.pages(&Pages { block: &block, normal, zero, packet_num: *num }, len, writer).unwrap();
                    writer.bytes(&vec![0xda; len as usize]);
                }
                Item::Sync(num) => encoder.sync(*num, writer).unwrap(),
                Item::Device { idstr, instance, len }
                    if options.compression == Compression::None && options.layout == PacketLayout::ZeroPages =>
                {
                    let state = DeviceState::new(CountedString::new(idstr).unwrap(), *instance, (*len).into());
                    encoder.device_state(&state, writer).unwrap();
                    writer.bytes(&vec![0xde; (*len).into()]);
                }
                Item::Device { .. } => {}
            }
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn what_is_written_is_read_and_written_again(
        items in prop::collection::vec(item(), 0..4),
        compression in prop::sample::select(&Compression::ALL[..]),
        layout in prop::sample::select(&[PacketLayout::Pages, PacketLayout::ZeroPages]),
        piece in 1usize..3000,
    ) {
        let options = EncoderOptions { layout, compression, ..EncoderOptions::default() };
        let bytes = write(&options, &items);
        prop_assert_eq!(again(&ChannelOptions::default(), &bytes, piece).unwrap(), bytes);
    }

    #[test]
    fn values_survive(normal in prop::collection::vec(0u64..1 << 50, 0..60), zero in prop::collection::vec(0u64..1 << 50, 0..60), num: u64) {
        let (normal, zero): (Vec<_>, Vec<_>) = (normal.iter().map(|p| p * PAGE).collect(), zero.iter().map(|p| p * PAGE).collect());
        let bytes = channel(&EncoderOptions::default(), |encoder, writer| {
            let pages = Pages { block: &block(), normal: &normal, zero: &zero, packet_num: num };
            encoder.pages(&pages, normal.len() as u64 * PAGE, writer).unwrap();
        });
        let packet = RamPacket::decode(&bytes[INIT..], PageGeometry::X86, &Limits::default()).unwrap();
        prop_assert_eq!(packet.normal().collect::<Vec<_>>(), normal);
        prop_assert_eq!(packet.zero().collect::<Vec<_>>(), zero);
        prop_assert_eq!((packet.packet_num(), packet.compression()), (num, Compression::None));
    }

    /// Damage gives an error or another channel that survives, never a panic, and the place is inside the input.
    #[test]
    fn damaged_channels_are_errors_or_other_channels(
        items in prop::collection::vec(item(), 1..3),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
        piece in 1usize..3000,
    ) {
        let mut bytes = write(&EncoderOptions::default(), &items);
        for (at, value) in damage {
            // Most damage belongs where it matters.
            let at = at.index(bytes.len().min(2 * INIT + PACKET));
            bytes[at] = value;
        }
        bytes.truncate(cut.index(bytes.len() * 2).min(bytes.len()));
        match again(&ChannelOptions::default(), &bytes, piece) {
            Ok(copy) => prop_assert_eq!(copy, bytes),
            Err(error) => {
                prop_assert!(error.offset <= bytes.len() as u64);
                prop_assert_eq!(error.fault(), error.kind.fault());
            }
        }
    }
}
