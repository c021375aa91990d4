#!/usr/bin/env python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Every float addition, multiplication and division of the shaders is "precise".

What a row gives must not depend on which kernel computes it, and error bounds are counted step by
step; a driver may contract and reorder whatever lacks the decoration. Takes the words that glslc
made of each shader (-mfmt=num).
"""

import sys

DECORATE = 71
NO_CONTRACTION = 42
ARITHMETIC = {
    129: "OpFAdd",
    131: "OpFSub",
    133: "OpFMul",
    136: "OpFDiv",
    142: "OpVectorTimesScalar",
    148: "OpDot",
}


def instructions(words):
    at = 5
    while at < len(words):
        count = words[at] >> 16
        assert count, "not SPIR-V"
        yield words[at] & 0xFFFF, words[at + 1 : at + count]
        at += count


def check(path):
    with open(path, encoding="ascii") as file:
        words = [int(word, 0) for word in file.read().replace(",", " ").split()]
    assert words[0] == 0x07230203, f"{path}: not SPIR-V"
    precise = set()
    wrong = {}
    n = 0
    for opcode, operands in instructions(words):
        if opcode == DECORATE and operands[1] == NO_CONTRACTION:
            precise.add(operands[0])
        elif opcode in ARITHMETIC:
            n += 1
            if operands[1] not in precise:
                name = ARITHMETIC[opcode]
                wrong[name] = wrong.get(name, 0) + 1
    for name, count in wrong.items():
        print(f"{path}: {count} {name} not precise: a result is no precise variable")
    return n, not wrong


def main():
    results = [check(path) for path in sys.argv[1:]]
    assert sum(n for n, _ in results) > 0, "no arithmetic in any shader"
    sys.exit(0 if all(good for _, good in results) else 1)


main()
