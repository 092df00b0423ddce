# Resets of the guest by itself, and the power button.

    .code64
# rax = now: when the next reset is due
plan_reset:
    mov rdx, -1
    mov [C_RESET_AT], rdx
    mov rcx, [C_RESET]
    cmp rcx, rdx
    je 1f
    test rcx, rcx
    jz 1f
    mov rdx, [C_BOOTS]
    cmp rdx, [C_RESETS]
    ja 1f
    imul rcx, [C_TSC_KHZ]
    add rcx, rax
    mov [C_RESET_AT], rcx
1:  ret

# Does not return.
reset:
    call serial_lock
    lea rsi, [rip + msg_reset]
    call puts
    FIELD name_boots, [C_BOOTS]
    call newline
    cmp qword ptr [C_WAY], 2
    je 1f
    mov eax, ACPI_RESET
    mov byte ptr [rax], 0x42
    jmp 2f
1:  # Without gates for exceptions the first one is the last.
    mov edi, IDT
    xor eax, eax
    mov ecx, 32 * 16 / 8
    rep stosq
    ud2
2:  pause
    jmp 2b

# Changes rax, rsi.
look_at_button:
    mov rax, [C_BUTTON]
    dec rax
    cmp rax, 1
    ja 1f                          # not given, or 0
    mov eax, ACPI_EVENTS
    mov eax, [rax]
    test al, 2
    jz 1f
    call serial_lock
    lea rsi, [rip + msg_button]
    call puts
    call serial_unlock
    cmp qword ptr [C_BUTTON], 2
    jne 1f
    mov eax, ACPI_SLEEP
    mov byte ptr [rax], 0x34       # sleep type 5, now
1:  ret

msg_reset:
    .asciz "qevm-payload reset"
name_boots:
    .asciz " boots="
msg_button:
    .asciz "qevm-payload power button\n"
