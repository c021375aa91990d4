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


@test
def calls_that_nobody_answered(folder, model):
    """They lie in the socket of a daemon that will not read them."""
    wanted = expected(folder, model, (20, "one"), (20, "two"))
    saved = os.path.join(folder, "saved")
    with Manager(llmd, folder, model) as m, Shell(m.socket) as c:
        c.new()
        for turn, text in zip(((20, "one"), (20, "two")), wanted):
            m.process.send_signal(signal.SIGSTOP)
            c.tell("say", 0, *turn)
            m.restart()
            assert c.hear() == text
        for words in (("save", 0, saved), ("new",), ("restore", 1, saved), ("rewind", 1, 5), ("cancel", 0), ("measure", "one"),
                      ("status",), ("fork", 0), ("open", 1), ("close", 0), ("close", 1)):
            m.process.send_signal(signal.SIGSTOP)
            c.tell(*words)
            m.restart()
            c.hear()
        assert os.path.getsize(saved) > 40
        assert c.fails("say", 0, 5, "x") == "NoSuchSession"


@test
def streams_go_on(folder, model):
    wanted, = expected(folder, model, (600, "one"))
    with Manager(llmd, folder, model) as m, Shell(m.socket) as c:
        c.new()
        c.do("start", 0, 600, "one")
        c.tell("read")
        for _ in range(3):
            m.restart()
        assert c.hear() == wanted
        # And its end is told to the session as well.
        c.do("say", 0, 5, "two")


@test
def what_is_lost_says_so(folder, model):
    with Manager(llmd, folder, model) as m, Shell(m.socket) as c:
        c.new()
        c.new()
        with Client(m.socket) as d:
            before = d.manager("Instance")
            assert re.fullmatch("[0-9a-f]{32}", before), before
        m.restart()
        c.do("say", 0, 5, "x")
        with Client(m.socket) as d:
            assert d.manager("Instance") == before
        m.kill()
        with m.lock:
            m.drop(lambda *_: True)
        m.begin()
        assert c.fails("say", 0, 5, "x") == "SessionLost" and c.fails("rewind", 1, 0) == "SessionLost"
        c.do("close", 0)  # it is
        with Client(m.socket) as d:
            assert d.manager("Instance") != before
        number, path = c.new()
        c.do("say", number, 5, "x")
        assert path.endswith("/1"), path  # one that the one before had given out as well


def adopt(client, path):
    client.call(path, SESSION, "Adopt", "a{sv}", options_of())


@test
def who_may_adopt(folder, model):
    with Manager(llmd, folder, model) as m:
        owner, other = Client(m.socket), Client(m.socket)
        path = owner.create().path
        adopt(owner, path)
        assert error_of(adopt, other, path)[0] == "Busy"
        m.restart()
        if os.getuid() == 0:
            def of_another(child):
                with Client(m.socket) as c:
                    return error_of(adopt, c, path)[0]

            for path_to in (os.path.dirname(folder), folder):
                os.chmod(path_to, 0o755)
            os.chmod(m.socket, 0o666)
            assert Child(65534, of_another).join() == "NoSuchSession"
        first, second = Client(m.socket), Client(m.socket)
        adopt(first, path)
        assert error_of(adopt, second, path)[0] == "Busy"
        adopt(first, path)
        # With its new owner it ends; the one before has no say any more.
        owner.close()
        until(lambda: len(stored(m, "connection-")) == 1, lambda: m.names())
        first.call(path, SESSION, "Rewind", "u", dbus.UInt32(0))
        first.close()
        until(lambda: second.manager("Sessions") == 0)
        until(lambda: not stored(m, "connection-") and not stored(m, "session-"), lambda: m.names())
        second.close()
        other.close()


def sessions(client):
    return sorted(str(s[0]) for s in client.manage("ListSessions", "a{sv}", options_of()))


@test
def clients_that_are_gone(folder, model):
    """One went while no daemon was there, one later; one says nothing for longer than their sessions are kept, and stays."""
    with Manager(llmd, folder, model) as m, Shell(m.socket) as silent:
        early, late, lingering = Shell(m.socket), Shell(m.socket), Shell(m.socket)
        stays = [silent.new()[1], lingering.new("linger")[1]]
        early.new()
        late.new()
        m.kill()
        early.kill()
        m.settle()
        until(lambda: len(stored(m, "connection-")) == 2, lambda: m.names())
        m.begin()
        late.kill()
        lingering.kill()
        with Client(m.socket) as c:
            until(lambda: sessions(c) == sorted(stays), lambda: (sessions(c), stays))
        silent.do("say", 0, 5, "x")


@test
def quotas_count_what_came_back(folder, model):
    with Manager(llmd, folder, model, config="[Limits]\nMaxSessions=2\nMaxConnections=1\n") as m, Shell(m.socket) as c:
        c.new()
        c.new()
        m.restart()
        assert c.fails("new") == "QuotaExceeded"  # and the connection that is held was no obstacle
        with subprocess.Popen([shell, m.socket], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as refused:
            assert refused.stdout.read().startswith(b"error")
        c.do("close", 0)
        c.new()


# ---- on a bus ----

SYSTEMD = "org.freedesktop.systemd1"


class BrokerWithSystemd(Broker):
    CONFIG = Broker.CONFIG.replace('<allow own="{name}"/>', '<allow own="{name}"/><allow own="' + SYSTEMD + '"/>').replace(
        '<allow send_destination="{name}"/>', '<allow send_destination="{name}"/><allow send_destination="' + SYSTEMD + '"/>')


class Systemd:
    """The part of it that llmd asks. job: "restart", "stop"; "": it has none; None: it does not answer"""

    def __init__(self, broker, job):
        self.bus, self.job, self.asked = RawBus(broker.path, broker=True), job, []
        self.bus.socket.settimeout(None)
        assert self.bus.call("/org/freedesktop/DBus", "org.freedesktop.DBus", "RequestName", "su", SYSTEMD, 0,
                             destination="org.freedesktop.DBus") == [1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                m = self.bus.receive()
            except ConnectionResetError:  # the broker has gone
                return
            if m.kind != CALL:
                continue
            self.asked.append(m.member if m.member != "Get" else m.body[1])
            if self.job is None:
                continue
            answer = {"GetUnitByPID": ("o", ["/unit"]),
                      "Job": ("v", [("(uo)", (7, "/job") if self.job else (0, "/"))]),
                      "JobType": ("v", [("s", self.job)])}[self.asked[-1]]
            self.bus.serial += 1
            self.bus.send(*encode(RETURN, self.bus.serial, {REPLY_SERIAL: m.serial, DESTINATION: m.sender}, *answer))


def wait_named(broker, m):
    with BusClient(broker.address) as c:
        until(lambda: c.bus.name_has_owner(BUS_NAME), m.log)


@test
def clients_on_a_bus(folder, model):
    wanted = expected(folder, model, (20, "one"), (20, "two"))
    with Broker(folder) as broker, RawBus(broker.path, broker=True, destination=BUS_NAME) as ear:
        ear.match("type='signal',interface='org.llmd.Llm1.Manager',member='Restarted'")
        env = dict(os.environ, DBUS_SYSTEM_BUS_ADDRESS=broker.address)
        with Manager(llmd, folder, model, broker=broker) as m:
            wait_named(broker, m)
            goes = RawBus(broker.path, broker=True, destination=BUS_NAME)
            kept, = ear.call(ROOT, MANAGER, "CreateSession", "a{sv}", {})
            goes.call(ROOT, MANAGER, "CreateSession", "a{sv}", {})
            with Shell("system", env) as c:
                c.new()
                assert c.do("say", 0, 20, "one") == wanted[0]
                assert not [message for message in ear.pending() if message.member == "Restarted"]
                m.kill()
                goes.close()
                m.begin()
                assert c.do("say", 0, 20, "two") == wanted[1]
                heard = ear.wait_for(lambda message: message.member == "Restarted")
                assert (heard.path, heard.body) == (ROOT, [])
                # The name is the same, and so is the owner: nothing has to be adopted.
                assert ear.call(kept, "org.freedesktop.DBus.Properties", "Get", "ss", SESSION, "State") == [("s", "idle")]
                ear.call(kept, SESSION, "Adopt", "a{sv}", {})
                until(lambda: ear.call(ROOT, "org.freedesktop.DBus.Properties", "Get", "ss", MANAGER, "Sessions") == [("u", 2)])
            until(lambda: ear.call(ROOT, "org.freedesktop.DBus.Properties", "Get", "ss", MANAGER, "Sessions") == [("u", 1)])
            assert not [message for message in ear.pending() if message.member == "Restarted"]  # once
            with BusClient(broker.address) as other:
                assert error_of(adopt, other, kept)[0] == "Busy"
            m.restart()
            wait_named(broker, m)
            with BusClient(broker.address) as other:
                assert error_of(adopt, other, kept)[0] == "Busy"  # its owner has said nothing yet, and is there
            ear.close()
            with BusClient(broker.address) as other:
                until(lambda: other.manager("Sessions") == 0)


@test
def a_bus_that_comes_back(folder, model):
    """With it the names are others; who connects anew within the grace adopts."""
    broker = Broker(folder)
    env = dict(os.environ, DBUS_SYSTEM_BUS_ADDRESS=broker.address)
    wanted = expected(folder, model, (20, "one"), (20, "two"))
    try:
        with Manager(llmd, folder, model, broker=broker) as m:
            wait_named(broker, m)
            with Shell("system", env) as c:
                c.new()
                assert c.do("say", 0, 20, "one") == wanted[0]
                with RawBus(broker.path, broker=True, destination=BUS_NAME) as ear:
                    ear.match("type='signal',interface='org.llmd.Llm1.Manager',member='Restarted'")
                    m.restart()
                    ear.wait_for(lambda message: message.member == "Restarted")
                m.process.send_signal(signal.SIGSTOP)
                broker.stop()
                broker = Broker(folder)
                with RawBus(broker.path, broker=True, destination=BUS_NAME) as ear:
                    ear.match("type='signal',interface='org.llmd.Llm1.Manager',member='Restarted'")
                    m.process.send_signal(signal.SIGCONT)
                    assert c.do("say", 0, 20, "two") == wanted[1]
                    ear.call(ROOT, "org.freedesktop.DBus.Peer", "Ping")
                    assert not [s for s in ear.pending() if s.member == "Restarted"]  # that was told on the other
            with Client(m.socket) as d:
                until(lambda: d.manager("Sessions") == 0)
    finally:
        broker.stop()


@test
def restarted_or_stopped(folder, model):
    """The same signal; what it means, systemd knows."""
    subprocess.run([make_model, model, "200000"], check=True)  # an answer that only its stop ends
    wanted, = expected(folder, model, (600, "one"))
    with BrokerWithSystemd(folder) as broker:
        systemd = Systemd(broker, "restart")
        with Manager(llmd, folder, model, broker=broker) as m, Shell(m.socket) as c:
            wait_named(broker, m)
            c.new()
            c.do("start", 0, 600, "one")
            assert m.kill(signal.SIGTERM) == 0
            assert systemd.asked == ["GetUnitByPID", "Job", "JobType"], systemd.asked
            assert stored(m, "session-") and stored(m, "request-") and stored(m, "instance"), m.names()
            m.begin()
            assert c.do("read") == wanted
            for job in ("stop", "", None):
                wait_named(broker, m)
                systemd.job = job
                with Client(m.socket) as d:
                    f = d.create().generate(prompt="x", ignore_end=True)
                    m.process.send_signal(signal.SIGTERM)
                    assert read_all(f)[1][-1] == {"type": "end", "reason": "shutdown"}, job
                    f.close()
                assert m.kill(signal.SIGTERM) == 0
                assert not m.names(), (job, m.names())
                assert systemd.asked[-1] == ("JobType" if job else "GetUnitByPID" if job is None else "Job"), systemd.asked
                m.begin()
            assert c.fails("say", 0, 5, "x") == "SessionLost"
            # Twice: nobody waits for an answer then.
            wait_named(broker, m)
            c.new()
            n = len(systemd.asked)
            m.process.send_signal(signal.SIGTERM)
            until(lambda: len(systemd.asked) > n)
            assert m.kill(signal.SIGTERM) == 0 and not m.names()
            m.begin()


# ---- llmctl ----

class Llmctl:
    def __init__(self, m, *words):
        self.process = subprocess.Popen([llmctl, "--socket", m.socket, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, bufsize=0, env=dict(os.environ, HOME=m.folder))

    def say(self, line):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def end(self):
        out, notes = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, notes.decode()


RUN = ("run", "-n", "--max-tokens", "600", "--ignore-end", "--seed", "7", "one")
CHAT = ("chat", "--max-tokens", "20", "--ignore-end", "--seed", "7")


@test
def llmctl_run_and_chat(folder, model):
    with Manager(llmd, folder, model) as m:
        wanted = Llmctl(m, *RUN).end()
        chat = Llmctl(m, *CHAT)
        talk = [chat.say("one"), chat.say("two"), chat.say("three")]
        assert wanted[0] == 0 and chat.end()[0] == 0 and all(talk)
        run = Llmctl(m, *RUN)
        begun = run.process.stdout.read(20)
        m.restart()
        status, out, notes = run.end()
        assert (status, begun + out, notes) == wanted, ((status, begun + out, notes), wanted)
        chat = Llmctl(m, *CHAT)
        again = []
        for line in ("one", "two", "three"):
            again.append(chat.say(line))
            m.restart()
        assert again == talk, (again, talk)
        assert chat.end() == (0, b"", "")
        # One that is lost ends it.
        chat = Llmctl(m, *CHAT)
        chat.say("one")
        m.kill()
        with m.lock:
            m.drop(lambda *_: True)
        m.begin()
        chat.process.stdin.write(b"two\n")
        status, out, notes = chat.end()
        assert status == 1 and not out and notes.count("\n") == 1 and "session" in notes, (status, out, notes)


@test
def llmctl_watches_on(folder, model):
    with Manager(llmd, folder, model) as m:
        monitor = Llmctl(m, "monitor", "--json")
        notes = monitor.process.stderr.readline()
        assert b"watching" in notes, notes

        def event(name):
            while name not in (line := monitor.process.stdout.readline()):
                assert line, monitor.process.stderr.read()

        for _ in range(2):
            with Client(m.socket) as c:
                c.create()
                event(b'"session-added"')
            event(b'"session-removed"')
            m.restart()
            event(b'"daemon-restarted"')
        top = Llmctl(m, "top", "--json", "--rounds", "40", "--delay", "0.1")
        assert top.process.stdout.readline()
        m.restart()
        status, out, notes = top.end()
        assert status == 0 and out.count(b"\n") == 39 and not notes, (status, out.count(b"\n"), notes)
        event(b'"daemon-restarted"')
        monitor.process.send_signal(signal.SIGINT)
        assert monitor.end()[0] == 130


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
