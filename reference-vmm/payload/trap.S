# Exceptions end the guest with one line; the timer interrupt counts.

    .code64
    .set TRAP_STUB_SIZE, 16        # set before use: Intel syntax takes an unknown symbol for memory

# Builds the IDT. Runs in ring 3: the table lies in ordinary, user-accessible memory.
install_traps:
    lea rsi, [rip + trap_stubs]
    mov edi, IDT
    xor ecx, ecx
1:  mov dl, 0x8e
    call gate
    add rsi, TRAP_STUB_SIZE
    add edi, 16
    inc ecx
    cmp ecx, 32
    jb 1b
    mov edi, IDT + 16 * VEC_TIMER
    lea rsi, [rip + timer_interrupt]
    mov dl, 0x8e
    call gate
    ret

# rdi = gate, rsi = handler, dl = type and privilege
gate:
    mov rax, rsi
    mov [rdi], ax
    mov word ptr [rdi + 2], SEL_CODE64
    mov byte ptr [rdi + 4], 0
    mov [rdi + 5], dl
    shr rax, 16
    mov [rdi + 6], ax
    shr rax, 16
    mov [rdi + 8], eax
    mov dword ptr [rdi + 12], 0
    ret

    .macro TRAP_STUB vector, has_error
    .balign TRAP_STUB_SIZE
    .if \has_error == 0
    push 0
    .endif
    push \vector
    jmp trap_relay
    .endm

    .balign TRAP_STUB_SIZE
trap_stubs:
    .irp v, 0,1,2,3,4,5,6,7
    TRAP_STUB \v, 0
    .endr
    TRAP_STUB 8, 1
    TRAP_STUB 9, 0
    .irp v, 10,11,12,13,14
    TRAP_STUB \v, 1
    .endr
    TRAP_STUB 15, 0
    TRAP_STUB 16, 0
    TRAP_STUB 17, 1
    .irp v, 18,19,20
    TRAP_STUB \v, 0
    .endr
    TRAP_STUB 21, 1
    .irp v, 22,23,24,25,26,27,28
    TRAP_STUB \v, 0
    .endr
    TRAP_STUB 29, 1
    TRAP_STUB 30, 1
    TRAP_STUB 31, 0
trap_relay:
    # [rsp] vector, error code, rip, cs, rflags, rsp, ss
    cmp dword ptr [C_GAVE_UP], 0
    jne halted
    lea rsi, [rip + msg_trap]
    call puts
    mov rax, [rsp]
    call putdec
    lea rsi, [rip + msg_error]
    call puts
    mov rax, [rsp + 8]
    call puthex
    lea rsi, [rip + msg_rip]
    call puts
    mov rax, [rsp + 16]
    call puthex
    lea rsi, [rip + msg_cr2]
    call puts
    mov rax, cr2
    call puthex
    call newline
halted:
    cli
    hlt
    jmp halted

timer_interrupt:
    push rax
    # The ring 0 stack tells the vCPU.
    mov rax, rsp
    sub rax, STACK0
    shr rax, 12
    imul rax, rax, PERCPU_SIZE
    inc qword ptr [rax + PERCPU + P_TICKS]
    mov eax, LAPIC
    mov dword ptr [rax + 0xb0], 0  # EOI
    pop rax
    iretq

msg_trap:
    .asciz "\nqevm-payload trap vector="
msg_error:
    .asciz " error="
msg_rip:
    .asciz " rip="
msg_cr2:
    .asciz " cr2="
