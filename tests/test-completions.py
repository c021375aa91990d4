#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""llmctl's help, man page and completions tell the same.

  test-completions.py LLMCTL MAN_PAGE COMPLETIONS_FOLDER

Every option that --help names, of every command, is in the man page and offered by bash, zsh and fish, and nothing
else is. Names that are asked of the daemon come from a stand-in for llmctl here; test-llmctl-admin.py has the real one.
Status 77 when a shell is missing and the others do well.
"""
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile

LLMCTL, MAN, FOLDER = map(os.path.abspath, sys.argv[1:4])
BASH, ZSH, FISH = (os.path.join(FOLDER, name) for name in ("llmctl.bash", "_llmctl", "llmctl.fish"))
PATIENCE = 60
wrong = []

# Says which daemon was meant where nobody sees it but us, and knows two sessions and two models.
STAND_IN = """#!/bin/sh
echo "$@" >> "$0.calls"
for a; do
    case $a in --*) shift;; *) break;; esac
done
while [ $# -gt 0 ]; do
    case $1 in --*) shift;; *) break;; esac
done
case "$1 $2" in
"session list") printf '%s\\n' ' 7 one  root interactive idle 0 0 1 0 0' '12 -    root batch       idle 0 0 1 0 0' ;;
"model list") printf '%s\\n' 'demo   loaded    1 yes small' 'gemma3 available 2 no  large' ;;
*) echo "ARGUMENTS:$*:" ;;
esac
"""


def expect(good, *what):
    if not good:
        wrong.append(" ".join(map(str, what)))


def output(*command, **kw):
    p = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=PATIENCE,
                       **kw)
    expect(p.returncode == 0 and not p.stderr, command, "ends with", p.returncode, p.stderr.decode())
    return p.stdout.decode()


def help_of(path):
    """(options, names of the commands below) of a command."""
    text = output(LLMCTL, *path, "--help")
    options = set()
    for line in text.splitlines():
        if re.match(r" +-", line):
            options.update(re.findall(r"--[a-z][a-z-]*", re.split(r"(?<=\S)  +", line.strip())[0]))
    part = re.search(r"^Commands:\n((?:  .*\n)+)", text, re.M)
    return options, re.findall(r"^  ([a-z][a-z-]*) ", part[1], re.M) if part else []


def walk(path=()):
    options, commands = help_of(path)
    tree = {path: (options, commands)}
    for c in commands:
        tree.update(walk(path + (c,)))
    return tree


def check_man(tree):
    text = open(MAN).read().replace("\\-", "-")
    for path, (options, _) in tree.items():
        if path:
            expect(re.search(rf'^\.BR? "?{" ".join(path)}\b', text, re.M), "the man page lacks the command", *path)
        for o in sorted(options):
            expect(re.search(rf"{o}(?![a-z-])", text), "the man page lacks", *path, o)
    known = set().union(*(options for options, _ in tree.values()))
    own = text[text.index(".SH COMMANDS"):text.index(".SH EXIT STATUS")]
    for o in sorted(set(re.findall(r"--[a-z][a-z-]*", own)) - known):
        expect(False, "the man page knows", o, "which llmctl does not")
    if shutil.which("groff"):
        p = subprocess.run(["groff", "-man", "-t", "-ww", "-z", MAN], stderr=subprocess.PIPE, timeout=PATIENCE)
        expect(p.returncode == 0 and not p.stderr, "groff:", p.stderr.decode())


def bash(folder, *words):
    """What bash offers for the last word; words as bash has them, --a=b in three."""
    script = f'''
        source "$1"; shift
        PATH={folder}:$PATH COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        _llmctl
        printf '%s\\n' "${{COMPREPLY[@]}}"
    '''
    return set(output("bash", "--norc", "-c", script, "bash", BASH, *words).split())


def check_bash(tree, folder):
    everywhere = tree[()][0] - {"--version"}
    for path, (options, commands) in tree.items():
        offered = {o.rstrip("=") for o in bash(folder, "llmctl", *path, "--")}
        wanted = options | everywhere
        expect(offered == wanted, "bash offers for", *path, sorted(offered - wanted), "and lacks", sorted(wanted - offered))
        if commands:
            expect(bash(folder, "llmctl", *path, "") == set(commands), "bash: commands of", *path)
    for words, want in (
            (("session", "sh"), {"show"}),
            (("--user", "se"), {"session"}),
            (("--socket", "session", "mod"), {"model"}),
            (("--timeout", "=", "3", "session", "clo"), {"close"}),
            (("session", "close", ""), {"7", "12"}),
            (("cancel", "1"), {"12"}),
            (("run", "--session", "=", ""), {"7", "12"}),
            (("run", "--session", "1"), {"12"}),
            (("run", "--session", "="), {"7", "12"}),
            (("run", "--class", "="), {"interactive", "batch", "idle"}),
            (("run", "--class", "b"), {"batch"}),
            (("run", "--seed", "="), set()),
            (("run", "--seed", ""), set()),
            (("status", "--json", "=", "p"), {"pretty"}),
            (("model", "remove", "g"), {"gemma3"}),
            (("run", "--json", "--raw", "--no-s"), {"--no-start", "--no-stdin"}),
            (("quota", "set", "roo"), {"root"}),
    ):
        seen = bash(folder, "llmctl", *words)
        expect(seen == want, "bash offers for", words, seen)
    calls = os.path.join(folder, "llmctl.calls")
    os.unlink(calls)
    bash(folder, "llmctl", "--socket", "=", "/x/y", "session", "close", "")
    expect("--socket=/x/y " in open(calls).read(), "bash asks another daemon:", open(calls).read())


def fish(folder, line):
    text = output("fish", "--no-config", "-c", f"source {FISH}; complete -C '{line}'",
                  env=dict(os.environ, PATH=f"{folder}:{os.environ['PATH']}", HOME=folder))
    return {entry.split("\t")[0] for entry in text.splitlines()}


def check_fish(tree, folder):
    output("fish", "--no-config", "-n", FISH)
    everywhere = tree[()][0] - {"--version"}
    for path, (options, commands) in tree.items():
        line = " ".join(("llmctl",) + path)
        offered = {o.rstrip("=") for o in fish(folder, line + " --")}
        wanted = options | everywhere
        expect(offered == wanted, "fish offers for", *path, sorted(offered - wanted), "and lacks", sorted(wanted - offered))
        if commands:
            expect(fish(folder, line + " ") == set(commands), "fish: commands of", *path)
    for line, want in (
            ("session close ", {"7", "12"}),
            ("--timeout 3 cancel ", {"7", "12"}),
            ("run --session=", {"--session=7", "--session=12"}),
            ("run --class b", {"batch"}),
            ("model remove g", {"gemma3"}),
            ("run -n --no-st", {"--no-start", "--no-stdin"}),
            ("status --json=p", {"--json=pretty"}),
    ):
        seen = fish(folder, "llmctl " + line)
        expect(seen == want, "fish offers for", line, seen)
    calls = os.path.join(folder, "llmctl.calls")
    os.unlink(calls)
    fish(folder, "llmctl --socket /x/y session close ")
    expect("--socket=/x/y " in open(calls).read(), "fish asks another daemon:", open(calls).read())


class Zsh:
    """An interactive shell that has these completions."""

    def __init__(self, folder):
        self.program = os.path.join(folder, "llmctl")
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(HOME=folder, TERM="dumb", COLUMNS="500", PATH=f"{folder}:{os.environ['PATH']}")
            os.execvp("zsh", ["zsh", "-f", "-i"])
        self.seen = b""
        # What the line is once it is completed is told by a key of its own.
        os.write(self.fd, f"fpath=({FOLDER} $fpath); autoload -U compinit; compinit -u -D; unsetopt beep; stty cols 500; "
                          "tell() { print -- \"<<$BUFFER>\"\">\" }; zle -N tell; bindkey '^X' tell; print REA''DY\n".encode())
        self.until(b"READY\r\n")

    def until(self, text):
        while text not in self.seen:
            if not select.select([self.fd], [], [], PATIENCE)[0]:
                raise AssertionError(f"zsh says nothing more: {self.seen}")
            self.seen += os.read(self.fd, 65536)
        before, _, self.seen = self.seen.partition(text)
        return before

    def complete(self, line):
        os.write(self.fd, f"{self.program} {line}\t\x18".encode())
        self.until(b"<<")
        found = self.until(b">>").decode()
        os.write(self.fd, b"\x15")
        return found.removeprefix(self.program).strip()

    def close(self):
        os.close(self.fd)
        os.waitpid(self.pid, 0)


def check_zsh(tree, folder):
    output("zsh", "-f", "-n", ZSH)
    everywhere = tree[()][0] - {"--version"}
    script = 'source "$1"; shift; _llmctl_options "$@"; print -l -- $reply; reply=(); _llmctl_commands "$@"; print -l -- "+"$^reply'
    for path, (options, commands) in tree.items():
        lines = output("zsh", "-f", "-c", script, "zsh", ZSH, *path).splitlines()
        offered = {m[1] for m in (re.match(r"(?:\([^)]*\)|\*)*(--[a-z][a-z-]*)", line) for line in lines) if m}
        wanted = options | everywhere
        expect(offered == wanted, "zsh offers for", *path, sorted(offered - wanted), "and lacks", sorted(wanted - offered))
        below = {line[1:].split(":")[0] for line in lines if re.match(r"\+[a-z]", line)}
        expect(below == set(commands), "zsh: commands of", *path, below)
    zsh = Zsh(folder)
    for line, want in (
            ("session cl", "session close"),
            ("--user session cl", "--user session close"),
            ("session close 1", "session close 12"),
            ("cancel 7 1", "cancel 7 12"),
            ("model remove g", "model remove gemma3"),
            ("run --session=1", "run --session=12"),
            ("run --class=b", "run --class=batch"),
            ("status --json=p", "status --json=pretty"),
            ("is-ready --wa", "is-ready --wait"),
    ):
        seen = zsh.complete(line)
        expect(seen == want, "zsh makes of", line, ":", seen)
    zsh.close()


def main():
    tree = walk()
    expect(len(tree) > 15, "commands found:", list(tree))
    missing = []
    with tempfile.TemporaryDirectory() as folder:
        stand_in = os.path.join(folder, "llmctl")
        with open(stand_in, "w") as f:
            f.write(STAND_IN)
        os.chmod(stand_in, 0o755)
        check_man(tree)
        for name, check in (("bash", check_bash), ("zsh", check_zsh), ("fish", check_fish)):
            if shutil.which(name):
                check(tree, folder)
            else:
                missing.append(name)
    for w in wrong:
        print(w)
    print(f"{len(tree)} commands, {len(wrong)} differences; shells missing: {missing}")
    return 1 if wrong else 77 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
