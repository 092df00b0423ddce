# Configuration: RAM size and vCPU count from QEMU's fw_cfg keys, the rest from its file opt/qevm/payload,
# a text such as "dirty=64M hold=16M rate=0". Keys are those of config_keys, values decimal with K, M or G.

    .code64
    .set FW_CFG_SIGNATURE, 0x00
    .set FW_CFG_RAM_SIZE,  0x03
    .set FW_CFG_NB_CPUS,   0x05
    .set FW_CFG_FILE_DIR,  0x19

read_config:
    mov edi, C_CONFIG
    mov ecx, CONFIG_COUNT
    mov rax, -1
    rep stosq
    mov ax, FW_CFG_SIGNATURE
    call fw_select
    mov ecx, 4
    call fw_number
    cmp eax, 0x554d4551            # "QEMU"
    lea rsi, [rip + msg_no_fw_cfg]
    jne fatal
    mov ax, FW_CFG_RAM_SIZE
    call fw_select
    mov ecx, 8
    call fw_number
    mov [C_RAM], rax
    mov ax, FW_CFG_NB_CPUS
    call fw_select
    mov ecx, 2
    call fw_number
    test eax, eax
    jnz 1f
    inc eax
1:  mov [C_NCPU], rax
    # The directory: big-endian count, then entries {u32 size, u16 selector, u16 0, char[56] name}.
    mov ax, FW_CFG_FILE_DIR
    call fw_select
    mov ecx, 4
    call fw_number
    bswap eax
    mov ebp, eax
2:  test ebp, ebp
    jz config_done
    dec ebp
    mov ecx, 8
    call fw_number
    mov rbx, rax
    # Compare the name; all 56 bytes are read in any case.
    lea rsi, [rip + config_name]
    xor r8d, r8d                   # differs
    xor r9d, r9d                   # the wanted name has ended
    mov ecx, 56
3:  call fw_byte
    test r9d, r9d
    jnz 4f
    movzx edx, byte ptr [rsi]
    inc rsi
    cmp al, dl
    setne dl
    movzx edx, dl
    or r8d, edx
    test al, al
    sete r9b
4:  dec ecx
    jnz 3b
    test r8d, r8d
    jnz 2b
    # Found: read the text.
    mov rax, rbx
    bswap eax                      # size
    cmp eax, CONFIG_MAX - 1
    lea rsi, [rip + msg_long_config]
    ja fatal
    mov ecx, eax
    mov rax, rbx
    shr rax, 32
    xchg al, ah                    # selector
    call fw_select
    mov edi, CONFIG_TEXT
    test ecx, ecx
    jz 6f
5:  call fw_byte
    stosb
    dec ecx
    jnz 5b
6:  mov byte ptr [rdi], 0
    mov esi, CONFIG_TEXT
    call parse_config
config_done:
    ret

# ax = key
fw_select:
    mov dx, FW_CFG_SEL
    out dx, ax
    ret

# al = next byte of the selected item; changes dx
fw_byte:
    mov dx, FW_CFG_DATA
    in al, dx
    ret

# ecx = bytes; rax = the little-endian number they make; changes rcx, rdx, r8, r9
fw_number:
    xor r8d, r8d
    mov r9d, ecx
    xor ecx, ecx
1:  call fw_byte
    movzx eax, al
    shl rax, cl
    or r8, rax
    add ecx, 8
    dec r9d
    jnz 1b
    mov rax, r8
    ret

# rsi = text ending in 0
parse_config:
    movzx eax, byte ptr [rsi]
    test al, al
    jz 9f
    cmp al, ' '
    jbe 8f                         # separators: blanks, line ends, ',' and ';'
    cmp al, ','
    je 8f
    cmp al, ';'
    je 8f
    # The key, up to 8 characters, as one little-endian number.
    mov r10, rsi
    xor ebx, ebx
    xor ecx, ecx
1:  movzx eax, byte ptr [rsi]
    cmp al, '='
    je 2f
    cmp al, ' '
    jbe bad_config
    cmp ecx, 64
    jae bad_config
    shl rax, cl
    or rbx, rax
    add ecx, 8
    inc rsi
    jmp 1b
2:  inc rsi
    lea rdx, [rip + config_keys]
    xor edi, edi
3:  cmp rbx, [rdx + rdi * 8]
    je 4f
    inc edi
    cmp edi, CONFIG_COUNT
    jb 3b
    jmp bad_config
4:  # The value.
    xor ebx, ebx
    mov rdx, rsi
5:  movzx eax, byte ptr [rsi]
    sub eax, '0'
    cmp eax, 9
    ja 6f
    imul rbx, rbx, 10
    add rbx, rax
    inc rsi
    jmp 5b
6:  cmp rsi, rdx
    je bad_config
    xor ecx, ecx
    movzx eax, byte ptr [rsi]
    cmp al, 'K'
    mov edx, 10
    cmove ecx, edx
    cmp al, 'M'
    mov edx, 20
    cmove ecx, edx
    cmp al, 'G'
    mov edx, 30
    cmove ecx, edx
    shl rbx, cl
    test ecx, ecx
    jz 7f
    inc rsi
7:  mov [C_CONFIG + rdi * 8], rbx
    movzx eax, byte ptr [rsi]
    cmp al, ' '
    jbe parse_config
    cmp al, ','
    je 8f
    cmp al, ';'
    jne bad_config
8:  inc rsi
    jmp parse_config
9:  ret

# r10 = where the bad entry starts
bad_config:
    lea rsi, [rip + msg_bad_config]
    call puts
    mov rsi, r10
    call puts
    call newline
    jmp give_up

# rsi = message; does not return
fatal:
    call puts
give_up:
    mov dword ptr [C_GAVE_UP], 1
    hlt                            # not allowed in ring 3: ends in the trap handler, which halts

config_keys:
    .ascii "base\0\0\0\0"          # first address of the hot range, bytes
    .ascii "dirty\0\0\0"           # size of the hot range of all vCPUs together, bytes
    .ascii "hold\0\0\0\0"          # size of the pseudo-random range behind it, bytes
    .ascii "zero\0\0\0\0"          # size of the untouched range behind that, bytes
    .ascii "rate\0\0\0\0"          # bytes per second all vCPUs together dirty, 0 = as fast as possible
    .ascii "report\0\0"            # milliseconds between two progress lines
    .ascii "verify\0\0"            # background pages per second and vCPU
    .ascii "timer\0\0\0"           # timer interrupts per second and vCPU, 0 = none
    .ascii "cpus\0\0\0\0"          # vCPUs to use at most
    .ascii "virtio\0\0"            # devices to use: 1 disk, 2 random numbers, 4 console, 8 network
    .ascii "events\0\0"            # not 0: with VIRTIO_RING_F_EVENT_IDX
    .ascii "reset\0\0\0"           # milliseconds from the start to a reset, 0 = never
    .ascii "resets\0\0"            # how often at most
    .ascii "way\0\0\0\0\0"         # how: 1 ACPI reset register, 2 triple fault
    .ascii "button\0\0"            # power button: 1 report it, 2 report it and switch off
    .ascii "worst\0\0\0"           # not 0: do nothing but your worst
    .ascii "pci\0\0\0\0\0"         # PCI bus: 1 its host bridge, 2 and its test devices, with interrupts by 3 INTx, 4 MSI, 5 MSI-X
    .ascii "dma\0\0\0\0\0"         # address of the first page that those write to, 0 = none
    .ascii "dmapages"              # pages for each of them
    .ascii "reader\0\0"           # not 0: read the hold range at random, and measure each read
config_name:
    .asciz "opt/qevm/payload"
msg_no_fw_cfg:
    .asciz "qevm-payload error: no fw_cfg device at port 0x510\n"
msg_long_config:
    .asciz "qevm-payload error: opt/qevm/payload is longer than 4095 bytes\n"
msg_bad_config:
    .asciz "qevm-payload error: not understood, want KEY=NUMBER[K|M|G] with a known key, at: "
