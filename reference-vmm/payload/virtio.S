# A driver of virtio-mmio devices that never rests: the first vCPU keeps a batch of numbered requests going on each device.
#
#  * disk: writes numbered sectors, reads them back and compares; word k of sector number n is n + k * VIRTIO_STEP,
#    and it lies at n modulo the disk's size,
#  * random numbers: takes 32 bytes, which must be others than the last,
#  * console: writes numbered lines of 16 hexadecimal digits,
#  * network: sends numbered frames.
#
# Every batch has to come back whole, each request once. Rings are polled; interrupts are counted. Legacy transports only.

    .code64
    .set VIRTIO_BASE,   0xfeb00000
    .set VIRTIO_STRIDE, 0x200
    .set VIRTIO_SLOTS,  24
    .set IOAPIC2,       0xfec10000
    .set VIRTIO_MAGIC,  0x74726976
    .set VIRTIO_STEP,   0x9e3779b9
    .set EVENT_IDX,     1 << 29

    .set BATCH,         4          # requests of a batch

    # A device, addressed by r14.
    .set D_KIND,        0x00
    .set D_MMIO,        0x08       # 0 = none
    .set D_DESC,        0x10       # its queue
    .set D_AVAIL,       0x18
    .set D_USED,        0x20
    .set D_BUFFERS,     0x28
    .set D_NUM,         0x30       # descriptors
    .set D_QUEUE,       0x38
    .set D_SUBMITTED,   0x40       # available index
    .set D_SEEN,        0x48       # used index
    .set D_NEXT,        0x50       # number of the next request
    .set D_FLYING,      0x58       # requests of the batch under way, 0 = none
    .set D_STEP,        0x60       # descriptors of a request
    .set D_READING,     0x68       # disk: the batch reads back
    .set D_SIZE,        0x70       # disk: sectors; network: bytes of the header
    .set D_EVENTS,      0x78       # VIRTIO_RING_F_EVENT_IDX is in use
    .set DEVICE_SIZE,   0x80

    .set KINDS,         4
    .set KIND_BLOCK,    0
    .set KIND_RNG,      1
    .set KIND_CONSOLE,  2
    .set KIND_NET,      3

    .set BUFFER,        0x400      # bytes for each request of a batch
    .set B_STATUS,      0x20
    .set B_DATA,        0x100

# Finds the devices that were asked for and starts them.
virtio_start:
    mov edi, VIRTIO_DEVICES
    xor eax, eax
    mov ecx, (KINDS * DEVICE_SIZE + 0x40) / 8
    rep stosq
    mov qword ptr [V_ERRORS], 0
    xor eax, eax
    mov edi, C_VIRTIO
    call default
    xor eax, eax
    mov edi, C_EVENTS
    call default
    cmp qword ptr [C_VIRTIO], 0
    je 9f
    mov edi, IDT + 16 * VEC_VIRTIO
    lea rsi, [rip + virtio_interrupt]
    mov dl, 0x8e
    call gate
    mov r12d, VIRTIO_SLOTS
1:  dec r12d
    js 9f
    mov r13d, r12d
    imul r13d, r13d, VIRTIO_STRIDE
    add r13d, VIRTIO_BASE
    mov eax, [r13]
    cmp eax, VIRTIO_MAGIC
    jne 1b
    mov eax, [r13 + 4]             # version
    cmp eax, 1
    jne 1b
    mov eax, [r13 + 8]             # device number
    mov ebx, KIND_BLOCK
    cmp eax, 2
    je 2f
    mov ebx, KIND_RNG
    cmp eax, 4
    je 2f
    mov ebx, KIND_CONSOLE
    cmp eax, 3
    je 2f
    mov ebx, KIND_NET
    cmp eax, 1
    jne 1b
2:  bt [C_VIRTIO], ebx
    jnc 1b
    mov r14d, ebx
    imul r14d, r14d, DEVICE_SIZE
    add r14d, VIRTIO_DEVICES
    cmp qword ptr [r14 + D_MMIO], 0
    jne 1b                         # one of a kind is enough
    call virtio_set_up
    # Its interrupt: a pin of the second IOAPIC, edge triggered, to the first vCPU.
    mov edx, IOAPIC2
    lea eax, [r12 * 2 + 0x11]
    mov [rdx], eax
    mov dword ptr [rdx + 0x10], 0
    lea eax, [r12 * 2 + 0x10]
    mov [rdx], eax
    mov dword ptr [rdx + 0x10], VEC_VIRTIO
    jmp 1b
9:  ret

# r14 = device, r13 = transport, ebx = kind
virtio_set_up:
    mov [r14 + D_KIND], rbx
    mov qword ptr [r14 + D_NEXT], 1
    mov dword ptr [r13 + 0x70], 0  # reset
    mov dword ptr [r13 + 0x70], 3  # acknowledge, driver
    mov dword ptr [r13 + 0x14], 0
    mov eax, [r13 + 0x10]
    # Mergeable buffers make the network header longer; no other feature of the devices matters.
    mov ecx, EVENT_IDX
    xor edx, edx
    cmp qword ptr [C_EVENTS], 0
    cmove ecx, edx
    and eax, ecx
    mov [r14 + D_EVENTS], rax
    mov dword ptr [r13 + 0x24], 0
    mov [r13 + 0x20], eax
    mov dword ptr [r13 + 0x28], 4096
    # Sizes: a queue, a step, and what the kind needs.
    mov ecx, 8
    mov edx, 1
    xor esi, esi
    cmp ebx, KIND_RNG
    je 1f
    mov esi, 1                     # console, network: the transmit queue
    mov qword ptr [r14 + D_SIZE], 10
    cmp ebx, KIND_BLOCK
    jne 1f
    mov ecx, 16
    mov edx, 3
    xor esi, esi
    mov eax, [r13 + 0x104]
    shl rax, 32
    mov edi, [r13 + 0x100]
    or rax, rdi
    mov [r14 + D_SIZE], rax
1:  mov [r14 + D_NUM], rcx
    mov [r14 + D_STEP], rdx
    mov [r14 + D_QUEUE], rsi
    mov eax, ebx
    shl eax, 16
    add eax, VIRTIO_MEMORY
    mov [r14 + D_DESC], rax
    mov rdx, rcx
    shl rdx, 4
    add rdx, rax
    mov [r14 + D_AVAIL], rdx
    lea rdx, [rax + 0x1000]
    mov [r14 + D_USED], rdx
    lea rdx, [rax + 0x4000]
    mov [r14 + D_BUFFERS], rdx
    mov rdi, rax
    push rax
    push rcx
    xor eax, eax
    mov ecx, 0x8000 / 8
    rep stosq
    pop rcx
    pop rax
    mov [r13 + 0x30], esi          # queue
    mov [r13 + 0x38], ecx
    mov dword ptr [r13 + 0x3c], 4096
    shr eax, 12
    mov [r13 + 0x40], eax
    mov dword ptr [r13 + 0x70], 7  # driver ready
    mov [r14 + D_MMIO], r13
    ret

# Looks at every device: takes what has come back and sends the next batch. Changes rax, rcx, rdx, rsi, rdi, r8-r11.
virtio_poll:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    mov r14d, VIRTIO_DEVICES
1:  mov r13, [r14 + D_MMIO]
    test r13, r13
    jz 2f
    call virtio_device
2:  add r14, DEVICE_SIZE
    cmp r14, VIRTIO_DEVICES + KINDS * DEVICE_SIZE
    jb 1b
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

virtio_device:
    mov rbp, [r14 + D_FLYING]
    test rbp, rbp
    jz virtio_send
    mov rdi, [r14 + D_USED]
    movzx eax, word ptr [rdi + 2]
    mov ecx, [r14 + D_SEEN]
    sub ax, cx
    movzx eax, ax
    cmp eax, ebp
    jb 9f                          # not all there yet
    lea rsi, [rip + virtio_repeated]
    ja virtio_error
    # Each request once, by the descriptor it begins with.
    xor ebx, ebx
1:  mov eax, [r14 + D_SEEN]
    xor edx, edx
    movzx eax, ax
    div dword ptr [r14 + D_NUM]
    mov eax, [rdi + rdx * 8 + 4]
    xor edx, edx
    div dword ptr [r14 + D_STEP]
    lea rsi, [rip + virtio_wrong_id]
    test edx, edx
    jnz virtio_error
    cmp eax, [r14 + D_FLYING]
    jae virtio_error
    bts ebx, eax
    jc virtio_error
    inc word ptr [r14 + D_SEEN]
    dec ebp
    jnz 1b
    # The interrupt is acknowledged before the next request can raise another.
    mov eax, [r13 + 0x60]
    test eax, eax
    jz 2f
    mov [r13 + 0x64], eax
2:  # What came back.
    mov rax, [r14 + D_KIND]
    xor r12d, r12d
    cmp eax, KIND_BLOCK
    je virtio_check_disk
    cmp eax, KIND_RNG
    je virtio_check_rng
virtio_done:
    mov rax, [r14 + D_FLYING]
    add [r14 + D_NEXT], rax
virtio_send:
    mov rax, [r14 + D_KIND]
    xor r12d, r12d                 # request of the batch
    cmp eax, KIND_BLOCK
    je virtio_send_disk
    cmp eax, KIND_RNG
    je virtio_send_rng
    cmp eax, KIND_CONSOLE
    je virtio_send_lines
    jmp virtio_send_frames
9:  ret

# rbp = buffers of request r12, r10 = its number, r8 = its first descriptor
virtio_request:
    mov rbp, r12
    imul rbp, rbp, BUFFER
    add rbp, [r14 + D_BUFFERS]
    mov r10, [r14 + D_NEXT]
    add r10, r12
    mov r8, r12
    imul r8, [r14 + D_STEP]
    ret

# Writes descriptor r8: rax = address, ecx = bytes, edx = flags (1 next, 2 written by the device); r8 = the next
virtio_descriptor:
    mov r9, r8
    shl r9, 4
    add r9, [r14 + D_DESC]
    mov [r9], rax
    mov [r9 + 8], ecx
    inc r8
    mov [r9 + 12], dx
    mov [r9 + 14], r8w
    ret

# Makes the requests whose first descriptors are multiples of the step available; r12 = how many
virtio_submit:
    mov [r14 + D_FLYING], r12
    mov rdi, [r14 + D_AVAIL]
    mov r11d, [r14 + D_SUBMITTED]  # old index
    xor ecx, ecx
1:  movzx eax, r11w
    add ax, cx
    movzx eax, ax
    xor edx, edx
    div dword ptr [r14 + D_NUM]
    mov eax, ecx
    imul eax, [r14 + D_STEP]
    mov [rdi + rdx * 2 + 4], ax
    inc ecx
    cmp ecx, r12d
    jb 1b
    cmp qword ptr [r14 + D_EVENTS], 0
    je 2f
    # Interrupt for the last request of the batch.
    mov eax, [r14 + D_NUM]
    mov edx, [r14 + D_SEEN]
    lea edx, [rdx + rcx - 1]
    mov [rdi + rax * 2 + 4], dx
2:  add cx, r11w                   # new index
    mov [r14 + D_SUBMITTED], cx
    mov [rdi + 2], cx
    mfence
    cmp qword ptr [r14 + D_EVENTS], 0
    je 3f
    # Tell the device only if it asked for one of these: new - event - 1 < new - old, modulo 2^16.
    mov eax, [r14 + D_NUM]
    mov rdi, [r14 + D_USED]
    movzx edx, word ptr [rdi + rax * 8 + 4]
    mov eax, ecx
    sub ax, dx
    dec ax
    sub cx, r11w
    cmp ax, cx
    jae 4f
3:  mov eax, [r14 + D_QUEUE]
    mov [r13 + 0x50], eax
4:  ret

# Disk: a batch is written first, then the same sectors are read.
virtio_send_disk:
1:  call virtio_request
    mov eax, [r14 + D_READING]
    xor eax, 1                     # 1 = write, 0 = read
    mov [rbp], eax
    mov dword ptr [rbp + 4], 0
    mov rax, r10
    xor edx, edx
    div qword ptr [r14 + D_SIZE]
    mov [rbp + 8], rdx
    mov byte ptr [rbp + B_STATUS], 0xff
    lea rdi, [rbp + B_DATA]
    xor ecx, ecx
    cmp dword ptr [rbp], 0
    je 3f
2:  call virtio_word
    mov [rdi + rcx * 8], rax
    inc ecx
    cmp ecx, 64
    jb 2b
    jmp 4f
3:  mov [rdi + rcx * 8], r10       # other contents than those to be read
    inc ecx
    cmp ecx, 64
    jb 3b
    not qword ptr [rdi]
4:  mov rax, rbp
    mov ecx, 16
    mov edx, 1
    call virtio_descriptor
    lea rax, [rbp + B_DATA]
    mov ecx, 512
    mov edx, [r14 + D_READING]
    lea edx, [rdx * 2 + 1]
    call virtio_descriptor
    lea rax, [rbp + B_STATUS]
    mov ecx, 1
    mov edx, 2
    call virtio_descriptor
    inc r12d
    cmp r12d, BATCH
    jb 1b
    jmp virtio_submit

# rax = word rcx of number r10
virtio_word:
    mov eax, VIRTIO_STEP
    imul rax, rcx
    add rax, r10
    ret

virtio_check_disk:
1:  call virtio_request
    cmp byte ptr [rbp + B_STATUS], 0
    lea rsi, [rip + virtio_failed]
    jne virtio_error
    cmp qword ptr [r14 + D_READING], 0
    je 3f
    lea rdi, [rbp + B_DATA]
    lea rsi, [rip + virtio_contents]
    xor ecx, ecx
2:  call virtio_word
    cmp [rdi + rcx * 8], rax
    jne virtio_error
    inc ecx
    cmp ecx, 64
    jb 2b
3:  inc r12d
    cmp r12d, [r14 + D_FLYING]
    jb 1b
    xor qword ptr [r14 + D_READING], 1
    jz virtio_done
    jmp virtio_send

virtio_send_rng:
    call virtio_request
    lea rdi, [rbp + B_DATA]
    xor eax, eax
    mov ecx, 4
    mov rax, [rdi]
    mov [rdi + 0x20], rax          # what came last
    xor eax, eax
    rep stosq
    lea rax, [rbp + B_DATA]
    mov ecx, 32
    mov edx, 2
    call virtio_descriptor
    inc r12d
    jmp virtio_submit

virtio_check_rng:
    call virtio_request
    lea rsi, [rip + virtio_contents]
    mov rax, [rbp + B_DATA]
    test rax, rax
    jz virtio_error
    cmp rax, [rbp + B_DATA + 0x20]
    je virtio_error
    jmp virtio_done

virtio_send_lines:
1:  call virtio_request
    lea rdi, [rbp + B_DATA]
    mov ecx, 16
2:  rol r10, 4
    mov al, r10b
    and al, 15
    add al, '0'
    cmp al, '9'
    jbe 3f
    add al, 'a' - '9' - 1
3:  stosb
    dec ecx
    jnz 2b
    mov byte ptr [rdi], 10
    lea rax, [rbp + B_DATA]
    mov ecx, 17
    xor edx, edx
    call virtio_descriptor
    inc r12d
    cmp r12d, BATCH
    jb 1b
    jmp virtio_submit

# A header of zeroes, then a broadcast of an experimental protocol with the number.
virtio_send_frames:
1:  call virtio_request
    lea rdi, [rbp + B_DATA]
    mov rcx, [r14 + D_SIZE]
    xor eax, eax
    rep stosb
    mov rax, 0xffffffffffff
    mov [rdi], rax
    mov rax, 0x563412005452
    mov [rdi + 6], rax
    mov word ptr [rdi + 12], 0xb588
    mov [rdi + 14], r10
    lea rax, [rbp + B_DATA]
    mov ecx, [r14 + D_SIZE]
    add ecx, 60
    xor edx, edx
    call virtio_descriptor
    inc r12d
    cmp r12d, BATCH
    jb 1b
    jmp virtio_submit

# rsi = what is wrong. The device is left alone from now on.
virtio_error:
    mov qword ptr [r14 + D_MMIO], 0
    inc qword ptr [V_ERRORS]
    push rsi
    call serial_lock
    lea rsi, [rip + virtio_error_begin]
    call puts
    mov rax, [r14 + D_KIND]
    call putdec
    lea rsi, [rip + virtio_error_number]
    call puts
    mov rax, [r14 + D_NEXT]
    call putdec
    mov al, ' '
    call putc
    pop rsi
    call puts
    call newline
    call serial_unlock
    ret

# Behind the progress line, with the serial line locked.
virtio_progress:
    cmp qword ptr [C_VIRTIO], 0
    je 1f
    lea rsi, [rip + virtio_progress_begin]
    call puts
    .macro REQUESTS text, kind
    lea rsi, [rip + \text]
    call puts
    mov rax, [VIRTIO_DEVICES + \kind * DEVICE_SIZE + D_NEXT]
    call putdec
    .endm
    REQUESTS virtio_name_disk, KIND_BLOCK
    REQUESTS virtio_name_rng, KIND_RNG
    REQUESTS virtio_name_console, KIND_CONSOLE
    REQUESTS virtio_name_net, KIND_NET
    FIELD virtio_name_interrupts, [V_INTERRUPTS]
    FIELD virtio_name_errors, [V_ERRORS]
    jmp newline
1:  ret

virtio_interrupt:
    push rax
    inc qword ptr [V_INTERRUPTS]
    mov eax, LAPIC
    mov dword ptr [rax + 0xb0], 0  # EOI
    pop rax
    iretq

virtio_error_begin:
    .asciz "qevm-payload virtio-error kind="
virtio_error_number:
    .asciz " number="
virtio_repeated:
    .asciz "more requests came back than were sent"
virtio_wrong_id:
    .asciz "a request came back that was not sent, or twice"
virtio_failed:
    .asciz "the device reports an error"
virtio_contents:
    .asciz "the device gave other data than expected"
virtio_progress_begin:
    .asciz "qevm-payload virtio"
virtio_name_disk:
    .asciz " disk="
virtio_name_rng:
    .asciz " rng="
virtio_name_console:
    .asciz " console="
virtio_name_net:
    .asciz " net="
virtio_name_interrupts:
    .asciz " interrupts="
virtio_name_errors:
    .asciz " errors="
