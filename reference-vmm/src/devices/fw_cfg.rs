//! QEMU's firmware configuration device on ports, with DMA (QEMU document "QEMU Firmware Configuration (fw_cfg)
//! Device").

use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use qevm_microvm::state::FwCfgState;
use std::collections::BTreeMap;

const PORT_SELECTOR: u16 = 0x510;
const PORT_DATA: u16 = 0x511;
const PORT_DMA_HIGH: u16 = 0x514;
const PORT_DMA_LOW: u16 = 0x518;

const KEY_SIGNATURE: u16 = 0x00;
const KEY_ID: u16 = 0x01;
/// The machine's UUID.
pub(crate) const KEY_UUID: u16 = 0x02;
const KEY_RAM_SIZE: u16 = 0x03;
const KEY_NOGRAPHIC: u16 = 0x04;
const KEY_NB_CPUS: u16 = 0x05;
const KEY_MAX_CPUS: u16 = 0x0f;
const KEY_FILE_DIR: u16 = 0x19;
const KEY_FILE_FIRST: u16 = 0x20;
/// Selected while no item is.
const KEY_INVALID: u16 = 0xffff;

/// Traditional interface and DMA.
const ID_FEATURES: u32 = 0b11;
const DMA_SIGNATURE: u64 = 0x51454d5520434647;
const DMA_ERROR: u32 = 1 << 0;
const DMA_READ: u32 = 1 << 1;
const DMA_SKIP: u32 = 1 << 2;
const DMA_SELECT: u32 = 1 << 3;
const DMA_WRITE: u32 = 1 << 4;
/// Copy unit of a DMA read, so that a guest's length costs no memory.
const DMA_CHUNK: usize = 4096;

/// Most zeroes that a DMA read adds to the end of an item: a guest that asks for gigabytes of them keeps the vCPU from
/// stopping meanwhile.
const DMA_BEYOND: u64 = 64 << 20;

/// The files of any `microvm` of QEMU's with ACPI, next to which those of its command line are: read from 7.2, 10.0 and
/// 11.1. They are in the directory here as well, empty where this machine has nothing to say, so that a guest that
/// comes from a QEMU, or goes to one, finds the rest of the directory where it was, and files under the keys that it
/// has read.
const OF_QEMU: [(&str, &[u8]); 8] = [
    ("bios-geometry", &[]),
    ("bootorder", &[]),
    ("etc/acpi/rsdp", &[]),
    ("etc/acpi/tables", &[]),
    // Not to be tried again.
    ("etc/boot-fail-wait", &[0xff; 4]),
    ("etc/e820", &[]),
    ("etc/fdt", &[]),
    ("etc/table-loader", &[]),
];

/// Names of files in the directory have at most this many bytes, the closing zero not counted.
const MAX_NAME: usize = 55;

/// What the device tells the guest.
#[derive(Clone, Debug, Default)]
pub struct FwCfgItems {
    /// Bytes of RAM.
    pub ram_size: u64,
    /// Number of vCPUs.
    pub cpus: u16,
    /// Files by name.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Items without a name, by key.
    pub by_key: BTreeMap<u16, Vec<u8>>,
}

/// The device.
#[derive(Debug)]
pub struct FwCfg {
    items: BTreeMap<u16, Vec<u8>>,
    entry: u16,
    offset: u32,
    dma_address: u64,
}

impl FwCfg {
    /// A device with these items; files get the keys that they have in a QEMU.
    ///
    /// # Errors
    /// [`Error::Config`] for a name longer than 55 bytes.
    pub fn new(items: FwCfgItems) -> Result<FwCfg> {
        let (mut by_key, mut files) = (items.by_key, items.files);
        for (name, data) in OF_QEMU {
            files.entry(name.to_owned()).or_insert_with(|| data.to_vec());
        }
        let count = u32::try_from(files.len()).ok().filter(|count| *count < 0x1000);
        let count = count.ok_or_else(|| Error::Config("fw_cfg has room for 4095 files".to_owned()))?;
        let mut directory = count.to_be_bytes().to_vec();
        for (key, (name, data)) in (KEY_FILE_FIRST..).zip(files) {
            if name.len() > MAX_NAME || name.is_empty() || name.contains('\0') {
                return Err(Error::Config(format!("fw_cfg file name '{name}' must have 1 to {MAX_NAME} bytes")));
            }
            let len =
                u32::try_from(data.len()).map_err(|_| Error::Config(format!("fw_cfg file '{name}' is too large")))?;
            directory.extend(len.to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0; 2]);
            directory.extend(name.as_bytes());
            directory.resize(directory.len() + MAX_NAME + 1 - name.len(), 0);
            by_key.insert(key, data);
        }
        by_key.insert(KEY_SIGNATURE, b"QEMU".to_vec());
        by_key.insert(KEY_ID, ID_FEATURES.to_le_bytes().to_vec());
        by_key.entry(KEY_UUID).or_insert_with(|| vec![0; 16]);
        by_key.insert(KEY_RAM_SIZE, items.ram_size.to_le_bytes().to_vec());
        by_key.insert(KEY_NOGRAPHIC, 1u16.to_le_bytes().to_vec());
        by_key.insert(KEY_NB_CPUS, items.cpus.to_le_bytes().to_vec());
        by_key.insert(KEY_MAX_CPUS, items.cpus.to_le_bytes().to_vec());
        by_key.insert(KEY_FILE_DIR, directory);
        Ok(FwCfg { items: by_key, entry: KEY_SIGNATURE, offset: 0, dma_address: 0 })
    }

    /// A read of one of the device's ports.
    pub fn port_in(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0);
        match port {
            PORT_DATA => data[0] = self.next_byte(),
            PORT_DMA_HIGH..=0x51b => {
                let signature = DMA_SIGNATURE.to_be_bytes();
                let at = usize::from(port - PORT_DMA_HIGH);
                for (byte, from) in data.iter_mut().zip(&signature[at..]) {
                    *byte = *from;
                }
            }
            _ => {}
        }
    }

    /// A write to one of the device's ports; the one that completes a DMA address does the transfer.
    pub fn port_out(&mut self, port: u16, data: &[u8], memory: &GuestMemory) {
        match (port, data) {
            (PORT_SELECTOR, &[low, high]) => self.select(u16::from_le_bytes([low, high])),
            (PORT_DMA_HIGH, &[a, b, c, d]) => self.dma_address = u64::from(u32::from_be_bytes([a, b, c, d])) << 32,
            (PORT_DMA_LOW, &[a, b, c, d]) => {
                let address = self.dma_address | u64::from(u32::from_be_bytes([a, b, c, d]));
                self.dma_address = 0;
                self.transfer(address, memory);
            }
            _ => {}
        }
    }

    /// What a migration carries: the position, not the items.
    pub fn save(&self) -> FwCfgState {
        FwCfgState { cur_entry: self.entry, cur_offset: self.offset, dma_addr: self.dma_address }
    }

    /// Takes over a position.
    pub fn load(&mut self, state: &FwCfgState) {
        (self.entry, self.offset, self.dma_address) = (state.cur_entry, state.cur_offset, state.dma_addr);
    }

    fn select(&mut self, key: u16) {
        self.offset = 0;
        self.entry = if self.items.contains_key(&key) { key } else { KEY_INVALID };
    }

    /// Bytes beyond the end of an item, and of no item, are zero.
    fn next_byte(&mut self) -> u8 {
        let byte = self.rest().first().copied();
        if byte.is_some() {
            self.offset += 1;
        }
        byte.unwrap_or(0)
    }

    fn rest(&self) -> &[u8] {
        self.items.get(&self.entry).and_then(|item| item.get(self.offset as usize..)).unwrap_or(&[])
    }

    /// The structure at `address`: big-endian u32 control, u32 length, u64 address. Control is set to 0 or the error
    /// bit.
    fn transfer(&mut self, address: u64, memory: &GuestMemory) {
        let mut request = [0; 16];
        let result = memory.read(address, &mut request).and_then(|()| self.serve(&request, memory));
        let status = if result.is_ok() { 0 } else { DMA_ERROR };
        if memory.write(address, &status.to_be_bytes()).is_err() {
            tracing::debug!(address, "fw_cfg DMA structure is not in RAM");
        }
    }

    fn serve(&mut self, request: &[u8; 16], memory: &GuestMemory) -> Result<()> {
        let control = u32::from_be_bytes(request[..4].try_into().expect("four bytes"));
        let mut len = u64::from(u32::from_be_bytes(request[4..8].try_into().expect("four bytes")));
        let mut target = u64::from_be_bytes(request[8..].try_into().expect("eight bytes"));
        if control & DMA_SELECT != 0 {
            self.select((control >> 16) as u16);
        }
        if control & DMA_READ != 0 {
            if len > self.rest().len() as u64 + DMA_BEYOND {
                return Err(Error::Config("a fw_cfg read goes far beyond its item".to_owned()));
            }
            while len > 0 {
                let mut chunk = [0; DMA_CHUNK];
                let here = len.min(DMA_CHUNK as u64);
                let rest = self.rest();
                let have = rest.len().min(here as usize);
                chunk[..have].copy_from_slice(&rest[..have]);
                memory.write(target, &chunk[..here as usize])?;
                self.offset += have as u32;
                target += here;
                len -= here;
            }
        } else if control & DMA_SKIP != 0 {
            self.offset += self.rest().len().min(len as usize) as u32;
        } else if control & DMA_WRITE != 0 {
            return Err(Error::Config("no fw_cfg item may be written".to_owned()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> FwCfg {
        let files = [("opt/qevm/payload", "dirty=1M"), ("etc/a", "x")];
        let files = files.map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec())).into();
        FwCfg::new(FwCfgItems { ram_size: 0x1234_5678, cpus: 2, files, ..FwCfgItems::default() }).unwrap()
    }

    fn memory() -> GuestMemory {
        GuestMemory::microvm(8 << 20, &[0; 64 << 10]).unwrap()
    }

    fn read(device: &mut FwCfg, key: u16, len: usize) -> Vec<u8> {
        device.port_out(PORT_SELECTOR, &key.to_le_bytes(), &memory());
        let mut out = vec![0; len];
        out.chunks_mut(1).for_each(|byte| device.port_in(PORT_DATA, byte));
        out
    }

    #[test]
    fn items_by_port() {
        let mut device = device();
        assert_eq!(read(&mut device, 0, 6), b"QEMU\0\0");
        assert_eq!(read(&mut device, 3, 8), 0x1234_5678u64.to_le_bytes());
        assert_eq!(read(&mut device, 5, 2), [2, 0]);
        assert_eq!(read(&mut device, 0x29, 9), b"dirty=1M\0");
        assert_eq!(read(&mut device, 0x77, 2), [0, 0]);
    }

    fn dma(device: &mut FwCfg, memory: &GuestMemory, control: u32, len: u32, target: u64) -> u32 {
        memory.write(0x1000, &control.to_be_bytes()).unwrap();
        memory.write(0x1004, &len.to_be_bytes()).unwrap();
        memory.write(0x1008, &target.to_be_bytes()).unwrap();
        device.port_out(PORT_DMA_HIGH, &[0; 4], memory);
        device.port_out(PORT_DMA_LOW, &0x1000u32.to_be_bytes(), memory);
        let mut status = [0; 4];
        memory.read(0x1000, &mut status).unwrap();
        u32::from_be_bytes(status)
    }

    #[test]
    fn dma_reads_skips_and_refuses() {
        let (mut device, memory) = (device(), memory());
        let mut signature = [0; 4];
        device.port_in(PORT_DMA_HIGH, &mut signature);
        assert_eq!(&signature, b"QEMU");
        assert_eq!(dma(&mut device, &memory, 0x29 << 16 | DMA_SELECT | DMA_SKIP, 6, 0), 0);
        assert_eq!(device.save(), FwCfgState { cur_entry: 0x29, cur_offset: 6, dma_addr: 0 });
        assert_eq!(dma(&mut device, &memory, DMA_READ, 4, 0x2000), 0);
        let mut text = [9; 5];
        memory.read(0x2000, &mut text).unwrap();
        assert_eq!(text, [b'1', b'M', 0, 0, 0]);
        assert_eq!(dma(&mut device, &memory, DMA_WRITE, 4, 0x2000), DMA_ERROR);
        assert_eq!(dma(&mut device, &memory, DMA_READ, u32::MAX, 0x2000), DMA_ERROR, "beyond the end of RAM");
        let large = GuestMemory::microvm(256 << 20, &[0; 64 << 10]).unwrap();
        assert_eq!(dma(&mut device, &large, DMA_READ, DMA_BEYOND as u32, 0x2000), 0);
        assert_eq!(dma(&mut device, &large, DMA_READ, DMA_BEYOND as u32 + 1, 0x2000), DMA_ERROR, "too many zeroes");
        memory.blocks()[0].take_vmm_writes();
        dma(&mut device, &memory, 0x29 << 16 | DMA_SELECT | DMA_READ, 4, 0x5000);
        assert_eq!(memory.blocks()[0].take_vmm_writes()[0] & 1 << 5, 1 << 5, "DMA marks the page dirty");
    }

    #[test]
    fn position_survives_a_save() {
        let mut device = device();
        read(&mut device, 0x29, 3);
        let mut other = self::device();
        other.load(&device.save());
        assert_eq!([other.next_byte(), other.next_byte()], *b"ty");
        other.load(&FwCfgState { cur_entry: 0x29, cur_offset: u32::MAX, dma_addr: 0 });
        assert_eq!(other.next_byte(), 0);
    }

    /// The directory of a QEMU with one file of the command line, the same in 7.2, 10.0 and 11.1.
    #[test]
    fn the_directory_is_that_of_a_qemu() {
        let files = [("opt/qevm/payload", "dirty=1M"), ("etc/e820", "map")];
        let files = files.map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec())).into();
        let mut device = FwCfg::new(FwCfgItems { files, ..FwCfgItems::default() }).unwrap();
        assert_eq!(read(&mut device, 0x25, 3), b"map");
        assert_eq!(read(&mut device, 0x28, 8), b"dirty=1M");
        // It was at the fourth byte there, and the rest is to be read here.
        device.load(&FwCfgState { cur_entry: 0x28, cur_offset: 3, dma_addr: 0 });
        assert_eq!([device.next_byte(), device.next_byte()], *b"ty");
        let directory = read(&mut device, KEY_FILE_DIR, 4 + 10 * 64);
        assert_eq!(directory[..4], [0, 0, 0, 9]);
        let name = |entry: &[u8]| String::from_utf8_lossy(&entry[8..]).trim_end_matches('\0').to_owned();
        let entries: Vec<_> = directory[4..].chunks(64).map(|entry| (entry[5], name(entry), entry[3])).collect();
        let expected = [
            (0x20, "bios-geometry", 0),
            (0x21, "bootorder", 0),
            (0x22, "etc/acpi/rsdp", 0),
            (0x23, "etc/acpi/tables", 0),
            (0x24, "etc/boot-fail-wait", 4),
            (0x25, "etc/e820", 3),
            (0x26, "etc/fdt", 0),
            (0x27, "etc/table-loader", 0),
            (0x28, "opt/qevm/payload", 8),
            (0, "", 0),
        ];
        assert_eq!(entries, expected.map(|(key, name, len)| (key, name.to_owned(), len)));
    }

    #[test]
    fn long_names_are_refused() {
        let items = FwCfgItems { files: [("n".repeat(56), vec![])].into(), ..FwCfgItems::default() };
        assert!(matches!(FwCfg::new(items), Err(Error::Config(_))));
    }
}
