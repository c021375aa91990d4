# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""A service manager for tests: it holds llmd's listening socket and what llmd gives it to keep, as systemd does, and starts it again."""
import array
import fcntl
import json
import os
import select
import signal
import socket
import stat
import subprocess
import threading
import time

from daemon_client import ERROR, MANAGER, PATIENCE, ROOT, SESSION, backend_options
from raw_bus import BusError, RawBus

HIGH = 2000  # descriptors are moved there, out of the way of those that the child gets


class Manager:
    """FDSTORE=1, FDSTOREREMOVE=1, FDNAME=; sockets whose peer has gone are dropped. llmd runs between start() and kill()."""

    def __init__(self, llmd, folder, model, *options, config="", env=None, broker=None):
        self.folder, self.llmd, self.model, self.options = folder, llmd, model, options
        self.socket = os.path.join(folder, "llmd.socket")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.socket)
        self.listener.listen(128)
        self.notify_path = os.path.join(folder, "notify")
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.notify.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self.notify.bind(self.notify_path)
        self.lock = threading.Condition()
        self.store = []  # (name, fd)
        self.deaf = False  # to what is to be forgotten
        self.ready = self.markers = self.n_starts = 0
        self.process = None
        self.log_path = os.path.join(folder, "log")
        self.config = os.path.join(folder, "llmd.conf")
        with open(self.config, "w") as f:
            f.write(config)
        os.makedirs(os.path.join(folder, "state"), exist_ok=True)
        self.env = dict(os.environ if env is None else env, STATE_DIRECTORY=os.path.join(folder, "state"),
                        DBUS_SYSTEM_BUS_ADDRESS=broker.address if broker else "unix:path=/nonexistent",
                        NOTIFY_SOCKET=self.notify_path)
        self.no_bus = [] if broker else ["--no-bus"]
        self.poll = select.epoll()
        self.poll.register(self.notify.fileno(), select.EPOLLIN)
        threading.Thread(target=self.run, daemon=True).start()

    # ---- what llmd tells ----

    def run(self):
        while True:
            for fd, events in self.poll.poll():
                with self.lock:
                    if fd == self.notify.fileno():
                        self.hear()
                    elif events & (select.EPOLLHUP | select.EPOLLERR):
                        self.drop(lambda name, held, gone=fd: held == gone)
                    self.lock.notify_all()

    def hear(self):
        data, ancillary, _, _ = self.notify.recvmsg(65536, socket.CMSG_SPACE(4 * 253) + socket.CMSG_SPACE(64))
        fds = array.array("i")
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(raw[:len(raw) - len(raw) % fds.itemsize])
        lines = data.decode().split("\n")
        name = next((line[len("FDNAME="):] for line in lines if line.startswith("FDNAME=")), "stored")
        if "FDSTORE=1" in lines:
            for fd in fds:
                high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH)
                os.close(fd)
                self.store.insert(0, (name, high))  # systemd has the newest first
                if stat.S_ISSOCK(os.fstat(high).st_mode):
                    self.poll.register(high, 0)
        elif "FDSTOREREMOVE=1" in lines and not self.deaf:
            self.drop(lambda held, _: held == name)
        if "READY=1" in lines:
            self.ready += 1
        if "TEST=marker" in lines:
            self.markers += 1

    def drop(self, which):
        for entry in [e for e in self.store if which(*e)]:
            self.store.remove(entry)
            if stat.S_ISSOCK(os.fstat(entry[1]).st_mode):
                self.poll.unregister(entry[1])  # it would forget it only when nobody holds the socket
            os.close(entry[1])

    def wait(self, condition, what):
        end = time.monotonic() + PATIENCE
        with self.lock:
            while not condition():
                self.check()
                assert time.monotonic() < end, what
                self.lock.wait(0.05)

    def check(self):
        assert self.process.poll() is None, f"llmd ended with {self.process.returncode}: {self.log()}"

    def settle(self):
        """All that has been told so far is heard."""
        with self.lock:
            wanted = self.markers + 1
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
                s.setblocking(False)
                while True:
                    try:
                        s.sendto(b"TEST=marker", self.notify_path)
                        break
                    except BlockingIOError:
                        self.lock.wait(0.01)
            while self.markers < wanted:
                self.lock.wait()

    def names(self):
        with self.lock:
            return sorted(name for name, _ in self.store)

    def held(self, name):
        """Descriptors of that name: the manager's own."""
        with self.lock:
            return [fd for held, fd in self.store if held == name]

    def wait_held(self, name, n):
        """Until n descriptors of that name are held: the others were dropped."""
        end = time.monotonic() + PATIENCE
        while len(self.held(name)) != n:
            assert time.monotonic() < end, (name, self.names())
            time.sleep(0.01)

    # ---- llmd ----

    def begin(self, wait=True):
        """Starts it with all that is held."""
        with self.lock:
            passed = [("llmd", self.listener.fileno())] + self.store
            wanted = self.ready + 1
            sources = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH) for _, fd in passed]
        env = dict(self.env, LISTEN_FDS=str(len(passed)), LISTEN_FDNAMES=":".join(name for name, _ in passed))
        log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

        def arrange():
            os.dup2(null, 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            for i, fd in enumerate(sources):
                os.dup2(fd, 3 + i)

        # Numbers matter, so close_fds= would be in the way: everything of ours is close-on-exec.
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", "LISTEN_PID=$$; export LISTEN_PID; exec \"$@\"", "sh", self.llmd, "--system", *self.no_bus,
             "--model", self.model, "--config", self.config, *backend_options(self.options), *self.options], env=env, preexec_fn=arrange, close_fds=False)
        for fd in (*sources, log, null):
            os.close(fd)
        self.n_starts += 1
        if wait:
            self.wait(lambda: self.ready >= wanted, "llmd does not become ready")
        return self

    def kill(self, number=signal.SIGKILL):
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(PATIENCE)
        self.settle()
        return status

    def restart(self, wait=True):
        self.kill()
        return self.begin(wait)

    def log(self):
        with open(self.log_path, errors="replace") as f:
            return f.read()

    def __enter__(self):
        return self.begin()

    def __exit__(self, kind, value, trace):
        status = self.kill(signal.SIGTERM)
        with self.lock:
            self.drop(lambda *_: True)
        self.listener.close()
        if kind is None:
            assert status == 0, f"llmd ended with {status}: {self.log()}"


class Client:
    """A client on the socket that connects again, and takes its sessions with it, when the daemon has gone.

    Methods that may be asked for twice are, when there was no answer (docs/dbus-api.md).
    """

    def __init__(self, manager):
        self.manager, self.bus, self.paths = manager, None, set()
        self.n_connects = 0
        self.connect()

    def connect(self):
        before = self.bus
        while True:
            try:
                self.bus = RawBus(self.manager.socket)
                for path in sorted(self.paths):
                    self.adopt(path)
                break
            except OSError:  # killed meanwhile
                pass
        self.n_connects += 1
        if before:
            before.close()

    def adopt(self, path):
        try:
            self.bus.call(path, SESSION, "Adopt", "a{sv}", {})
        except BusError as e:
            assert e.name in (ERROR + "NoSuchSession", ERROR + "NotSupported"), e

    def call(self, path, interface, method, signature="", *args):
        while True:
            try:
                return self.bus.call(path, interface, method, signature, *args)
            except OSError:
                self.connect()

    def create(self, **options):
        path, = self.call(ROOT, MANAGER, "CreateSession", "a{sv}", variants(options))
        self.paths.add(path)
        return Session(self, path)

    def manager_property(self, name):
        return self.call(ROOT, "org.freedesktop.DBus.Properties", "Get", "ss", MANAGER, name)[0][1]

    def close(self):
        self.bus.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


TYPES = {bool: "b", str: "s", float: "d", int: "u"}


def variants(options):
    """a{sv}; in keywords _ stands for -. Whole numbers are u, the seed t."""
    return {k.replace("_", "-"): ("t" if k == "seed" else TYPES[type(v)], v) for k, v in options.items()}


class Session:
    def __init__(self, client, path):
        self.client, self.path = client, path

    @property
    def id(self):
        return int(self.path.rsplit("/", 1)[1])

    def get(self, name):
        return self.client.call(self.path, "org.freedesktop.DBus.Properties", "Get", "ss", SESSION, name)[0][1]

    def call(self, method, signature="", *args):
        return self.client.call(self.path, SESSION, method, signature, *args)

    def generate(self, **options):
        """The stream, a socket; its request's number."""
        fd, number = self.call("Generate", "a{sv}", variants(options))
        return socket.socket(fileno=fd), number

    def run(self, **options):
        stream, _ = self.generate(**options)
        return read_all(stream)

    def close(self):
        self.client.paths.discard(self.path)
        try:
            self.call("Close")
        except BusError as e:
            assert e.name == ERROR + "NoSuchSession", e  # the first one was carried out, and not answered

    def wait_state(self, *states):
        end = time.monotonic() + PATIENCE
        while (state := self.get("State")) not in states:
            assert time.monotonic() < end, f"state {state}, not {states}"


def read_all(stream, told=None):
    """All bytes of a stream. told(): after each that came."""
    said = bytearray()
    with stream:
        while got := stream.recv(65536):
            said += got
            if told:
                told()
    return bytes(said)


def what_was_said(said):
    """Without the records that tell of waiting, which depend on the others."""
    return b"".join(line for line in said.splitlines(keepends=True) if not line.startswith((b'{"type":"queued"', b'{"type":"progress"')))


def last_record(said):
    return json.loads(said.splitlines()[-1])


class Load:
    """n clients, each with conversations of two turns, until stopped; every answer is compared with the undisturbed one."""

    PROMPTS = ["Tell me about the sea.", "Why is the sky blue?", "Count to ten.", "What is a daemon?", "Write a poem."]

    def __init__(self, manager, n, seed, tokens=60):
        self.manager, self.tokens = manager, tokens
        self.expected, self.deviations, self.n_answers = {}, [], 0
        self.lock = threading.Lock()
        self.heard = threading.Event()  # something came out of a stream
        self.stopping = False
        self.cases = [(prompt, 100 * seed + i, form) for i, prompt in enumerate(self.PROMPTS) for form in ("records", "text", "logprobs")]
        with Client(manager) as c:
            for case in self.cases:
                self.expected[case] = self.converse(c, case)
        self.threads = [threading.Thread(target=self.run, args=(i,)) for i in range(n)]

    def converse(self, c, case, told=None):
        prompt, seed, form = case
        options = {"format": "text"} if form == "text" else {"logprobs": True, "top_logprobs": 2} if form == "logprobs" else {}
        s = c.create()
        said = []
        for turn in range(2):
            stream, _ = s.generate(prompt=prompt, seed=seed + turn, temperature=1.0, max_tokens=self.tokens, ignore_end=turn == 0, **options)
            out = read_all(stream, told)
            said.append(out if form == "text" else what_was_said(out))
        s.close()
        return said

    def run(self, i):
        try:
            with Client(self.manager) as c:
                n = i
                while not self.stopping:
                    case = self.cases[n % len(self.cases)]
                    said = self.converse(c, case, self.heard.set)
                    with self.lock:
                        self.n_answers += 2
                        if said != self.expected[case]:
                            self.deviations.append((case, self.expected[case], said))
                    n += 1
        except Exception as e:  # pylint: disable=broad-except
            with self.lock:
                self.deviations.append((i, "a client ended", repr(e)))

    def __enter__(self):
        for t in self.threads:
            t.start()
        return self

    def __exit__(self, *_):
        self.stopping = True
        for t in self.threads:
            t.join()
