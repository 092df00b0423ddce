use qevm_savevm::Reader;
use qevm_savevm::container::{FileKind, libvirt, qcow2, recognise};
use qevm_wire::Limits;

/// The input is a file. Whatever it is recognised as must be walked to the stream without leaving it.
pub fn savevm_container(data: &[u8]) {
    let limits = Limits::default();
    match recognise(data) {
        Some(FileKind::Libvirt) => {
            if let Ok(image) = libvirt::SaveImage::parse(data, &limits) {
                assert!(image.stream_offset >= libvirt::HEADER_LEN as u64 + image.xml_len);
            }
        }
        Some(FileKind::Qcow2) => {
            let _ = snapshots(data, &limits);
        }
        _ => {}
    }
}

/// Reads up to four clusters of the VM state of each snapshot.
fn snapshots(file: &[u8], limits: &Limits) -> Result<(), qevm_savevm::Error> {
    let header = qcow2::Header::parse(file)?;
    header.check_snapshots(limits)?;
    let at = |offset: u64| usize::try_from(offset).ok().and_then(|offset| file.get(offset..)).unwrap_or_default();
    let mut table = Reader::at(at(header.snapshots_offset), header.snapshots_offset);
    for _ in 0..header.snapshots {
        let snapshot = qcow2::Snapshot::parse(&mut table)?;
        let l1 = at(snapshot.l1_offset);
        let l1 = &l1[..l1.len().min(snapshot.l1_len as usize)];
        let Ok(state) = qcow2::VmState::new(&header, &snapshot, l1) else { continue };
        let mut position = 0;
        for _ in 0..4 {
            let step = state.contiguous(position);
            assert!(step <= header.cluster_size() && (step > 0) == (position < state.len()));
            if let Some(offset) = state.l2_table(position)? {
                let l2 = at(offset);
                let l2 = &l2[..l2.len().min(header.cluster_size() as usize)];
                state.cluster(position, l2, offset)?;
            }
            position += step;
        }
    }
    Ok(())
}
