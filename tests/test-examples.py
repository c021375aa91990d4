#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""The example programs with the real daemon, as their readers would use them.

  test-examples.py ASK ASK_PY LLMD DEMO_MODEL MAKE_CHAT_MODEL [TEST...]
"""
import os
import shutil
import signal
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
try:
    from daemon_client import PATIENCE, Broker, Daemon, SystemDaemon
except ImportError as e:
    print(f"skipped: {e} (python3-dbus)")
    sys.exit(77)

ASK, ASK_PY, LLMD, DEMO, MAKE_CHAT_MODEL = map(os.path.abspath, sys.argv[1:6])
SYSTEM_SOCKET = "/run/llmd/llmd.socket"
QUESTION, ANSWER = "What is 47 + 38?", "85"
RANDOM = "random.llmd"  # a model whose answers are long and mean nothing

tests = []
folder = tempfile.mkdtemp(prefix="examples-test-")


def test(f):
    tests.append(f)
    return f


class Place:
    """A runtime directory, and how each example reaches the private daemon there."""

    def __init__(self):
        self.runtime = tempfile.mkdtemp(dir=folder)
        os.mkdir(os.path.join(self.runtime, "llmd"), 0o700)
        self.socket = os.path.join(self.runtime, "llmd", "private.sock")
        nowhere = "unix:path=/nonexistent"
        self.env = dict(os.environ, XDG_RUNTIME_DIR=self.runtime, DBUS_SYSTEM_BUS_ADDRESS=nowhere,
                        DBUS_SESSION_BUS_ADDRESS=nowhere, PYTHONUNBUFFERED="1")
        self.programs = [[ASK], [sys.executable, ASK_PY, "--socket", self.socket]]

    def daemon(self, model=DEMO, *options):
        return Daemon(LLMD, model, self.socket, *options)

    def slow_daemon(self):
        """Its answers take seconds, but for the few that end soon by chance."""
        return self.daemon(os.path.join(folder, RANDOM), "--cpu-level", "reference", "--threads", "1")

    def popen(self, program, *args, **kw):
        return subprocess.Popen([*program, *args], env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, **kw)

    def call(self, program, *args):
        p = self.popen(program, *args)
        out, err = p.communicate(timeout=PATIENCE)
        return p.returncode, out.decode(), err.decode()


def wait_no_sessions(daemon):
    with daemon.connect() as c:
        while c.manager("Sessions"):
            pass


@test
def answers():
    place = Place()
    with place.daemon() as daemon:
        for program in place.programs:
            status, out, err = place.call(program, QUESTION)
            assert status == 0 and ANSWER in out and err == "", (program, status, out, err)
            wait_no_sessions(daemon)


@test
def answers_on_a_bus():
    if not shutil.which("dbus-daemon"):
        return "skipped: no dbus-daemon"
    place = Place()
    with Broker(place.runtime) as broker, SystemDaemon(LLMD, place.runtime, broker, model=DEMO) as daemon:
        daemon.wait_named()
        for program, bus in (([ASK], "SYSTEM"), ([ASK], "SESSION"), ([sys.executable, ASK_PY], "SYSTEM"),
                             ([sys.executable, ASK_PY, "--user"], "SESSION")):
            nowhere = dict(place.env)
            place.env[f"DBUS_{bus}_BUS_ADDRESS"] = broker.address
            status, out, err = place.call(program, QUESTION)
            assert status == 0 and ANSWER in out and err == "", (program, bus, status, out, err)
            place.env = nowhere
            wait_no_sessions(daemon)


@test
def complaints():
    place = Place()
    for program in place.programs:
        status, out, err = place.call(program, QUESTION)
        assert status == 1 and out == "" and len(err.splitlines()) == 1, (program, status, out, err)
    with place.daemon() as daemon:
        for program in place.programs:
            # Comes through the stream: it shows only when the prompt is read.
            status, out, err = place.call(program, "x" * 100000)
            assert status == 1 and out == "" and len(err.splitlines()) == 1, (program, status, out, err)
            assert "room for" in err, err
            wait_no_sessions(daemon)


@test
def interrupted():
    """While nothing comes, for the daemon stands still, so that Ctrl-C alone can end it."""
    place = Place()
    with place.slow_daemon() as daemon:
        for program in place.programs:
            for _ in range(100):  # until one has not had its whole answer yet
                p = place.popen(program, "x")
                p.stdout.read(1)
                daemon.process.send_signal(signal.SIGSTOP)
                p.send_signal(signal.SIGINT)
                _, err = p.communicate(timeout=PATIENCE)
                daemon.process.send_signal(signal.SIGCONT)
                wait_no_sessions(daemon)
                if p.returncode != 0:
                    break
            # The C program says so; the Python one is ended by the signal.
            assert (p.returncode, err) in ((1, ASK.encode() + b": the answer was cut\n"), (-signal.SIGINT, b"")), (
                program, p.returncode, err)


@test
def daemon_dies():
    place = Place()
    for program in place.programs:
        daemon = place.slow_daemon()
        assert daemon.ready, daemon.log()
        for _ in range(100):
            p = place.popen(program, "x")
            p.stdout.read(1)
            daemon.stop(signal.SIGKILL)
            _, err = p.communicate(timeout=PATIENCE)
            os.unlink(place.socket)
            if p.returncode != 0:
                break
            daemon = place.slow_daemon()
        assert p.returncode == 1 and err.endswith(b": the answer was cut\n"), (program, p.returncode, err)


def main():
    if os.path.exists(SYSTEM_SOCKET):
        print(f"skipped: {SYSTEM_SOCKET} is there, and is what the example would talk to")
        sys.exit(77)
    subprocess.run([MAKE_CHAT_MODEL, os.path.join(folder, RANDOM)], check=True)
    wanted = sys.argv[6:]
    for t in tests:
        if not wanted or t.__name__ in wanted:
            print(f"{t.__name__} ... ", end="", flush=True)
            print(t() or "ok", flush=True)
    subprocess.run(["rm", "-rf", folder], check=True)


main()
