//! A Linux guest of an emulated QEMU that stops over in reference-vmm: everything of it is loaded there, nothing
//! of it runs, and a QEMU takes it back. The host's KVM need not be able to run a stock kernel.

use super::Monitor;
use super::endpoint::start_reference;
use super::round_trip::differences;
use crate::cpio::Archive;
use crate::exec;
use crate::launch::Qemu;
use crate::linux::Linux;
use crate::patience::{LONG_PATIENCE, PATIENCE};
use crate::process::run;
use crate::roots::{Root, Suite};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(20);
/// Lines that the guest has to print before it leaves and after it has come home.
const TICKS: usize = 3;
const DISK_BYTES: usize = 1 << 20;
/// In the order of the command line.
const DEVICES: [&str; 4] = ["virtio-blk-device", "virtio-net-device", "virtio-rng-device", "virtio-serial-device"];

/// The guest's program: uses every virtio device, reads the disk anew each time, and says so once a round.
const COUNTER: &str = "#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
while read module; do
  case $module in *virtio*|*failover*|*rng*|*rtc*) insmod /modules/$module.ko 2>/dev/null;; esac
done < /modules/order
ip link set eth0 up; ip addr add 10.1.1.1/24 dev eth0
n=0
while :; do
  echo 3 > /proc/sys/vm/drop_caches
  disk=$(busybox md5sum /dev/vda); random=$(dd if=/dev/hwrng bs=16 count=1 2>/dev/null | busybox wc -c)
  echo tick $n > /dev/hvc0
  busybox ping -c 1 -W 1 10.1.1.2 >/dev/null 2>&1 &
  echo \"tick $n ${disk%% *} $random $(cat /sys/class/net/eth0/statistics/tx_packets) end\"
  n=$((n+1)); sleep 0.2
done
";

/// The releases between which a guest stops over.
#[derive(Debug, Clone, Copy)]
pub struct StoppedLinuxGuest {
    /// Where it boots.
    pub from: Suite,
    /// Where it goes on.
    pub to: Suite,
}

/// One line of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Tick {
    number: u64,
    disk: String,
    random: u64,
    sent: u64,
}

impl StoppedLinuxGuest {
    /// Boots the guest in `from`, loads it into the reference-vmm of `program`, and lets it go on in `to`. Says how far
    /// it got.
    ///
    /// # Errors
    /// reference-vmm gives back another guest than it got, or the guest does not go on where it stopped.
    pub fn play(&self, from: &Root, to: &Root, program: &Monitor) -> Result<String> {
        let scratch = tempfile::Builder::new().prefix("qevm-stopped-linux-").tempdir()?;
        let scratch = scratch.path();
        let setup = Setup::prepare(scratch, from)?;
        let mut source = setup.qemu(from, "from", &[])?;
        wait("the guest does not boot", LONG_PATIENCE, || Ok(setup.ticks(&["from"])?.len() >= TICKS))?;
        // 7.2 loses pages of an emulated guest that writes while it leaves.
        let live = self.from != Suite::Bookworm;
        if !live {
            source.execute("stop", Value::Null)?;
        }
        let [first, second, door] = ["first.qevm", "second.qevm", "door"].map(|name| scratch.join(name));
        exec::save(&mut source, &first)?;
        source.quit();

        setup.stop_over(program, self.to, &first, &second, &door)?;
        let changed = differences(program, &first, &second)?;
        // The guest is stopped.
        let expected = |place: &str| live && place.starts_with("globalstate instance 0 ");
        if let Some(other) = changed.iter().find(|d| !expected(d["place"].as_str().unwrap_or_default())) {
            bail!("reference-vmm gave back another guest: {other} (of {} differences)", changed.len());
        }

        let before = setup.ticks(&["from"])?.len();
        let mut home = setup.qemu(to, "to", &["-incoming", "defer"])?;
        home.execute("migrate-incoming", json!({ "uri": format!("exec:cat {}", second.display()) }))?;
        home.wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
        home.execute("cont", Value::Null)?;
        // A busy machine may let the guest's own processes wait, of which the one that sends is another than the one
        // that counts.
        wait("the guest does not go on, or does not send", PATIENCE, || {
            let ticks = setup.ticks(&["from", "to"])?;
            Ok(ticks.len() >= before + 2 * TICKS && has_sent(&ticks, before))
        })?;
        home.quit();
        let ticks = setup.ticks(&["from", "to"])?;
        self::check(&ticks, before, &setup.digest)?;
        let console = fs::read_to_string(scratch.join("to.hvc"))?;
        ensure!(console.contains("tick "), "nothing arrives at the virtio console: {console:?}");
        Ok(format!("{before} rounds before and {} after", ticks.len() - before))
    }
}

/// Every round follows the one before, and every device works on both sides.
fn check(ticks: &[Tick], before: usize, digest: &str) -> Result<()> {
    for (i, tick) in ticks.iter().enumerate() {
        ensure!(tick.number == i as u64, "line {i} is of round {}: output is lost or repeated", tick.number);
        ensure!(tick.disk == digest, "round {i} has read another disk: {}, not {digest}", tick.disk);
        ensure!(tick.random == 16, "round {i} got {} random bytes", tick.random);
    }
    ensure!(has_sent(ticks, before), "the network card has not sent since: {:?}", &ticks[before..]);
    Ok(())
}

/// The network card has sent since the round `before`.
fn has_sent(ticks: &[Tick], before: usize) -> bool {
    ticks.get(before).zip(ticks.last()).is_some_and(|(before, last)| before.sent < last.sent)
}

struct Setup<'a> {
    scratch: &'a Path,
    linux: Linux,
    firmware: PathBuf,
    digest: String,
}

impl Setup<'_> {
    fn prepare<'a>(scratch: &'a Path, root: &Root) -> Result<Setup<'a>> {
        let mut linux = Linux::install()?;
        let mut archive = Archive::new();
        archive.program("counter", COUNTER.as_bytes());
        let mut initramfs = fs::read(&linux.initramfs)?;
        // The kernel looks for the next archive at a multiple of four bytes.
        initramfs.resize(initramfs.len().next_multiple_of(4), 0);
        initramfs.extend(archive.finish());
        linux.initramfs = scratch.join("initramfs");
        fs::write(&linux.initramfs, initramfs)?;
        let disk = scratch.join("disk.raw");
        let pattern: Vec<u8> = (0..DISK_BYTES as u32).map(|i| (i.wrapping_mul(0x9e37_79b1) >> 23) as u8).collect();
        fs::write(&disk, pattern)?;
        let digest = run(Command::new("md5sum").arg(&disk), PATIENCE)?;
        let digest = digest.split_whitespace().next().context("md5sum says nothing")?.to_string();
        let folders = ["usr/share/seabios", "usr/share/qemu"].map(|folder| root.dir().join(folder));
        let mut firmware = folders.iter().map(|folder| folder.join("bios-microvm.bin"));
        let firmware = firmware.find(|file| file.exists()).context("this QEMU has no bios-microvm.bin")?;
        Ok(Setup { scratch, linux, firmware, digest })
    }

    fn qemu(&self, root: &Root, name: &str, more: &[&str]) -> Result<Qemu> {
        let file = |suffix: &str| self.scratch.join(format!("{name}.{suffix}")).display().to_string();
        let mut arguments: Vec<String> = ["-M", "microvm,accel=tcg,rtc=on", "-m", "192"].map(String::from).into();
        let mut add = |option: &str, value: String| arguments.extend([option.to_string(), value]);
        add("-bios", self.firmware.display().to_string());
        add("-kernel", self.linux.kernel.display().to_string());
        add("-initrd", self.linux.initramfs.display().to_string());
        let clock = "tsc=reliable tsc_early_khz=1000000";
        add(
            "-append",
            format!("console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check {clock} rdinit=/counter"),
        );
        add("-serial", format!("file:{}", file("console")));
        let disk = self.scratch.join("disk.raw");
        add("-drive", format!("if=none,id=d,format=raw,readonly=on,file={}", disk.display()));
        add("-netdev", "socket,id=n,udp=127.0.0.1:9,localaddr=127.0.0.1:0".into());
        add("-chardev", format!("file,id=c,path={}", file("hvc")));
        let backends = [",drive=d", ",netdev=n", "", ""];
        DEVICES.iter().zip(backends).for_each(|(device, backend)| add("-device", format!("{device}{backend}")));
        add("-device", "virtconsole,chardev=c".into());
        arguments.extend(more.iter().map(|argument| argument.to_string()));
        Qemu::start(root, name, &arguments, self.scratch)
    }

    /// Takes the stream `first` in and writes the stream `second`.
    fn stop_over(&self, program: &Monitor, to: Suite, first: &Path, second: &Path, door: &Path) -> Result<()> {
        let machine = format!("microvm,rtc=on,qemu={},peer-accel=tcg", to.series());
        let (firmware, entry) = (self.firmware.display().to_string(), format!("unix:{}", door.display()));
        let console = format!("file:{}", self.scratch.join("lodge.console").display());
        let mut arguments = vec!["-S", "-m", "192", "-M", &machine, "--bios", &firmware, "--serial", &console];
        arguments.extend(["--incoming", &entry]);
        arguments.extend(DEVICES.iter().flat_map(|device| ["--device", device]));
        let arguments: Vec<String> = arguments.into_iter().map(String::from).collect();
        let mut lodge = start_reference(program, "lodge", &arguments, self.scratch)?;
        let mut stream = UnixStream::connect(door)?;
        io::copy(&mut File::open(first)?, &mut stream).context("the guest was not taken in")?;
        stream.flush()?;
        stream.shutdown(Shutdown::Write)?;
        wait("the guest was not taken in", PATIENCE, || {
            Ok(lodge.execute("query-status", Value::Null)?["status"] == "paused")
        })?;
        ensure!(lodge.execute("cont", Value::Null).is_err(), "a guest whose devices have no model was let run");

        lodge.execute("migrate", json!({ "uri": format!("exec:cat > {}", second.display()) }))?;
        lodge.wait_migration(PATIENCE, |migration| migration["status"] == "completed")?;
        lodge.quit();
        Ok(())
    }

    /// What the guest has said on these QEMUs' serial ports, one after the other.
    fn ticks(&self, names: &[&str]) -> Result<Vec<Tick>> {
        let mut text = String::new();
        for name in names {
            match fs::read(self.scratch.join(format!("{name}.console"))) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                read => text.push_str(&String::from_utf8_lossy(&read?)),
            }
        }
        Ok(text.lines().filter_map(Tick::parse).collect())
    }
}

impl Tick {
    fn parse(line: &str) -> Option<Tick> {
        let mut words = line.trim().strip_prefix("tick ")?.strip_suffix(" end")?.split(' ');
        let mut word = || words.next();
        let (number, disk, random, sent) = (word()?, word()?, word()?, word()?);
        let number = number.parse().ok()?;
        Some(Tick { number, disk: disk.into(), random: random.parse().ok()?, sent: sent.parse().ok()? })
    }
}

fn wait(what: &str, limit: Duration, mut reached: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !reached()? {
        ensure!(Instant::now() < deadline, "{what} within {} s", limit.as_secs());
        thread::sleep(POLL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tick(number: u64, sent: u64) -> Tick {
        Tick { number, disk: "abc".into(), random: 16, sent }
    }

    #[test]
    fn lines_of_the_guest() {
        assert_eq!(
            Tick::parse("tick 7 abc 16 9 end\r"),
            Some(Tick { number: 7, disk: "abc".into(), random: 16, sent: 9 })
        );
        for other in ["", "tick 7 abc 16 9", "[ 1.0] virtio_net: tick 7 abc 16 9 end", "tick x abc 16 9 end"] {
            assert_eq!(Tick::parse(other), None, "{other}");
        }
    }

    #[test]
    fn a_guest_that_does_not_go_on_is_found_out() {
        let good = [tick(0, 1), tick(1, 2), tick(2, 3), tick(3, 4)];
        assert!(check(&good, 2, "abc").is_ok());
        assert!(check(&good, 2, "abd").is_err());
        assert!(check(&[tick(0, 1), tick(1, 2), tick(1, 2), tick(2, 3)], 2, "abc").is_err());
        assert!(check(&[tick(0, 1), tick(1, 2), tick(3, 3), tick(4, 4)], 2, "abc").is_err());
        assert!(check(&[tick(0, 1), tick(1, 2), tick(2, 3), tick(3, 3)], 2, "abc").is_err());
        assert!(check(&[tick(0, 1), tick(1, 2), Tick { random: 0, ..tick(2, 3) }, tick(3, 4)], 2, "abc").is_err());
    }
}
