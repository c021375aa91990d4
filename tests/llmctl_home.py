# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""For tests of llmctl: a user's home with a real llmd in it. The test's own arguments are

  LLMCTL LLMD MAKE_CHAT_MODEL [TEST...]
"""
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile

import dbus

from daemon_client import Client, make_endless_model, write_starter

LLMCTL, LLMD, MAKE_MODEL = map(os.path.abspath, sys.argv[1:4])
PATIENCE = 120
ENDLESS = ("--json", "--ignore-end", "--top-logprobs", "64", "--seed", "1")  # more than all buffers hold

tests = []
folder = tempfile.mkdtemp(prefix="llmctl-test-")
model = os.path.join(folder, "chat.llmd")
endless_model = os.path.join(folder, "endless.llmd")  # its answers end only when something ends them


def test(f):
    tests.append(f)
    return f


class Home:
    """A user's directories. The daemon is started through a script that notes its process id."""

    def __init__(self, model=model):
        self.path = tempfile.mkdtemp(dir=folder)
        self.runtime = os.path.join(self.path, "run")
        self.data = os.path.join(self.path, "share")
        os.makedirs(self.runtime, 0o700)
        self.socket = os.path.join(self.runtime, "llmd", "private.sock")
        self.starts_path = os.path.join(self.path, "starts")
        wrapper = os.path.join(self.path, "llmd")
        write_starter(wrapper, LLMD, f"echo $$ >> {self.starts_path}")
        self.env = dict(os.environ, XDG_RUNTIME_DIR=self.runtime, XDG_DATA_HOME=self.data, LLMD_BINARY=wrapper,
                        LLMD_MODEL=model)

    def popen(self, *args, **kw):
        kw.setdefault("stdin", subprocess.DEVNULL)
        # An installed daemon must not answer in the place of ours.
        scope = [] if kw.pop("any_scope", False) else ["--private"]
        return subprocess.Popen([kw.pop("program", LLMCTL), *scope, *args], stdout=kw.pop("stdout", subprocess.PIPE), stderr=subprocess.PIPE,
                                env=kw.pop("env", self.env), **kw)

    def call(self, *args, data=None, **kw):
        p = self.popen(*args, stdin=subprocess.PIPE if data is not None else subprocess.DEVNULL, **kw)
        out, err = p.communicate(data, timeout=PATIENCE)
        return p.returncode, out.decode(), err.decode()

    def starts(self):
        if not os.path.exists(self.starts_path):
            return []
        with open(self.starts_path) as f:
            return list(map(int, f))

    def client(self):
        return Client(self.socket)

    def wait_client(self):
        """A client of the daemon that is about to be started."""
        while True:
            try:
                return self.client()
            except (OSError, dbus.DBusException):
                pass  # it does not listen yet

    def wait_sessions(self, n):
        with self.wait_client() as c:
            while c.manager("Sessions") != n:
                pass

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        log = self.socket + ".log"
        for pid in self.starts():
            try:
                fd = os.pidfd_open(pid)
                signal.pidfd_send_signal(fd, signal.SIGTERM)
            except ProcessLookupError:
                continue
            select.select([fd], [], [], PATIENCE)
            os.close(fd)
        text = open(log, errors="replace").read() if os.path.exists(log) else ""
        assert "Sanitizer" not in text and "runtime error" not in text, text


def complaint(result, status, *texts):
    """One line on stderr that holds the texts; nothing on stdout."""
    assert result[0] == status, result
    assert result[1] == "", result
    assert len(result[2].splitlines()) == 1 and result[2].startswith("llmctl: "), result
    for t in texts:
        assert t in result[2], (t, result)


def main():
    subprocess.run([MAKE_MODEL, model], check=True)
    make_endless_model(MAKE_MODEL, endless_model)
    wanted = sys.argv[4:]
    for t in tests:
        if not wanted or t.__name__ in wanted:
            print(t.__name__, end=" ", flush=True)
            print(t() or "ok", flush=True)
    shutil.rmtree(folder)
