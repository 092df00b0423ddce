//! Virtio devices that a payload guest keeps busy on its way, and what has to be left of it in the end.
//!
//! The guest numbers its requests (see the payload's `virtio.S`), checks itself that each comes back once, and says how
//! far it got. Here the other side is looked at: the disk's file, and what arrived on the console and the network.
//! Every number has to be there once, in order, whatever monitor served the request.

use super::tap::{self, Taps};
use crate::patience::PATIENCE;
use anyhow::{Context, Result, bail, ensure};
use parking_lot::Mutex;
use std::fs;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Bytes of the disk: a few seconds of the guest's work, so that it goes round.
const DISK: u64 = 1 << 20;
const SECTOR: usize = 512;
/// Word `k` of sector number `n` is `n + k * WORD_STEP`.
const WORD_STEP: u64 = 0x9e37_79b9;
/// How the first monitor is called.
const FIRST: &str = "stop0";
/// Requests that are under way at the same time.
const BATCH: u64 = 4;

/// A device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VirtioLoad {
    /// `virtio-blk-device`
    Disk,
    /// The same, which refuses one write at the first stop: QEMU stops the guest with the request under way
    /// (`werror=stop`).
    FailingDisk,
    /// `virtio-rng-device`
    Rng,
    /// `virtio-serial-device` with a `virtconsole`
    Console,
    /// `virtio-net-device` on `-netdev dgram`
    Net,
    /// The same on `-netdev tap`, which only root can have.
    Tap,
}

impl VirtioLoad {
    /// Its bit in the payload's configuration.
    fn bit(self) -> u32 {
        match self {
            VirtioLoad::Disk | VirtioLoad::FailingDisk => 1,
            VirtioLoad::Rng => 2,
            VirtioLoad::Console => 4,
            VirtioLoad::Net | VirtioLoad::Tap => 8,
        }
    }

    /// Its counter in the payload's line.
    fn counter(self) -> &'static str {
        match self {
            VirtioLoad::Disk | VirtioLoad::FailingDisk => "disk",
            VirtioLoad::Rng => "rng",
            VirtioLoad::Console => "console",
            VirtioLoad::Net | VirtioLoad::Tap => "net",
        }
    }
}

/// What the payload has to be told.
pub(super) fn configuration(virtio: &[VirtioLoad]) -> String {
    match virtio.iter().map(|virtio| virtio.bit()).sum::<u32>() {
        0 => String::new(),
        bits => format!(" virtio={bits}"),
    }
}

/// The arguments of the monitor `name`, the same for QEMU and reference-vmm.
pub(super) fn arguments(virtio: &[VirtioLoad], scratch: &Path, name: &str) -> Result<Vec<String>> {
    let mut arguments = Vec::new();
    let mut add = |option: &str, value: String| arguments.extend([option.to_string(), value]);
    for virtio in virtio {
        match virtio {
            VirtioLoad::Disk | VirtioLoad::FailingDisk => {
                let disk = disk(scratch);
                if !disk.exists() {
                    fs::File::create(&disk)?.set_len(DISK)?;
                }
                let file = match virtio {
                    VirtioLoad::FailingDisk if name == FIRST => {
                        let error = ["event=pwritev", "errno=28", "once=on", "sector=400"]
                            .map(|part| format!("file.inject-error.0.{part}"));
                        let image = format!("file.image.driver=file,file.image.filename={}", disk.display());
                        format!("werror=stop,file.driver=blkdebug,{image},{}", error.join(","))
                    }
                    _ => format!("file={}", disk.display()),
                };
                add("--drive", format!("if=none,id=d,format=raw,{file}"));
                add("--device", "virtio-blk-device,drive=d".into());
            }
            VirtioLoad::Rng => add("--device", "virtio-rng-device".into()),
            VirtioLoad::Console => {
                add("--chardev", format!("file,id=c,path={}", console(scratch, name).display()));
                add("--device", "virtio-serial-device".into());
                add("--device", "virtconsole,chardev=c".into());
            }
            VirtioLoad::Net => {
                let (local, remote) = (scratch.join(format!("{name}.net")), frames(scratch));
                let unix = |end: &str, path: &Path| format!("{end}.type=unix,{end}.path={}", path.display());
                add("--netdev", format!("dgram,id=n,{},{}", unix("local", &local), unix("remote", &remote)));
                add("--device", "virtio-net-device,netdev=n".into());
            }
            VirtioLoad::Tap => {
                let ifname = tap::add(scratch, name)?;
                add("--netdev", format!("tap,id=n,ifname={ifname},script=no,downscript=no"));
                add("--device", "virtio-net-device,netdev=n".into());
            }
        }
    }
    Ok(arguments)
}

fn disk(scratch: &Path) -> PathBuf {
    scratch.join("disk.raw")
}

fn console(scratch: &Path, name: &str) -> PathBuf {
    scratch.join(format!("{name}.hvc"))
}

fn frames(scratch: &Path) -> PathBuf {
    scratch.join("frames")
}

/// The network's other end: records the guest's frames wherever it is.
#[derive(Debug)]
pub(super) struct FrameCounter {
    numbers: Arc<Mutex<Vec<u64>>>,
    thread: Option<JoinHandle<()>>,
}

/// Gives a frame, or an error when none comes in time.
type Receive = Box<dyn FnMut(&mut [u8]) -> io::Result<usize> + Send>;

/// How long one read waits before it checks whether the load has ended.
const PAUSE: Duration = Duration::from_millis(200);

impl FrameCounter {
    /// Begins to listen, before the first monitor starts.
    pub(super) fn listen(virtio: &[VirtioLoad], scratch: &Path) -> Result<FrameCounter> {
        /// Ethertype of the guest's frames (for experiments), and where their number is.
        const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
        const NUMBER: usize = 14;
        let numbers: Arc<Mutex<Vec<u64>>> = Arc::default();
        let mut receive: Option<Receive> = None;
        if virtio.contains(&VirtioLoad::Net) {
            let socket = UnixDatagram::bind(frames(scratch))?;
            socket.set_read_timeout(Some(PAUSE))?;
            receive = Some(Box::new(move |frame| socket.recv(frame)));
        }
        if virtio.contains(&VirtioLoad::Tap) {
            let mut taps = Taps::listen(scratch, PAUSE)?;
            receive = Some(Box::new(move |frame| taps.receive(frame)));
        }
        let mut thread = None;
        if let Some(mut receive) = receive {
            let weak = Arc::downgrade(&numbers);
            thread = Some(thread::spawn(move || {
                let mut frame = [0; 2048];
                while let Some(numbers) = weak.upgrade() {
                    let Ok(len) = receive(&mut frame) else { continue };
                    let number = frame[..len].get(NUMBER..).and_then(|rest| rest.first_chunk());
                    if let Some(number) = number.filter(|_| frame[NUMBER - 2..NUMBER] == ETHERTYPE) {
                        numbers.lock().push(u64::from_le_bytes(*number));
                    }
                }
            }));
        }
        Ok(FrameCounter { numbers, thread })
    }

    /// What has arrived, when everything before number `next` should have: what is still on its way is waited for.
    fn received(&self, next: u64) -> Vec<u64> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let numbers = self.numbers.lock().clone();
            if numbers.len() as u64 + 1 >= next || Instant::now() > deadline {
                return numbers;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for FrameCounter {
    fn drop(&mut self) {
        // The thread sees that, and is waited for: it takes its interfaces away.
        self.numbers = Arc::default();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What arrived on the consoles of all stops, one after the other.
fn consoles(scratch: &Path) -> Result<Vec<u8>> {
    let files = (0..).map(|stop| console(scratch, &format!("stop{stop}"))).take_while(|file| file.exists());
    let texts: Vec<Vec<u8>> = files.map(fs::read).collect::<std::io::Result<_>>()?;
    Ok(texts.concat())
}

/// How far the guest got, by its last line: the counter of each device, and of interrupts.
fn last_counters(text: &str, virtio: &[VirtioLoad]) -> Option<Vec<u64>> {
    counter_lines(text).next_back().and_then(|line| counters(line, virtio))
}

/// Every device and the interrupts have done more than one batch since the first line of `text`.
pub(super) fn works(virtio: &[VirtioLoad], text: &str) -> bool {
    let first = counter_lines(text).next().and_then(|line| counters(line, virtio));
    let since =
        |(first, last): (Vec<u64>, Vec<u64>)| first.iter().zip(last).all(|(first, last)| last > first + 2 * BATCH);
    virtio.is_empty() || first.zip(last_counters(text, virtio)).is_some_and(since)
}

fn counter_lines(text: &str) -> impl DoubleEndedIterator<Item = &str> {
    text.lines().filter(|line| line.starts_with("qevm-payload virtio ") && line.contains(" errors="))
}

fn counters(line: &str, virtio: &[VirtioLoad]) -> Option<Vec<u64>> {
    let value = |name: &str| {
        let (found, number) =
            line.split(' ').filter_map(|word| word.split_once('=')).find(|(found, _)| *found == name)?;
        debug_assert_eq!(found, name);
        number.parse().ok()
    };
    virtio.iter().map(|virtio| virtio.counter()).chain(["interrupts"]).map(value).collect()
}

/// Judges the whole way. `texts` is what the guest printed at each stop.
pub(super) fn judge(virtio: &[VirtioLoad], texts: &[Vec<u8>], scratch: &Path, counter: &FrameCounter) -> Result<()> {
    if virtio.is_empty() {
        return Ok(());
    }
    let mut before: Option<Vec<u64>> = None;
    for (stop, text) in texts.iter().enumerate() {
        let text = String::from_utf8_lossy(text);
        let counters = last_counters(&text, virtio)
            .with_context(|| format!("the guest said nothing of its virtio devices at stop {stop}"))?;
        // A batch that was under way is no work of this stop's.
        let stuck = |before: &Vec<u64>| before.iter().zip(&counters).any(|(before, now)| *now <= before + 2 * BATCH);
        if before.as_ref().is_some_and(stuck) || counters.contains(&0) {
            bail!(
                "a device or its interrupts make no progress at stop {stop}: {before:?}, then {counters:?} of {virtio:?} and interrupts"
            );
        }
        before = Some(counters);
    }
    let counters = before.context("the guest has been nowhere")?;
    for (virtio, next) in virtio.iter().zip(counters) {
        match virtio {
            VirtioLoad::Disk | VirtioLoad::FailingDisk => judge_disk(&fs::read(disk(scratch))?, next),
            // The guest has looked at what it got.
            VirtioLoad::Rng => Ok(()),
            VirtioLoad::Console => judge_console(&consoles(scratch)?, next),
            VirtioLoad::Net | VirtioLoad::Tap => judge_frames(&counter.received(next), next),
        }
        .with_context(|| format!("{virtio:?}, of which the guest had done {} requests", next - 1))?;
    }
    Ok(())
}

/// Sector `n` modulo their number holds number `n`, for all of the last round. The guest had gone on for a moment after
/// it said that `next` is its next number, and may have been stopped while it wrote a batch.
fn judge_disk(disk: &[u8], next: u64) -> Result<()> {
    let sectors = (disk.len() / SECTOR) as u64;
    let words = |sector: u64| disk[sector as usize * SECTOR..][..SECTOR].as_chunks::<8>().0.iter();
    let number = |sector: u64| words(sector).next().map_or(0, |word| u64::from_le_bytes(*word));
    let newest = (0..sectors).map(number).max().unwrap_or(0);
    ensure!(newest + 1 >= next, "the newest sector on the disk is number {newest}");
    for n in newest.saturating_sub(sectors - 1).max(1)..=newest {
        let sector = n % sectors;
        let found = number(sector);
        // The oldest may have been overwritten, or the last batch written out of order.
        let under_way = n + BATCH > newest;
        ensure!(
            found == n || under_way && (found == 0 || found == n - sectors),
            "sector {sector} holds number {found}, not {n}"
        );
        let whole = words(sector)
            .zip(0u64..)
            .all(|(word, k)| found == 0 || u64::from_le_bytes(*word) == found.wrapping_add(k.wrapping_mul(WORD_STEP)));
        ensure!(whole, "sector {sector} is not what the guest wrote as number {found}");
    }
    Ok(())
}

/// Each line is the next number. The last may have been cut off with the guest's end.
fn judge_console(text: &[u8], next: u64) -> Result<()> {
    let text = String::from_utf8_lossy(text);
    let mut expected = 1;
    for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        let found = u64::from_str_radix(line, 16);
        ensure!(line.len() == 16 && found == Ok(expected), "line {expected} is '{line}'");
        expected += 1;
    }
    ensure!(expected >= next, "line {expected} is missing");
    Ok(())
}

/// Each frame is the next number.
fn judge_frames(numbers: &[u64], next: u64) -> Result<()> {
    for (expected, found) in (1..).zip(numbers) {
        ensure!(expected == *found, "frame {expected} is number {found}");
    }
    ensure!(numbers.len() as u64 + 1 >= next, "{} frames arrived", numbers.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(disk: &mut [u8], n: u64) {
        let sectors = (disk.len() / SECTOR) as u64;
        let at = (n % sectors) as usize * SECTOR;
        for k in 0..64 {
            let word = n.wrapping_add(k * WORD_STEP);
            disk[at + 8 * k as usize..][..8].copy_from_slice(&word.to_le_bytes());
        }
    }

    #[test]
    fn a_disk_with_every_number_is_whole() {
        let mut disk = vec![0; 16 * SECTOR];
        (1..=40).for_each(|n| written(&mut disk, n));
        assert!(judge_disk(&disk, 41).is_ok());
        assert!(judge_disk(&disk, 37).is_ok());
        assert!(judge_disk(&disk, 42).is_err(), "number 41 is lost");
        let mut lost = disk.clone();
        written(&mut lost, 30 - 16);
        assert!(judge_disk(&lost, 41).is_err(), "number 30 is lost");
        let mut torn = disk.clone();
        torn[5 * SECTOR + 100] ^= 1;
        assert!(judge_disk(&torn, 41).is_err(), "a sector is damaged");
    }

    #[test]
    fn lines_that_are_lost_repeated_or_damaged_are_found_out() {
        let lines = |numbers: &[u64]| numbers.iter().map(|n| format!("{n:016x}\n")).collect::<String>().into_bytes();
        let text = lines(&[1, 2, 3, 4, 5]);
        assert!(judge_console(&text, 6).is_ok());
        assert!(judge_console(&text[..text.len() - 3], 5).is_ok());
        assert!(judge_console(&text, 7).is_err());
        assert!(judge_console(&lines(&[1, 2, 4, 5]), 5).is_err());
        assert!(judge_console(&lines(&[1, 2, 2, 3]), 4).is_err());
        assert!(judge_console(&text[1..], 6).is_err());
        assert!(judge_frames(&[1, 2, 3], 4).is_ok());
        assert!(judge_frames(&[1, 2, 3], 5).is_err());
        assert!(judge_frames(&[1, 3], 2).is_err());
        assert!(judge_frames(&[1, 2, 2], 2).is_err());
    }

    #[test]
    fn a_device_that_stands_still_is_found_out() {
        let line = |disk: u64, interrupts: u64| {
            format!("qevm-payload virtio disk={disk} rng=0 console=0 net=0 interrupts={interrupts} errors=0\n")
                .into_bytes()
        };
        let folder = tempfile::tempdir().unwrap();
        let mut disk_file = vec![0; 16 * SECTOR];
        (1..=60).for_each(|n| written(&mut disk_file, n));
        fs::write(disk(folder.path()), &disk_file).unwrap();
        let counter = FrameCounter::listen(&[VirtioLoad::Disk], folder.path()).unwrap();
        let judge = |texts: &[Vec<u8>]| judge(&[VirtioLoad::Disk], texts, folder.path(), &counter);
        assert!(judge(&[line(20, 30), line(61, 60)]).is_ok());
        assert!(judge(&[line(60, 30), line(61, 60)]).is_err());
        assert!(judge(&[line(20, 30), line(61, 30)]).is_err());
        assert!(judge(&[line(20, 30), b"nothing\n".to_vec()]).is_err());
        let both = |first: (u64, u64), last: (u64, u64)| {
            let lines = [line(first.0, first.1), line(last.0, last.1)].concat();
            works(&[VirtioLoad::Disk], &String::from_utf8(lines).unwrap())
        };
        assert!(both((20, 30), (29, 39)) && !both((20, 30), (28, 39)) && !both((20, 30), (29, 38)));
        assert!(works(&[], "") && !works(&[VirtioLoad::Disk], ""));
        assert_eq!(configuration(&[]), "");
        assert_eq!(configuration(&[VirtioLoad::Disk]), " virtio=1");
    }
}
