#!/usr/bin/env python3
"""Writes a guest for QEMU that dirties memory steadily: boot_rom.py FILE, to be given to -bios.

A ROM of 64 KiB whose reset vector leads to protected mode, where a loop adds 1 to a word of each page from 16 to 144 MiB,
round and round. Some empty turns after each page keep hosts that interpret privileged code (KVM without VT-x or SVM) from
writing a ring full between two looks at it.
"""

import sys

SIZE, BASE, CODE = 1 << 16, 0xFFFF0000, 0xFF00
FIRST, END, TURNS = 16 << 20, 144 << 20, 6


def word(value):
    return value.to_bytes(4, "little")


# None, flat code, flat data; accessed already, so that no CPU writes them.
GDT = bytes(8) + bytes.fromhex("ffff0000009bcf00") + bytes.fromhex("ffff00000093cf00")
GDT_AT = CODE - 0x40
GDTR_AT = CODE - 0x10

real_mode = (
    bytes.fromhex("fa")  # cli
    + bytes.fromhex("2e660f0116") + GDTR_AT.to_bytes(2, "little")  # lgdt cs:[GDTR_AT]
    + bytes.fromhex("0f20c00c010f22c0")  # CR0.PE = 1
)
real_mode += bytes.fromhex("66ea") + word(BASE + CODE + len(real_mode) + 8) + bytes.fromhex("0800")  # jmp 8:protected

each_page = (
    bytes.fromhex("ff03")  # inc dword [ebx]
    + bytes.fromhex("b9") + word(TURNS) + bytes.fromhex("4975fd")  # as often: dec ecx
    + bytes.fromhex("81c3") + word(4096)  # add ebx, 4096
    + bytes.fromhex("81fb") + word(END)  # cmp ebx, END
)
each_page += bytes.fromhex("72") + (256 - len(each_page) - 2).to_bytes(1, "little")  # jb each_page
protected = bytes.fromhex("66b810008ed8")  # ds = 16
all_pages = bytes.fromhex("bb") + word(FIRST) + each_page  # mov ebx, FIRST
all_pages += bytes.fromhex("eb") + (256 - len(all_pages) - 2).to_bytes(1, "little")  # jmp all_pages

rom = bytearray(SIZE)
for at, what in [
    (GDT_AT, GDT),
    (GDTR_AT, (len(GDT) - 1).to_bytes(2, "little") + word(BASE + GDT_AT)),
    (CODE, real_mode + protected + all_pages),
    (0xFFF0, bytes.fromhex("e9") + (CODE - 0xFFF3 & 0xFFFF).to_bytes(2, "little")),  # jmp CODE
]:
    rom[at : at + len(what)] = what

with open(sys.argv[1], "wb") as file:
    file.write(rom)
