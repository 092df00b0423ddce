//! Which frames a network card receives (virtio 1.2, 5.1.6.5.1 and 5.1.6.5.3).

use qevm_microvm::state::VirtioNetFilter;

/// Addresses that the filter holds (QEMU's `MAC_TABLE_ENTRIES`, from the sections of 7.2 to 11.1: more overflow).
const ENTRIES: usize = 64;
/// Classes of commands.
const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const CLASS_VLAN: u8 = 2;

const VLAN_TAG: [u8; 2] = [0x81, 0x00];
const MAX_VLAN: usize = 4096;

/// The filter of a card.
#[derive(Debug, Default)]
pub(super) struct Filter {
    pub(super) state: VirtioNetFilter,
}

impl Filter {
    /// Whether the card receives a frame.
    pub(super) fn accepts(&self, frame: &[u8], own: &[u8; 6]) -> bool {
        let Some((to, rest)) = frame.split_first_chunk::<6>() else { return false };
        let state = &self.state;
        if state.promisc {
            return true;
        }
        if let Some((tag, vlan)) = rest.get(6..10).and_then(|bytes| bytes.split_first_chunk::<2>())
            && *tag == VLAN_TAG
        {
            let id = (usize::from(vlan[0]) << 8 | usize::from(vlan[1])) % MAX_VLAN;
            if state.vlans[id / 8] & 1 << (id % 8) == 0 {
                return false;
            }
        }
        if *to == [0xff; 6] {
            return !state.nobcast;
        }
        let listed = || state.macs.contains(to);
        if to[0] & 1 != 0 {
            return !state.nomulti && (state.allmulti || state.multi_overflow || listed());
        }
        !state.nouni && (state.alluni || state.uni_overflow || to == own || listed())
    }

    /// A command of the guest's; false if it is not understood.
    pub(super) fn command(&mut self, class: u8, command: u8, data: &[u8]) -> bool {
        match (class, command, data) {
            (CLASS_RX, _, [on]) => {
                let state = &mut self.state;
                let modes = [
                    &mut state.promisc,
                    &mut state.allmulti,
                    &mut state.alluni,
                    &mut state.nomulti,
                    &mut state.nouni,
                    &mut state.nobcast,
                ];
                modes.into_iter().nth(command.into()).map(|mode| *mode = *on != 0).is_some()
            }
            (CLASS_MAC, 0, data) => self.set_table(data).is_some(),
            (CLASS_VLAN, 0 | 1, [low, high]) => {
                let id = usize::from(*high) << 8 | usize::from(*low);
                let Some(byte) = self.state.vlans.get_mut(id / 8) else { return false };
                let bit = 1 << (id % 8);
                *byte = if command == 0 { *byte | bit } else { *byte & !bit };
                true
            }
            _ => false,
        }
    }

    /// Two lists, unicast and multicast, each with its number of addresses before it.
    fn set_table(&mut self, data: &[u8]) -> Option<()> {
        let (unicast, rest) = list(data)?;
        let (multicast, _) = list(rest)?;
        let state = &mut self.state;
        state.macs.clear();
        state.uni_overflow = unicast.len() > ENTRIES;
        if !state.uni_overflow {
            state.macs.extend(unicast);
        }
        state.multi_overflow = state.macs.len() + multicast.len() > ENTRIES;
        if !state.multi_overflow {
            state.macs.extend(multicast);
        }
        Some(())
    }

    /// Takes over what a source had.
    pub(super) fn load(&mut self, state: &VirtioNetFilter) -> Result<(), String> {
        if state.macs.len() > ENTRIES {
            return Err(format!("its filter has {} addresses, more than {ENTRIES}", state.macs.len()));
        }
        self.state = state.clone();
        Ok(())
    }
}

fn list(data: &[u8]) -> Option<(&[[u8; 6]], &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let len = (u32::from_le_bytes(*count) as usize).checked_mul(6)?;
    let (list, rest) = rest.split_at_checked(len)?;
    Some((list.as_chunks().0, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
    const OTHER: [u8; 6] = [0x52, 0x54, 0, 9, 9, 9];
    const GROUP: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

    fn frame(to: [u8; 6], behind: &[u8]) -> Vec<u8> {
        [&to[..], &[2; 6], behind].concat()
    }

    #[test]
    fn frames_are_received_as_the_guest_asks() {
        let mut filter = Filter::default();
        let plain = |to| frame(to, &[8, 0, 0, 0]);
        assert!(filter.accepts(&plain(OTHER), &OWN), "until it says otherwise a card receives all");
        assert!(filter.command(0, 0, &[0]));
        let seen = |filter: &Filter| [OWN, OTHER, GROUP, [0xff; 6]].map(|to| filter.accepts(&plain(to), &OWN));
        assert_eq!(seen(&filter), [true, false, false, true]);
        assert!(filter.command(0, 1, &[1]) && filter.command(0, 5, &[1]));
        assert_eq!(seen(&filter), [true, false, true, false]);
        assert!(filter.command(0, 1, &[0]) && filter.command(0, 2, &[1]) && filter.command(0, 4, &[1]));
        assert_eq!(seen(&filter), [false, false, false, false]);
        let table = |uni: &[[u8; 6]], multi: &[[u8; 6]]| {
            let list = |list: &[[u8; 6]]| [&(list.len() as u32).to_le_bytes()[..], &list.concat()].concat();
            [list(uni), list(multi)].concat()
        };
        assert!(
            filter.command(0, 2, &[0])
                && filter.command(0, 4, &[0])
                && filter.command(1, 0, &table(&[OTHER], &[GROUP]))
        );
        assert_eq!(seen(&filter), [true, true, true, false]);
        assert!(filter.command(1, 0, &table(&[], &vec![OTHER; 65])));
        assert_eq!(seen(&filter), [true, false, true, false]);
        let tagged = frame(OWN, &[0x81, 0, 0x20, 5, 8, 0]);
        assert!(!filter.accepts(&tagged, &OWN));
        assert!(filter.command(2, 0, &5u16.to_le_bytes()) && filter.accepts(&tagged, &OWN));
        assert!(filter.command(2, 1, &5u16.to_le_bytes()) && !filter.accepts(&tagged, &OWN));
        assert!(!filter.accepts(&OWN[..5], &OWN) && !filter.accepts(&[], &OWN));
    }

    #[test]
    fn commands_that_are_none_are_refused() {
        let mut filter = Filter::default();
        for (class, command, data) in [
            (0, 6, &[1][..]),
            (0, 0, &[]),
            (1, 0, &[1, 0, 0, 0, 1]),
            (1, 0, &[0xff, 0xff, 0xff, 0xff, 1, 2]),
            (1, 0, &[0, 0, 0, 0]),
            (2, 0, &[0xff, 0xff]),
            (2, 2, &[1, 0]),
            (4, 0, &[1, 0]),
        ] {
            assert!(!filter.command(class, command, data), "{class} {command} {data:?}");
        }
        let many = VirtioNetFilter { macs: vec![OWN; 65], ..VirtioNetFilter::default() };
        assert_eq!(filter.load(&many).unwrap_err(), "its filter has 65 addresses, more than 64");
    }
}
