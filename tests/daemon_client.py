# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""For whole-system tests: a real llmd on a socket of its own, a bus of its own, and clients of several users."""
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback

import dbus
import dbus.bus
import dbus.connection

ROOT = "/org/llmd/Llm1"
MANAGER = "org.llmd.Llm1.Manager"
SESSION = "org.llmd.Llm1.Session"
MODEL = "org.llmd.Llm1.Model"
ERROR = "org.llmd.Llm1.Error."
BUS_NAME = "org.llmd.Llm1"
PATIENCE = 120  # seconds until a test that waits for an event gives up; decides nothing else

# Children are to be ended by these, also where whoever started the test has them ignored: in the background, by nohup.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)


def make_endless_model(make_chat_model, path):
    """The chat model with a context so long that an answer ends only when something ends it."""
    subprocess.run([make_chat_model, path, str(1 << 24)], check=True)


def backend_options(options=()):
    """What lets a daemon use mesa's software driver, where LLMD_TEST_BACKEND says vulkan or hybrid (tools/test --backend)."""
    backend = os.environ.get("LLMD_TEST_BACKEND")
    if not backend or any(str(o).startswith("--backend") for o in options):
        return []
    return [f"--backend={backend}", "--device=" + os.environ.get("LLMD_TEST_DEVICE", "llvmpipe")]


def write_starter(path, llmd, first=""):
    """For $LLMD_BINARY: a script that becomes llmd with those options, after the shell command `first`."""
    with open(path, "w") as f:
        f.write(f'#!/bin/sh\n{first}\nexec {llmd} {" ".join(backend_options())} "$@"\n')
    os.chmod(path, 0o755)


class Daemon:
    """llmd itself, started directly. Its log is a file. model: None lets it look for one itself."""

    def __init__(self, llmd, model, socket, *options, mode="--private", env=None):
        self.socket = socket
        self.log_path = socket + ".test-log"
        read, write = os.pipe()
        which = ["--model", model] if model else []
        program = [llmd] if isinstance(llmd, str) else llmd  # or a command that starts it
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [*program, mode, *which, "--socket", socket, "--ready-fd", str(write), *backend_options(options), *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[write], env=env)
        os.close(write)
        with os.fdopen(read, "rb") as f:
            self.ready = f.read() == b"READY=1\n"

    def log(self):
        with open(self.log_path, errors="replace") as f:
            return f.read()

    def said(self):
        """Its log without the first line of a daemon that was given a GPU (backend_options())."""
        lines = self.log().splitlines(keepends=True)
        if lines and lines[0].startswith("<6>GPU: ") and os.environ.get("LLMD_TEST_BACKEND"):
            del lines[0]
        return "".join(lines)

    def connect(self):
        return Client(self.socket)

    def fds(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self, number=signal.SIGTERM):
        """Its exit status; 0 is what every test wants (sanitizers have their say there)."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(PATIENCE)
        assert "the sandbox refused" not in self.log(), self.log()
        return status

    def __enter__(self):
        assert self.ready, self.log()
        return self

    def __exit__(self, kind, value, trace):
        status = self.stop()
        if kind is None:
            assert status == 0, f"llmd ended with {status}: {self.log()}"


class Broker:
    """A dbus-daemon of our own that lets anybody own and call anything, as a system bus with llmd's policy would."""

    CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
     "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
    <busconfig>
      <type>system</type>
      <listen>unix:path={path}</listen>
      <auth>EXTERNAL</auth>
      <policy context="default">
        <allow user="*"/>
        <deny own="*"/>
        <deny send_type="method_call"/>
        <allow send_type="signal"/>
        <allow send_requested_reply="true" send_type="method_return"/>
        <allow send_requested_reply="true" send_type="error"/>
        <allow receive_type="method_call"/>
        <allow receive_type="method_return"/>
        <allow receive_type="error"/>
        <allow receive_type="signal"/>
        <allow send_destination="org.freedesktop.DBus"/>
        <allow send_destination="{name}"/>
      </policy>
      <policy user="{user}"><allow own="{name}"/></policy>
      <limit name="max_connections_per_user">1000</limit>
      <limit name="max_completed_connections">1000</limit>
    </busconfig>
    """

    def __init__(self, folder):
        self.path = os.path.join(folder, "bus.sock")
        self.address = "unix:path=" + self.path
        config = os.path.join(folder, "bus.conf")
        with open(config, "w") as f:
            f.write(self.CONFIG.format(path=self.path, name=BUS_NAME, user=os.getuid()))
        read, write = os.pipe()
        self.process = subprocess.Popen(
            ["dbus-daemon", "--config-file=" + config, "--nofork", "--nopidfile", f"--print-address={write}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[write])
        os.close(write)
        with os.fdopen(read) as f:
            assert f.readline(), "dbus-daemon does not start"

    def stop(self):
        self.process.terminate()
        self.process.wait(PATIENCE)
        if os.path.exists(self.path):
            os.unlink(self.path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class SystemDaemon(Daemon):
    """llmd --system on a socket, a configuration and a state folder of its own in `folder`, and on that broker."""

    def __init__(self, llmd, folder, broker, *options, model=None, config="", env=None, state=None):
        self.broker = broker
        self.state = state or os.path.join(folder, "state")
        if not state:
            os.makedirs(self.state, exist_ok=True)
        self.config = os.path.join(folder, "llmd.conf")
        with open(self.config, "w") as f:
            f.write(config)
        env = dict(os.environ if env is None else env, STATE_DIRECTORY=self.state,
                   DBUS_SYSTEM_BUS_ADDRESS=broker.address if broker else "unix:path=/nonexistent")
        super().__init__(llmd, model, os.path.join(folder, "llmd.socket"), "--config", self.config, *options,
                         mode="--system", env=env)

    def connect(self, via="socket"):
        return Client(self.socket) if via == "socket" else BusClient(self.broker.address)

    def wait_named(self):
        """Until the bus knows it."""
        with BusClient(self.broker.address) as c:
            until(lambda: c.bus.name_has_owner(BUS_NAME) or self.process.poll() is not None)
            assert self.process.poll() is None, self.log()


class Child:
    """f(self, *args) in a process of its own, as that user; what it returns or raises comes back by join().

    It may say() words that the parent reads with hear(), and the other way round: so that many wait for each other.
    """

    def __init__(self, uid, f, *args):
        ours, theirs = os.pipe(), os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(ours[0])
                os.close(theirs[1])
                self.words, self.out = os.fdopen(theirs[0], "rb"), os.fdopen(ours[1], "wb")
                if uid is not None and os.getuid() == 0:
                    os.setgroups([])
                    os.setresgid(uid, uid, uid)
                    os.setresuid(uid, uid, uid)
                try:
                    result = ("returned", f(self, *args))
                except BaseException:  # noqa: B902 (told to the parent)
                    result = ("raised", traceback.format_exc())
                self.say(result)
                status = 0
            finally:
                os._exit(status)
        os.close(ours[1])
        os.close(theirs[0])
        self.words, self.out = os.fdopen(ours[0], "rb"), os.fdopen(theirs[1], "wb")

    def say(self, word):
        pickle.dump(word, self.out)
        self.out.flush()

    def hear(self):
        word = pickle.load(self.words)
        if isinstance(word, tuple) and word[0] == "raised":
            raise AssertionError("in a child: " + word[1])
        return word

    def join(self):
        kind, value = self.hear()
        assert kind == "returned", value
        self.done()
        return value

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self.done()

    def done(self):
        os.waitpid(self.pid, 0)
        self.words.close()
        self.out.close()


class Client:
    """One connection to the socket."""

    destination = None

    def __init__(self, socket):
        self.bus = dbus.connection.Connection("unix:path=" + socket)

    def call(self, path, interface, method, signature="", *args):
        return self.bus.call_blocking(self.destination, path, interface, method, signature, args, timeout=PATIENCE)

    def get(self, path, interface, name):
        return self.call(path, "org.freedesktop.DBus.Properties", "Get", "ss", interface, name)

    def manager(self, name):
        return self.get(ROOT, MANAGER, name)

    def manage(self, method, signature="", *args):
        return self.call(ROOT, MANAGER, method, signature, *args)

    def create(self, **options):
        return Session(self, self.manage("CreateSession", "a{sv}", options_of(options)))

    def close(self):
        self.bus.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class BusClient(Client):
    """One connection to the broker."""

    destination = BUS_NAME

    def __init__(self, address):
        self.bus = dbus.bus.BusConnection(address)
        self.bus.set_exit_on_disconnect(False)


class Session:
    def __init__(self, client, path):
        self.client, self.path = client, path

    def get(self, name):
        return self.client.get(self.path, SESSION, name)

    def call(self, method, signature="", *args):
        return self.client.call(self.path, SESSION, method, signature, *args)

    def generate(self, options=None, **more):
        """The stream, as a binary file."""
        fd, _ = self.call("Generate", "a{sv}", options_of(options, **more))
        return os.fdopen(fd.take(), "rb")

    def append(self, options=None, **more):
        """The records of the stream, all."""
        fd, _ = self.call("Append", "a{sv}", options_of(options, **more))
        with os.fdopen(fd.take(), "rb") as f:
            return read_all(f)[1]

    def fork(self, **options):
        return Session(self.client, self.call("Fork", "a{sv}", options_of(options)))

    def run(self, options=None, **more):
        """(text, records other than deltas)"""
        with self.generate(options, **more) as f:
            return read_all(f)

    def wait_state(self, *states):
        seen = []

        def there():
            seen.append(self.get("State"))
            return seen[-1] in states

        until(there, lambda: f"state {seen[-1]}, not {states}")

    def wait_idle(self):
        self.wait_state("idle")


def until(condition, complaint=lambda: "it does not happen"):
    """Waits for what must come; gives up only when something is broken."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, complaint()


def options_of(options=None, **more):
    """a{sv}; in keywords _ stands for -."""
    return dbus.Dictionary(dict({k.replace("_", "-"): v for k, v in (options or {}).items()},
                                **{k.replace("_", "-"): v for k, v in more.items()}), signature="sv")


def read_all(f):
    """All that there is to be said is taken as fast as it comes: a daemon that ends does not wait for long."""
    records = [json.loads(line) for line in f.read().splitlines()]
    return "".join(r["text"] for r in records if r["type"] == "delta"), [r for r in records if r["type"] != "delta"]


def error_of(call, *args, **kw):
    """(name without its prefix, message) of the error a call must give."""
    try:
        call(*args, **kw)
    except dbus.DBusException as e:
        name = e.get_dbus_name()
        return (name[len(ERROR):] if name.startswith(ERROR) else name), e.get_dbus_message()
    raise AssertionError(f"{args} {kw}: succeeded")
