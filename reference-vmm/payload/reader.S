# A reader at random: pages of the hold range in an order without any pattern, each once in a round. It measures how long each read
# takes, which is long where the page is still at another host.

    .code64
    .set READ_FACTOR,  0x5851f42d4c957f2d  # of a generator that meets each number below a power of two once in a round
    .set READ_STEP,    0x3039
    .set READ_OCTAVES, 24
    .set READ_SLOTS,   READ_OCTAVES * 16   # counters of READ_TIMES

reader_start:
    xor eax, eax
    mov edi, C_READER
    call default
    mov qword ptr [READ_AT], 0
    mov qword ptr [READS], 0
    mov edi, READ_TIMES
    mov ecx, READ_SLOTS
    xor eax, eax
    rep stosq
    # All ones up to the number of the last page.
    mov rax, [C_HOLD_PAGES]
    test rax, rax
    jnz 1f
    mov [C_READER], rax
    ret
1:  dec rax
    or rax, 1
    bsr rcx, rax
    mov eax, 2
    shl rax, cl
    dec rax
    mov [READ_MASK], rax
    ret

# Reads the next page. Only the first vCPU does; changes rax, rcx, rdx, rsi, rdi, r8, r10, r11
random_read:
    cmp qword ptr [C_READER], 0
    je 9f
    mov rsi, [READ_AT]
    movabs rcx, READ_FACTOR
1:  imul rsi, rcx
    add rsi, READ_STEP
    and rsi, [READ_MASK]
    cmp rsi, [C_HOLD_PAGES]
    jae 1b
    mov [READ_AT], rsi
    mov rdi, rsi
    shl rdi, 12
    add rdi, [C_HOLD_BASE]
    lfence
    call tsc
    mov r8, rax
    mov r10, [rdi]
    lfence
    call tsc
    sub rax, r8
    jb 3f                          # the clock went back, which is counted elsewhere
    mov ecx, 1000000
    mul rcx
    cmp rdx, [C_TSC_KHZ]
    jae 3f
    div qword ptr [C_TSC_KHZ]      # ns
    # Sixteen counters for each doubling from 4096 ns on: what is faster is not counted.
    bsr rcx, rax
    jz 3f
    sub ecx, 12
    jb 3f
    cmp ecx, READ_OCTAVES
    jae 3f
    mov edx, ecx
    shl edx, 4
    add ecx, 8
    shr rax, cl
    and eax, 15
    add edx, eax
    inc qword ptr [rdx * 8 + READ_TIMES]
3:  inc qword ptr [READS]
    # Its first word tells which page it is.
    call hold_start
    call hold_next
    cmp rax, r10
    je 9f
    mov rcx, rax
    mov rdx, r10
    mov rax, rsi
    xor r8d, r8d
    lea rsi, [rip + kind_hold]
    call stale
9:  ret

reader_progress:
    cmp qword ptr [C_READER], 0
    je 3f
    lea rsi, [rip + msg_reads]
    call puts
    mov rax, [READS]
    call putdec
    xor r12d, r12d
1:  cmp qword ptr [r12 * 8 + READ_TIMES], 0
    je 2f
    mov al, ' '
    call putc
    mov rax, r12
    call putdec
    mov al, ':'
    call putc
    mov rax, [r12 * 8 + READ_TIMES]
    call putdec
2:  inc r12d
    cmp r12d, READ_SLOTS
    jb 1b
    jmp newline
3:  ret

msg_reads:
    .asciz "qevm-payload reads total="
