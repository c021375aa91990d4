# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""For whole-system tests: a real llmd on a socket of its own, and its bus peer to peer."""
import json
import os
import signal
import subprocess

import dbus
import dbus.connection

ROOT = "/org/llmd/Llm1"
MANAGER = "org.llmd.Llm1.Manager"
SESSION = "org.llmd.Llm1.Session"
ERROR = "org.llmd.Llm1.Error."
PATIENCE = 120  # seconds until a test that waits for an event gives up; decides nothing else


class Daemon:
    """llmd itself, started directly. Its log is a file."""

    def __init__(self, llmd, model, socket, *options, env=None):
        self.socket = socket
        self.log_path = socket + ".test-log"
        read, write = os.pipe()
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [llmd, "--private", "--model", model, "--socket", socket, "--ready-fd", str(write), *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[write], env=env)
        os.close(write)
        with os.fdopen(read, "rb") as f:
            self.ready = f.read() == b"READY=1\n"

    def log(self):
        with open(self.log_path, errors="replace") as f:
            return f.read()

    def connect(self):
        return Client(self.socket)

    def fds(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self, number=signal.SIGTERM):
        """Its exit status; 0 is what every test wants (sanitizers have their say there)."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def __enter__(self):
        assert self.ready, self.log()
        return self

    def __exit__(self, kind, value, trace):
        status = self.stop()
        if kind is None:
            assert status == 0, f"llmd ended with {status}: {self.log()}"


class Client:
    """One connection."""

    def __init__(self, socket):
        self.bus = dbus.connection.Connection("unix:path=" + socket)

    def call(self, path, interface, method, signature="", *args):
        return self.bus.call_blocking(None, path, interface, method, signature, args, timeout=PATIENCE)

    def get(self, path, interface, name):
        return self.call(path, "org.freedesktop.DBus.Properties", "Get", "ss", interface, name)

    def manager(self, name):
        return self.get(ROOT, MANAGER, name)

    def create(self, **options):
        options = {k.replace("_", "-"): v for k, v in options.items()}
        path = self.call(ROOT, MANAGER, "CreateSession", "a{sv}", dbus.Dictionary(options, signature="sv"))
        return Session(self, path)

    def close(self):
        self.bus.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Session:
    def __init__(self, client, path):
        self.client, self.path = client, path

    def get(self, name):
        return self.client.get(self.path, SESSION, name)

    def call(self, method):
        return self.client.call(self.path, SESSION, method)

    def generate(self, options=None, **more):
        """The stream, as a binary file."""
        options = dict(options or {}, **{k.replace("_", "-"): v for k, v in more.items()})
        fd, _ = self.client.call(self.path, SESSION, "Generate", "a{sv}", dbus.Dictionary(options, signature="sv"))
        return os.fdopen(fd.take(), "rb")

    def run(self, options=None, **more):
        """(text, records other than deltas)"""
        with self.generate(options, **more) as f:
            return read_all(f)

    def wait_idle(self):
        while self.get("State") != "idle":
            pass


def read_all(f):
    records = [json.loads(line) for line in f]
    return "".join(r["text"] for r in records if r["type"] == "delta"), [r for r in records if r["type"] != "delta"]


def error_of(call, *args, **kw):
    """(name without its prefix, message) of the error a call must give."""
    try:
        call(*args, **kw)
    except dbus.DBusException as e:
        name = e.get_dbus_name()
        return (name[len(ERROR):] if name.startswith(ERROR) else name), e.get_dbus_message()
    raise AssertionError(f"{args} {kw}: succeeded")
