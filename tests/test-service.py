# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""test-service.py LLMD MAKE_CHAT_MODEL: the life of the service: what it tells the service manager, inherited
sockets, a bus that comes and goes, a configuration that changes, models that come and are exchanged."""
import contextlib
import ctypes
import os
import queue
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

try:
    import dbus
    from daemon_client import (BUS_NAME, Broker, BusClient, Child, Client, Daemon, ERROR, MANAGER, PATIENCE, ROOT,
                               SESSION, SystemDaemon, error_of, make_endless_model, options_of)
    from raw_bus import DESTINATION, REPLY_SERIAL, RETURN, BusError, RawBus, encode
except ImportError:
    print("python3-dbus is not there")
    sys.exit(77)

llmd, make_model = (os.path.abspath(p) for p in sys.argv[1:])
tests = []


def test(f):
    tests.append(f)
    return f


class Notify:
    """What a service manager hears. Always taken, as it would: who notifies waits while the socket is full."""

    def __init__(self, folder):
        self.path = os.path.join(folder, "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.heard = queue.SimpleQueue()
        threading.Thread(target=self.hear, daemon=True).start()

    def hear(self):
        while True:
            self.heard.put(self.socket.recv(4096).decode())

    def next(self, patience=PATIENCE):
        return self.heard.get(timeout=patience)

    def until(self, start):
        """All that comes, the one that begins so last."""
        heard = [self.next()]
        while not heard[-1].startswith(start):
            heard.append(self.next())
        return heard

    def env(self, **more):
        return dict(os.environ, NOTIFY_SOCKET=self.path, **more)


def wait_for(what):
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def listens(path):
    with socket.socket(socket.AF_UNIX) as s:
        return s.connect_ex(path) == 0


def wait_log(d, text):
    wait_for(lambda: re.search(text, d.log()))


@test
def start_and_end_are_told(folder, model):
    notify = Notify(folder)
    with SystemDaemon(llmd, folder, None, "--no-bus", model=model, env=notify.env()) as d:
        heard = notify.until("READY=1")
        assert any(re.match(r"STATUS=(Opening|Loading|Serving) ", h) for h in heard), heard
        with d.connect() as c:
            assert c.manager("State") == "ready" and c.manager("LoadProgress") == 1
            c.create()
            notify.until("STATUS=Serving model: 1 session of 1 client")
        assert d.stop() == 0
        assert notify.until("STOPPING=1")
        assert "STATUS" not in d.log()


@test
def memory_is_freed_after_an_oom_kill(folder, model):
    """What ExecStopPost= runs: the manager is to let go of the KV then, and at no other end."""
    del model
    notify = Notify(folder)

    def stopped(**env):
        return subprocess.run([llmd, "--after-stop"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, env=env)

    for result in "success", "signal", "watchdog":
        p = stopped(NOTIFY_SOCKET=notify.path, SERVICE_RESULT=result)
        assert (p.returncode, p.stdout, p.stderr) == (0, "", ""), p
    p = stopped(NOTIFY_SOCKET=notify.path, SERVICE_RESULT="oom-kill")
    assert p.returncode == 0 and p.stdout == "" and p.stderr.startswith("<4>killed for lack of memory"), p
    assert notify.next() == "FDSTOREREMOVE=1\nFDNAME=kv"
    assert notify.next() == "BARRIER=1" and notify.heard.empty()
    for nowhere in {}, {"NOTIFY_SOCKET": notify.path + ".not"}:
        p = stopped(SERVICE_RESULT="oom-kill", **nowhere)
        assert p.returncode == 1 and p.stderr.count("\n") == 1 and "cannot be told" in p.stderr, p


def thread_named(pid, name):
    for tid in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            with open(f"/proc/{pid}/task/{tid}/comm") as f:
                if f.read().strip() == name:
                    return int(tid)
    raise AssertionError(f"no thread {name}")


def has_thread(pid, name):
    try:
        return thread_named(pid, name)
    except AssertionError:
        return None


@test
def watchdog_stops_with_the_engine(folder, model):
    """PTRACE_INTERRUPT stops one thread and leaves the others, which SIGSTOP would not."""
    if os.geteuid() != 0:
        return "root only: ptrace"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    notify = Notify(folder)
    env = notify.env(WATCHDOG_USEC="300000")
    env.pop("WATCHDOG_PID", None)
    endless = os.path.join(folder, "endless.llmd")
    make_endless_model(make_model, endless)
    with SystemDaemon(llmd, folder, None, "--no-bus", model=endless, env=env) as d, d.connect() as c:
        notify.until("WATCHDOG=1")  # while it is idle
        s = c.create()
        stream = s.generate(prompt="a" * (1 << 18), raw=True)  # at work for longer than all of this takes
        s.wait_state("prefill")
        tid = thread_named(d.process.pid, "llmd-engine")
        if libc.ptrace(0x4206, tid, None, None) < 0:  # PTRACE_SEIZE
            return "this kernel lets nobody trace"
        try:
            for _ in range(20):
                assert libc.ptrace(0x4207, tid, None, None) == 0  # PTRACE_INTERRUPT
                os.waitpid(tid, 0x40000000)  # __WALL
                try:
                    c.bus.call_blocking(None, ROOT, MANAGER, "GetStatistics", "", (), timeout=3)
                    break
                except dbus.DBusException:  # stopped while it held the mutex, which no hanging step does: elsewhere, then
                    assert libc.ptrace(7, tid, None, None) == 0  # PTRACE_CONT
            while not notify.heard.empty():  # what was said before
                notify.next()
            # What it had done before still counts, once; one may have been under way. Then silence.
            heard = []
            with contextlib.suppress(queue.Empty):
                while len(heard) < 20:
                    heard.append(notify.next(patience=1))
            assert heard.count("WATCHDOG=1") <= 3, heard
            assert c.manager("State") == "ready"  # the loop is well
        finally:
            assert libc.ptrace(17, tid, None, None) == 0  # PTRACE_DETACH
        notify.until("WATCHDOG=1")
        stream.close()


@test
def reloads(folder, model):
    notify = Notify(folder)
    config = "[Limits]\nMaxSessions=1\n[Engine]\nThreads=1\n"
    with SystemDaemon(llmd, folder, None, "--no-bus", model=model, config=config, env=notify.env()) as d, d.connect() as c:
        notify.until("READY=1")

        def reload(text):
            with open(d.config, "w") as f:
                f.write(text)
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            os.kill(d.process.pid, signal.SIGHUP)
            told = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", notify.until("RELOADING=1")[-1])
            assert told and before <= int(told[1]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            notify.until("READY=1")

        c.create()
        assert error_of(c.create)[0] == "QuotaExceeded"
        reload("[Limits]\nMaxSessions=2\n[Engine]\nThreads=2\n")
        c.create()
        assert error_of(c.create)[0] == "QuotaExceeded"
        assert "Threads= will be looked at when llmd is started the next time" in d.log()

        reload("[Limits]\nMaxSessions=three\n")
        assert f"{d.config}:2: [Limits] MaxSessions=three: not understood" in d.log()
        assert "the configuration is left as it was" in d.log()
        assert error_of(c.create)[0] == "QuotaExceeded"
        os.unlink(d.config)
        os.mkdir(d.config)
        os.kill(d.process.pid, signal.SIGHUP)
        notify.until("READY=1")
        assert error_of(c.create)[0] == "QuotaExceeded" and "is a folder" in d.log()
        os.rmdir(d.config)

        reload(f"[Limits]\nMaxSessions=1\n[User {os.geteuid()}]\nMaxSessions=3\n")
        c.create()
        assert error_of(c.create)[0] == "QuotaExceeded"
        reload("[Limits]\nMaxSessions=4\n")  # the user's section is gone
        c.create()
        assert error_of(c.create)[0] == "QuotaExceeded"
        reload("[Limits]\nMaxSessions=5\n")  # and stays so
        c.create()
        assert error_of(c.create)[0] == "QuotaExceeded"
        c.manage("SetQuota", "ua{sv}", dbus.UInt32(os.geteuid()), options_of(max_sessions=dbus.UInt32(6)))
        reload("[Limits]\nMaxSessions=3\n")
        c.create()
        assert error_of(c.create)[0] == "QuotaExceeded"


@test
def checks_the_configuration(folder, model):
    path = os.path.join(folder, "some.conf")

    def check(text):
        with open(path, "w") as f:
            f.write(text)
        r = subprocess.run([llmd, "--check-config", path], capture_output=True, text=True, timeout=PATIENCE)
        return r.returncode, r.stdout, r.stderr

    assert check("[Limits]\nWeight=5\n") == (0, path + "\n", "")
    status, _, said = check("[Limits]\nWieght=5\n")
    assert status == 1 and said.startswith(f"{path}:2: [Limits] Wieght=: no such key") and "Weight" in said, said
    os.unlink(path)
    r = subprocess.run([llmd, "--check-config", path], capture_output=True, text=True, timeout=PATIENCE)
    assert r.returncode == 1 and path in r.stderr and not r.stdout


@test
def says_which_mode(folder, model):
    if os.geteuid() != 0:
        return "root only: another user"
    os.chmod(folder, 0o755)
    r = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", llmd], capture_output=True,
                       text=True, timeout=PATIENCE)
    if r.returncode in (126, 127):
        return "another user cannot run this build"
    assert r.returncode == 2 and "--user" in r.stderr and "--private" in r.stderr, r


@test
def inherits_sockets(folder, model):
    if not shutil.which("systemd-socket-activate"):
        return "systemd-socket-activate is not there"
    path = os.path.join(folder, "inherited.socket")
    env = dict(os.environ, XDG_RUNTIME_DIR=folder, XDG_STATE_HOME=folder, XDG_CONFIG_HOME=folder)
    os.chmod(folder, 0o700)
    setenv = [f"--setenv={k}={v}" for k, v in env.items() if k.startswith(("ASAN", "UBSAN", "TSAN", "XDG", "PATH", "LD_", "HOME"))]
    with open(os.path.join(folder, "log"), "wb") as log:
        p = subprocess.Popen(["systemd-socket-activate", "--fdname=llmd", "-l", path, *setenv, llmd, "--user", "--no-bus",
                              "--model", model], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
    wait_for(lambda: listens(path))  # the file comes first
    with Client(path) as c:
        assert c.create().run(prompt="a", max_tokens=dbus.UInt32(1))
        assert not os.path.exists(os.path.join(folder, "llmd", "llmd.socket"))
    p.send_signal(signal.SIGTERM)
    with open(os.path.join(folder, "log")) as log:
        assert p.wait(PATIENCE) == 0, log.read()
    assert os.path.exists(path)  # not ours to remove


@test
def user_mode(folder, model):
    """The session bus, a configuration of the user's own, and nobody else."""
    config = os.path.join(folder, "llmd", "llmd.conf.d")
    os.makedirs(config, 0o700)
    os.chmod(os.path.join(folder, "llmd"), 0o700)
    os.chmod(folder, 0o755)
    with open(os.path.join(config, "10-one.conf"), "w") as f:
        f.write("[Limits]\nMaxSessions=1\n")
    with Broker(folder) as broker:
        env = dict(os.environ, DBUS_SESSION_BUS_ADDRESS=broker.address, XDG_CONFIG_HOME=folder, XDG_STATE_HOME=folder,
                   DBUS_SYSTEM_BUS_ADDRESS="unix:path=/nonexistent")
        path = os.path.join(folder, "user.socket")
        with Daemon(llmd, model, path, mode="--user", env=env) as d:
            wait_log(d, "serving on the session bus as " + BUS_NAME)
            with BusClient(broker.address) as c:
                assert c.create().run(prompt="a", max_tokens=dbus.UInt32(1))
                assert error_of(c.create)[0] == "QuotaExceeded"
            if os.geteuid() == 0:
                os.chmod(path, 0o666)

                def other(child):
                    del child
                    with socket.socket(socket.AF_UNIX) as s:
                        s.connect(path)
                        return s.recv(1)

                assert Child(65534, other).join() == b""
                wait_log(d, "refused a connection of user 65534, .*: this daemon serves another user")


@test
def goes_on_without_a_bus(folder, model):
    with SystemDaemon(llmd, folder, None, model=model) as d, d.connect() as c:
        wait_log(d, "<4>system bus: cannot connect")
        assert c.create().run(prompt="a", max_tokens=dbus.UInt32(1))
        assert d.log().count("system bus") == 1


@test
def the_bus_comes_and_goes(folder, model):
    broker = Broker(folder)
    try:
        with SystemDaemon(llmd, folder, broker, model=model) as d, d.connect() as c:
            wait_log(d, "serving on the system bus as " + BUS_NAME)
            first = BusClient(broker.address)
            first.create()
            s = c.create()
            assert c.manager("Sessions") == 2
            broker.stop()
            wait_log(d, "system bus: the connection is lost")
            assert c.manager("Sessions") == 2  # its clients may come back with it
            assert s.run(prompt="a", max_tokens=dbus.UInt32(1))
            broker = Broker(folder)
            wait_for(lambda: d.log().count("serving on the system bus as") == 2)
            second = BusClient(broker.address)
            assert second.create().run(prompt="a", max_tokens=dbus.UInt32(1))
            wait_for(lambda: c.manager("Sessions") == 2)  # nobody on this bus is who was on the other
            # A second one on another socket does not get the name, and says so.
            other = os.path.join(folder, "other")
            os.mkdir(other)
            with SystemDaemon(llmd, other, broker, model=model) as e, e.connect() as f:
                wait_log(e, "does not give out|is another process's")
                assert f.manager("State") == "ready"
            second.close()
    finally:
        broker.stop()


@test
def leaves_when_idle(folder, model):
    broker = Broker(folder)
    try:
        came = False
        while not came:
            with SystemDaemon(llmd, folder, broker, "--idle-timeout", "1", model=model) as d:
                with contextlib.suppress(dbus.DBusException):  # it has left before we came: once more
                    with d.connect() as c:
                        c.create()
                        came = True
                assert d.process.wait(PATIENCE) == 0
                assert "leaving" in d.log() and not os.path.exists(d.socket)
    finally:
        broker.stop()


@test
def without_a_model(folder, model):
    notify = Notify(folder)
    env = notify.env(XDG_DATA_HOME=folder)
    config = f"[Model]\nFolder={folder}/models\n"
    with SystemDaemon(llmd, folder, None, "--no-bus", "--model", "absent", config=config, env=env) as d, d.connect() as c:
        heard = notify.until("READY=1")
        assert any(h.startswith("STATUS=No model: there is no model 'absent'") for h in heard), heard
        assert c.manager("State") == "degraded" and c.manager("Model") == ""
        assert error_of(c.create)[0] == "ModelNotReady"
        assert d.said().startswith("<3>there is no model 'absent'; see llmctl model list")


@test
def models_come_and_are_exchanged(folder, model):
    config = f"[Model]\nFolder={folder}/models\n[Daemon]\nContext=64\n"
    os.mkdir(f"{folder}/models")
    shutil.copy(model, f"{folder}/models/one.llmd")
    notify = Notify(folder)

    def install(c, name):
        with open(model, "rb") as f:
            c.manage("InstallModel", "hsa{sv}", dbus.types.UnixFd(f.fileno()), name, options_of())
        wait_for(lambda: [m[1] for m in c.manage("ListModels", "a{sv}", options_of()) if m[0] == name][0] != "installing")

    with SystemDaemon(llmd, folder, None, "--no-bus", config=config, env=notify.env()) as d, d.connect() as c:
        notify.until("READY=1")
        assert c.manager("Model") == "one"
        install(c, "two")
        s = c.create()
        c.manage("SetDefaultModel", "sa{sv}", "two", options_of())
        wait_log(d, "two is opened; it is served when the sessions of one are closed")
        assert c.manager("Model") == "one" and c.manager("DefaultModel") == "two"
        assert s.run(prompt="a", max_tokens=dbus.UInt32(1))
        s.call("Close")
        wait_for(lambda: c.manager("Model") == "two")
        assert c.create().run(prompt="a", max_tokens=dbus.UInt32(1))
        assert error_of(c.manage, "SetDefaultModel", "sa{sv}", "none", options_of())[0] == "NoSuchModel"
    with SystemDaemon(llmd, folder, None, "--no-bus", config=config, env=notify.env()) as d, d.connect() as c:
        assert c.manager("Model") == "two"  # kept
        # One that cannot be opened leaves what is there.
        shutil.copy(model, f"{folder}/models/three.llmd")
        with open(f"{folder}/models/three.llmd", "r+b") as f:
            f.truncate(os.path.getsize(model) // 2)
        os.kill(d.process.pid, signal.SIGHUP)
        notify.until("RELOADING=1")
        notify.until("READY=1")
        assert error_of(c.manage, "SetDefaultModel", "sa{sv}", "three", options_of())[0] == "NoSuchModel"
        shutil.copy(model, f"{folder}/models/four.llmd")
        os.kill(d.process.pid, signal.SIGHUP)
        notify.until("RELOADING=1")
        notify.until("READY=1")
        os.unlink(f"{folder}/models/four.llmd")  # after it was listed
        c.manage("SetDefaultModel", "sa{sv}", "four", options_of())
        wait_for(lambda: c.manager("State") == "degraded")
        assert c.manager("Model") == "two" and "four.llmd: cannot open" in d.log(), d.log()
        assert c.create().run(prompt="a", max_tokens=dbus.UInt32(1))
        c.manage("SetDefaultModel", "sa{sv}", "two", options_of())
        assert c.manager("State") == "ready"
        assert c.create().run(prompt="a", max_tokens=dbus.UInt32(1)) and c.manager("Model") == "two"


@test
def ends_while_files_wait(folder, model):
    """Files that will never be read or written to their end do not keep the daemon, nor break its end."""
    for name in "Restore", "Save":
        read, write = os.pipe()
        os.set_blocking(write, False)
        with contextlib.suppress(BlockingIOError):
            while name == "Save":
                os.write(write, bytes(65536))
        os.set_blocking(write, True)
        with Daemon(llmd, model, f"{folder}/{name}.sock") as d, RawBus(d.socket) as c:
            session, = c.call(ROOT, MANAGER, "CreateSession", "a{sv}", [])
            serial = c.start(session, SESSION, name, "h", write if name == "Save" else read)
            wait_for(lambda: has_thread(d.process.pid, "llmd-file"))
            assert d.stop() == 0, d.log()
            try:
                c.reply(serial)
                raise AssertionError("it was answered")
            except BusError as e:
                assert e.name == ERROR + "ShuttingDown", e
        os.close(read)
        os.close(write)


@test
def questions_have_a_limit(folder, model):
    """polkit that does not answer one user: calls that wait are only so many, and others are asked about."""
    if os.geteuid() != 0:
        return "root only: another user"
    os.chmod(folder, 0o755)

    class PolkitBroker(Broker):
        CONFIG = Broker.CONFIG.replace("<policy user", "<policy context='default'>"
                                       "<allow own='org.freedesktop.PolicyKit1'/>"
                                       "<allow send_destination='org.freedesktop.PolicyKit1'/></policy><policy user", 1)

    with PolkitBroker(folder) as broker, RawBus(broker.path, broker=True) as polkit:
        polkit.call("/org/freedesktop/DBus", "org.freedesktop.DBus", "RequestName", "su", "org.freedesktop.PolicyKit1",
                    0, destination="org.freedesktop.DBus")
        with SystemDaemon(llmd, folder, broker, model=model) as d:
            d.wait_named()

            def asks(m):
                return m.member == "CheckAuthorization" and m.body[1]

            def flood(child):
                with RawBus(d.socket) as c:
                    serials = [c.start(ROOT, MANAGER, "SetDefaultModel", "sa{sv}", "model", []) for _ in range(129)]
                    try:
                        c.reply(serials[-1])
                        raise AssertionError("answered")
                    except BusError as e:
                        assert e.name == ERROR + "QuotaExceeded" and "wait to be allowed" in e.text, e
                    assert not c.others, c.others
                    child.say("waits")
                    child.words.readline()

            def other(_):
                with RawBus(d.socket) as c:
                    c.call(ROOT, MANAGER, "CreateSession", "a{sv}", [])

            for _ in range(2):  # places are free again when who waited has gone
                first = Child(65534, flood)
                assert first.hear() == "waits"
                second = Child(65533, other)
                asked = polkit.wait_for(lambda m: asks(m) == "org.llmd.Llm1.use")
                polkit.send(*encode(RETURN, 1000, {DESTINATION: asked.sender, REPLY_SERIAL: asked.serial}, "(bba{ss})",
                                    [(True, False, [])]))
                second.join()
                assert len([m for m in polkit.pending() if asks(m)]) == 8
                first.kill()
                with d.connect() as c:
                    wait_for(lambda: c.manage("GetStatistics")["clients"] == 1)  # it knows that the first has gone
            assert d.stop() == 0


def silent_connection(d):
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(PATIENCE)
    s.connect(d.socket)
    return s


@test
def silent_peers(folder, model):
    """One uid fills its own places; those who never speak are thrown out."""
    config = "[Limits]\nMaxConnections=5\n"
    with SystemDaemon(llmd, folder, None, "--no-bus", model=model, config=config) as d:
        silent = [silent_connection(d) for _ in range(5)]
        for s in silent:
            assert s.recv(1) == b""  # after the time for a handshake
            s.close()
        assert "refused a connection" not in d.log()
        held = [d.connect() for _ in range(5)]
        for c in held:
            assert c.manager("State") == "ready"
        start = time.monotonic()
        for _ in range(51):
            with silent_connection(d) as s:
                assert s.recv(1) == b""
        wait_log(d, "refused a connection of user .*MaxConnections")
        # And no more lines than five in ten seconds, whenever these begin.
        n = d.log().count("refused a connection")
        assert 5 <= n <= 5 * (1 + (time.monotonic() - start) // 10), d.log()
        for c in held:
            assert c.manager("State") == "ready"
            c.close()


@test
def one_uid_does_not_fill_the_daemon(folder, model):
    """All places are taken by silent connections of one uid; another's gets in."""
    if os.geteuid() != 0:
        return "root only: another user"
    os.chmod(folder, 0o755)
    config = "[Daemon]\nMaxConnections=4\n"
    with SystemDaemon(llmd, folder, None, "--no-bus", model=model, config=config) as d:
        def other(child):
            with d.connect() as c:
                child.say(str(c.manager("State")))
                child.words.readline()

        gone = None
        while gone is None:
            start = time.monotonic()
            silent = [silent_connection(d) for _ in range(4)]
            child = Child(65534, other)
            assert child.hear() == "ready"
            gone = [s for s in silent if select.select([s], [], [], 0)[0]]
            if time.monotonic() - start >= 5:  # the time for a handshake was over: once more
                child.kill()
                gone = None
        assert gone == silent[:1], gone  # the oldest made place
        # But nobody takes a place from who has less.
        for s in silent:
            s.close()
        held = [admitted(d) for _ in range(3)]
        with silent_connection(d) as more:
            assert more.recv(1) == b""
        wait_log(d, "all connections of the daemon are in use")
        for c in held:
            c.close()
        child.kill()


def admitted(d):
    """A client, once the daemon has seen others leave."""
    while True:
        c = d.connect()
        with contextlib.suppress(dbus.DBusException):
            c.manager("State")
            return c


def main():
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        model = os.path.join(top, "model.llmd")
        subprocess.run([make_model, model], check=True)
        only = os.environ.get("ONLY")
        for t in tests:
            if only and t.__name__ != only:
                continue
            folder = os.path.join(top, t.__name__)
            os.mkdir(folder)
            skipped = t(folder, model)
            print(t.__name__, "left out: " + skipped if skipped else "", flush=True)


main()
