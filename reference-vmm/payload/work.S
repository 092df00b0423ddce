# The work of every vCPU: hot pages, background pages, the clock.
#
# Word 0 of hot page i in pass g is i << 32 | g, where i counts over all vCPUs. Word k is a mix of word 0 and k.
# Most pages have LIGHT words rewritten and checked in a pass, every 32nd page has all 512.
# Words that a pass leaves alone keep the values of pass 0.

    .code64
    .set WORD_STEP,  0xd1b54a35
    .set FULL_EVERY, 32

# rax = word \k of the page whose word 0 is in \first; r9 = MIX_FACTOR; changes rcx
    .macro WORD k, first
    .if \k == 0
    mov rax, \first
    .else
    movabs rax, \k * WORD_STEP
    xor rax, \first
    imul rax, r9
    mov rcx, rax
    shr rcx, 32
    xor rax, rcx
    .endif
    .endm

# The same with k in r8, not 0.
    .macro WORD_R8 first
    mov eax, WORD_STEP
    imul rax, r8
    xor rax, \first
    imul rax, r9
    mov rcx, rax
    shr rcx, 32
    xor rax, rcx
    .endm

    .macro LOAD_MIX_FACTOR
    movabs r9, 0x9e3779b97f4a7c15
    .endm

# r15 = own block
work:
    LOAD_MIX_FACTOR
    mov rax, [r15 + P_ID]
    mul qword ptr [C_PAGES]
    shl rax, 12
    add rax, [C_BASE]
    mov rbp, rax                   # own range
    call fill_hot
    lock inc dword ptr [C_READY]
1:  pause
    mov eax, [C_READY]
    cmp eax, [C_NCPU]
    jb 1b
    call tsc
    mov [r15 + P_TSC], rax
    mov [r15 + P_BG_NEXT], rax
    mov [r15 + P_PACE], rax
    mov [r15 + P_PRINT_NEXT], rax
    call start_timer
    mov ebx, 1                     # the pass being written; it lives in the register, the block has a copy
pass:
    xor r12d, r12d                 # page of the own range
    mov r13, rbp
hot_page:
    call first_word                # r10 = word 0 as the last pass left it
    lea r11, [r10 + 1]             # word 0 of this pass
    test r12d, FULL_EVERY - 1
    jz full_page
    .irp k, 0,7,64,219,384,511
    WORD \k, r10
    cmp [r13 + \k * 8], rax
    mov r8d, \k
    jne stale_hot
    .endr
write_light:
    .irp k, 0,7,64,219,384,511
    WORD \k, r11
    mov [r13 + \k * 8], rax
    .endr
    jmp page_done
full_page:
    xor r8d, r8d
    mov rax, r10
    cmp [r13], rax
    jne stale_hot
1:  inc r8d
    WORD_R8 r10
    cmp [r13 + r8 * 8], rax
    jne stale_hot
    cmp r8d, 511
    jb 1b
write_full:
    mov r10, r11
    mov rdi, r13
    call fill_hot_page
page_done:
    inc qword ptr [r15 + P_WRITTEN]
    add r13, 4096
    inc r12
    cmp r12, [C_PAGES]
    je 2f
    test r12d, PAGE_BATCH - 1
    jnz hot_page
    call tick
    jmp hot_page
2:  call tick
    # The block's copy of the pass must be the one before this.
    lea rax, [rbx - 1]
    cmp [r15 + P_PASS], rax
    je 3f
    mov rdx, [r15 + P_PASS]
    lea rsi, [rip + kind_control]
    mov rcx, rax
    mov rax, [r15 + P_ID]
    xor r8d, r8d
    call stale
3:  cmp qword ptr [r15 + P_ID], 0
    jne 4f
    call pci_check
    LOAD_MIX_FACTOR
4:  mov [r15 + P_PASS], rbx
    inc rbx
    jmp pass

# rax = expected, r8 = word
stale_hot:
    mov rdx, [r13 + r8 * 8]
    mov rcx, rax
    mov rax, r10
    shr rax, 32
    lea rsi, [rip + kind_hot]
    call stale
    test r12d, FULL_EVERY - 1
    jz write_full
    jmp write_light

# r10 = word 0 that page r12 must hold before pass rbx
first_word:
    mov rax, [r15 + P_ID]
    mul qword ptr [C_PAGES]
    add rax, r12
    shl rax, 32
    lea r10, [rbx - 1]
    mov r10d, r10d
    or r10, rax
    ret

# All pages of the own range as pass 0 leaves them.
fill_hot:
    xor r12d, r12d
    mov rdi, rbp
    mov ebx, 1
1:  call first_word
    call fill_hot_page
    add rdi, 4096
    inc r12
    cmp r12, [C_PAGES]
    jb 1b
    ret

# rdi = page, r10 = its word 0
fill_hot_page:
    mov [rdi], r10
    xor r8d, r8d
1:  inc r8d
    WORD_R8 r10
    mov [rdi + r8 * 8], rax
    cmp r8d, 511
    jb 1b
    ret

# Hold page j, word k: the (512 j + k)th output of a SplitMix64 generator seeded with SEED.
# rdi = page, rsi = j. r11 = generator state afterwards.
    .set HOLD_SEED, 0x7165766d
hold_start:
    movabs rax, 0x9e3779b97f4a7c15
    mov r11, rsi
    shl r11, 9
    imul r11, rax
    add r11, HOLD_SEED
    ret

# rax = next output; changes rcx, r11
hold_next:
    movabs rax, 0x9e3779b97f4a7c15
    add r11, rax
    mov rax, r11
    mov rcx, rax
    shr rcx, 30
    xor rax, rcx
    movabs rcx, 0xbf58476d1ce4e5b9
    imul rax, rcx
    mov rcx, rax
    shr rcx, 27
    xor rax, rcx
    movabs rcx, 0x94d049bb133111eb
    imul rax, rcx
    mov rcx, rax
    shr rcx, 31
    xor rax, rcx
    ret

fill_hold:
    xor esi, esi
    mov rdi, [C_HOLD_BASE]
1:  cmp rsi, [C_HOLD_PAGES]
    jae 3f
    call hold_start
    xor r8d, r8d
2:  call hold_next
    mov [rdi + r8 * 8], rax
    inc r8d
    cmp r8d, 512
    jb 2b
    add rdi, 4096
    inc rsi
    jmp 1b
3:  ret

# Checks one background page: hold pages first, then zero pages. The vCPUs go round independently.
background:
    mov rsi, [r15 + P_BG_PAGE]
    mov rax, [C_HOLD_PAGES]
    cmp rsi, rax
    jae 3f
    mov rdi, rsi
    shl rdi, 12
    add rdi, [C_HOLD_BASE]
    call hold_start
    xor r8d, r8d
1:  call hold_next
    cmp [rdi + r8 * 8], rax
    jne 2f
    inc r8d
    cmp r8d, 512
    jb 1b
    jmp background_done
2:  mov rcx, rax
    mov rdx, [rdi + r8 * 8]
    mov rax, rsi
    lea rsi, [rip + kind_hold]
    call stale
    jmp background_done
3:  sub rsi, rax
    cmp rsi, [C_ZERO_PAGES]
    jae background_round
    mov rdi, rsi
    shl rdi, 12
    add rdi, [C_ZERO_BASE]
    xor r8d, r8d
4:  mov rdx, [rdi + r8 * 8]
    test rdx, rdx
    jnz 5f
    inc r8d
    cmp r8d, 512
    jb 4b
    jmp background_done
5:  xor ecx, ecx
    mov rax, rsi
    lea rsi, [rip + kind_zero]
    call stale
background_done:
    inc qword ptr [r15 + P_HELD]
    inc qword ptr [r15 + P_BG_PAGE]
    ret
background_round:
    mov qword ptr [r15 + P_BG_PAGE], 0
    inc qword ptr [r15 + P_HELD_PASS]
    ret

# Called after every batch of hot pages: clock, background, progress line, pace.
tick:
    mov rax, [C_STEP]
    add [r15 + P_PACE], rax
1:  call tsc
    mov r8, [r15 + P_TSC]
    mov [r15 + P_TSC], rax
    cmp rax, r8
    jae 2f
    inc qword ptr [r15 + P_TSC_BACK]
    mov [r15 + P_BG_NEXT], rax
    mov [r15 + P_PRINT_NEXT], rax
    mov [r15 + P_PACE], rax
    mov [V_NEXT], rax
    mov [PCI_NEXT], rax
2:  cmp rax, [r15 + P_BG_NEXT]
    jb 3f
    mov rcx, [C_BG_STEP]
    cmp rcx, -1
    je 3f
    add rcx, rax
    mov [r15 + P_BG_NEXT], rcx
    call background
    LOAD_MIX_FACTOR
3:  cmp qword ptr [r15 + P_ID], 0
    jne 4f
    mov rax, [r15 + P_TSC]
    cmp rax, [C_RESET_AT]
    jae reset
    cmp qword ptr [C_VIRTIO], 0
    je 7f
    cmp rax, [V_NEXT]
    jb 7f
    add rax, [C_TSC_KHZ]           # a millisecond
    mov [V_NEXT], rax
    call virtio_poll
    LOAD_MIX_FACTOR
    mov rax, [r15 + P_TSC]
7:  cmp qword ptr [C_PCI], PCI_INTX
    jb 8f
    cmp rax, [PCI_NEXT]
    jb 8f
    add rax, [C_TSC_KHZ]
    mov [PCI_NEXT], rax
    call pci_devices_poll
    LOAD_MIX_FACTOR
    mov rax, [r15 + P_TSC]
8:  cmp rax, [r15 + P_PRINT_NEXT]
    jb 4f
    call progress
    call look_at_button
    # The interval starts when the line is out: where ports are slow, printing must not crowd out the work.
    call tsc
    add rax, [C_PRINT_STEP]
    mov [r15 + P_PRINT_NEXT], rax
4:  cmp qword ptr [r15 + P_ID], 0
    jne 8f
    call random_read
    LOAD_MIX_FACTOR
8:  cmp qword ptr [C_STEP], 0
    je 5f
    mov rax, [r15 + P_TSC]
    cmp rax, [r15 + P_PACE]
    jae 6f
    pause
    jmp 1b
6:  # A vCPU that fell behind catches up a little: enough for a busy host, too little to turn a paused machine into a burst.
    mov rcx, rax
    sub rcx, [r15 + P_PACE]
    cmp rcx, [C_CATCH_UP]
    jbe 5f
    sub rax, [C_CATCH_UP]
    mov [r15 + P_PACE], rax
5:  ret
