#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""libllm.so as its users see it: header, linker map, library and manual agree, and it needs libsystemd alone.

  test-libllm-abi.py LIBRARY SOURCE_ROOT
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile

LIBRARY, ROOT = sys.argv[1:3]
HEADER = os.path.join(ROOT, "client/llm.h")
MAP = os.path.join(ROOT, "client/libllm.map")
MANUAL = os.path.join(ROOT, "docs/man/libllm.3")
BUS_ERRORS = os.path.join(ROOT, "ipc/bus-error.c")
SONAME = "libllm.so.1"
# Not counted: what a compiler brings: its sanitizers, their helpers, and the C library itself.
NEEDED = {"libsystemd.so.0"}
OF_THE_COMPILER = re.compile(r"lib(c|m|pthread|dl|rt|gcc_s|asan|ubsan|tsan|lsan|clang_rt\..*)\.so.*|ld-linux.*")


def output(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def without_comments(path):
    with open(path, encoding="utf-8") as f:
        return re.sub(r"/\*.*?\*/", "", f.read(), flags=re.S)


def check_symbols():
    """{version: names} must be the same in all three places."""
    in_map = {}
    for version, names in re.findall(r"(\S+) \{\s*global:(.*?)(?:local:.*?)?\}", without_comments(MAP), re.S):
        in_map[version] = set(re.findall(r"\w+", names))
    assert "LLM_1.0" in in_map, in_map
    exported = {}
    for line in output("nm", "-D", "--defined-only", "--with-symbol-versions", LIBRARY).splitlines():
        kind, name = line.split()[-2:]
        if kind == "A":
            continue  # the versions themselves
        name, _, version = name.partition("@@")
        exported.setdefault(version, set()).add(name)
    declared = set(re.findall(r"LLM_EXPORT\s[^;]*?\b(\w+)\([^;]*\);", without_comments(HEADER)))
    assert exported == in_map, (exported, in_map)
    assert declared == set().union(*in_map.values()), declared ^ set().union(*in_map.values())
    assert len(declared) > 20 and all(n.startswith("llm_") for n in declared), declared
    return declared


def check_needs():
    dynamic = output("readelf", "--dynamic", "--wide", LIBRARY)
    assert re.findall(r"\(SONAME\).*\[(.*)\]", dynamic) == [SONAME], dynamic
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    needed = {n for n in needed if not OF_THE_COMPILER.fullmatch(n)}
    assert needed == NEEDED, needed


def check_header():
    """It is read alone, by strict compilers of C and of C++."""
    ways = [("cc", "c", "-std=c99"), ("cc", "c", "-std=c17"), ("c++", "c++", "-std=c++11")]
    tried = 0
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "includes")
        with open(source, "w") as f:
            f.write(f'#include "{HEADER}"\n')
        for compiler, language, standard in ways:
            if not shutil.which(compiler):
                continue
            tried += 1
            subprocess.run([compiler, "-x", language, standard, "-Wall", "-Wextra", "-pedantic-errors", "-Werror",
                            "-Wno-pragma-once-outside-header", "-fsyntax-only", source], check=True)
    return tried


def prototype(text):
    return re.sub(r"\s+", " ", text).replace("( ", "(").strip()


def check_manual(declared):
    """Each prototype stands in the synopsis as in the header, and each error of the bus in the table."""
    with open(MANUAL, encoding="utf-8") as f:
        manual = f.read()
    plain = re.sub(r"\\f[BRI]", "", manual).replace("\\-", "-")
    synopsis = plain.split(".SH DESCRIPTION")[0]
    shown = {prototype(p) for p in re.findall(r"^(?:int|void|enum|struct|const)\b[^;]*?\bllm_\w+\([^;]*\);", synopsis, re.M)}
    wanted = {prototype(p) for p in re.findall(r"LLM_EXPORT (\s*[^;]*\);)", without_comments(HEADER))}
    assert len(wanted) == len(declared) and shown == wanted, shown ^ wanted
    for name in re.findall(r"\b(LLM_[A-Z_]+),", without_comments(HEADER)):
        assert name in plain, name
    with open(BUS_ERRORS, encoding="utf-8") as f:
        errors = re.findall(r'SD_BUS_ERROR_MAP\(ERR\("(\w+)"\), (\w+)\)', f.read())
    table = re.findall(r"^([A-Z]\w+)\t(E\w+)$", plain, re.M)
    assert len(errors) > 10 and set(errors) <= set(table), set(errors) - set(table)


for program in ("nm", "readelf"):
    if not shutil.which(program):
        print(f"skipped: no {program}")
        sys.exit(77)
check_manual(check_symbols())
check_needs()
print(f"ok; the header was compiled in {check_header()} ways")
