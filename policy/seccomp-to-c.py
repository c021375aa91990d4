#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Makes a C table (daemon/seccomp-list.h) of lists of system calls, policy/*.seccomp.

A line allows a system call; what is not listed is refused with EPERM and told of.

  # a comment: the reason of what follows, up to the next comment
  NAME                         allowed, whatever its arguments
  NAME:NUMBER                  the same, for one that libseccomp may not know by name yet
  NAME argN == VALUE           allowed if the low 32 bits of that argument (0..5) are VALUE
  NAME argN & MASK == VALUE    allowed if those bits of that argument are VALUE; all 64 bits of it are looked at
  NAME CONDITION, CONDITION    allowed if all hold, of different arguments; several lines of a NAME: if one does
  NAME [CONDITIONS] = ERRNO    refused without a word, with that error: callers are known to have another way

Values are constants of C in parentheses or without, or `self`: the number of the process.

  seccomp-to-c.py OUTPUT LIST...
"""
import os
import re
import sys

HEADERS = ["asm/termbits.h", "errno.h", "fcntl.h", "linux/falloc.h", "linux/memfd.h", "linux/prctl.h",
           "sched.h",
           "sys/ioctl.h", "sys/mman.h", "sys/resource.h", "sys/socket.h"]
CONSTANT = re.compile(r"[A-Za-z0-9_|() ]+")


def fail(path, number, what):
    sys.exit(f"{path}:{number}: {what}")


def condition(path, number, text):
    m = re.fullmatch(r"arg([0-5])\s*(?:&\s*(.+?)\s*)?==\s*(.+)", text.strip())
    if not m or not all(CONSTANT.fullmatch(c) for c in m.groups()[1:] if c):
        fail(path, number, f"'{text.strip()}' is not a condition: argN [& MASK] == VALUE")
    if m[3] == "self":
        return m[1], f"{{.argument = {m[1]}, .mask = UINT32_MAX, .is_self = true}}"
    mask = f"(uint64_t)({m[2]})" if m[2] else "UINT32_MAX"
    cast = "uint64_t" if m[2] else "uint32_t"
    return m[1], f"{{.argument = {m[1]}, .mask = {mask}, .value = ({cast})({m[3]})}}"


def rule(path, number, line):
    m = re.fullmatch(r"([a-z][a-z0-9_]*)(?::([0-9]+))?(?: (arg.+?))?(?: = (E[A-Z0-9]+))?", line)
    if not m:
        fail(path, number, f"'{line}' is not NAME, NAME CONDITION, ... or NAME = ERRNO")
    fields = [f'.name = "{m[1]}"', f".number = {m[2] or -1}"]
    if m[4]:
        fields.append(f".error = {m[4]}")
    if m[3]:
        conditions = [condition(path, number, c) for c in m[3].split(",")]
        if len(conditions) > 3 or len({a for a, _ in conditions}) != len(conditions):
            fail(path, number, "at most 3 conditions, each of another argument")
        fields.append(f".n_conditions = {len(conditions)}")
        fields.append(".conditions = {" + ", ".join(c for _, c in conditions) + "}")
    return "{" + ", ".join(fields) + "}"


def read(path):
    rules, seen, reason = [], set(), False
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            line = " ".join(line.split())
            if not line:
                reason = False
            elif line.startswith("#"):
                reason = True
            elif not reason:
                fail(path, number, "a group of system calls begins with a comment that gives the reason")
            elif line in seen:
                fail(path, number, f"'{line}' is there already")
            else:
                seen.add(line)
                rules.append(rule(path, number, line))
    if not rules:
        sys.exit(f"{path}: has no system calls")
    return rules


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    output, paths = sys.argv[1], [p for p in sys.argv[2:] if p.endswith('.seccomp')]
    lines = ["/* Made by policy/seccomp-to-c.py of the lists in policy/. */", '#include "daemon/seccomp-list.h"']
    lines += [f"#include <{h}>" for h in HEADERS]
    for path in paths:
        name = os.path.basename(path).split(".")[0].replace("-", "_")
        lines += ["", f"static const struct seccomp_rule {name}_rules[] = {{"]
        lines += [f"    {r}," for r in read(path)]
        lines += ["};", f"const struct seccomp_list seccomp_{name} = {{{name}_rules,",
                  f"    sizeof({name}_rules) / sizeof({name}_rules[0])}};"]
    with open(output, "w", encoding="utf-8") as f:
        f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
