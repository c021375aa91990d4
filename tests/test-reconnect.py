# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""test-reconnect.py LLMD LLMCTL LIBLLM_SHELL MAKE_CHAT_MODEL: clients of a daemon that is killed and started again: what
they have to do, what libllm does for them, and whose sessions end."""
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading

try:
    import dbus
    from daemon_client import (BUS_NAME, Broker, BusClient, Child, Client, ERROR, MANAGER, PATIENCE, ROOT, SESSION,
                               error_of, options_of, read_all, until)
    from kept_daemon import Manager
    from raw_bus import CALL, DESTINATION, REPLY_SERIAL, RETURN, SENDER, RawBus, encode
except ImportError:
    print("python3-dbus is not there")
    sys.exit(77)

llmd, llmctl, shell, make_model = (os.path.abspath(p) for p in sys.argv[1:5])
tests = []


def test(f):
    tests.append(f)
    return f


class Shell:
    """A program with libllm."""

    def __init__(self, where, env=None):
        self.process = subprocess.Popen([shell, where], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        self.hear()

    def tell(self, *words):
        self.process.stdin.write(" ".join(map(str, words)).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self):
        words = self.process.stdout.readline().decode().rstrip("\n").split(" ", 1)
        assert words[0] == "ok", words
        return words[1]

    def do(self, *words):
        self.tell(*words)
        return self.hear()

    def fails(self, *words):
        self.tell(*words)
        line = self.process.stdout.readline().decode().split()
        assert line[0] == "error", line
        return line[2][len(ERROR):] if len(line) > 2 else os.strerror(int(line[1]))

    def new(self, *words):
        """(its number here, its path)"""
        number, path = self.do("new", *words).split()
        return int(number), path

    def kill(self):
        self.process.kill()
        self.done()

    def done(self):
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait(PATIENCE)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        status = self.done()
        assert kind or status == 0, status


def expected(folder, model, *turns):
    """What a conversation has when nothing happens to it."""
    os.makedirs(os.path.join(folder, "calm"), exist_ok=True)
    with Manager(llmd, tempfile.mkdtemp(dir=os.path.join(folder, "calm")), model) as m, Shell(m.socket) as c:
        c.new()
        return [c.do("say", 0, *turn) for turn in turns]


def stored(m, prefix):
    m.settle()
    return [name for name in m.names() if name.startswith(prefix)]


@test
def a_conversation_goes_on(folder, model):
    turns = [(20, "one"), (20, "two"), (20, "three"), (20, "four")]
    wanted = expected(folder, model, *turns)
    with Manager(llmd, folder, model) as m, Shell(m.socket) as c:
        c.new()
        got = []
        for turn in turns:
            got.append(c.do("say", 0, *turn))
            m.restart()
        assert got == wanted, (got, wanted)
        # Its former connections are let go, each with the next call.
        c.do("status")
        until(lambda: len(stored(m, "connection-")) == 1, lambda: m.names())
        assert len(stored(m, "session-")) == 1


def main():
    only = sys.argv[5:]
    with tempfile.TemporaryDirectory() as top:
        model = os.path.join(top, "model.llmd")
        subprocess.run([make_model, model], check=True)
        for t in tests:
            if only and t.__name__ not in only:
                continue
            print(t.__name__, end=" ", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                print(t(folder, model) or "ok", flush=True)


main()
