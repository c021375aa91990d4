#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""What `meson install` puts where, used as those would who get it.

  test-install.py BUILD_ROOT MESON... -- COMPILER...

Installs into a folder of its own (DESTDIR). COMPILER comes with the options that the library's sanitizers ask for.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.dom.minidom

BUILD = os.path.abspath(sys.argv[1])
SPLIT = sys.argv.index("--")
MESON, COMPILER = sys.argv[2:SPLIT], sys.argv[SPLIT + 1:]
SONAME = "libllm.so.1"

tests = []
folder = tempfile.mkdtemp(prefix="install-test-")
destdir = os.path.join(folder, "root")


def test(f):
    tests.append(f)
    return f


def run(*command, env=None, check=True):
    p = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                       env={k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"} | (env or {}))
    if check and p.returncode != 0:
        raise AssertionError(f"{command}: {p.returncode}\n{p.stdout}{p.stderr}")
    return p


def files(*below):
    """Paths of all that was installed below a folder, wherever that is, as users see them (without DESTDIR)."""
    found = []
    for where, _, names in os.walk(destdir):
        for name in names:
            path = "/" + os.path.relpath(os.path.join(where, name), destdir)
            if all(f"/{b}/" in path for b in below):
                found.append(path)
    return sorted(found)


def only(paths, name):
    found = [p for p in paths if os.path.basename(p) == name]
    assert len(found) == 1, (name, found)
    return destdir + found[0]


def programs():
    return [destdir + p for p in files("bin")]


def pkg_config(*args):
    where = os.path.dirname(only(files("pkgconfig"), "libllm.pc"))
    env = {"PKG_CONFIG_LIBDIR": where, "PKG_CONFIG_PATH": "", "PKG_CONFIG_SYSROOT_DIR": destdir}
    return run("pkg-config", *args, "libllm", env=env).stdout.split()


@test
def programs_run_where_they_are():
    names = {os.path.basename(p) for p in programs()}
    assert {"llmd", "llmctl", "llm-import"} <= names, names
    # Below /usr the linker of the machine finds the library, which DESTDIR's is not; elsewhere each program does.
    libraries = os.path.dirname(only(files(), SONAME))
    found = {"LD_LIBRARY_PATH": libraries} if libraries.startswith(destdir + "/usr/lib") else {}
    linked = 0
    for program in programs():
        p = run(program, "--version", env=found)
        assert re.fullmatch(r"\S+ \d+\.\d+\.\d+\n", p.stdout), p.stdout
        if shutil.which("readelf"):
            dynamic = run("readelf", "--dynamic", "--wide", program).stdout
            linked += f"[{SONAME}]" in dynamic
            assert BUILD not in dynamic, "finds its libraries in the build"
    assert linked or not shutil.which("readelf"), "llmctl at least links the library"


@test
def library_and_links():
    paths = files()
    real = only(paths, SONAME + ".0.0")
    where = os.path.dirname(real)
    assert os.readlink(os.path.join(where, SONAME)) == SONAME + ".0.0"
    assert os.path.realpath(os.path.join(where, "libllm.so")) == real
    assert not [p for p in paths if p.endswith(".a")], "internal archives are nobody's business"
    assert [os.path.basename(p) for p in files("include")] == ["llm.h"]


@test
def compiles_with_pkg_config_alone():
    if not shutil.which("pkg-config"):
        return "skipped: no pkg-config"
    assert pkg_config("--modversion") == ["1.0.0"]
    flags = pkg_config("--cflags", "--libs")
    assert "-lllm" in flags and not [f for f in flags if "systemd" in f], flags
    with open(only(files("man3"), "libllm.3"), encoding="utf-8") as f:
        example = f.read().split(".SH EXAMPLE")[1].split(".RS 4\n")[1].split("\n.RE")[0]
    from_manual = os.path.join(folder, "manual.c")
    with open(from_manual, "w", encoding="utf-8") as f:
        f.write(example.replace(r"\-", "-").replace(r"\e", "\\") + "\n")
    libraries = os.path.dirname(only(files(), SONAME))
    nowhere = "unix:path=/nonexistent"
    for source in (only(files("doc", "examples"), "ask.c"), from_manual):
        program = os.path.join(folder, "program")
        run(*COMPILER, "-std=c11", "-D_DEFAULT_SOURCE", "-Wall", "-Wextra", "-Werror", "-o", program, source, *flags)
        p = run(program, "Hello!", check=False, env={
            "LD_LIBRARY_PATH": libraries, "XDG_RUNTIME_DIR": folder,
            "DBUS_SYSTEM_BUS_ADDRESS": nowhere, "DBUS_SESSION_BUS_ADDRESS": nowhere})
        if not os.path.exists("/run/llmd/llmd.socket"):
            assert p.returncode == 1 and "private.sock" in p.stderr and p.stdout == "", p


@test
def manual_pages():
    pages = files("man")
    assert {"libllm.3", "llmctl.1", "llmd.8"} <= {os.path.basename(p) for p in pages}, pages
    for path in pages:
        name, section = os.path.basename(path).rsplit(".", 1)
        assert os.path.basename(os.path.dirname(path)) == f"man{section}", path
        with open(destdir + path, encoding="utf-8") as f:
            text = f.read()
        title = re.search(r'^\.(?:TH|Dt) "?(\S+?)"? (\d)', text, re.M)
        assert title and (title[1].replace("\\-", "-").lower(), title[2]) == (name.lower(), section), path
    for program in programs():
        name = os.path.basename(program)
        assert [p for p in pages if re.fullmatch(re.escape(name) + r"\.[18]", os.path.basename(p))], f"{name} has no manual"
    if not shutil.which("groff"):
        return "formatting skipped: no groff"
    for path in pages:
        p = run("groff", "-ww", "-t", "-mandoc", "-Tutf8", "-z", destdir + path)
        assert p.stderr == "", p.stderr


@test
def services_start_what_is_there():
    started = []
    units = {os.path.basename(p) for p in files("systemd")}
    for path in files("systemd") + files("dbus-1"):
        with open(destdir + path, encoding="utf-8") as f:
            text = f.read()
        for program in re.findall(r"^(?:ExecStart|ExecReload|Exec)=[-@:+!|]*(/\S+)", text, re.M):
            assert os.access(destdir + program, os.X_OK) or program == "/bin/false", (path, program)
            started.append(program)
        for unit in re.findall(r"^(?:SystemdService|Requires|Also)=(llmd\S*)$", text, re.M):
            assert unit in units, (path, unit)
    assert not units or started, units
    for path in files("dbus-1") + files("polkit-1"):
        if path.endswith((".conf", ".policy", ".xml")):
            xml.dom.minidom.parse(destdir + path)


@test
def nothing_of_the_build_in_texts():
    n = 0
    for path in files():
        full = destdir + path
        if os.path.islink(full) or os.path.getsize(full) > 1 << 20:
            continue
        with open(full, "rb") as f:
            data = f.read()
        if b"\0" in data:
            continue
        n += 1
        assert BUILD.encode() not in data and destdir.encode() not in data, path
    assert n > 5, "texts"


@test
def modes():
    for path in files():
        mode = os.lstat(destdir + path).st_mode
        if os.path.islink(destdir + path):
            continue
        assert not mode & 0o022, f"{path}: others may write it"
        assert mode & 0o444 == 0o444 or "/polkit-1/" in path, f"{path}: not everybody may read it"
        if "/bin/" in path:
            assert mode & 0o111 == 0o111, path


def main():
    run(*MESON, "install", "-C", BUILD, "--no-rebuild", "--destdir", destdir)
    for t in tests:
        print(f"{t.__name__} ... ", end="", flush=True)
        print(t() or "ok", flush=True)
    shutil.rmtree(folder)


main()
