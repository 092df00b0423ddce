# The host bridge of -M microvm,pcie=on, seen through its configuration space: who it is must not change, and what was written
# there must be there in the next pass, wherever the guest runs by then.

    .code64
    .set BRIDGE_ID,        0x00081b36  # Red Hat's "PCIe Host bridge"
    .set BRIDGE_CLASS,     0x06000000
    .set PCI_COMMAND,      0x04
    .set PCI_CLASS,        0x08
    .set PCI_LINE,         0x3c        # interrupt line, a byte for the guest to remember something
    .set PCI_OWN,          0x40        # first of the bridge's own registers, which keeps what is written
    .set MEMORY_AND_MASTER, 6

pci_start:
    xor eax, eax
    mov edi, C_PCI
    call default
    mov qword ptr [PCI_CHECKS], 0
    cmp qword ptr [C_PCI], 0
    je 1f
    mov eax, ECAM
    mov word ptr [rax + PCI_COMMAND], MEMORY_AND_MASTER
    mov byte ptr [rax + PCI_LINE], 0
    mov dword ptr [rax + PCI_OWN], 0
1:  jmp pci_devices_start

    .macro PCI_EXPECT at, expected
    mov ecx, \expected
    mov eax, ECAM + \at
    mov edx, [rax]
    mov eax, \at
    call pci_expect
    .endm

# Called by the first vCPU at the end of each pass; changes rax, rcx, rdx, rsi, rdi, r8-r11
pci_check:
    cmp qword ptr [C_PCI], 0
    je 1f
    PCI_EXPECT 0, BRIDGE_ID
    PCI_EXPECT PCI_CLASS, BRIDGE_CLASS
    PCI_EXPECT PCI_COMMAND, MEMORY_AND_MASTER
    PCI_EXPECT PCI_OWN, [PCI_CHECKS]
    movzx ecx, byte ptr [PCI_CHECKS]
    PCI_EXPECT PCI_LINE, ecx
    inc qword ptr [PCI_CHECKS]
    mov ecx, [PCI_CHECKS]
    mov eax, ECAM
    mov [rax + PCI_LINE], cl
    mov [rax + PCI_OWN], ecx
    jmp pci_devices_check
1:  ret

# eax = register, ecx = expected, edx = found
pci_expect:
    cmp ecx, edx
    je 1f
    xor r8d, r8d
    lea rsi, [rip + kind_pci]
    jmp stale
1:  ret

pci_progress:
    cmp qword ptr [C_PCI], 0
    je 1f
    lea rsi, [rip + msg_pci]
    call puts
    mov rax, [PCI_CHECKS]
    call putdec
    call newline
    jmp pci_devices_progress
1:  ret

kind_pci:
    .asciz "pci"
msg_pci:
    .asciz "qevm-payload pci checks="
