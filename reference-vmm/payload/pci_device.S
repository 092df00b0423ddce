# A driver of the lab's test device (conformance/lab/testdev) that never rests, for each that is on the bus: it places the BARs, turns
# memory and bus mastering on, and gives it pages of RAM to write numbers to. Then
#
#  * in each pass its configuration, its registers and its memory must be as they were left, and the counter goes up by one,
#  * each of the device's pages that is looked at must hold a number that the device has given it, the last one at least,
#  * interrupts are raised one at a time, by the next vector each: the next when the last one has come.
#
# What is otherwise counts as stale.

    .code64
    .set TEST_DEVICE,      0x00017e57
    .set TDEV,             0x76656474  # "tdev"
    .set LOW_WINDOW,       0xc0000000
    .set IOAPIC1,          0xfec00000
    .set FIRST_LINE,       16          # pin of the first IOAPIC
    .set LEVEL,            0x8000
    .set PCI_BARS,         0x10
    .set PCI_CAPABILITIES, 0x34
    .set PCI_PIN,          0x3d
    .set CAPABILITY_MSI,   0x05
    .set CAPABILITY_MSIX,  0x11
    .set INTX_DISABLE,     0x400
    .set VECTORS,          4
    .set LOST_MS,          5000        # an interrupt that has not come by then is lost
    .set DEFAULT_DMA_PAGES, 64
    .set DMA_AT_ONCE,      32          # pages looked at in a pass
    .set DMA_MAGIC,        0x616d6476656474
    .set DMA_TRIES,        100000      # the device may be writing

    # Registers of the device.
    .set R_COUNTER,        0x04
    .set R_SCRATCH,        0x08
    .set R_RAISE,          0x0c
    .set R_PENDING,        0x10
    .set R_RAISED,         0x14
    .set R_DMA_LOW,        0x18
    .set R_DMA_HIGH,       0x1c
    .set R_DMA_PAGES,      0x20
    .set R_DMA_DONE,       0x24

    # A device, addressed by r14.
    .set X_CONFIG,         0x00
    .set X_SLOT,           0x08
    .set X_REGISTERS,      0x10        # addresses of the BARs
    .set X_MEMORY,         0x18
    .set X_TABLE,          0x20
    .set X_CAPABILITY,     0x28        # address of the MSI or MSI-X capability, 0 = none
    .set X_CONTROL,        0x30        # what its control must be, but for read-only bits
    .set X_COMMAND,        0x38
    .set X_COUNTER,        0x40
    .set X_RAISED,         0x48        # interrupts raised
    .set X_TAKEN,          0x50        # and come
    .set X_OTHERS,         0x58        # come by another vector
    .set X_SPURIOUS,       0x60        # INTx: come without a cause
    .set X_DEADLINE,       0x68        # TSC
    .set X_DMA,            0x70        # first page, 0 = none
    .set X_DMA_NEXT,       0x78        # next page to be looked at
    .set X_DMA_CHECKED,    0x80

# Finds the devices and starts them; changes all but r15.
pci_devices_start:
    mov edi, PCI_DEVICES
    xor eax, eax
    mov ecx, PCI_STATE / 8
    rep stosq
    mov edi, C_DMA
    call default
    mov eax, DEFAULT_DMA_PAGES
    mov edi, C_DMA_PAGES
    call default
    cmp qword ptr [C_PCI], PCI_REGISTERS
    jb 9f
    lea rsi, [rip + pci_stubs]
    mov edi, IDT + 16 * VEC_PCI
    mov ecx, MAX_PCI * VECTORS
1:  mov dl, 0x8e
    call gate
    add rsi, TRAP_STUB_SIZE
    add edi, 16
    dec ecx
    jnz 1b
    mov dword ptr [PCI_ROOM], LOW_WINDOW
    mov r14d, PCI_DEVICES
    xor r12d, r12d
2:  inc r12d
    cmp r12d, 32
    jae 3f
    mov r13d, r12d
    shl r13d, 15
    add r13d, ECAM
    mov eax, [r13]
    cmp eax, TEST_DEVICE
    jne 2b
    call pci_device_set_up
    add r14d, PCI_SIZE
    inc qword ptr [PCI_COUNT]
    cmp qword ptr [PCI_COUNT], MAX_PCI
    jb 2b
3:  cmp qword ptr [PCI_COUNT], 0
    lea rsi, [rip + msg_no_test_device]
    je fatal
9:  ret

# r12 = slot, r13 = configuration space, r14 = device
pci_device_set_up:
    mov [r14 + X_CONFIG], r13
    mov [r14 + X_SLOT], r12
    mov word ptr [r13 + PCI_COMMAND], 0
    # Each BAR at the next multiple of its size.
    lea rsi, [rip + msg_bad_bar]
    xor ebx, ebx
1:  mov dword ptr [r13 + PCI_BARS + rbx * 4], -1
    mov eax, [r13 + PCI_BARS + rbx * 4]
    test al, 7                     # of memory, 32 bits
    jnz fatal
    and eax, -16
    jz fatal
    neg eax
    lea ecx, [rax - 1]
    mov edx, [PCI_ROOM]
    add edx, ecx
    not ecx
    and edx, ecx
    mov [r13 + PCI_BARS + rbx * 4], edx
    mov [r14 + X_REGISTERS + rbx * 8], rdx
    add edx, eax
    mov [PCI_ROOM], edx
    inc ebx
    cmp ebx, 3
    jb 1b
    mov word ptr [r13 + PCI_COMMAND], 2    # memory
    mov rbx, [r14 + X_REGISTERS]
    mov eax, [rbx]
    cmp eax, TDEV
    lea rsi, [rip + msg_no_registers]
    jne fatal
    mov dword ptr [rbx + R_COUNTER], 0
    mov dword ptr [rbx + R_SCRATCH], -1
    mov dword ptr [rbx + R_DMA_PAGES], 0
    mov dword ptr [rbx + R_PENDING], -1
    mov eax, [rbx + R_RAISED]
    mov [r14 + X_RAISED], rax
    mov [r14 + X_TAKEN], rax
    mov rax, [r14 + X_MEMORY]
    mov dword ptr [rax], 0
    mov dword ptr [rax + 0xffc], -1
    # The pages that it may write to.
    mov rax, [C_DMA]
    test rax, rax
    jz 2f
    mov rcx, [PCI_COUNT]
    imul rcx, [C_DMA_PAGES]
    shl rcx, 12
    add rax, rcx
    and rax, -4096
    mov [r14 + X_DMA], rax
    mov [rbx + R_DMA_LOW], eax
    shr rax, 32
    mov [rbx + R_DMA_HIGH], eax
    mov eax, [C_DMA_PAGES]
    mov [rbx + R_DMA_PAGES], eax
2:  mov edi, MEMORY_AND_MASTER
    mov rax, [C_PCI]
    cmp eax, PCI_INTX
    jb 3f
    je pci_device_intx
    or edi, INTX_DISABLE
    mov ebx, CAPABILITY_MSI
    cmp eax, PCI_MSI
    je 4f
    mov ebx, CAPABILITY_MSIX
4:  call pci_device_messages
3:  mov [r14 + X_COMMAND], rdi
    mov [r13 + PCI_COMMAND], di
    ret

# A pin of the first IOAPIC: level triggered, to the first vCPU.
pci_device_intx:
    movzx ecx, byte ptr [r13 + PCI_PIN]
    lea rsi, [rip + msg_no_interrupt]
    dec ecx
    js fatal
    add ecx, r12d
    and ecx, 3
    add ecx, FIRST_LINE
    mov [r13 + PCI_LINE], cl
    call pci_device_vector
    mov edx, IOAPIC1
    lea ecx, [rcx * 2 + 0x11]
    mov [rdx], ecx
    mov dword ptr [rdx + 0x10], 0
    dec ecx
    mov [rdx], ecx
    or eax, LEVEL
    mov [rdx + 0x10], eax
    jmp 3b

# eax = the first vector of the device that is set up
pci_device_vector:
    mov eax, [PCI_COUNT]
    lea eax, [rax * VECTORS + VEC_PCI]
    ret

# ebx = capability: four messages to the first vCPU
pci_device_messages:
    lea rsi, [rip + msg_no_interrupt]
    movzx ecx, byte ptr [r13 + PCI_CAPABILITIES]
    mov edx, 48                    # a list that goes round ends
1:  and ecx, -4
    jz fatal
    movzx eax, byte ptr [r13 + rcx]
    cmp eax, ebx
    je 2f
    movzx ecx, byte ptr [r13 + rcx + 1]
    dec edx
    jnz 1b
    jmp fatal
2:  add rcx, r13
    mov [r14 + X_CAPABILITY], rcx
    call pci_device_vector
    movzx edx, word ptr [rcx + 2]
    cmp ebx, CAPABILITY_MSIX
    je 4f
    mov ebx, edx
    and ebx, 0xe
    cmp ebx, 2 << 1                # four vectors
    jb fatal
    mov dword ptr [rcx + 4], LAPIC
    test dl, 0x80
    jz 3f
    mov dword ptr [rcx + 8], 0
    add ecx, 4
3:  mov [rcx + 8], ax
    mov rcx, [r14 + X_CAPABILITY]
    mov eax, 0x21                  # on, four vectors
    mov [rcx + 2], ax
    mov qword ptr [r14 + X_CONTROL], 0x71
    ret
4:  and edx, 0x7ff
    cmp edx, VECTORS - 1
    jb fatal
    mov edx, [rcx + 4]
    mov ebx, edx
    and ebx, 7
    cmp ebx, 2
    jne fatal
    and edx, -8
    add rdx, [r14 + X_TABLE]
    mov ebx, VECTORS
5:  mov dword ptr [rdx], LAPIC
    mov dword ptr [rdx + 4], 0
    mov [rdx + 8], eax
    mov dword ptr [rdx + 12], 0
    add rdx, 16
    inc eax
    dec ebx
    jnz 5b
    mov eax, 0x8000
    mov [rcx + 2], ax
    mov qword ptr [r14 + X_CONTROL], 0xc000
    ret

    .macro DEVICE_EXPECT kind, at, expected
    mov ecx, \expected
    mov eax, \at
    lea rsi, [rip + \kind]
    call pci_device_expect
    .endm

# Called by the first vCPU at the end of each pass; changes rax, rcx, rdx, rsi, rdi, r8-r11
pci_devices_check:
    push rbx
    push r12
    push r13
    push r14
    mov r14d, PCI_DEVICES
    mov r12, [PCI_COUNT]
1:  dec r12
    js 9f
    mov r13, [r14 + X_CONFIG]
    mov rbx, [r14 + X_REGISTERS]
    mov edx, [r13]
    DEVICE_EXPECT kind_pci, 0, TEST_DEVICE
    movzx edx, word ptr [r13 + PCI_COMMAND]
    DEVICE_EXPECT kind_pci, PCI_COMMAND, [r14 + X_COMMAND]
    .irp bar, 0,1,2
    mov edx, [r13 + PCI_BARS + \bar * 4]
    and edx, -16
    DEVICE_EXPECT kind_pci, (PCI_BARS+\bar*4), [r14+X_REGISTERS+\bar*8]
    .endr
    mov rax, [r14 + X_CAPABILITY]
    test rax, rax
    jz 2f
    movzx edx, word ptr [rax + 2]
    and edx, [r14 + X_CONTROL]
    mov ecx, 0x21
    cmp qword ptr [C_PCI], PCI_MSI
    je 3f
    mov ecx, 0x8000
3:  sub rax, r13
    lea rsi, [rip + kind_pci]
    call pci_device_expect
2:  mov edx, [rbx]
    DEVICE_EXPECT kind_pci_register, 0, TDEV
    mov edx, [rbx + R_COUNTER]
    DEVICE_EXPECT kind_pci_register, R_COUNTER, [r14 + X_COUNTER]
    mov edx, [rbx + R_SCRATCH]
    not edx
    DEVICE_EXPECT kind_pci_register, R_SCRATCH, [r14 + X_COUNTER]
    mov edx, [rbx + R_RAISED]
    DEVICE_EXPECT kind_pci_register, R_RAISED, [r14 + X_RAISED]
    mov rdi, [r14 + X_MEMORY]
    mov edx, [rdi]
    DEVICE_EXPECT kind_pci_memory, 0, [r14 + X_COUNTER]
    mov rdi, [r14 + X_MEMORY]
    mov edx, [rdi + 0xffc]
    not edx
    DEVICE_EXPECT kind_pci_memory, 0xffc, [r14 + X_COUNTER]
    inc dword ptr [r14 + X_COUNTER]
    mov eax, [r14 + X_COUNTER]
    mov rdi, [r14 + X_MEMORY]
    mov [rbx + R_COUNTER], eax
    mov [rdi], eax
    not eax
    mov [rbx + R_SCRATCH], eax
    mov [rdi + 0xffc], eax
    cmp qword ptr [r14 + X_DMA], 0
    je 4f
    call pci_device_dma
4:  add r14d, PCI_SIZE
    jmp 1b
9:  pop r14
    pop r13
    pop r12
    pop rbx
    ret

# eax = where, ecx = expected, edx = found, rsi = kind, r14 = device
pci_device_expect:
    cmp ecx, edx
    je 1f
    mov r8, [r14 + X_SLOT]
    jmp stale
1:  ret

# Looks at some of the pages that the device writes: 32 bytes with magic, number, inverse number and address in each. Page p of P gets the
# numbers p, p + P, p + 2 P …; a device that has written n of them has given it at least the last of these below n.
pci_device_dma:
    push rbp
    push r12
    push r13
    mov ebp, DMA_AT_ONCE
1:  mov r12d, [rbx + R_DMA_DONE]
    mov r13, [r14 + X_DMA_NEXT]
    mov rcx, [C_DMA_PAGES]
    cmp r12, r13
    jbe 8f                         # not there yet: nor is any after it
    lea rax, [r12 - 1]
    sub rax, r13
    xor edx, edx
    div rcx
    imul rax, rcx
    add rax, r13
    mov r10, rax                   # the number, at least
    mov rdi, r13
    shl rdi, 12
    add rdi, [r14 + X_DMA]
    mov r11d, DMA_TRIES
2:  mov r9, [rdi + 8]
    movabs rax, DMA_MAGIC
    cmp [rdi], rax
    jne 3f
    mov rax, r9
    not rax
    cmp [rdi + 16], rax
    jne 3f
    cmp [rdi + 24], rdi
    jne 3f
    mov rax, r9
    sub rax, r10
    jb 3f
    xor edx, edx
    div rcx
    test rdx, rdx
    jz 4f
3:  pause
    dec r11d
    jnz 2b
    mov rax, r13
    mov rcx, r10
    mov rdx, r9
    mov r8, [r14 + X_SLOT]
    lea rsi, [rip + kind_pci_dma]
    call stale
4:  inc qword ptr [r14 + X_DMA_CHECKED]
    inc r13
    cmp r13, [C_DMA_PAGES]
    jb 5f
    xor r13d, r13d
5:  mov [r14 + X_DMA_NEXT], r13
    dec ebp
    jnz 1b
    jmp 9f
8:  mov qword ptr [r14 + X_DMA_NEXT], 0
9:  pop r13
    pop r12
    pop rbp
    ret

# Called by the first vCPU every millisecond; changes rax, rcx, rdx, rsi, rdi, r8, r10
pci_devices_poll:
    push rbx
    push r12
    push r14
    mov r14d, PCI_DEVICES
    mov r12, [PCI_COUNT]
1:  dec r12
    js 9f
    xor eax, eax
    xchg [r14 + X_OTHERS], rax
    test rax, rax
    jz 2f
    mov rdx, rax
    xor ecx, ecx
    mov eax, 1
    lea rsi, [rip + kind_pci_interrupt]
    mov r8, [r14 + X_SLOT]
    call stale
2:  mov rdx, [r14 + X_TAKEN]
    mov rcx, [r14 + X_RAISED]
    cmp rdx, rcx
    je 4f
    ja 3f
    mov rax, [r15 + P_TSC]
    cmp rax, [r14 + X_DEADLINE]
    jb 5f
3:  # Lost, or more than one for one.
    mov [r14 + X_TAKEN], rcx
    xor eax, eax
    lea rsi, [rip + kind_pci_interrupt]
    mov r8, [r14 + X_SLOT]
    call stale
4:  imul rax, [C_TSC_KHZ], LOST_MS
    add rax, [r15 + P_TSC]
    mov [r14 + X_DEADLINE], rax
    mov ecx, [r14 + X_RAISED]
    inc qword ptr [r14 + X_RAISED]
    and ecx, VECTORS - 1
    mov rbx, [r14 + X_REGISTERS]
    mov [rbx + R_RAISE], ecx
5:  add r14d, PCI_SIZE
    jmp 1b
9:  pop r14
    pop r12
    pop rbx
    ret

# After the line of the bus, with the serial line locked.
pci_devices_progress:
    push rbx
    push r12
    mov ebx, PCI_DEVICES
    mov r12, [PCI_COUNT]
1:  dec r12
    js 9f
    FIELD msg_pci_device, [rbx + X_SLOT]
    FIELD pci_name_counter, [rbx + X_COUNTER]
    FIELD pci_name_raised, [rbx + X_RAISED]
    FIELD pci_name_taken, [rbx + X_TAKEN]
    FIELD pci_name_spurious, [rbx + X_SPURIOUS]
    FIELD pci_name_dma, [rbx + X_DMA_CHECKED]
    call newline
    add ebx, PCI_SIZE
    jmp 1b
9:  pop r12
    pop rbx
    ret

    .macro PCI_STUB number
    .balign TRAP_STUB_SIZE
    push \number
    jmp pci_interrupt
    .endm

    .balign TRAP_STUB_SIZE
pci_stubs:
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    PCI_STUB \n
    .endr
pci_interrupt:
    # [rsp] device * VECTORS + vector, then what the CPU has pushed
    push rax
    push rcx
    push rdx
    push rsi
    mov ecx, [rsp + 32]
    mov eax, ecx
    shr eax, 2
    imul eax, eax, PCI_SIZE
    add eax, PCI_DEVICES
    and ecx, VECTORS - 1
    cmp qword ptr [C_PCI], PCI_INTX
    jne 1f
    # The pin: which bits it is for, which are cleared before the end of the interrupt.
    mov rsi, [rax + X_REGISTERS]
    mov edx, [rsi + R_PENDING]
    bsf ecx, edx
    jz 3f
    mov [rsi + R_PENDING], edx
    mov esi, 1
    shl esi, cl
    cmp edx, esi
    jne 4f                         # more than one
1:  mov edx, [rax + X_RAISED]
    dec edx
    and edx, VECTORS - 1
    cmp edx, ecx
    je 2f
4:  inc qword ptr [rax + X_OTHERS]
2:  inc qword ptr [rax + X_TAKEN]
    jmp 5f
3:  inc qword ptr [rax + X_SPURIOUS]
5:  mov eax, LAPIC
    mov dword ptr [rax + 0xb0], 0  # EOI
    pop rsi
    pop rdx
    pop rcx
    pop rax
    add rsp, 8
    iretq

kind_pci_register:
    .asciz "pci-register"
kind_pci_memory:
    .asciz "pci-memory"
kind_pci_dma:
    .asciz "pci-dma"
kind_pci_interrupt:
    .asciz "pci-interrupt"
msg_pci_device:
    .asciz "qevm-payload pci-device slot="
    .irp name, counter,raised,taken,spurious,dma
pci_name_\name:
    .asciz " \name="
    .endr
msg_no_test_device:
    .asciz "qevm-payload error: there is no device 7e57:0001 on the PCI bus\n"
msg_bad_bar:
    .asciz "qevm-payload error: a BAR of the PCI device is not one for memory of 32 bits\n"
msg_no_registers:
    .asciz "qevm-payload error: the PCI device's registers are not where its BAR was placed\n"
msg_no_interrupt:
    .asciz "qevm-payload error: the PCI device does not offer the interrupts that pci asks for\n"
