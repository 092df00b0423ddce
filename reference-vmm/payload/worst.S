# A guest that does its worst to whoever runs it: with key worst, the vCPUs do no work but this, for ever.
#
#  * Every queue of every virtio device gets as many requests as it takes, again as soon as they come back, and a notification for each
#    register that the driver writes. The disk feeds itself: each request reads a sector over the available index and its own header,
#    so that there is always one more.
#  * Registers get values that cannot be, ports get strings, fw_cfg copies 1 MiB at a time, the PIT is asked for a tick every 1.7 us.
#  * Every 64 rounds the first vCPU resets all devices, whatever they are at.

    .code64
    .set WORST_COUNT,   0x37fff8   # queues
    .set WORST_TABLE,   0x380000   # a block of ENTRY bytes for each, fields E_*
    .set ENTRY,         0x40
    .set E_MMIO,        0x00
    .set E_QUEUE,       0x08
    .set E_NUM,         0x10
    .set E_KIND,        0x18       # device number
    .set E_DESC,        0x20
    .set E_AVAIL,       0x28
    .set E_USED,        0x30
    .set WORST_MEMORY,  0x400000   # WORST_QUEUE bytes for each: rings, buffers
    .set WORST_QUEUE,   0x10000
    .set WORST_BUFFERS, 0x8000
    .set WORST_SCRATCH, 0x600000
    .set WORST_TARGET,  0x800000
    .set WORST_QUEUES,  6          # of a device
    .set DEVICE_NET,    1
    .set DEVICE_BLOCK,  2
    .set DEVICE_SERIAL, 3
    .set DEVICE_RNG,    4
    .set FW_CFG_DMA,    0x514

# Finds all devices, resets them and fills their queues.
worst_set_up:
    mov qword ptr [WORST_COUNT], 0
    mov r12d, VIRTIO_SLOTS
1:  dec r12d
    js 9f
    mov r13d, r12d
    imul r13d, r13d, VIRTIO_STRIDE
    mov eax, VIRTIO_BASE
    add r13, rax
    mov eax, [r13]
    cmp eax, VIRTIO_MAGIC
    jne 1b
    mov r11d, [r13 + 8]
    test r11d, r11d
    jz 1b
    mov dword ptr [r13 + 0x70], 0  # reset
    mov dword ptr [r13 + 0x70], 3
    mov ecx, 1 << 11               # disk: the write cache is the guest's to switch
    cmp r11d, DEVICE_BLOCK
    je 2f
    mov ecx, 1 << 1                # serial: several ports
    cmp r11d, DEVICE_SERIAL
    je 2f
    mov ecx, 3 << 17               # network: the control queue and its receive modes
    cmp r11d, DEVICE_NET
    je 2f
    xor ecx, ecx
2:  mov dword ptr [r13 + 0x24], 0
    mov [r13 + 0x20], ecx
    mov dword ptr [r13 + 0x28], 4096
    xor r10d, r10d
3:  mov [r13 + 0x30], r10d
    mov eax, [r13 + 0x34]
    test eax, eax
    jz 4f
    call worst_queue
    inc r10d
    cmp r10d, WORST_QUEUES
    jb 3b
4:  mov dword ptr [r13 + 0x70], 7
    jmp 1b
9:  ret

# r13 = transport, r11d = device number, r10d = queue, eax = its size
worst_queue:
    mov [r13 + 0x38], eax
    mov dword ptr [r13 + 0x3c], 4096
    mov rcx, [WORST_COUNT]
    mov rbx, rcx
    shl rbx, 6
    add rbx, WORST_TABLE
    shl rcx, 16
    add rcx, WORST_MEMORY
    mov [rbx + E_MMIO], r13
    mov [rbx + E_QUEUE], r10
    mov [rbx + E_NUM], rax
    mov [rbx + E_KIND], r11
    mov [rbx + E_DESC], rcx
    mov rdi, rcx
    mov edx, eax
    shl edx, 4
    add rcx, rdx
    mov [rbx + E_AVAIL], rcx
    lea rcx, [rcx + rax * 2 + 6 + 0xfff]
    and rcx, -4096
    mov [rbx + E_USED], rcx
    # Everything zero, then the descriptors.
    mov r9, rax
    xor eax, eax
    mov ecx, WORST_QUEUE / 8
    rep stosq
    mov rdi, [rbx + E_DESC]
    lea rsi, [rdi + WORST_BUFFERS]
    mov r8, [rbx + E_AVAIL]
    cmp r11d, DEVICE_BLOCK
    jne 1f
    .macro DESCRIPTOR at, address, len, flags, next
    lea rax, \address
    mov [rdi + \at * 16], rax
    mov dword ptr [rdi + \at * 16 + 8], \len
    mov word ptr [rdi + \at * 16 + 12], \flags
    mov word ptr [rdi + \at * 16 + 14], \next
    .endm
    DESCRIPTOR 0, [rsi], 16, 1, 1
    DESCRIPTOR 1, [r8 + 2], 2, 3, 2
    DESCRIPTOR 2, [rsi], 16, 3, 3
    DESCRIPTOR 3, [rsi + 0x100], 494, 3, 4
    DESCRIPTOR 4, [rsi + 0x400], 1, 2, 0
    mov word ptr [r8 + 2], 1
    jmp 7f
1:  # What the device writes: random numbers, even queues of serial ports, frames that come.
    mov edx, 2
    cmp r11d, DEVICE_RNG
    je 2f
    test r10d, 1
    jnz 5f
    cmp r11d, DEVICE_NET
    jne 2f
    test r10d, r10d
    jz 2f
5:  xor edx, edx
2:  xor ecx, ecx
3:  mov [rdi], rsi
    mov dword ptr [rdi + 8], 0x100
    mov [rdi + 12], dx
    mov [r8 + rcx * 2 + 4], cx
    cmp r10d, 3
    jne 6f
    # Control messages of a serial bus: port, event, value.
    mov eax, ecx
    and eax, 1
    mov [rsi], eax
    mov eax, ecx
    and eax, 7
    or eax, 0x10000
    mov [rsi + 4], eax
6:  cmp r11d, DEVICE_NET
    jne 4f
    cmp r10d, 2
    jne 4f
    # Commands of a network card: each with room for its answer.
    mov word ptr [rdi + 12], 1
    lea eax, [rcx + 1]
    mov [rdi + 14], ax
    test ecx, 1
    jz 4f
    mov word ptr [rdi + 12], 2
    lea eax, [rcx - 1]
    mov [r8 + rcx * 2 + 4], ax
4:  add rdi, 16
    lea eax, [rcx + 1]
    and eax, 63
    shl eax, 8
    mov rsi, [rbx + E_DESC]
    lea rsi, [rsi + rax + WORST_BUFFERS]
    inc ecx
    cmp ecx, r9d
    jb 3b
    mov [r8 + 2], r9w
7:  mov rax, [rbx + E_DESC]
    shr rax, 12
    mov [r13 + 0x40], eax
    inc qword ptr [WORST_COUNT]
    ret

# r15 = own block
worst:
    xor r14d, r14d
worst_again:
    inc r14
    mov ebx, WORST_TABLE
    mov rbp, [WORST_COUNT]
1:  dec rbp
    js 3f
    mov r13, [rbx + E_MMIO]
    cmp qword ptr [rbx + E_KIND], DEVICE_BLOCK
    je 2f
    mov rdi, [rbx + E_USED]
    movzx eax, word ptr [rdi + 2]
    add eax, [rbx + E_NUM]
    mov rdi, [rbx + E_AVAIL]
    mov [rdi + 2], ax
2:  mov eax, [rbx + E_QUEUE]
    mov [r13 + 0x50], eax          # notify
    mov dword ptr [r13 + 0x3c], 3  # an alignment that cannot be
    mov [r13 + 0x50], eax
    mov dword ptr [r13 + 0x38], -1 # a size that cannot be
    mov dword ptr [r13 + 0x64], 3
    mov ecx, [r13 + 0x100]
    mov [r13 + 0x108], r14d        # serial: emergency output
    mov [r13 + 0x120], r14b        # disk: write cache on and off
    mov dword ptr [r13 + 0x50], 77
    add rbx, ENTRY
    jmp 1b
3:  # The serial port, without a look at it.
    mov dx, COM1
    mov esi, CODE
    mov ecx, 512
    rep outsb
    mov dx, COM1 + 1
    mov al, 15
    out dx, al
    mov dx, COM1 + 4
    mov eax, r14d
    out dx, al
    mov dx, COM1
    mov edi, WORST_SCRATCH
    mov ecx, 512
    rep insb
    # fw_cfg, by its port and by DMA.
    mov dx, FW_CFG_SEL
    mov ax, FW_CFG_FILE_DIR
    out dx, ax
    mov dx, FW_CFG_DATA
    mov edi, WORST_SCRATCH
    mov ecx, 512
    rep insb
    mov edi, WORST_SCRATCH
    mov dword ptr [rdi], 0x0a001900    # big-endian: read, select the directory
    mov dword ptr [rdi + 4], 0x00001000    # 1 MiB
    mov dword ptr [rdi + 8], 0
    mov dword ptr [rdi + 12], 0x00008000   # WORST_TARGET
    mov dx, FW_CFG_DMA
    xor eax, eax
    out dx, eax
    mov dx, FW_CFG_DMA + 4
    mov eax, WORST_SCRATCH
    bswap eax
    out dx, eax
    # PIT, clock, and a port that is nobody's.
    mov al, 0x34
    out 0x43, al
    mov al, 2
    out 0x40, al
    xor eax, eax
    out 0x40, al
    out 0x70, al
    in al, 0x71
    out 0x80, al
    mov edx, IOAPIC2
    mov [rdx], r14d
    mov eax, [rdx + 0x10]
    cmp qword ptr [r15 + P_ID], 0
    jne worst_again
    test r14d, 63
    jnz worst_again
    call worst_set_up
    jmp worst_again
