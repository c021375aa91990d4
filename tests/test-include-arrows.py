#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Rules about source files that no compiler checks (docs/architecture.md, "Folders"):

- arrows between folders point one way: an include, or a library in a meson.build, only from where it may come;
- quoted includes are written from the root and exist, or are generated;
- each file bears its two SPDX lines (a meson.build the licence's alone);
- a source file has at most 1500 lines;
- each test and fuzzer is entered in a meson.build, and each fuzzer has a corpus.

  test-include-arrows.py SOURCE_ROOT
"""
import os
import re
import sys

# folder: the folders it may include from, besides itself; None: any.
ARROWS = {
    "base": [],
    "ipc": ["base"],
    "backends": ["base", "shaders"],
    "shaders": [],
    "engine": ["base", "backends"],
    "daemon": ["base", "ipc", "backends", "engine"],
    "client": ["base", "ipc"],
    "tools": None,
    "tests": None,
}
# Besides these, folders that hold sources of no folder's library.
OTHERS = ["docs", "systemd", "policy", "models", "examples", ".ci"]
MAX_LINES = 1500

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
LINKED = re.compile(r"\b(\w+)_(?:dep|lib)\b")
SPDX = ("SPDX-FileCopyrightText: the llmd authors", "SPDX-License-Identifier: Apache-2.0")


def is_source(path):
    name = os.path.basename(path)
    if name in ("meson.build", "meson_options.txt") or name.endswith((".c", ".h", ".py", ".sh", ".comp", ".glsl", ".ini")):
        return True
    if "." in name.lstrip("."):
        return False
    with open(path, "rb") as f:
        return f.read(2) == b"#!"


def sources(root):
    top = [n for n in os.listdir(root) if os.path.isfile(os.path.join(root, n))]
    for name in sorted(top):
        if is_source(os.path.join(root, name)):
            yield name
    for folder in [*ARROWS, *OTHERS]:
        for where, folders, names in os.walk(os.path.join(root, folder)):
            # Corpora are inputs, whatever they are called.
            folders[:] = sorted(d for d in folders if not d.endswith("-corpus") and d != "__pycache__")
            for name in sorted(names):
                path = os.path.join(where, name)
                if is_source(path):
                    yield os.path.relpath(path, root)


def library_folders(root):
    """{name before _lib or _dep: the folder whose meson.build defines it}"""
    found = {}
    for folder in ARROWS:
        for where, _, names in os.walk(os.path.join(root, folder)):
            if "meson.build" in names:
                text = open(os.path.join(where, "meson.build"), encoding="utf-8").read()
                for name in re.findall(r"^\s*(\w+)_(?:dep|lib)\s*=", text, re.M):
                    found[name] = folder
    return found


def check_entered(root, path, builds):
    """Complaints about a test or fuzzer that no build would notice."""
    where, name = os.path.split(path)
    m = re.fullmatch(r"(test|fuzz)-(.+)\.(c|py|sh)", name)
    if not m or name == "fuzz-replay.c":
        return []
    wrong = []
    if not re.search(rf"'({re.escape(m[2])}|([^']*/)?{re.escape(name)})'", builds):
        wrong.append(f"{path}: is entered in no meson.build")
    if m[1] == "fuzz":
        corpus = os.path.join(root, where, m[2] + "-corpus")
        if not os.path.isdir(corpus) or not os.listdir(corpus):
            wrong.append(f"{path}: has no inputs in {m[2]}-corpus/")
    return wrong


def check(root):
    wrong = []
    n = 0
    libraries = library_folders(root)
    builds = "\n".join(open(os.path.join(root, p), encoding="utf-8").read() for p in sources(root)
                       if os.path.basename(p) == "meson.build")
    builds = re.sub("#.*", "", builds)

    for path in sources(root):
        n += 1
        with open(os.path.join(root, path), encoding="utf-8", errors="replace") as f:
            lines = f.read().splitlines()
        head = "\n".join(lines[:5])
        for spdx in SPDX:
            if spdx not in head and not (path.endswith("meson.build") and spdx == SPDX[0]):
                wrong.append(f"{path}: lacks the line '{spdx}' at its head")
        if len(lines) > MAX_LINES:
            wrong.append(f"{path}: {len(lines)} lines, more than {MAX_LINES}: it is two files")

        wrong += check_entered(root, path, builds)

        folder = path.split(os.sep)[0]
        may = ARROWS.get(folder)
        if os.path.basename(path).startswith(("test-", "fuzz-")):
            may = None  # tests may use anything, wherever they stand
        for i, line in enumerate(lines, 1):
            at = f"{path}:{i}"
            m = INCLUDE.match(line) if path.endswith((".c", ".h", ".comp", ".glsl")) else None
            if m:
                target = m[2].split("/")[0]
                if m[1] == "<":
                    if target in ARROWS and os.path.exists(os.path.join(root, m[2])):
                        wrong.append(f"{at}: <{m[2]}> is ours: include it in quotes")
                    continue
                if may is not None and target in ARROWS and target != folder and target not in may:
                    wrong.append(f"{at}: {folder}/ may not include {m[2]}")
                if folder != "shaders" and not m[2].endswith(("spirv.h", "config.h")) and not os.path.exists(
                        os.path.join(root, m[2])):
                    wrong.append(f"{at}: \"{m[2]}\" is not a path from the root")
            if os.path.basename(path) == "meson.build" and may is not None:
                for name in LINKED.findall(line.split("#")[0]):
                    owner = libraries.get(name, folder)
                    if owner != folder and owner not in may:
                        wrong.append(f"{at}: {folder}/ may not link {name} of {owner}/")
    if n < 10:
        wrong.append(f"{root}: only {n} sources found: is this the root?")
    return wrong, n


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    wrong, n = check(sys.argv[1])
    for w in wrong:
        print(w)
    print(f"{n} files, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
