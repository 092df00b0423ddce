# Ring 3 entry: the first vCPU sets up, wakes the others, and all start to work.

    .code64
    .set DEFAULT_DIRTY,  64 << 20
    .set DEFAULT_HOLD,   16 << 20
    .set DEFAULT_ZERO,   8 << 20
    .set DEFAULT_REPORT, 250
    .set DEFAULT_VERIFY, 4096
    .set DEFAULT_TIMER,  20

# edi = vCPU number
main:
    cld
    mov r15d, edi
    imul r15, r15, PERCPU_SIZE
    add r15, PERCPU
    push rdi
    mov rdi, r15
    xor eax, eax
    mov ecx, PERCPU_SIZE / 8
    rep stosq
    pop rdi
    mov [r15 + P_ID], rdi
    test edi, edi
    jnz main_ap
    call serial_init
    call map_low
    call install_traps
    call read_config
    call calibrate_tsc
    call plan
    call map_high
    inc qword ptr [C_BOOTS]
    call banner
    call fill_hold
    call virtio_start
    call pci_start
    call reader_start
    cmp qword ptr [C_WORST], 0
    je 1f
    call worst_set_up
1:  call start_aps
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov [C_START], rax
    call plan_reset
    mov dword ptr [C_GO], 1
    jmp main_go
main_ap:
    pause
    cmp dword ptr [C_GO], 0
    je main_ap
main_go:
    cmp qword ptr [C_WORST], 0
    je work
    jmp worst

# Identity-maps the first 4 GiB; boot.S has linked the first and the last of these page directories.
map_low:
    mov edi, PD
    mov eax, PTE_LARGE
    mov ecx, 4 * 512
1:  mov [rdi], rax
    add rax, 0x200000
    add rdi, 8
    dec ecx
    jnz 1b
    mov eax, PD + 0x1000 + PTE_TABLE
    mov [PDPT + 8], rax
    mov eax, PD + 0x2000 + PTE_TABLE
    mov [PDPT + 16], rax
    ret

# Identity-maps RAM above 4 GiB.
map_high:
    mov r8, [C_RAM]
    mov eax, LOW_RAM_MAX
    sub r8, rax
    jbe 3f
    add r8, 0x3fffffff
    shr r8, 30                     # GiB
    cmp r8, MAX_GIB - 4
    lea rsi, [rip + msg_large]
    ja fatal
    mov edi, PD + 4 * 0x1000
    mov edx, PDPT + 4 * 8
    mov rax, HIGH_RAM + PTE_LARGE
1:  mov ecx, 512
    lea rbx, [rdi + PTE_TABLE]
2:  mov [rdi], rax
    add rax, 0x200000
    add rdi, 8
    dec ecx
    jnz 2b
    mov [rdx], rbx
    add rdx, 8
    dec r8
    jnz 1b
3:  ret

# Counts TSC ticks during 20 ms of PIT channel 0 (1193182 Hz), until it gets the same twice, by a 32nd: where the host takes the CPU
# away in between, the TSC and the PIT are not read at one time, or the PIT wraps.
    .set PIT_20MS, 23864
calibrate_tsc:
    mov r12d, 100                  # tries
1:  dec r12d
    lea rsi, [rip + msg_no_pit]
    jz fatal
    mov al, 0x34                   # channel 0, both bytes, mode 2
    out 0x43, al
    xor eax, eax
    out 0x40, al
    out 0x40, al                   # reload 65536
    call pit_count
    mov ebx, eax
    call tsc
    mov r8, rax
    mov r10d, 1000000              # gives up when there is no PIT
2:  dec r10d
    lea rsi, [rip + msg_no_pit]
    jz fatal
    call pit_count
    mov ecx, ebx
    sub ecx, eax
    movzx ecx, cx                  # it counts down and wraps
    cmp ecx, PIT_20MS
    jb 2b
    call tsc
    sub rax, r8
    imul rax, rax, 1193
    xor edx, edx
    div rcx                        # kHz
    mov rdx, [C_TSC_KHZ]           # what it was before, maybe before a reset
    mov [C_TSC_KHZ], rax
    sub rdx, rax
    mov rcx, rdx
    neg rcx
    cmovs rcx, rdx                 # the difference without its sign
    shl rcx, 5
    cmp rcx, rax
    ja 1b
    ret

pit_count:
    xor eax, eax
    out 0x43, al                   # latch channel 0
    in al, 0x40
    mov dl, al
    in al, 0x40
    mov ah, al
    mov al, dl
    movzx eax, ax
    ret

# rax = TSC; changes rdx
tsc:
    rdtsc
    shl rdx, 32
    or rax, rdx
    ret

# Turns the configuration into ranges and paces.
plan:
    mov rax, [C_CPUS]
    cmp rax, [C_NCPU]
    jae 1f
    mov [C_NCPU], rax
1:  mov ebx, MAX_CPUS
    cmp [C_NCPU], rbx
    jbe 2f
    mov [C_NCPU], rbx
2:  cmp qword ptr [C_NCPU], 0
    lea rsi, [rip + msg_no_cpus]
    je fatal
    mov rax, WORK_MIN
    mov edi, C_BASE
    call default
    # Defaults take at most half, an eighth and an eighth of the RAM beyond the first 8 MiB.
    mov r8, [C_RAM]
    sub r8, 8 << 20
    lea rsi, [rip + msg_small]
    jbe fatal
    mov rax, r8
    shr rax, 1
    mov ecx, DEFAULT_DIRTY
    call at_most
    mov edi, C_DIRTY
    call default
    mov rax, r8
    shr rax, 3
    mov ecx, DEFAULT_HOLD
    call at_most
    mov edi, C_HOLD
    call default
    mov rax, r8
    shr rax, 3
    mov ecx, DEFAULT_ZERO
    call at_most
    mov edi, C_ZERO
    call default
    xor eax, eax
    mov edi, C_RATE
    call default
    xor eax, eax
    mov edi, C_WORST
    call default
    mov eax, DEFAULT_REPORT
    mov edi, C_REPORT
    call default
    mov eax, DEFAULT_VERIFY
    mov edi, C_VERIFY
    call default
    mov eax, DEFAULT_TIMER
    mov edi, C_TIMER
    call default
    # Ranges, in whole pages.
    and qword ptr [C_BASE], -4096
    mov rax, [C_DIRTY]
    shr rax, 12
    xor edx, edx
    div qword ptr [C_NCPU]
    mov [C_PAGES], rax
    test rax, rax
    lea rsi, [rip + msg_no_pages]
    jz fatal
    mul qword ptr [C_NCPU]
    shl rax, 12
    mov [C_DIRTY], rax
    add rax, [C_BASE]
    mov [C_HOLD_BASE], rax
    mov rcx, [C_HOLD]
    shr rcx, 12
    mov [C_HOLD_PAGES], rcx
    shl rcx, 12
    add rax, rcx
    mov [C_ZERO_BASE], rax
    mov rcx, [C_ZERO]
    shr rcx, 12
    mov [C_ZERO_PAGES], rcx
    shl rcx, 12
    add rax, rcx                   # end of it all
    mov rbx, [C_BASE]
    lea rsi, [rip + msg_range]
    cmp rbx, WORK_MIN
    jb fatal
    mov rdx, [C_RAM]
    mov ecx, LOW_RAM_MAX
    mov rdi, HIGH_RAM
    cmp rbx, rdi
    jae 3f
    cmp rdx, rcx                   # low RAM ends at 3 GiB
    cmova rdx, rcx
    jmp 4f
3:  sub rdx, rcx
    lea rsi, [rip + msg_range]
    jbe fatal
    add rdx, rdi                   # high RAM starts at 4 GiB
4:  cmp rax, rdx
    ja fatal
    # Paces, in TSC ticks.
    mov rbx, [C_TSC_KHZ]
    mov rax, [C_REPORT]
    mul rbx
    mov [C_PRINT_STEP], rax
    imul rax, rbx, CATCH_UP_MS
    mov [C_CATCH_UP], rax
    imul rbx, rbx, 1000            # Hz
    xor eax, eax
    mov rcx, [C_RATE]
    test rcx, rcx
    jz 5f
    mov rax, PAGE_BATCH * 4096
    mul qword ptr [C_NCPU]
    mul rbx
    div rcx
5:  mov [C_STEP], rax
    mov rcx, [C_VERIFY]
    mov rax, -1                    # never
    test rcx, rcx
    jz 6f
    mov rax, rbx
    xor edx, edx
    div rcx
6:  mov [C_BG_STEP], rax
    ret

# [edi] = rax unless it was configured
default:
    cmp qword ptr [rdi], -1
    jne 1f
    mov [rdi], rax
1:  ret

# rax = min(rax, rcx)
at_most:
    cmp rax, rcx
    cmova rax, rcx
    ret

# INIT, SIPI, SIPI to all but self, then waits until they are there.
start_aps:
    mov rcx, [C_NCPU]
    dec rcx
    jz 4f
    mov ebx, LAPIC
    mov dword ptr [rbx + 0x300], 0x000c4500
    mov eax, 10
    call sleep_ms
    mov dword ptr [rbx + 0x300], 0x000c46f0
    mov eax, 1
    call sleep_ms
    mov dword ptr [rbx + 0x300], 0x000c46f0
    mov r8d, 5000
1:  mov eax, [C_APS]
    cmp eax, ecx
    jae 4f
    mov eax, 1
    call sleep_ms
    dec r8d
    jnz 1b
    lea rsi, [rip + msg_no_ap]
    jmp fatal
4:  ret

# eax = milliseconds; changes rax, rdx, rdi
sleep_ms:
    mov edi, eax
    imul rdi, [C_TSC_KHZ]
    call tsc
    add rdi, rax
1:  pause
    call tsc
    cmp rax, rdi
    jb 1b
    ret

# The local APIC's timer, periodic. KVM and QEMU both run it at 1 GHz.
start_timer:
    mov rcx, [C_TIMER]
    test rcx, rcx
    jz 1f
    mov ebx, LAPIC
    mov dword ptr [rbx + 0x350], 0x10000    # LINT0 masked: the 8259s stay out
    mov dword ptr [rbx + 0xf0], 0x1ff       # enabled, spurious vector 0xff
    mov dword ptr [rbx + 0x3e0], 0xb        # divide by 1
    mov dword ptr [rbx + 0x320], 0x20000 + VEC_TIMER
    mov eax, 1000000000
    xor edx, edx
    div rcx
    mov [rbx + 0x380], eax
1:  ret

msg_large:
    .asciz "qevm-payload error: more RAM than 512 GiB\n"
msg_small:
    .asciz "qevm-payload error: needs more than 8 MiB of RAM\n"
msg_no_pit:
    .asciz "qevm-payload error: no i8254 to measure the TSC with\n"
msg_no_cpus:
    .asciz "qevm-payload error: cpus must not be 0\n"
msg_no_pages:
    .asciz "qevm-payload error: dirty must be at least one page for each vCPU\n"
msg_range:
    .asciz "qevm-payload error: base + dirty + hold + zero must lie within one piece of RAM, from 4M\n"
msg_no_ap:
    .asciz "qevm-payload error: not all application processors started within 5 s\n"
