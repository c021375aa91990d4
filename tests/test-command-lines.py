#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""What every program promises of its command line.

  test-command-lines.py PROGRAM...

- --help and --version answer on stdout, say nothing on stderr, and end with 0; the version is "NAME VERSION";
- --help fits 100 columns and holds no colours when it goes to a pipe;
- a wrong option or a missing argument: one complaint on stderr that points to --help, nothing on stdout, status 2;
- an answer that cannot be written is an error, not a success;
- a reader that leaves (SIGPIPE) ends the program without complaint.

Subcommands named in the "Commands:" part of a program's help are held to the same, and so are theirs.
"""
import os
import re
import signal
import subprocess
import sys

wrong = []


def call(command, **kw):
    kw.setdefault("stdout", subprocess.PIPE)
    p = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60, **kw)
    return p.returncode, (p.stdout or b"").decode(), p.stderr.decode()


def expect(good, command, what, *seen):
    if not good:
        wrong.append(f"{' '.join(map(os.path.basename, command))}: {what}: " + " ".join(repr(s) for s in seen))


def check_help(command):
    """Checks --help and gives its text."""
    c = [*command, "--help"]
    status, out, err = call(c)
    expect(status == 0 and err == "", c, "must end with 0 and leave stderr empty", status, err)
    expect(out.startswith("Usage: ") and out.endswith("\n"), c, "must answer 'Usage: ...' on stdout", out[:80])
    expect("\033" not in out, c, "has escape sequences in a pipe")
    for line in out.splitlines():
        expect(len(line) <= 100, c, "has a line of more than 100 columns", line)
    return out


def check_complaint(command, *args):
    c = [*command, *args]
    status, out, err = call(c)
    expect(status == 2, c, "must end with status 2", status)
    expect(out == "", c, "must leave stdout empty", out[:80])
    expect("--help" in err, c, "must point to --help", err)
    expect(err.startswith((command[0], os.path.basename(command[0]))), c, "must begin with the program's name", err)
    expect(2 <= len(err.splitlines()) <= 3 or (len(err.splitlines()) == 1 and len(err) > len("see --help") + 10), c,
           "must say in a line what is wrong", err)


def check_unwritable(command, *args):
    c = [*command, *args]
    with open("/dev/full", "w") as full:
        status, _, err = call(c, stdout=full)
    expect(status not in (0, 2) and status > 0 and err.strip(), c, "with a full stdout must complain and fail", status, err)

    status, _, err = call(c, stdout=None, preexec_fn=lambda: os.close(1))
    expect(status not in (0, 2) and status > 0 and "descriptor" in err, c, "without stdout must complain and fail", status, err)

    read, write = os.pipe()
    os.close(read)
    # Python ignores SIGPIPE and would pass that on.
    status, _, err = call(c, stdout=write, preexec_fn=lambda: signal.signal(signal.SIGPIPE, signal.SIG_DFL))
    os.close(write)
    quiet = status == -signal.SIGPIPE and err == ""
    expect(quiet or (status > 0 and "Sanitizer" not in err), c, "with a closed stdout must end at once", status, err)


def commands_of(text):
    """The names in the "Commands:" part of a help."""
    part = re.search(r"^Commands:\n((?:  .*\n)+)", text, re.M)
    return re.findall(r"^  ([a-z][a-z-]*) ", part[1], re.M) if part else []


def check_subcommand(command):
    """The number of commands checked: those that it has itself, too."""
    out = check_help(command)
    check_complaint(command, "--no-such-option")
    check_unwritable(command, "--help")
    own = commands_of(out)
    if own:
        check_complaint(command, "no-such-command")
    return 1 + sum(check_subcommand([*command, sub]) for sub in own)


def check(program):
    name = os.path.basename(program)
    out = check_help([program])
    c = [program, "--version"]
    status, version, err = call(c)
    expect(status == 0 and err == "", c, "must end with 0 and leave stderr empty", status, err)
    expect(re.fullmatch(rf"{re.escape(name)} \d+\.\d+\.\d+\n", version) is not None, c, "must answer 'NAME VERSION'", version)
    for flag in ("--help", "--version"):
        check_unwritable([program], flag)
    check_complaint([program], "--no-such-option")

    subcommands = commands_of(out)
    if subcommands:
        check_complaint([program])
        check_complaint([program], "no-such-command")
    return 1 + sum(check_subcommand([program, sub]) for sub in subcommands)


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    n = 0
    for program in sys.argv[1:]:
        n += check(program)
    for w in wrong:
        print(w)
    print(f"{n} commands, {len(wrong)} promises not kept")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
