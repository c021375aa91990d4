#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""llmctl's commands beside run, chat and map, with real daemons.

  test-llmctl-admin.py LLMCTL LLMD MAKE_CHAT_MODEL [TEST...]

Nothing here is decided by time.
"""
import contextlib
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
try:
    import dbus
    import llmctl_home
    from daemon_client import BUS_NAME, Broker, backend_options
    from llmctl_home import ENDLESS, LLMCTL, LLMD, PATIENCE, Home, complaint, test
    from raw_bus import CALL, DESTINATION, MEMBER, PATH, INTERFACE, REPLY_SERIAL, RETURN, SIGNAL, RawBus, encode
except ImportError as e:
    print(f"skipped: {e} (python3-dbus)")
    sys.exit(77)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def ok(result):
    assert result[0] == 0 and result[2] == "", result
    return result[1]


def parsed(h, *args):
    """The command's JSON, the same short and pretty."""
    short, pretty = ok(h.call(*args, "--json")), ok(h.call(*args, "--json=pretty"))
    assert len(short.splitlines()) == 1 and len(pretty.splitlines()) > 1 or short == "[]\n", (short, pretty)
    return json.loads(short)


@contextlib.contextmanager
def user_daemon(h, *options, **env):
    """llmd --user with a state directory."""
    env = dict(h.env, **env, XDG_STATE_HOME=os.path.join(h.path, "state"), XDG_CONFIG_HOME=os.path.join(h.path, "config"))
    read, write = os.pipe()
    p = subprocess.Popen([LLMD, "--user", "--ready-fd", str(write), *backend_options(options), *options], env=env, pass_fds=[write],
                         stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    os.close(write)
    with os.fdopen(read, "rb") as f:
        assert f.read() == b"READY=1\n", p.communicate()
    try:
        yield p
    finally:
        p.terminate()
        err = p.communicate(timeout=PATIENCE)[1].decode()
    assert p.returncode == 0 and "Sanitizer" not in err, (p.returncode, err)


def user(h, *args, **kw):
    return h.call("--user", *args, any_scope=True, **kw)


class Terminal:
    """A command on a terminal of 80 columns and the lines given."""

    def __init__(self, h, *args, lines=24, env=None, scope=("--private",)):
        import fcntl
        import termios
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, 80, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen([LLMCTL, *scope, *args], stdin=slave, stdout=slave, stderr=slave, close_fds=True,
                                        env={**h.env, **(env or {}), "TERM": "xterm"}, preexec_fn=lambda: (os.setsid(),
                                        fcntl.ioctl(0, termios.TIOCSCTTY, 0)))
        self.master, self.slave, self.seen = master, slave, b""

    def until(self, text):
        while text not in self.seen:
            self.seen += os.read(self.master, 65536)

    def write(self, text):
        os.write(self.master, text)

    def end(self):
        """(exit status, all that was shown); the terminal must be as it was."""
        import termios
        end = os.pidfd_open(self.process.pid)
        while not select.select([end], [], [], 0)[0]:  # it may have more to say than a terminal holds
            ready = select.select([self.master, end], [], [], PATIENCE)[0]
            assert ready, self.seen
            if self.master in ready:
                self.seen += os.read(self.master, 65536)
        os.close(end)
        status = self.process.wait()
        assert termios.tcgetattr(self.slave) == self.before, "the terminal is left as it was found"
        os.write(self.slave, b"\0END")
        self.until(b"\0END")
        os.close(self.slave)
        os.close(self.master)
        return status, self.seen[:-4].decode().replace("\r\n", "\n")


@test
def nobody_there():
    with Home() as h:
        for args in (("status",), ("is-ready",), ("is-ready", "--wait"), ("session", "list"), ("session", "close", "1"),
                     ("model", "list"), ("cancel", "--all"), ("top",), ("monitor",), ("quota",), ("measure", "--no-start", "x"),
                     ("session", "create", "--no-start")):
            complaint(h.call(*args), 3, "does not run")
        assert h.starts() == [], "none of them starts a daemon"


@test
def usage():
    with Home() as h:
        for args in (("session", "show"), ("session", "close", "x"), ("session", "close", "0"), ("session", "fork"),
                     ("session", "fork", "1", "2"), ("session", "create", "1"), ("session", "create", "--context=0"), ("cancel",),
                     ("cancel", "--all", "3"), ("cancel", "x"), ("model", "show"), ("model", "install"), ("model", "remove"),
                     ("model", "install", "a", "b"), ("measure", "--raw", "--instructions=x", "y"), ("measure",), ("top", "-n", "0"),
                     ("top", "-d", "0"), ("top", "--once", "-n", "3"), ("quota", "set"), ("quota", "set", "root"),
                     ("quota", "set", "root", "--weight=x"), ("quota", "set", "root", "--max-kv-bytes=16777216T"),
                     ("quota", "show", "no such user"), ("is-ready", "x"), ("status", "x"), ("status", "--json=x")):
            complaint(h.call(*args), 2)
        complaint(h.call("model", "install", "/no/such/file"), 1, "/no/such/file: No such file")
        complaint(h.call("model", "install", "/dev/null"), 1, "/dev/null")
        assert h.starts() == []


@test
def sessions():
    with Home() as h:
        s = ok(h.call("session", "create", "--label=gr\u00fcn tea", "--class=batch", "--context=512"))
        assert s.strip().isdigit() and s == s.strip() + "\n", s
        s = s.strip()
        assert parsed(h, "session", "list") == [{
            "session": int(s), "label": "gr\u00fcn tea", "uid": os.geteuid(), "class": "batch", "state": "idle",
            "queue_position": 0, "context_used": 0, "context_max": 512, "prompt_tokens": 0, "completion_tokens": 0}]
        text = ok(h.call("session", "list"))
        assert text.startswith("ID LABEL") and "gr\u00fcn tea" in text, text
        assert ok(h.call("session", "list", "--no-legend")).splitlines() == text.splitlines()[1:]
        assert ok(h.call("session")) == text, "without a command: the list"

        ok(h.call("run", "--session", s, "--max-tokens", "5", "--ignore-end", "my name is Ada"))
        shown = parsed(h, "session", "show", s)
        assert shown["completion_tokens"] == 5 and shown["context_used"] > 5 and shown["linger"] is True, shown
        assert shown["estimated_start_usec"] is None and shown["model"] == "chat" and shown["state"] == "idle", shown
        assert f"Context used   {shown['context_used']}\n" in ok(h.call("session", "show", s))

        fork = parsed(h, "session", "fork", s, "--label=copy")  # two of them
        assert fork["path"] == f"/org/llmd/Llm1/session/{fork['session']}"
        copies = [x for x in parsed(h, "session", "list") if x["label"] == "copy"]
        assert len(copies) == 2 and copies[0]["context_used"] == shown["context_used"], copies
        ok(h.call("session", "close", *(str(x["session"]) for x in copies)))
        ok(h.call("session", "close", "--session", s))
        assert parsed(h, "session", "list") == [] and ok(h.call("session", "list")) == ""
        for args in (("session", "show", s), ("session", "close", s), ("session", "fork", s), ("cancel", s),
                     ("measure", "--session", s, "x")):
            complaint(h.call(*args), 1, "there is no such session")
        assert len(h.starts()) == 1


@test
def first_failure_counts():
    with Home() as h:
        a, b = (ok(h.call("session", "create")).strip() for _ in range(2))
        complaint(h.call("session", "close", a, "4711", b), 1, "4711")
        assert parsed(h, "session", "list") == [], "the others are closed all the same"


@test
def quotas():
    with Home() as h:
        ok(h.call("session", "create"))
        me = str(os.geteuid())
        q = parsed(h, "quota")
        assert len(q) == 1 and q[0]["uid"] == os.geteuid() and q[0]["sessions"] == 1 and q[0]["weight"] == 100, q
        ok(h.call("quota", "set", me, "--max-sessions=1", "--max-kv-bytes=3M", "--weight=7"))
        q = parsed(h, "quota", "show", me)[0]
        assert (q["max_sessions"], q["max_kv_bytes"], q["weight"]) == (1, 3 << 20, 7), q
        complaint(h.call("session", "create"), 75)


@test
def measures():
    with Home() as h:
        n = int(ok(h.call("measure", "hello")))
        assert json.loads(ok(h.call("measure", "--json", "hello"))) == {"tokens": n}
        assert int(ok(h.call("measure", "hello", data=b"world"))) == int(ok(h.call("measure", "hello\nworld"))) > n
        assert int(ok(h.call("measure", "-n", "hello", data=b"world"))) == n
        assert 0 < int(ok(h.call("measure", "--raw", "hello"))) < n < int(ok(h.call("measure", "--instructions=be brief", "hello")))
        assert int(ok(h.call("measure", data=b"a\0b"))) > 0
        s = ok(h.call("session", "create")).strip()
        first = int(ok(h.call("measure", "--session", s, "hello")))
        ok(h.call("run", "--session", s, "--max-tokens=1", "--ignore-end", "hello"))
        used = parsed(h, "session", "show", s)["prompt_tokens"]
        assert used == first, (used, first)


@test
def cancels():
    with Home() as h:
        s = ok(h.call("session", "create")).strip()
        for args in (("cancel", s), ("cancel", "--all"), ("--session", s, "cancel")):
            p = h.popen("run", "--session", s, *ENDLESS, "x")
            p.stdout.readline()
            ok(h.call(*args))
            out, err = p.communicate(timeout=PATIENCE)
            assert p.returncode == 1 and b"cancelled" in out + err, (p.returncode, err)
            assert parsed(h, "session", "show", s)["context_used"] == 0, "rolled back"
        ok(h.call("cancel", s))


@test
def status_and_readiness():
    with Home() as h:
        ok(h.call("session", "create"))
        while parsed(h, "status")["load_progress"] < 1:  # a private daemon serves before all of the model is in memory
            pass
        s = parsed(h, "status")
        assert s["scope"] == "private" and s["state"] == "ready" and s["model"] == "chat" and s["sessions"] == 1, s
        assert s["load_progress"] == 1 and isinstance(s["backends"], list) and s["kv_bytes_max"] > 0 and s["queued"] == 0, s
        assert isinstance(s["decode_rate"], float) and s["uptime_usec"] > 0, s
        assert "state           ready\n" in ok(h.call("status"))
        assert ok(h.call("is-ready")) == "ready\n" and ok(h.call("is-ready", "--quiet")) == ""
        assert ok(h.call("is-ready", "--wait", "--timeout=60")) == "ready\n"
        # Whatever is computed, it is told at once.
        p = h.popen("run", *ENDLESS, "x")
        p.stdout.readline()
        assert parsed(h, "status")["running"] == 1
        p.terminate()
        p.communicate(timeout=PATIENCE)
        # A stopped daemon does not answer; that is no success.
        daemon = h.starts()[0]
        os.kill(daemon, signal.SIGSTOP)
        try:
            status, out, err = h.call("status", "--timeout=0.2")
            assert (status, out) == (124, "") and "within the time" in err, (status, out, err)
            p = h.popen("status", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
            while b"S" != open(f"/proc/{p.pid}/stat", "rb").read().rsplit(b")")[1].split()[0]:
                pass
            while not int(next(x for x in open(f"/proc/{p.pid}/status") if x.startswith("SigCgt")).split()[1], 16) & 2:
                pass
            p.send_signal(signal.SIGINT)
            assert p.communicate(timeout=PATIENCE)[0] == b"" and p.returncode == 130, p.returncode
        finally:
            os.kill(daemon, signal.SIGCONT)


@test
def models():
    with Home() as h, user_daemon(h, "--no-bus", "--model", "chat"):
        def wait_served(name):  # it is opened first, and ready as long as another one serves
            while json.loads(user(h, "status", "--json")[1])["model"] != name:
                pass

        # Nothing is there yet: it runs, and is not ready.
        status, out, err = user(h, "is-ready")
        assert (status, err) == (1, "") and out != "ready\n", (status, out, err)
        assert user(h, "is-ready", "--wait")[:2] == (1, out)
        complaint(user(h, "model", "install", __file__), 1)
        assert user(h, "model", "install", "--default", llmctl_home.model)[0] == 0
        assert user(h, "model", "default") == (0, "chat\n", "")
        complaint(user(h, "model", "install", llmctl_home.model), 1, "chat")
        assert user(h, "model", "install", "--default", "--name=two", llmctl_home.model)[0] == 0
        assert user(h, "model", "default", "--json") == (0, '{"model":"two"}\n', "")
        complaint(user(h, "model", "install", "--name=two", llmctl_home.model), 1, "two")
        wait_served("two")
        assert user(h, "is-ready", "--wait") == (0, "ready\n", "")
        complaint(user(h, "model", "remove", "two"), 75, "two")
        assert user(h, "model", "default", "chat") == (0, "", "")
        wait_served("chat")
        assert user(h, "is-ready", "--wait") == (0, "ready\n", "")
        assert user(h, "model", "install", "--replace", "--name=two", llmctl_home.model)[0] == 0
        listed = {m["model"]: m for m in json.loads(user(h, "model", "list", "--json")[1])}
        assert listed["chat"]["default"] is True and listed["two"]["default"] is False, listed
        assert listed["two"]["state"] == "available" and listed["two"]["bytes"] == os.path.getsize(llmctl_home.model), listed
        shown = json.loads(user(h, "model", "show", "two", "--json")[1])
        assert shown["model"] == "two" and shown["context_max"] > 0 and shown["progress"] == 1, shown
        assert "two" in user(h, "model", "list")[1]
        assert user(h, "model", "remove", "two") == (0, "", "")
        complaint(user(h, "model", "remove", "two"), 1, "two")
        complaint(user(h, "model", "show", "two"), 1, "two")
        complaint(user(h, "model", "default", "two"), 1, "two")


def bus_env(h, broker):
    """Of a client that finds no socket, but the bus."""
    elsewhere = os.path.join(h.path, "elsewhere")
    os.makedirs(elsewhere, 0o700, exist_ok=True)
    return dict(h.env, XDG_RUNTIME_DIR=elsewhere, DBUS_SESSION_BUS_ADDRESS=broker.address)


@test
def on_a_bus():
    with Home() as h, Broker(h.path) as broker:
        env = bus_env(h, broker)

        def call(*args):
            return ok(user(h, *args, env=env))

        complaint(user(h, "status", env=env), 3)
        with user_daemon(h, "--model", llmctl_home.model, DBUS_SESSION_BUS_ADDRESS=broker.address) as daemon:
            while user(h, "is-ready", env=env)[0] == 3:  # it serves before it has its name on the bus
                pass
            p = h.popen("--user", "monitor", "--json", any_scope=True, env=env)
            assert b"watching" in p.stderr.readline()
            s = call("session", "create", "--label=here").strip()
            call("run", "--session", s, "--max-tokens=3", "--ignore-end", "x")
            status = json.loads(call("status", "--json"))
            assert status["scope"] == "user" and status["sessions"] == 1, status
            assert " here " in call("top") and " here " in call("session", "list", "--all")
            call("model", "install", "--name=two", llmctl_home.model)
            call("session", "close", s)
            events = []
            while not events or events[-1]["event"] != "session-removed":
                events.append(json.loads(p.stdout.readline()))
            kinds = {e["event"] for e in events}
            assert {"session-added", "session-changed", "session-finished", "model-added", "model-changed"} <= kinds, kinds
            daemon.terminate()
            err = p.communicate(timeout=PATIENCE)[1]
            assert p.returncode == 3 and b"llmd has ended" in err, "the bus tells that it has left"


class LoadingDaemon:
    """Stands in for llmd on a bus, and loads for as long as the test wants."""

    def __init__(self, broker):
        self.bus = RawBus(broker.path, broker=True)
        assert self.bus.call("/org/freedesktop/DBus", "org.freedesktop.DBus", "RequestName", "su", BUS_NAME, 4,
                             destination="org.freedesktop.DBus") == [1]
        self.bus.match("type='signal',member='NameOwnerChanged'")

    def send(self, kind, fields, signature="", *body):
        self.bus.serial += 1
        self.bus.send(*encode(kind, self.bus.serial, fields, signature, body))

    def answer(self, state, **more):
        """Answers calls up to the next question for the properties, that included; who asked."""
        while not (asked := self.answer_one(self.bus.wait_for(lambda m: m.kind == CALL), state, **more)):
            pass
        return asked

    def answer_one(self, m, state, **more):
        """Who asked, where the properties were asked for."""
        to = {DESTINATION: m.sender, REPLY_SERIAL: m.serial}
        if m.member == "GetAll":
            self.send(RETURN, to, "a{sv}", {"State": ("s", state), **more})
            return m.sender
        if m.member == "Get":
            self.send(RETURN, to, "v", ("s", "0.0.0"))
        elif m.member == "InstallModel":
            for fd in m.fds:
                os.close(fd)
            self.send(RETURN, to, "o", "/org/llmd/Llm1/model/chat")
        else:
            self.send(RETURN, to)
        return None

    def answer_until_end(self, p, state):
        """For as long as p asks at all: it may end before its first question."""
        end = os.pidfd_open(p.pid)
        while not select.select([end], [], [], 0)[0]:
            for m in self.bus.pending():
                if m.kind == CALL:
                    self.answer_one(m, state)
            select.select([self.bus.socket, end], [], [])
        os.close(end)

    def forget(self, name):
        """All that was asked by one who is about to be gone: no answer is to go there rather than to the next."""
        self.bus.wait_for(lambda m: m.member == "NameOwnerChanged" and m.body[0] == name and not m.body[2])
        self.bus.pending()

    def change(self, state):
        self.send(SIGNAL, {PATH: "/org/llmd/Llm1", INTERFACE: "org.freedesktop.DBus.Properties", MEMBER: "PropertiesChanged"},
                  "sa{sv}as", "org.llmd.Llm1.Manager", {"State": ("s", state)}, [])


@test
def readiness_is_waited_for():
    with Home() as h, Broker(h.path) as broker:
        args, kw = ("--user", "is-ready", "--wait"), {"any_scope": True, "env": bus_env(h, broker)}
        daemon = LoadingDaemon(broker)
        p = h.popen("--user", "is-ready", **kw)
        daemon.answer("loading")
        assert p.communicate(timeout=PATIENCE) == (b"loading\n", b"") and p.returncode == 1

        p = h.popen(*args, **kw)
        daemon.answer("loading")
        for state in ("loading", "loading", "ready"):
            # It asks again because it was told, not because time has passed.
            assert p.poll() is None and not any(m.kind == CALL for m in daemon.bus.pending())
            daemon.change(state)
            daemon.answer(state)
        assert p.communicate(timeout=PATIENCE) == (b"ready\n", b"") and p.returncode == 0

        p = h.popen(*args, **kw)
        daemon.answer("loading")
        daemon.bus.close()
        out, err = p.communicate(timeout=PATIENCE)
        assert (p.returncode, out) == (3, b"") and b"llmd has ended" in err, (p.returncode, err)

        daemon = LoadingDaemon(broker)
        p = h.popen(*args, "--timeout=0.3", **kw)
        daemon.answer_until_end(p, "loading")
        assert p.communicate(timeout=PATIENCE)[0] == b"" and p.returncode == 124, p.returncode


@test
def installing():
    with Home() as h, Broker(h.path) as broker:
        args, kw = ("--user", "model", "install", llmctl_home.model), {"any_scope": True, "env": bus_env(h, broker)}
        daemon = LoadingDaemon(broker)
        p = h.popen(*args, **kw)
        daemon.answer("installing", Progress=("d", 0.4))
        daemon.answer("failed", Failure=("s", "the disk is full"))
        assert p.communicate(timeout=PATIENCE)[1].endswith(b": the disk is full\n") and p.returncode == 1

        p = h.popen(*args, **kw)
        asked = daemon.answer("installing", Progress=("d", 0.4))
        p.send_signal(signal.SIGINT)
        # It may have asked again before the signal came; that question has no answer.
        out, err = p.communicate(timeout=PATIENCE)
        assert (p.returncode, out) == (130, b"") and b"goes on copying" in err and len(err.splitlines()) == 1, err
        daemon.forget(asked)

        t = Terminal(h, *args, scope=(), env=kw["env"])
        daemon.answer("installing", Progress=("d", 0.4))
        t.until(b"installing chat: 40 %")
        daemon.answer("available")
        status, shown = t.end()
        assert status == 0 and shown.endswith("\r\033[K"), shown


def lines_of(p):
    while True:
        line = p.stdout.readline()
        assert line, p.communicate()
        yield json.loads(line)


@test
def monitors():
    with Home() as h:
        ok(h.call("session", "create"))
        p = h.popen("monitor", "--json")
        assert b"watching" in p.stderr.readline()
        s = int(ok(h.call("session", "create", "--label=watched")))
        secret = "the secret prompt"
        answer = ok(h.call("run", "--session", str(s), "--max-tokens=20", "--ignore-end", secret))
        ok(h.call("session", "close", str(s)))
        events = []
        for e in lines_of(p):
            events.append(e)
            if e["event"] == "session-removed" and e["session"] == s:
                break
        kinds = [e["event"] for e in events if e.get("session") == s]
        assert kinds[0] == "session-added" and "session-changed" in kinds, kinds
        done = next(e for e in events if e["event"] == "session-finished")
        assert done["session"] == s and done["reason"] == "length" and done["completion_tokens"] == 20, done
        assert all(isinstance(e["time_usec"], int) for e in events)
        assert secret not in json.dumps(events)
        p.send_signal(signal.SIGINT)
        assert p.wait(PATIENCE) == 130

        p = h.popen("monitor", "--quiet")
        # Until it has subscribed, sessions come and go unseen.
        made = []
        os.set_blocking(p.stdout.fileno(), False)
        while not (text := p.stdout.readline()):
            made.append(ok(h.call("session", "create", "--label=seen")).strip())
        assert b" session " in text and b" added" in text, text
        os.set_blocking(p.stdout.fileno(), True)
        os.kill(h.starts()[0], signal.SIGTERM)
        out, err = p.communicate(timeout=PATIENCE)
        assert p.returncode == 3 and b"llmd has ended" in err, (p.returncode, err)


@test
def top():
    with Home() as h:
        s = ok(h.call("session", "create", "--label=mine")).strip()
        text = ok(h.call("top"))
        assert text.startswith("llmd ") and " mine " in text and text.count("llmd ") == 1, text
        rounds = list(map(json.loads, ok(h.call("top", "--json", "-n", "3", "-d", "0.1")).splitlines()))
        assert len(rounds) == 3 and rounds[0]["sessions"][0]["rate"] is None and rounds[2]["sessions"][0]["rate"] == 0, rounds
        assert rounds[0]["sessions"][0]["session"] == int(s) and rounds[0]["kv_bytes_max"] > 0

        for leave, want in ((b"q", 0), (b"\x03", 130)):
            t = Terminal(h, "top")
            t.until(b" mine ")
            t.write(leave)
            status, shown = t.end()
            assert status == want, (status, shown)
            assert shown.startswith("\033[?1049h") and shown.rstrip("^C").endswith("\033[?1049l"), shown

        t = Terminal(h, "top")
        t.until(b" mine ")
        os.kill(h.starts()[0], signal.SIGTERM)
        status, shown = t.end()
        after = shown[shown.index("\033[?1049l"):]
        assert status == 3 and "llmd has ended" in after, "told on the shell's screen, not on the one that goes"
        t = Terminal(h, "session", "create")
        status, shown = t.end()
        assert status == 0
        t = Terminal(h, "top")
        t.until(b"interactive")
        t.process.terminate()
        status, shown = t.end()
        assert status == -signal.SIGTERM and "\033[?1049l" in shown, (status, shown)


@test
def terminal_and_pager():
    with Home() as h:
        for i in range(12):
            ok(h.call("session", "create", "--label=" + "l" * 60))
        pager = {"LLMD_PAGER": "sed s/^/PAGED:/"}
        status, shown = Terminal(h, "session", "list", env=pager).end()
        assert status == 0 and "PAGED" not in shown and shown.endswith("\n12 sessions\n"), shown
        assert max(map(len, shown.splitlines())) <= 80, shown
        for lines, args, paged in ((10, (), True), (10, ("--no-pager",), False), (10, ("--json",), False), (40, (), False)):
            status, shown = Terminal(h, "session", "list", *args, lines=lines, env=pager).end()
            assert status == 0 and ("PAGED:ID" in shown.replace(" ", "")) == paged, (lines, args, shown)
        for env in ({"LLMD_PAGER": ""}, {"PAGER": "cat"}, {"PAGER": "/no/such/pager"}):
            status, shown = Terminal(h, "session", "list", lines=10, env=env).end()
            assert status == 0 and "12 sessions" in shown, shown
        assert "sessions" not in Terminal(h, "session", "list", "--no-legend").end()[1]
        assert "PAGED" not in ok(h.call("session", "list", env=dict(h.env, **pager)))


@test
def completions():
    with Home() as h:
        s = ok(h.call("session", "create")).strip()
        script = f'source {ROOT}/client/completions/llmctl.bash; COMP_WORDS=({LLMCTL} --private session close ""); COMP_CWORD=4; ' \
                 '_llmctl; echo "${COMPREPLY[@]}"'
        out = subprocess.run(["bash", "--norc", "-c", script], env=h.env, stdout=subprocess.PIPE, timeout=PATIENCE).stdout.decode()
        assert out == s + "\n", out


@test
def unwritable():
    with Home() as h:
        ok(h.call("session", "create"))
        for args in (("status",), ("session", "list"), ("session", "list", "--json"), ("top",), ("quota",), ("is-ready",)):
            with open("/dev/full", "w") as full:
                p = h.popen(*args, stdout=full)
                err = p.communicate(timeout=PATIENCE)[1]
                assert p.returncode == 1 and b"cannot write" in err, (args, p.returncode, err)


llmctl_home.main()
