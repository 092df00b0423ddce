# SPDX-License-Identifier: MIT OR Apache-2.0
#
# The payload guest: a 64 KiB firmware image that notices when a migration loses a page.
#
# It starts at the reset vector, enters long mode, drops to ring 3 with I/O privilege and then, on every vCPU,
#  * rewrites a range of pages pass after pass; before a page is rewritten it must hold exactly what the
#    previous pass left there ("hot" pages, work.S),
#  * re-reads in the background a range of pseudo-random pages written once ("hold") and a range of pages
#    never written at all ("zero"),
#  * watches that the TSC never runs backwards and that its timer interrupt keeps coming,
#  * if asked to, keeps virtio devices busy with numbered requests (virtio.S), checks the PCI bus's host bridge
#    (pci.S), keeps the lab's test devices busy (pci_device.S), and measures how long reads of pages at random take (reader.S),
#  * reports on COM1.
# Everything that takes time happens in ring 3: a paravirtual KVM runs that natively and emulates the rest.
#
# With key worst it does nothing of this, and its worst to the monitor instead (worst.S).
#
# Read: layout.S (memory map), boot.S (reset vector to ring 3), config.S (fw_cfg), smp.S (start), work.S, report.S,
# reset.S, virtio.S, pci.S, pci_device.S, reader.S.

    .intel_syntax noprefix
    .text
    .include "layout.S"

    .globl image
image:
    # A SIPI with vector 0xf0 starts an application processor at f000:0000, the first byte of the image.
    .include "boot.S"
    .include "trap.S"
    .include "config.S"
    .include "smp.S"
    .include "work.S"
    .include "report.S"
    .include "reset.S"
    .include "virtio.S"
    .include "pci.S"
    .include "pci_device.S"
    .include "reader.S"
    .include "worst.S"
    .include "serial.S"
image_used_end:

    .code16
    .org 0xfff0
reset_vector:
    jmp bsp_entry
    .org 0x10000
