//! Capabilities, parameters and routes: what changes the stream itself.

use crate::roots::Suite::{self, Bookworm, Bullseye, Sid, Trixie};
use crate::scenario::{Route, Scenario};
use crate::suite::since;
use serde_json::json;

/// Bytes per second that let a guest dirty pages faster than they are sent.
const SLOW: u64 = 4 << 20;
/// The same when a page with one counter is sent compressed.
const SLOW_COMPRESSED: u64 = 256 << 10;

pub(super) fn rows() -> Vec<Scenario> {
    let mut rows = Vec::new();
    rows.extend(routes());
    rows.extend(xbzrle());
    rows.extend(multifd());
    rows.extend(mapped_ram());
    rows.extend(postcopy());
    rows.extend(others());
    rows
}

fn routes() -> Vec<Scenario> {
    let mut rows = Vec::new();
    for suite in Suite::ALL {
        let row = |machine: &str, what: &str| Scenario::new(suite, machine, what);
        rows.push(row("microvm", "unix").by(Route::Unix));
        rows.push(row("q35", "tcp").by(Route::Tcp));
        rows.push(row("q35", "receive-unix").by(Route::ReceiveUnix));
        rows.push(row("microvm", "receive-tcp").by(Route::ReceiveTcp).quick());
        rows.push(row("microvm", "return-path").by(Route::Peer).caps("return-path events").quick());
        rows.push(row("q35", "peer").by(Route::Peer));
        rows.push(
            row("pc", "savevm")
                .by(Route::Savevm)
                .with("-drive file={dir}/disk.qcow2,if=none,id=q0 -device virtio-blk-pci,drive=q0"),
        );
    }
    for suite in since(Trixie) {
        let row = |machine: &str, what: &str| Scenario::new(suite, machine, what);
        rows.push(row("microvm", "file").by(Route::File { offset: 0 }));
        rows.push(row("q35", "file-offset").by(Route::File { offset: 8192 }).quick());
        rows.push(row("q35", "switchover-ack").by(Route::Peer).caps("return-path switchover-ack"));
    }
    rows
}

/// TCG of 5.2 and 7.2 loses pages after a second synchronisation, so that their live rows run under KVM.
fn live(suite: Suite, machine: &str, what: &str) -> Scenario {
    let row = Scenario::new(suite, machine, what).parameter("max-bandwidth", SLOW);
    match suite {
        Bullseye | Bookworm => row.kvm().dirtying(1536, 1, 4),
        Trixie | Sid => row.dirtying(1536, 2000, 4),
    }
}

fn xbzrle() -> Vec<Scenario> {
    let mut rows = Vec::new();
    for suite in Suite::ALL {
        let row = live(suite, "microvm", "live-xbzrle").caps("xbzrle");
        rows.push(if suite == Sid { row.quick() } else { row });
        rows.push(
            live(suite, "microvm", "live-xbzrle-small-cache").caps("xbzrle").parameter("xbzrle-cache-size", 2 << 20),
        );
        rows.push(live(suite, "microvm", "live-dirtying"));
    }
    rows
}

fn multifd() -> Vec<Scenario> {
    let mut rows = Vec::new();
    for suite in Suite::ALL {
        for (channels, method) in
            [(1, "none"), (2, "none"), (4, "none"), (2, "zlib"), (4, "zlib"), (2, "zstd"), (4, "zstd")]
        {
            // Debian's 5.2 is built without zstd.
            if suite == Bullseye && method == "zstd" {
                continue;
            }
            let machine = if channels == 4 { "q35" } else { "microvm" };
            let row = Scenario::new(suite, machine, &format!("multifd-{method}-{channels}"))
                .by(Route::Unix)
                .caps("multifd")
                .parameter("multifd-channels", channels)
                .parameter("multifd-compression", method);
            rows.push(if channels == 2 && suite != Bullseye { row.quick() } else { row });
        }
    }
    for suite in since(Trixie) {
        for method in ["none", "zlib", "zstd"] {
            let row = live(suite, "microvm", &format!("live-multifd-{method}"))
                .by(Route::Unix)
                .caps("multifd")
                .parameter("multifd-channels", 2)
                .parameter("multifd-compression", method)
                .parameter("max-bandwidth", if method == "none" { SLOW } else { SLOW_COMPRESSED });
            rows.push(if method == "none" { row.quick() } else { row });
        }
        for mode in ["none", "legacy", "multifd"] {
            rows.push(
                live(suite, "q35", &format!("live-multifd-zero-page-{mode}"))
                    .by(Route::Unix)
                    .caps("multifd")
                    .parameter("multifd-channels", 3)
                    .parameter("zero-page-detection", mode),
            );
            rows.push(
                Scenario::new(suite, "microvm", &format!("zero-page-{mode}")).parameter("zero-page-detection", mode),
            );
        }
        rows.push(
            live(suite, "microvm", "live-multifd-flush-each-section")
                .by(Route::Unix)
                .caps("multifd")
                .with("-global migration.multifd-flush-after-each-section=on"),
        );
        rows.push(live(suite, "q35", "live-multifd-peer").by(Route::Peer).caps("multifd return-path"));
        rows.push(live(suite, "pc-q35-8.0", "live-multifd").by(Route::Unix).caps("multifd"));
        rows.push(
            live(suite, "pc-i440fx-7.2", "live-multifd-zlib")
                .by(Route::Tcp)
                .caps("multifd")
                .parameter("max-bandwidth", SLOW_COMPRESSED)
                .parameter("multifd-compression", "zlib"),
        );
    }
    rows
}

fn mapped_ram() -> Vec<Scenario> {
    let mut rows = Vec::new();
    let file = Route::File { offset: 0 };
    for suite in since(Trixie) {
        for machine in ["microvm", "q35", "pc"] {
            let row = Scenario::new(suite, machine, "mapped-ram").by(file).caps("mapped-ram");
            rows.push(if machine == "q35" { row.quick() } else { row });
            rows.push(
                Scenario::new(suite, machine, "mapped-ram-multifd")
                    .by(file)
                    .caps("mapped-ram multifd")
                    .parameter("multifd-channels", 2),
            );
        }
        rows.push(
            Scenario::new(suite, "q35", "mapped-ram-offset").by(Route::File { offset: 1 << 20 }).caps("mapped-ram"),
        );
        rows.push(live(suite, "microvm", "live-mapped-ram").by(file).caps("mapped-ram"));
        rows.push(live(suite, "microvm", "live-mapped-ram-multifd").by(file).caps("mapped-ram multifd").quick());
        rows.push(Scenario::new(suite, "q35", "mapped-ram-vga").by(file).caps("mapped-ram").with("-device VGA -m 48"));
    }
    rows
}

fn postcopy() -> Vec<Scenario> {
    let mut rows = Vec::new();
    for suite in Suite::ALL {
        let row = |machine: &str, what: &str, route: Route| {
            Scenario::new(suite, machine, what)
                .by(route)
                .caps("postcopy-ram")
                .parameter("max-bandwidth", SLOW)
                .dirtying(2048, 500, 1)
        };
        let slow = |s: Scenario| s.parameter("max-postcopy-bandwidth", 2 << 20);
        // So slow in the background that the guest asks for pages, on a machine that lets it wait, too.
        let plain = row("microvm", "postcopy", Route::Postcopy).parameter("max-postcopy-bandwidth", 4 << 20);
        rows.push(if suite == Sid { plain.quick() } else { plain });
        rows.push(row("q35", "postcopy", Route::Postcopy).with("-device VGA -device virtio-rng-pci"));
        rows.push(slow(row("microvm", "postcopy-recovery", Route::PostcopyRecovery)));
        if suite != Bullseye {
            // A slow background makes the destination ask for pages, which is what the preempt channel is for.
            let urgent = row("microvm", "postcopy-preempt", Route::Postcopy).caps("postcopy-preempt");
            rows.push(urgent.parameter("max-postcopy-bandwidth", 8 << 20));
            rows.push(slow(row("q35", "postcopy-preempt-recovery", Route::PostcopyRecovery).caps("postcopy-preempt")));
        }
        if suite == Sid {
            rows.push(
                row("microvm", "postcopy-multifd", Route::Postcopy).caps("multifd").parameter("multifd-channels", 2),
            );
            rows.push(
                row("q35", "postcopy-multifd-preempt", Route::Postcopy)
                    .caps("multifd postcopy-preempt")
                    .parameter("max-postcopy-bandwidth", 8 << 20)
                    .parameter("multifd-channels", 2),
            );
        }
    }
    rows
}

fn others() -> Vec<Scenario> {
    let mut rows = Vec::new();
    for suite in Suite::ALL {
        let row = |machine: &str, what: &str| Scenario::new(suite, machine, what);
        rows.push(row("q35", "validate-uuid").caps("validate-uuid").with("-uuid 2bbd4b29-9d2b-4e0b-9d0e-1f3f6f0e7a11"));
        let shared = row("q35", "ignore-shared").caps("x-ignore-shared").with(
            "-object memory-backend-file,id=pc.ram,size=32M,mem-path={dir}/shared.ram,share=on -M memory-backend=pc.ram",
        );
        rows.push(if suite == Trixie { shared.quick() } else { shared });
        rows.push(
            row("pc", "dirty-bitmaps")
                .caps("dirty-bitmaps")
                .with("-drive file={dir}/disk.qcow2,if=none,id=q0,node-name=n0 -device virtio-blk-pci,drive=q0")
                .before("block-dirty-bitmap-add", json!({"node": "n0", "name": "backup", "granularity": 65536}))
                .before("block-dirty-bitmap-add", json!({"node": "n0", "name": "kept", "persistent": true})),
        );
        rows.push(row("microvm", "no-global-state").with("-global migration.store-global-state=off"));
        rows.push(row("pc", "no-footers").with("-global migration.send-section-footer=off"));
    }
    for suite in [Bullseye, Bookworm] {
        let row = |machine: &str, what: &str| Scenario::new(suite, machine, what);
        let compress = row("microvm", "compress").caps("compress").parameter("compress-threads", 2);
        rows.push(if suite == Bookworm { compress.quick() } else { compress });
        rows.push(row("q35", "compress-level-9").caps("compress").parameter("compress-level", 9));
        rows.push(
            row("pc", "block-migration")
                .with("-drive file={dir}/disk.raw,if=none,id=d0,format=raw -device virtio-blk-pci,drive=d0")
                .migrate_with("blk", true),
        );
    }
    for suite in since(Bookworm) {
        let row = |machine: &str, what: &str| Scenario::new(suite, machine, what);
        let snapshot = row("microvm", "background-snapshot").caps("background-snapshot");
        rows.push(if suite == Sid { snapshot.quick() } else { snapshot });
        rows.push(row("q35", "background-snapshot").caps("background-snapshot").by(Route::Unix).with("-device VGA"));
    }
    for suite in since(Trixie) {
        rows.push(
            Scenario::new(suite, "microvm", "no-switchover-start").with("-global migration.send-switchover-start=off"),
        );
    }
    rows
}
