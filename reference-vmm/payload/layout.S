# Guest-physical memory used by the payload, below the ranges it is told to work on.

    .set GDT,          0x1000      # copied from the image, so that the CPU may mark TSS descriptors busy
    .set IDT,          0x2000      # 256 gates of 16 bytes
    .set TSS,          0x3000      # TSS_SIZE bytes per vCPU
    .set TSS_SIZE,     0x200
    .set IO_BITMAP,    0x68        # within a TSS
    .set IO_PORTS,     0x600       # ports that ring 3 may use
    .set TSS_LIMIT,    IO_BITMAP + IO_PORTS / 8
    .set CTRL,         0x4000      # one control block, fields C_*
    .set PERCPU,       0x5000      # PERCPU_SIZE bytes per vCPU, fields P_*
    .set PERCPU_SIZE,  0x200
    .set STACK0,       0x10000     # ring 0 stacks, STACK0_SIZE bytes per vCPU
    .set STACK0_SIZE,  0x1000
    .set STACK3,       0x20000     # ring 3 stacks, STACK3_SIZE bytes per vCPU
    .set STACK3_SIZE,  0x2000
    .set CONFIG_TEXT,  0x30000     # fw_cfg item opt/qevm/payload, at most CONFIG_MAX bytes
    .set CONFIG_MAX,   0x1000
    .set READ_TIMES,   0x32000     # READ_SLOTS counters of reads, by their time
    .set CODE,         0x40000     # copy of the image: ring 3 runs from RAM, see boot.S
    .set VIRTIO_DEVICES, 0x50000   # KINDS blocks of DEVICE_SIZE bytes, fields D_*
    .set V_INTERRUPTS, 0x50200     # interrupts of virtio devices
    .set V_ERRORS,     0x50208
    .set V_NEXT,       0x50210     # TSC before which the devices are left alone
    .set PCI_DEVICES,  0x51000     # MAX_PCI blocks of PCI_SIZE bytes, fields X_*
    .set PCI_SIZE,     0x100
    .set MAX_PCI,      4
    .set PCI_COUNT,    PCI_DEVICES + MAX_PCI * PCI_SIZE
    .set PCI_ROOM,     PCI_COUNT + 8   # address for the next BAR
    .set PCI_NEXT,     PCI_COUNT + 16  # TSC before which the devices are left alone
    .set PCI_STATE,    MAX_PCI * PCI_SIZE + 24
    .set VIRTIO_MEMORY, 0x60000    # 64 KiB of queues and buffers for each kind of device
    .set PML4,         0x100000
    .set PDPT,         0x101000
    .set PD,           0x102000    # one page for each GiB, up to MAX_GIB
    .set MAX_GIB,      512
    .set WORK_MIN,     0x400000    # first address that may be worked on: all of the above lies below
    .set LOW_RAM_MAX,  0xc0000000  # microvm puts RAM beyond 3 GiB at 4 GiB
    .set HIGH_RAM,     0x100000000
    .set ECAM,         0xe0000000  # configuration space of the PCI bus
    .set LAPIC,        0xfee00000
    .set ACPI_EVENTS,  0xfea00000  # selector of the generic event device
    .set ACPI_SLEEP,   0xfea00200
    .set ACPI_RESET,   0xfea00202
    .set MAX_CPUS,     4

    # Page table entry bits: present, writable, user, accessed, dirty; large page.
    .set PTE_TABLE,    0x27
    .set PTE_LARGE,    0xe7

    # Segment selectors.
    .set SEL_CODE32,   0x08
    .set SEL_DATA,     0x10
    .set SEL_CODE64,   0x18
    .set SEL_UDATA,    0x23
    .set SEL_UCODE64,  0x2b
    .set SEL_TSS,      0x30

    .set VEC_TIMER,    0x40
    .set VEC_VIRTIO,   0x41
    .set VEC_PCI,      0x60        # four vectors for each device

    .set COM1,         0x3f8
    .set FW_CFG_SEL,   0x510
    .set FW_CFG_DATA,  0x511

    # Control block.
    .set C_LOCK,       CTRL + 0x00 # serial line lock
    .set C_APS,        CTRL + 0x04 # application processors that reached 32-bit code
    .set C_GO,         CTRL + 0x08 # set once the configuration is final
    .set C_READY,      CTRL + 0x0c # vCPUs that have filled their range
    .set C_GAVE_UP,    CTRL + 0x14 # the next trap is fatal's way to stop: say nothing
    .set C_TSC_KHZ,    CTRL + 0x18
    .set C_NCPU,       CTRL + 0x70
    .set C_ROOM,       CTRL + 0x78 # characters that the transmitter takes without a look
    .set C_START,      CTRL + 0x20 # TSC when the work began
    .set C_RAM,        CTRL + 0x28 # bytes
    .set C_PAGES,      CTRL + 0x30 # hot pages of each vCPU
    .set C_HOLD_BASE,  CTRL + 0x38
    .set C_HOLD_PAGES, CTRL + 0x40
    .set C_ZERO_BASE,  CTRL + 0x48
    .set C_ZERO_PAGES, CTRL + 0x50
    .set C_STEP,       CTRL + 0x58 # TSC ticks between two batches of a paced vCPU, 0 = unpaced
    .set C_BG_STEP,    CTRL + 0x60 # TSC ticks between two background checks of a vCPU
    .set C_PRINT_STEP, CTRL + 0x68 # TSC ticks between two progress lines
    .set C_CATCH_UP,   CTRL + 0x200 # TSC ticks that a paced vCPU may be late and still make up for
    # Configuration, in the order of config_keys; all ones = not given.
    .set C_CONFIG,     CTRL + 0x80
    .set C_BASE,       C_CONFIG + 0x00
    .set C_DIRTY,      C_CONFIG + 0x08
    .set C_HOLD,       C_CONFIG + 0x10
    .set C_ZERO,       C_CONFIG + 0x18
    .set C_RATE,       C_CONFIG + 0x20
    .set C_REPORT,     C_CONFIG + 0x28
    .set C_VERIFY,     C_CONFIG + 0x30
    .set C_TIMER,      C_CONFIG + 0x38
    .set C_CPUS,       C_CONFIG + 0x40
    .set C_VIRTIO,     C_CONFIG + 0x48
    .set C_EVENTS,     C_CONFIG + 0x50
    .set C_RESET,      C_CONFIG + 0x58
    .set C_RESETS,     C_CONFIG + 0x60
    .set C_WAY,        C_CONFIG + 0x68
    .set C_BUTTON,     C_CONFIG + 0x70
    .set C_WORST,      C_CONFIG + 0x78
    .set C_PCI,        C_CONFIG + 0x80
    .set C_DMA,        C_CONFIG + 0x88
    .set C_DMA_PAGES,  C_CONFIG + 0x90
    .set C_READER,     C_CONFIG + 0x98
    .set CONFIG_COUNT, 20
    # Values of C_PCI, each with what those below it do but for another's interrupts.
    .set PCI_REGISTERS, 2
    .set PCI_INTX,     3
    .set PCI_MSI,      4
    .set PCI_MSIX,     5
    .set PCI_CHECKS,   CTRL + 0x218 # passes in which the PCI bus was checked
    .set READ_AT,      CTRL + 0x220 # page that was read last
    .set READ_MASK,    CTRL + 0x228
    .set READS,        CTRL + 0x230 # pages read
    # What a reset leaves alone, as it does all RAM.
    .set C_BOOTS,      CTRL + 0x208 # starts so far
    .set C_RESET_AT,   CTRL + 0x210 # TSC of the next reset, all ones = never

    # Per-vCPU block, addressed by r15.
    .set P_ID,         0x00
    .set P_PASS,       0x08        # last completed pass
    .set P_WRITTEN,    0x10        # hot pages written
    .set P_STALE,      0x18
    .set P_LINES,      0x20        # stale pages printed
    .set P_TSC,        0x28        # last TSC seen
    .set P_TSC_BACK,   0x30
    .set P_HELD,       0x38        # background pages checked
    .set P_HELD_PASS,  0x40        # complete rounds over hold and zero pages
    .set P_BG_PAGE,    0x48        # next background page
    .set P_BG_NEXT,    0x50        # TSC of the next background check
    .set P_PACE,       0x58        # TSC before which the next batch may not start
    .set P_PRINT_NEXT, 0x60
    .set P_TICKS,      0x68        # timer interrupts
    .set CATCH_UP_MS,  100
    .set PAGE_BATCH,   16          # hot pages between two looks at the clock
    .set STALE_LINES,  16          # stale pages each vCPU prints; the rest is only counted
