# COM1, polled.

    .code64
    .set FIFO_DEPTH, 16

serial_init:
    mov dx, COM1 + 1
    xor eax, eax
    out dx, al                     # no interrupts
    mov dx, COM1 + 3
    mov al, 0x83
    out dx, al                     # divisor latch open, 8n1
    mov dx, COM1
    mov al, 1
    out dx, al                     # 115200 baud
    mov dx, COM1 + 1
    xor eax, eax
    out dx, al
    mov dx, COM1 + 3
    mov al, 3
    out dx, al
    mov dx, COM1 + 2
    mov al, 7
    out dx, al                     # FIFOs on and empty
    mov dx, COM1 + 4
    mov al, 3
    out dx, al                     # DTR, RTS
    mov dword ptr [C_ROOM], 0
    ret

serial_lock:
    lock bts dword ptr [C_LOCK], 0
    jnc 2f
1:  pause
    test dword ptr [C_LOCK], 1
    jnz 1b
    jmp serial_lock
2:  ret

serial_unlock:
    mov dword ptr [C_LOCK], 0
    ret

# al = character; nothing changes but the flags. An empty transmitter takes a FIFO of characters.
putc:
    push rdx
    sub dword ptr [C_ROOM], 1
    jns 2f
    push rax
    mov dx, COM1 + 5
1:  in al, dx
    test al, 0x20                  # transmitter holding register empty
    jz 1b
    pop rax
    mov dword ptr [C_ROOM], FIFO_DEPTH - 1
2:  mov dx, COM1
    out dx, al
    pop rdx
    ret

newline:
    mov al, 10
    jmp putc

# rsi = text ending in 0; changes rax, rsi
puts:
    lodsb
    test al, al
    jz 1f
    call putc
    jmp puts
1:  ret

# rax = number; changes rax
putdec:
    push rbx
    push rcx
    push rdx
    mov ebx, 10
    xor ecx, ecx
1:  xor edx, edx
    div rbx
    push rdx
    inc ecx
    test rax, rax
    jnz 1b
2:  pop rax
    add al, '0'
    call putc
    dec ecx
    jnz 2b
    pop rdx
    pop rcx
    pop rbx
    ret

# rax = number, printed with 16 digits; changes rax
puthex:
    push rcx
    push rdx
    mov rdx, rax
    mov ecx, 16
1:  rol rdx, 4
    mov al, dl
    and al, 15
    add al, '0'
    cmp al, '9'
    jbe 2f
    add al, 'a' - '9' - 1
2:  call putc
    dec ecx
    jnz 1b
    pop rdx
    pop rcx
    ret
