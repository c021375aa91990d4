#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""What happens to a machine, and to files, happens to the real daemon: nothing is lost, nobody else is hurt, and whoever
is concerned hears of it by name.

  test-faults.py LLMD LLMCTL MAKE_CHAT_MODEL JUMPING_CLOCK [TEST...]

One function a test. Nothing here is decided by time.
"""
import contextlib
import json
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
try:
    import dbus
    from daemon_client import (PATIENCE, Child, Client, Daemon, Session, SystemDaemon, error_of, make_endless_model, options_of,
                               read_all, until, write_starter)
    from kept_daemon import Manager
except ImportError as e:
    print(f"skipped: {e} (python3-dbus)")
    sys.exit(77)

BACKEND = os.environ.get("LLMD_TEST_BACKEND")
LLMD, LLMCTL, MAKE_CHAT_MODEL, JUMPING_CLOCK = (os.path.abspath(p) for p in sys.argv[1:5])
LONG = {"ignore-end": True, "seed": dbus.UInt64(1), "temperature": 1.0}
SEEDED = dict(LONG, **{"max-tokens": dbus.UInt32(24)})

tests = []
folder = tempfile.mkdtemp(prefix="llmd-faults-")
os.chmod(folder, 0o711)
chat = os.path.join(folder, "chat.llmd")
endless = os.path.join(folder, "endless.llmd")


def test(f):
    tests.append(f)
    return f


class Private(Daemon):
    """On a model file of its own, which the test may do anything to."""

    def __init__(self, model=chat, *options, expect=0, **kw):
        self.where = tempfile.mkdtemp(dir=folder)
        self.model = os.path.join(self.where, "model.llmd")
        self.expect = expect
        shutil.copyfile(model, self.model)
        super().__init__(LLMD, self.model, os.path.join(self.where, "llmd.socket"), *options, **kw)

    def __exit__(self, kind, value, trace):
        if kind is None and self.expect:  # it has its reason already
            assert self.process.wait(PATIENCE) == self.expect, self.log()
            return
        status = self.stop()
        if kind is None:
            assert status == 0, f"llmd ended with {status}: {self.log()}"
        elif self.log():
            print("\n--- log ---\n" + self.log()[-4000:], flush=True)


def undisturbed(model, options, prompt="Hello"):
    """The text that those options give."""
    with Private(model) as d, d.connect() as c:
        return c.create().run(options, prompt=prompt)[0]


def read_some(f, n):
    """The text of the next n records that are deltas."""
    text = ""
    while n > 0:
        record = json.loads(f.readline())
        assert record["type"] in ("delta", "queued", "progress"), record
        if record["type"] == "delta":
            text += record["text"]
            n -= 1
    return text


def expect_model_changed(records):
    error = records[-1]
    assert error["type"] == "error" and error["name"] == "org.llmd.Llm1.Error.ModelChanged", records
    assert "file changed" in error["message"], error


# ---- the model's file ----


@test
def model_truncated_while_many_generate():
    """Each has been told only what is right, and why there is no more."""
    right = undisturbed(chat, dict(LONG, **{"max-tokens": dbus.UInt32(4000)}))
    assert len(right) > 1000, len(right)
    with Private(endless, expect=1) as d, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(d.connect()) for _ in range(6)]
        streams = [c.create().generate(LONG, prompt="Hello") for c in clients]
        said = [read_some(f, 3) for f in streams]
        os.truncate(d.model, 4096)
        for f, text in zip(streams, said):
            more, records = read_all(f)
            f.close()
            text += more
            assert right.startswith(text) or text.startswith(right), text
            expect_model_changed(records)
        assert d.process.wait(PATIENCE) == 1
        assert d.log().count("the model's file changed while it was in use") == 1, d.log()


@test
def model_truncated_before_first_use():
    with Private(expect=1) as d, d.connect() as c:
        s = c.create()
        os.truncate(d.model, 0)
        text, records = s.run(SEEDED, prompt="Hello")
        assert text == ""
        expect_model_changed(records)


@test
def no_thread_blocks_what_its_own_faults_raise():
    """A fault whose signal is blocked ends the process, and which thread has the first one is chance. A GPU's driver has threads, too,
    that took over the name of the one that started them."""
    with Private(chat, "--threads", "2") as d, d.connect() as c:
        c.create().run(SEEDED, prompt="Hello")
        blocked = []
        for tid in os.listdir(f"/proc/{d.process.pid}/task"):
            with open(f"/proc/{d.process.pid}/task/{tid}/status") as f:
                lines = dict(line.split(":", 1) for line in f)
            name = lines["Name"].strip()
            if name != "llmd" or int(tid) == d.process.pid:  # else a sanitizer's own
                blocked.append((name, int(lines["SigBlk"], 16)))
        assert {"llmd-engine", "llmd-compute"} <= {name for name, _ in blocked}, blocked
        for name, mask in blocked:
            assert not mask & 1 << signal.SIGBUS - 1, (name, hex(mask))


@test
def model_loses_its_last_bytes():
    """No fault tells of that: the rest of the page is zeros."""
    with Private(expect=1) as d, d.connect() as c:
        s = c.create()
        s.run(SEEDED, prompt="Hello")
        os.truncate(d.model, os.path.getsize(d.model) - 1)
        text, records = s.run(SEEDED, prompt="Again")
        assert text == ""
        expect_model_changed(records)


@test
def model_written_over():
    """In place, by one of the same size: its header has another hash."""
    with Private(expect=1) as d, d.connect() as c:
        s = c.create()
        s.run(SEEDED, prompt="Hello")
        with open(d.model, "r+b") as f:
            head = f.read(200)
            at = head.index(b'sha256":"') + len(b'sha256":"')
            f.seek(at)
            f.write(bytes(b"0123456789abcdef"[(b"0123456789abcdef".index(x) + 1) % 16] for x in head[at:at + 64]))
        text, records = s.run(SEEDED, prompt="Again")
        assert text == ""
        expect_model_changed(records)


@test
def model_replaced_removed_and_touched():
    """Renaming another file to its name, removing it, a new time, the same bytes once more: all as before."""
    right = undisturbed(chat, SEEDED)
    with Private() as d, d.connect() as c:
        def is_right():
            s = c.create()
            assert s.run(SEEDED, prompt="Hello")[0] == right
            s.call("Close")

        is_right()
        os.utime(d.model)
        is_right()
        with open(d.model, "r+b") as f:
            same = f.read()
            f.seek(0)
            f.write(same)
        is_right()
        other = d.model + ".new"
        with open(other, "wb") as f:
            f.write(b"something else")
        os.rename(other, d.model)
        is_right()
        os.unlink(d.model)
        is_right()
        assert "changed" not in d.log(), d.log()


@test
def llmctl_says_what_happened_to_the_model():
    """Which starts a daemon of its own, and is told by it."""
    where = tempfile.mkdtemp(dir=folder)
    model = os.path.join(where, "model.llmd")
    shutil.copyfile(endless, model)
    starter = os.path.join(where, "starter")
    write_starter(starter, LLMD)
    env = dict(os.environ, XDG_RUNTIME_DIR=where, HOME=where, LLMD_BINARY=starter)
    env.pop("NOTIFY_SOCKET", None)
    with subprocess.Popen([LLMCTL, "--private", "run", "--model", model, "--ignore-end", "Hello"], env=env,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        assert p.stdout.read(20)
        os.truncate(model, 4096)
        p.stdout.read()
        said = p.stderr.read().decode()
        assert p.wait(PATIENCE) not in (0, 2), said
    assert "model's file changed" in said, said


# ---- memory is short ----


class Short:
    """A FIFO by which memory is said to be short, and what of the environment names it."""

    def __init__(self):
        self.path = os.path.join(tempfile.mkdtemp(dir=folder), "pressure")
        os.mkfifo(self.path)
        self.fd = os.open(self.path, os.O_RDWR)
        self.env = dict(os.environ, MEMORY_PRESSURE_WATCH=self.path)
        self.env.pop("MEMORY_PRESSURE_WRITE", None)

    def event(self, client):
        """One, and the level that it leads to."""
        level = figure(client, "memory-pressure")
        os.write(self.fd, b"!")
        if level < 3:
            until(lambda: figure(client, "memory-pressure") == level + 1)
        return min(level + 1, 3)


class Kept(SystemDaemon):
    """With a state folder. before: a command that starts it."""

    def __init__(self, *options, model=None, short=None, state=None, env=None, before=(), config=""):
        self.where = tempfile.mkdtemp(dir=folder)
        env = dict(short.env if short else os.environ, **(env or {}))
        super().__init__([*before, LLMD], self.where, None, "--no-bus", *options, model=model or chat, config=config,
                         env=env, state=state)

    def __exit__(self, kind, value, trace):
        if kind is not None and self.log():
            print("\n--- log ---\n" + self.log()[-4000:], flush=True)
        super().__exit__(kind, value, trace)


def statistics(client):
    return client.manage("GetStatistics")


def figure(client, name):
    return int(statistics(client)[name])


def talk(s, seed=1, prompt="Hello", n=40):
    return s.run({"ignore-end": True, "temperature": 1.0, "seed": dbus.UInt64(seed), "max-tokens": dbus.UInt32(n)},
                 prompt=prompt)[0]


def undisturbed_talks(n, prompts=("Hello", "And then?", "At last?")):
    """What n conversations say, each with a seed of its own, that nothing happens to."""
    with Private() as d, d.connect() as c:
        sessions = [c.create() for _ in range(n)]
        return [[talk(s, i * 10 + k, p) for i, s in enumerate(sessions)] for k, p in enumerate(prompts)]


@test
def memory_gets_short_and_is_not_any_more():
    right = undisturbed_talks(3)
    short = Short()
    with Kept(short=short) as d, d.connect() as c:
        sessions = [c.create() for _ in range(3)]
        assert [talk(s, i * 10) for i, s in enumerate(sessions)] == right[0]
        used = figure(c, "kv-bytes-used")
        assert used > 0 and figure(c, "memory-pressure") == 0
        assert short.event(c) == 1
        assert figure(c, "kv-bytes-used") == used  # what is in use is not touched yet
        assert short.event(c) == 2
        until(lambda: figure(c, "kv-bytes-used") == 0)
        assert figure(c, "kv-spilled") == 3 and figure(c, "kv-bytes-spilled") == used, statistics(c)
        assert figure(c, "kv-given-back") == 0
        # The files have no names; two that have are a GPU's.
        assert set(os.listdir(d.state)) <= {"models"} | ({"vulkan-cache", "vulkan-crashes"} if BACKEND else set()), os.listdir(d.state)
        # It comes back for who needs it.
        assert talk(sessions[1], 11, "And then?") == right[1][1]
        assert figure(c, "kv-restored") == 1 and 0 < figure(c, "kv-bytes-spilled") < used, statistics(c)
        assert short.event(c) == 3
        until(lambda: figure(c, "kv-bytes-used") == 0)
        for create in (c.create, sessions[0].fork):
            name, text = error_of(create)
            assert name == "LowMemory" and "memory is short" in text, (name, text)
        # Nobody who is there is hurt.
        assert [talk(s, i * 10 + 1, "And then?") for i, s in enumerate(sessions) if i != 1] == \
            [t for i, t in enumerate(right[1]) if i != 1]
        assert [talk(s, i * 10 + 2, "At last?") for i, s in enumerate(sessions)] == right[2]
        assert figure(c, "kv-bytes-spilled") == 0 and figure(c, "kv-restored") == 4, statistics(c)
        until(lambda: figure(c, "memory-pressure") < 3)  # nothing happens for a while
        c.create()
        for line in ("goes back to the system", "go to disk", "no new sessions"):
            assert line in d.log(), d.log()


def shared_memory(d):
    """What of the KV pool is in memory."""
    with open(f"/proc/{d.process.pid}/status") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith("RssShmem:"))


@test
def memory_goes_back_to_the_system():
    """By the first event what is free, by the second what idle sessions hold. A GPU sees some MiB at a time, of which none may be used."""
    short = Short()
    with Kept(short=short) as d, d.connect() as c:
        keeps, goes = c.create(), c.create()
        for s in (keeps, goes):
            s.append(prompt="x" * 4000, raw=True)
        both = shared_memory(d)
        used = figure(c, "kv-bytes-used")
        goes.call("Close")
        until(lambda: figure(c, "kv-bytes-used") <= used // 2 + 65536)
        short.event(c)
        if not BACKEND:
            until(lambda: shared_memory(d) < both - used // 3)
            both -= used // 3
        assert figure(c, "kv-bytes-used") >= used // 3
        short.event(c)
        until(lambda: shared_memory(d) < both - used // 3)
        keeps.run(SEEDED, prompt="Hello")


@test
def the_service_manager_is_told_that_memory_is_short():
    short = Short()
    path = os.path.join(tempfile.mkdtemp(dir=folder), "notify")
    heard = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(path)

        def hear():  # always: who notifies waits while the socket is full
            while True:
                data, _, _, _ = notify.recvmsg(65536)
                if not data:
                    return
                heard.append(data.decode())

        thread = threading.Thread(target=hear)
        thread.start()

        def told(what):
            until(lambda: any(what in h for h in heard), lambda: heard)
            heard.clear()

        with Kept(short=short, env={"NOTIFY_SOCKET": path}) as d, d.connect() as c:
            s = c.create()
            s.append(prompt="x" * 8000, raw=True)
            mib = figure(c, "kv-bytes-used") >> 20
            assert mib > 0
            short.event(c)
            told("; memory is short, level 1 of 3")
            short.event(c)
            told(f"; memory is short, level 2 of 3; {mib} MiB of KV on disk")
            s.append(prompt="x", raw=True)
            told("0 queued; memory is short, level 2 of 3")
            until(lambda: figure(c, "memory-pressure") == 0)
            until(lambda: heard and heard[-1].endswith("0 queued"), lambda: heard)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", path)
        thread.join()


@test
def a_session_on_disk_is_forked_rewound_saved_and_closed():
    right = undisturbed_talks(1)
    short = Short()
    with Kept(short=short) as d, d.connect() as c:
        s = c.create()
        assert talk(s, 0) == right[0][0]
        n = s.get("ContextUsed")

        def spill():
            before = figure(c, "kv-spilled")
            while figure(c, "memory-pressure") < 2:
                short.event(c)
            short.event(c)
            until(lambda: figure(c, "kv-spilled") > before and not figure(c, "kv-bytes-used"))
            assert s.get("ContextUsed") == n
            until(lambda: figure(c, "memory-pressure") < 3)

        spill()
        fork = s.fork()
        assert talk(fork, 1, "And then?") == right[1][0]
        assert figure(c, "kv-restored") == 1
        fork.call("Close")
        assert talk(s, 1, "And then?") == right[1][0]
        assert figure(c, "kv-restored") == 2 and figure(c, "kv-bytes-spilled") == 0
        s.call("Rewind", "u", dbus.UInt32(n))
        spill()
        s.call("Rewind", "u", dbus.UInt32(n - 1))
        assert figure(c, "kv-bytes-spilled") == 0
        again = talk(s, 5, "x")
        with Private() as other, other.connect() as oc:
            o = oc.create()
            assert talk(o, 0) == right[0][0]
            o.call("Rewind", "u", dbus.UInt32(n - 1))
            assert talk(o, 5, "x") == again
        n = s.get("ContextUsed")
        spill()
        saved = os.memfd_create("saved")
        s.call("Save", "h", dbus.types.UnixFd(saved))
        os.lseek(saved, 0, os.SEEK_SET)
        assert os.fstat(saved).st_size > 0
        os.close(saved)
        fds = d.fds()
        s.call("Close")
        until(lambda: figure(c, "kv-bytes-spilled") == 0 and d.fds() < fds)


@test
def others_go_on_while_sessions_go_to_disk_and_back():
    """A stream that never ends, and 12 conversations to and fro, all of which say what they would say anyway."""
    right = undisturbed_talks(12)
    streamed = undisturbed(chat, dict(LONG, **{"max-tokens": dbus.UInt32(3000)}))
    short = Short()
    with Kept(short=short, model=endless) as d, d.connect() as c, d.connect() as other:
        with other.create().generate(LONG, prompt="Hello") as f:
            said = read_some(f, 10)
            sessions = [c.create() for _ in range(12)]
            for k, prompt in enumerate(("Hello", "And then?", "At last?")):
                assert [talk(s, i * 10 + k, prompt) for i, s in enumerate(sessions)] == right[k]
                short.event(c)
                short.event(c)
                until(lambda: figure(c, "kv-spilled") >= 12 * (k + 1))
                said += read_some(f, 10)
            assert figure(c, "kv-restored") == 24
        assert len(said) > 10 and (streamed.startswith(said) or said.startswith(streamed))


@test
def a_kill_loses_no_session_that_is_on_disk():
    """The file went with the process, and what it held is computed again."""
    right = undisturbed_talks(2)
    short = Short()
    with Manager(LLMD, tempfile.mkdtemp(dir=folder), chat, env=short.env) as m:
        with Client(m.socket) as c:
            sessions = [c.create(linger=True) for _ in range(2)]
            assert [talk(s, i * 10) for i, s in enumerate(sessions)] == right[0]
            short.event(c)
            short.event(c)
            until(lambda: figure(c, "kv-spilled") == 2)
            m.kill()
        m.begin()
        with Client(m.socket) as c:
            assert figure(c, "kv-bytes-spilled") == 0 and c.manager("Sessions") == 2
            sessions = [Session(c, s.path) for s in sessions]
            for k, prompt in ((1, "And then?"), (2, "At last?")):
                assert [talk(s, i * 10 + k, prompt) for i, s in enumerate(sessions)] == right[k]


@test
def without_a_state_directory_it_is_given_up():
    right = undisturbed_talks(2)
    short = Short()
    with Private(env=short.env) as d, d.connect() as c:
        sessions = [c.create() for _ in range(2)]
        assert [talk(s, i * 10) for i, s in enumerate(sessions)] == right[0]
        short.event(c)
        short.event(c)
        until(lambda: figure(c, "kv-bytes-used") == 0)
        assert figure(c, "kv-spilled") == 0 and figure(c, "kv-given-back") == 2, statistics(c)
        assert [talk(s, i * 10 + 1, "And then?") for i, s in enumerate(sessions)] == right[1]
        assert "cannot be kept" not in d.log(), d.log()

        def status():
            p = subprocess.run([LLMCTL, "--socket", d.socket, "status"], stdout=subprocess.PIPE, check=True)
            return p.stdout.decode()

        assert re.search("short of memory *[12]", status()), status()
        until(lambda: figure(c, "memory-pressure") == 0)
        assert "short of memory" not in status()


def gives_up(d, short, reason):
    """Idle sessions' KV cannot be written: it is said once, and computed again."""
    right = undisturbed_talks(2)
    with d.connect() as c:
        sessions = [c.create() for _ in range(2)]
        for k, prompt in enumerate(("Hello", "And then?")):
            assert [talk(s, i * 10 + k, prompt) for i, s in enumerate(sessions)] == right[k]
            short.event(c)
            short.event(c)
            until(lambda: figure(c, "kv-bytes-used") == 0)
        assert figure(c, "kv-spilled") == 0 and figure(c, "kv-given-back") == 4, statistics(c)
        assert [talk(s, i * 10 + 2, "At last?") for i, s in enumerate(sessions)] == right[2]
    assert d.log().count("cannot be kept in the state directory") == 1 and reason in d.log(), d.log()


@test
def a_file_may_not_grow():
    """The kernel sends a signal that would end the daemon."""
    with Kept("--kv-bytes=1M", before=("prlimit", "--fsize=16384")) as d, d.connect() as c:
        name, text = error_of(c.create)
        assert name == "ModelNotReady" and "File too large" in text, (name, text)
        assert "File too large" in d.log()


@test
def the_state_directory_is_not_there():
    short = Short()
    with Kept(short=short, state="/proc/nowhere") as d:
        gives_up(d, short, "(No such file or directory)")


def tmpfs(size, *, read_only=False):
    """A command that starts another with a small file system of its own, or with one that nobody may write to, on $0."""
    return ("unshare", "-m", "sh", "-c",
            f'mount -t tmpfs -o size={size} none "$0" && mkdir "$0/models" && chmod 755 "$0/models" && '
            + ('mount -o remount,ro "$0" && ' if read_only else "") + 'exec "$@"')


@test
def the_disk_is_full():
    if os.getuid() != 0:
        return "root only: mounts"
    short = Short()
    state = os.path.join(tempfile.mkdtemp(dir=folder), "state")
    os.mkdir(state)
    with Kept(short=short, state=state, before=(*tmpfs("64k"), state)) as d:
        gives_up(d, short, "not enough room")


@test
def the_state_directory_is_read_only():
    if os.getuid() != 0:
        return "root only: mounts"
    short = Short()
    state = os.path.join(tempfile.mkdtemp(dir=folder), "state")
    os.mkdir(state)
    with Kept(short=short, state=state, before=(*tmpfs("64m", read_only=True), state)) as d:
        gives_up(d, short, "Read-only")


@test
def what_tells_of_memory_cannot_be_used():
    """It serves all the same, and says so once."""
    for env, complaint in (({"MEMORY_PRESSURE_WATCH": "/nowhere"}, "/nowhere: No such file"),
                           ({"MEMORY_PRESSURE_WATCH": "nowhere"}, "no absolute path"),
                           ({"MEMORY_PRESSURE_WATCH": "/proc/self/status", "MEMORY_PRESSURE_WRITE": "%%%"}, "base64"),
                           ({"MEMORY_PRESSURE_WATCH": folder}, folder)):
        with Kept(env=env) as d, d.connect() as c:
            talk(c.create())
            assert d.log().count("nobody tells when memory is short") == 1 and complaint in d.log(), d.log()


@test
def memory_is_told_of_by_a_socket():
    """Which gets the text to begin with, and goes away at last."""
    path = os.path.join(tempfile.mkdtemp(dir=folder), "pressure")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        with Kept(env={"MEMORY_PRESSURE_WATCH": path, "MEMORY_PRESSURE_WRITE": "c29tZSAxIDI="}) as d, d.connect() as c:
            peer, _ = listening.accept()
            with peer:
                assert peer.recv(100) == b"some 1 2"
                for level in (1, 2):
                    peer.send(b"!")
                    until(lambda: figure(c, "memory-pressure") == level)
            talk(c.create())


@test
def a_quota_of_kv_takes_idle_sessions_first():
    """The least recently used of the user's own; not the one that asks, nor one that is at work."""
    right = undisturbed_talks(4)
    with Private() as d, d.connect() as c:
        talk(c.create())
        one = figure(c, "kv-bytes-used")
    with Kept(config=f"[Limits]\nMaxKvBytes={2 * one}\n") as d, d.connect() as c:
        sessions = [c.create() for _ in range(4)]
        for i, s in enumerate(sessions):
            assert talk(s, i * 10) == right[0][i]
        assert figure(c, "kv-bytes-used") <= 3 * one
        given = figure(c, "kv-given-back")
        assert given >= 1
        assert [talk(s, i * 10 + 1, "And then?") for i, s in enumerate(sessions)] == right[1]
        talk(sessions[0], n=400)
        # Alone above it, there is nobody else to take from.
        for s in sessions[1:]:
            s.call("Close")
        assert error_of(sessions[0].run, SEEDED, prompt="x")[0] == "QuotaExceeded"
        assert talk(c.create(), 0) == right[0][0]  # but another may have its place


# ---- disks ----


def install(c, path, name):
    fd = os.open(path, os.O_RDONLY)
    try:
        return c.manage("InstallModel", "hsa{sv}", dbus.types.UnixFd(fd), name, options_of())
    finally:
        os.close(fd)


def model_states(c):
    return {str(m[0]): str(m[1]) for m in c.manage("ListModels", "a{sv}", options_of())}


@test
def no_room_to_install_a_model():
    """Nothing half-written is left, it says why, and what is served is served on."""
    if os.getuid() != 0:
        return "root only: mounts"
    state = os.path.join(tempfile.mkdtemp(dir=folder), "state")
    os.mkdir(state)
    right = undisturbed_talks(1)[0][0]
    with Kept(state=state, before=(*tmpfs("300k"), state)) as d, d.connect() as c:
        there = f"/proc/{d.process.pid}/root{state}/models"
        with c.create().generate(SEEDED, prompt="Hello") as f:
            name, text = error_of(install, c, chat, "new")
            assert name == "NoSpace", (name, text)
            read_all(f)
        assert os.listdir(there) == [], os.listdir(there)
        assert "new" not in model_states(c)
        assert talk(c.create(), 0) == right
        # What was saved in part is of no use, and says so.
        s = c.create()
        talk(s)
        fd = os.open(os.path.join(os.path.dirname(there), "full"), os.O_RDWR | os.O_CREAT)
        with contextlib.suppress(OSError):
            while os.write(fd, bytes(4096)):
                pass
        os.close(fd)
        fd = os.open(os.path.join(os.path.dirname(there), "saved"), os.O_RDWR | os.O_CREAT)
        name, text = error_of(s.call, "Save", "h", dbus.types.UnixFd(fd))
        assert name == "NoSpace", (name, text)
        os.close(fd)
        assert talk(s)


@test
def nobody_may_write_to_the_state_directory():
    if os.getuid() != 0:
        return "root only: mounts"
    state = os.path.join(tempfile.mkdtemp(dir=folder), "state")
    os.mkdir(state)
    with Kept(state=state, before=(*tmpfs("64m", read_only=True), state)) as d, d.connect() as c:
        assert "new" not in model_states(c)
        name, text = error_of(install, c, chat, "new")
        assert "Read-only" in text, (name, text)
        assert "new" not in model_states(c)
        assert talk(c.create(), 0) == undisturbed_talks(1)[0][0]


# ---- clocks ----


@test
def the_clock_on_the_wall_jumps():
    """By years to and fro, at each look at it: nothing waits for it, nothing is measured by it."""
    right = undisturbed_talks(2)
    short = Short()
    asan = os.environ.get("ASAN_OPTIONS", "")
    env = {"LD_PRELOAD": JUMPING_CLOCK, "ASAN_OPTIONS": asan + ":verify_asan_link_order=0"}
    with Kept("--idle", "600", short=short, env=env) as d, d.connect() as c:
        sessions = [c.create() for _ in range(2)]
        lingering = c.create(linger=True)
        assert [talk(s, i * 10) for i, s in enumerate(sessions)] == right[0]
        short.event(c)
        short.event(c)
        until(lambda: figure(c, "kv-bytes-used") == 0)
        assert [talk(s, i * 10 + 1, "And then?") for i, s in enumerate(sessions)] == right[1]
        assert figure(c, "memory-pressure") == 2  # no calm yet by that clock
        assert lingering.get("State") == "idle" and figure(c, "uptime-usec") < 3600e6
        created = {int(s.get("CreatedUSec")) for s in sessions}
        assert max(created) - min(created) > 86400e6, created  # it does jump
        until(lambda: figure(c, "memory-pressure") == 0)
        assert c.manager("Sessions") == 3


# ---- too many ----


def other_users():
    """Two, as root; else the one there is."""
    uids = [u.pw_uid for u in pwd.getpwall() if u.pw_uid > 0]
    return sorted(uids)[:2] if os.getuid() == 0 else [os.getuid()] * 2


def say_nothing(child, path, n):
    """Opens n connections, closes none, and tells how many were taken at once."""
    held = []
    for _ in range(n):
        held.append(socket.socket(socket.AF_UNIX))
        held[-1].connect(path)  # waits for a place in the queue, as everybody does
    child.say(len(held))
    child.hear()
    child.say("kept on")
    child.hear()


@test
def ten_thousand_half_open_connections():
    """Others get in while more and more come, and the same user's other programs while they are there."""
    right = undisturbed_talks(1)[0][0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n = min(10000, hard - 200)
    evil, good = other_users()

    def ask(child, path):
        with Client(path) as c:
            return talk(c.create(), 0)

    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with Kept() as d:
            os.chmod(d.where, 0o711)
            with d.connect() as c:
                c.create()
                fds = d.fds()
                silent = Child(evil, say_nothing, d.socket, n)
                assert Child(good, ask, d.socket).join() == right
                assert silent.hear() == n
                silent.say("go on")
                assert silent.hear() == "kept on"
                for uid in (good, evil):
                    assert Child(uid, ask, d.socket).join() == right
                assert d.fds() <= fds + 2 * 64 + 8, (fds, d.fds())  # a socket and a process each, as many as one may have
                until(lambda: c.manager("Sessions") == 1)
                silent.say("end")
                silent.done()
                until(lambda: d.fds() <= fds + 2)
            assert d.log().count("refused a connection") <= 50, d.log()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def bomb(child, path, barrier, generates):
    """One of hundreds, each of which takes what it gets. What it was told when it got no more."""
    os.read(barrier, 1)
    try:
        c = Client(path)
        try:
            s = c.create()
            fds = []
            while True:
                fds.append(s.generate(LONG, prompt="x" * 200) if generates else c.create())
        except dbus.DBusException as e:
            told = e.get_dbus_name()
        child.say(told)
        child.hear()
        return "held on"
    except dbus.DBusException as e:  # not even let in
        child.say(e.get_dbus_name())
        return "kept out"


@test
def a_fork_bomb_of_clients():
    """Three hundred processes of one user want all that they can get; another user notices nothing but that it is slower."""
    right = undisturbed_talks(1, ("Hello", "And then?", "At last?"))
    evil, good = other_users()
    if evil == good:
        return "root only: another user"
    with Kept(model=endless) as d:
        os.chmod(d.where, 0o711)
        read, write = os.pipe()
        with d.connect() as c:
            c.manager("State")  # who says nothing is thrown out
            children = [Child(evil, bomb, d.socket, read, i % 2 == 0) for i in range(300)]

            def ask(child, path):
                with Client(path) as mine:
                    s = mine.create()
                    said = []
                    for k, prompt in enumerate(("Hello", "And then?", "At last?")):
                        said.append(talk(s, k, prompt))
                    return said

            os.write(write, b"!" * 300)
            assert Child(good, ask, d.socket).join() == [r[0] for r in right]
            told = [child.hear() for child in children]
            assert Child(good, ask, d.socket).join() == [r[0] for r in right]
            named = {t for t in told if t.startswith("org.llmd.Llm1.Error.")}
            refused = {t for t in told if not t.startswith("org.llmd.Llm1.Error.")}
            assert named <= {"org.llmd.Llm1.Error.QuotaExceeded", "org.llmd.Llm1.Error.Busy"} and named, named
            assert refused <= {"org.freedesktop.DBus.Error.NoServer", "org.freedesktop.DBus.Error.NoReply",
                               "org.freedesktop.DBus.Error.Disconnected", "org.freedesktop.DBus.Error.Failed",
                               "org.freedesktop.DBus.Error.Spawn.Failed"}, refused
            for child in children:
                child.kill()
            until(lambda: c.manager("Sessions") == 0 and not c.manager("KvBytesUsed"))
            assert Child(evil, ask, d.socket).join() == [r[0] for r in right]  # it has all its places again
        os.close(read)
        os.close(write)


def main():
    global chat, endless
    names = sys.argv[5:]
    subprocess.run([MAKE_CHAT_MODEL, chat], check=True)
    make_endless_model(MAKE_CHAT_MODEL, endless)
    failed = 0
    try:
        for t in tests:
            if names and t.__name__ not in names:
                continue
            print(t.__name__, end=" ... ", flush=True)
            try:
                print(t() or "ok", flush=True)
            except Exception:  # noqa: B902 (all of a test's)
                failed += 1
                import traceback
                print("FAILED", flush=True)
                traceback.print_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
