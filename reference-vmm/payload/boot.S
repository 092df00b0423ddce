# From the reset vector (or a SIPI) to ring 3.

    .code16
ap_entry:
    mov esi, 1
    jmp start16
bsp_entry:
    xor esi, esi
start16:
    cli
    lgdtd cs:[gdtr32 - image]
    mov eax, cr0
    and eax, 0x9fffffff            # caches on: CD and NW are set at reset
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea               # far jump with a 32-bit offset
    .long start32
    .word SEL_CODE32

    .code32
start32:
    mov ax, SEL_DATA
    mov ds, ax
    mov es, ax
    mov ss, ax
    test esi, esi
    jz start32_bsp
    # edi = vCPU number, in the order in which they arrive; surplus ones sleep.
    mov edi, 1
    lock xadd [C_APS], edi
    inc edi
    cmp edi, [C_NCPU]
    jae sleep32
    jmp enter_long_mode
sleep32:
    cli
    hlt
    jmp sleep32

start32_bsp:
    # Both 8259s: everything masked, before interrupts are on. The PIT counts from the start.
    mov al, 0xff
    out 0x21, al
    out 0xa1, al
    xor edi, edi
    # Descriptors. The image is read-only, so the busy bit of a TSS needs a copy in RAM.
    xor ecx, ecx
1:  mov eax, [gdt + ecx]
    mov [GDT + ecx], eax
    add ecx, 4
    cmp ecx, gdt_end - gdt
    jb 1b
    mov ebx, TSS
    xor ecx, ecx
2:  mov eax, ebx
    shl eax, 16
    or eax, TSS_LIMIT
    mov [GDT + SEL_TSS + ecx], eax
    mov dword ptr [GDT + SEL_TSS + ecx + 4], 0x00008900
    mov dword ptr [GDT + SEL_TSS + ecx + 8], 0
    mov dword ptr [GDT + SEL_TSS + ecx + 12], 0
    add ebx, TSS_SIZE
    add ecx, 16
    cmp ecx, 16 * MAX_CPUS
    jb 2b
    # Run from RAM: the paravirtual KVM of Linux 6.18 was seen to fault for ever on user code just below 4 GiB.
    mov esi, offset image
    mov edi, CODE
    mov ecx, (image_used_end - image + 3) / 4
    cld
    rep movsd
    # RSP0 and the I/O bitmap. Ring 3 has IOPL 3, but paravirtual KVM forgets it: the bitmap must allow as well.
    mov ebx, TSS
    mov edx, STACK0 + STACK0_SIZE
3:  mov edi, ebx
    xor eax, eax
    mov ecx, TSS_LIMIT / 4
    rep stosd
    mov byte ptr [ebx + TSS_LIMIT], 0xff
    mov [ebx + 4], edx
    mov word ptr [ebx + 0x66], IO_BITMAP
    add ebx, TSS_SIZE
    add edx, STACK0_SIZE
    cmp ebx, TSS + MAX_CPUS * TSS_SIZE
    jb 3b
    xor edi, edi
    # Only what ring 3 needs to start: the first 4 MiB and the image. Ring 3 maps the rest.
    mov dword ptr [PML4], PDPT + PTE_TABLE
    mov dword ptr [PDPT], PD + PTE_TABLE
    mov dword ptr [PDPT + 24], PD + 0x3000 + PTE_TABLE
    mov dword ptr [PD], PTE_LARGE
    mov dword ptr [PD + 8], 0x200000 + PTE_LARGE
    mov dword ptr [PD + 0x3ff8], 0xffe00000 + PTE_LARGE
    mov dword ptr [C_APS], 0
    mov dword ptr [C_GO], 0
    mov dword ptr [C_READY], 0
    mov dword ptr [C_LOCK], 0
    mov dword ptr [C_GAVE_UP], 0

enter_long_mode:
    mov eax, 0x620                 # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, PML4
    mov cr3, eax
    mov ecx, 0xc0000080            # EFER
    rdmsr
    or eax, 0x100                  # LME
    wrmsr
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    .byte 0xea
    .long CODE + start64 - image
    .word SEL_CODE64

    .code64
start64:
    lgdt [rip + gdtr64]
    lidt [rip + idtr64]
    mov ecx, edi
    shl ecx, 4
    add ecx, SEL_TSS
    # A guest that was reset finds its TSS marked busy.
    and byte ptr [rcx + GDT + 5], 0xfd
    ltr cx
    mov edx, edi
    imul edx, edx, STACK3_SIZE
    add edx, STACK3 + STACK3_SIZE
    xor eax, eax
    mov fs, ax
    mov gs, ax
    mov ax, SEL_UDATA
    mov ds, ax
    mov es, ax
    mov esp, edi
    imul esp, esp, STACK0_SIZE
    add esp, STACK0 + STACK0_SIZE
    lea rbx, [rip + main]
    push SEL_UDATA
    push rdx
    push 0x3202                    # IOPL 3, interrupts on: all sources are still silent
    push SEL_UCODE64
    push rbx
    iretq

    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff       # 32-bit code; the accessed bits are set, the image is read-only
    .quad 0x00cf93000000ffff       # data
    .quad 0x00af9b000000ffff       # 64-bit code
    .quad 0x00cff3000000ffff       # user data
    .quad 0x00affb000000ffff       # user 64-bit code
gdt_end:
gdtr32:
    .word gdt_end - gdt - 1
    .long gdt
gdtr64:
    .word SEL_TSS + 16 * MAX_CPUS - 1
    .quad GDT
idtr64:
    .word 16 * 256 - 1
    .quad IDT
