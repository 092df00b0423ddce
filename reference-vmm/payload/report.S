# Lines on the serial port. All start with "qevm-payload".

    .code64
    .macro FIELD text, source
    lea rsi, [rip + \text]
    call puts
    mov rax, \source
    call putdec
    .endm

banner:
    lea rsi, [rip + msg_start]
    call puts
    FIELD name_cpus, [C_NCPU]
    FIELD name_ram, [C_RAM]
    FIELD name_base, [C_BASE]
    FIELD name_dirty, [C_DIRTY]
    FIELD name_hold, [C_HOLD]
    FIELD name_zero, [C_ZERO]
    FIELD name_rate, [C_RATE]
    FIELD name_timer, [C_TIMER]
    FIELD name_tsc_khz, [C_TSC_KHZ]
    jmp newline

# Sums over the vCPUs; the pass is that of the slowest.
progress:
    push rbx
    push r12
    push r13
    call serial_lock
    lea rsi, [rip + msg_pass]
    call puts
    mov rax, -1
    mov edi, PERCPU
    mov ecx, [C_NCPU]
1:  cmp [rdi + P_PASS], rax
    cmovb rax, [rdi + P_PASS]
    add edi, PERCPU_SIZE
    dec ecx
    jnz 1b
    call putdec
    mov rax, [C_PAGES]
    mul qword ptr [C_NCPU]
    mov rbx, rax
    FIELD name_pages, rbx
    mov ebx, P_STALE
    lea rsi, [rip + name_stale]
    call sum
    mov ebx, P_TSC_BACK
    lea rsi, [rip + name_tsc_back]
    call sum
    mov ebx, P_WRITTEN
    lea rsi, [rip + name_written]
    call sum
    mov ebx, P_HELD
    lea rsi, [rip + name_checked]
    call sum
    mov ebx, P_HELD_PASS
    lea rsi, [rip + name_rounds]
    call sum
    mov ebx, P_TICKS
    lea rsi, [rip + name_ticks]
    call sum
    mov rax, [r15 + P_TSC]
    sub rax, [C_START]
    xor edx, edx
    div qword ptr [C_TSC_KHZ]
    mov rbx, rax
    FIELD name_ms, rbx
    call newline
    call virtio_progress
    call pci_progress
    call reader_progress
    call serial_unlock
    pop r13
    pop r12
    pop rbx
    ret

# rsi = name, ebx = field
sum:
    call puts
    xor eax, eax
    mov edi, PERCPU
    mov ecx, [C_NCPU]
1:  add rax, [rdi + rbx]
    add edi, PERCPU_SIZE
    dec ecx
    jnz 1b
    jmp putdec

# rsi = kind, rax = page index within the kind, r8 = word, rcx = expected, rdx = found; changes these, rdi
stale:
    inc qword ptr [r15 + P_STALE]
    cmp qword ptr [r15 + P_LINES], STALE_LINES
    jae 1f
    inc qword ptr [r15 + P_LINES]
    push rdx
    push rcx
    push r8
    push rax
    push rsi
    call serial_lock
    lea rsi, [rip + msg_stale]
    call puts
    pop rsi
    call puts
    FIELD name_cpu, [r15 + P_ID]
    lea rsi, [rip + name_page]
    call puts
    pop rax
    call putdec
    lea rsi, [rip + name_word]
    call puts
    pop rax
    call putdec
    lea rsi, [rip + name_expected]
    call puts
    pop rax
    call puthex
    lea rsi, [rip + name_found]
    call puts
    pop rax
    call puthex
    call newline
    call serial_unlock
1:  ret

msg_start:
    .asciz "qevm-payload start"
msg_pass:
    .asciz "qevm-payload pass="
msg_stale:
    .asciz "qevm-payload stale-page kind="
kind_hot:
    .asciz "hot"
kind_hold:
    .asciz "hold"
kind_zero:
    .asciz "zero"
kind_control:
    .asciz "control"
    .irp name, cpus,ram,base,dirty,hold,zero,rate,timer,tsc_khz,pages,stale,tsc_back,written,checked,rounds,ticks,ms,cpu,page,word,expected,found
name_\name:
    .asciz " \name="
    .endr
