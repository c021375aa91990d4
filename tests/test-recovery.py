# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""test-recovery.py LLMD MODEL MAKE_CHAT_MODEL: sessions and requests outlive the daemon's process, under a service manager that keeps
descriptors. Whatever is said here is compared with what an undisturbed daemon said."""
import array
import contextlib
import fcntl
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time

try:
    from kept_daemon import Client, Load, Manager, last_record, read_all, variants, what_was_said
    from daemon_client import ERROR, MANAGER, PATIENCE, ROOT, SESSION
    from raw_bus import BusError
except ImportError as e:
    print(f"skipped: {e} (python3-dbus)")
    sys.exit(77)

llmd, model, make_model = (os.path.abspath(p) for p in sys.argv[1:4])
tests = []
QUESTION = {"prompt": "Tell me about the sea.", "seed": 7, "temperature": 1.0, "ignore_end": True}
PAGE = 65536  # KEPT_ALIGN


def test(f):
    tests.append(f)
    return f


@contextlib.contextmanager
def managed(*options, **kw):
    with tempfile.TemporaryDirectory() as folder, Manager(llmd, folder, kw.pop("model", model), *options, **kw) as m:
        yield m


def first_bytes(stream, n):
    """Waits for at least n bytes; takes no more than there are."""
    out = b""
    while len(out) < n:
        got = stream.recv(n - len(out))
        assert got, "the stream has ended"
        out += got
    return out


def until(condition, what):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def flip(fd, at, n=1):
    """Damages what the manager holds."""
    old = os.pread(fd, n, at)
    os.pwrite(fd, bytes(b ^ 0x40 for b in old), at)


def is_record(fd):
    return os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")


def record_of(manager, name):
    return next(fd for fd in manager.held(name) if is_record(fd))


def undisturbed(manager, **options):
    with Client(manager) as c:
        s = c.create()
        said = [what_was_said(s.run(**options)), what_was_said(s.run(**dict(options, prompt="Go on.")))]
        s.close()
    return said


@test
def load_of_eight():
    """Eight clients, a dozen kills at any moment."""
    seed = int.from_bytes(os.urandom(2), "little")
    moments = random.Random(seed)
    with managed() as m:
        with Load(m, 8, seed, tokens=40) as load:
            for _ in range(14):
                time.sleep(moments.uniform(0.01, 0.3))
                m.restart()
            answers = load.n_answers
            until(lambda: load.n_answers > answers + 8 or load.deviations, "no answers")
        assert not load.deviations, (seed, load.deviations)
        assert load.n_answers > 16
        m.settle()
        until(lambda: m.names() == ["instance", "kv"], "things are kept that nobody has")
        assert " lost" not in m.log().replace("0 sessions lost", ""), m.log()


@test
def one_answer_of_many_processes():
    """One answer, the daemon killed again and again during it; and the session goes on."""
    with managed() as m:
        for extra in ({}, {"format": "text"}, {"logprobs": True, "top_logprobs": 3}, {"stop": None}):
            options = {k: v for k, v in dict(QUESTION, max_tokens=24, **extra).items() if v is not None}
            expected = undisturbed(m, **options)
            with Client(m) as c:
                s = c.create()
                stream, _ = s.generate(**options)
                out = b""
                with stream:
                    while len(out) < len(expected[0]):
                        got = stream.recv(max(1, len(expected[0]) // 5))
                        if not got:
                            break
                        out += got
                        m.restart()
                assert out == expected[0], (out, expected[0])
                assert what_was_said(s.run(**dict(options, prompt="Go on."))) == expected[1]
                s.close()


@test
def instance_stays():
    with managed() as m, Client(m) as c:
        first = c.manager_property("Instance")
        assert re.fullmatch("[0-9a-f]{32}", first)
        s = c.create(label="mine", context=512)
        s.run(**dict(QUESTION, max_tokens=3))
        before = [s.get(p) for p in ("ContextUsed", "ContextMax", "Label", "Owner", "Class", "CreatedUSec")]
        m.restart()
        assert c.manager_property("Instance") == first
        assert [s.get(p) for p in ("ContextUsed", "ContextMax", "Label", "Owner", "Class", "CreatedUSec")] == before
        assert s.get("State") == "idle" and c.n_connects == 2
        with m.lock:
            m.drop(lambda name, _: name != "llmd")  # as after a stop
        m.kill()
        with m.lock:
            m.drop(lambda *_: True)
        m.begin()
        c.paths.clear()
        assert c.manager_property("Instance") != first


@test
def waiting_and_reading():
    """Killed while one request is read and others wait for it."""
    # All of the pool for one; the others queue.
    long = " ".join(f"word{i}" for i in range(300))
    options = dict(QUESTION, prompt=long, max_tokens=6)
    with managed() as m:
        expected = undisturbed(m, **options)
        assert b'"type":"error"' not in b"".join(expected), expected
        with Client(m) as c:
            sessions = [c.create() for _ in range(4)]
            streams = [s.generate(**options)[0] for s in sessions]
            for _ in range(4):
                m.restart()
            assert [what_was_said(read_all(stream)) for stream in streams] == [expected[0]] * 4
            assert [what_was_said(s.run(**dict(options, prompt="Go on."))) for s in sessions] == [expected[1]] * 4
            # Append too is gone on with.
            a, b = c.create(), c.create()
            fd, _ = b.call("Append", "a{sv}", variants({"prompt": long}))
            m.restart()
            with os.fdopen(fd, "rb") as f:
                out = f.read()
                assert last_record(out) == {"type": "end", "reason": "appended"}, out
            fd, _ = a.call("Append", "a{sv}", variants({"prompt": long}))
            with os.fdopen(fd, "rb") as f:
                f.read()
            assert a.get("ContextUsed") == b.get("ContextUsed") > 300


@test
def slow_readers():
    """What waits in the log for its reader, and in the socket, comes once and whole, however often the daemon ends."""
    options = dict(QUESTION, max_tokens=1200, logprobs=True, top_logprobs=20)
    with managed() as m, Client(m) as c:
        s = c.create()
        expected = what_was_said(s.run(**options))
        s.close()
        s = c.create()
        stream, _ = s.generate(**options)
        s.wait_state("paused")
        out = b""
        for _ in range(3):
            m.restart()
            s.wait_state("paused")
            out += first_bytes(stream, 100001)
        assert what_was_said(out + read_all(stream)) == expected
        s.wait_state("idle")


@test
def forks_rewinds_and_others():
    with managed() as m, Client(m) as c:
        options = dict(QUESTION, max_tokens=8)
        s = c.create()
        s.run(**options)
        path, = s.call("Fork", "a{sv}", {})
        c.paths.add(path)
        fork = type(s)(c, path)
        expected = what_was_said(s.run(**dict(options, prompt="And then?")))
        used = s.get("ContextUsed")
        m.restart()
        assert what_was_said(fork.run(**dict(options, prompt="And then?"))) == expected
        s.call("Rewind", "u", 5)
        m.restart()
        assert s.get("ContextUsed") == 5 and fork.get("ContextUsed") == used
        s.close()
        m.settle()
        m.restart()
        with contextlib.suppress(BusError):
            s.get("State")
            raise AssertionError("a closed session came back")
        saved = os.memfd_create("saved")
        fork.call("Save", "h", saved)
        other = c.create()
        os.lseek(saved, 0, os.SEEK_SET)
        other.call("Restore", "h", saved)
        os.close(saved)
        m.restart()
        assert other.get("ContextUsed") == used
        assert what_was_said(other.run(**options)) == what_was_said(fork.run(**options))


@test
def who_went_meanwhile():
    """A stream whose reader goes while there is no daemon is a request cancelled."""
    with managed() as m, Client(m) as c:
        s = c.create()
        s.run(**dict(QUESTION, max_tokens=4))
        used = s.get("ContextUsed")
        stream, number = s.generate(**dict(QUESTION, max_tokens=1000))
        first_bytes(stream, 10)
        m.kill()
        stream.close()
        m.wait_held(f"request-{number}", 1)
        m.begin()
        assert (s.get("State"), s.get("ContextUsed")) == ("idle", used)
        m.settle()
        assert f"request-{number}" not in m.names()


def len_readable(sock):
    n = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), termios.FIONREAD, n)
    return n[0]


def introspection_bytes(client):
    """Of a reply on the wire."""
    serial = client.bus.start(ROOT, "org.freedesktop.DBus.Introspectable", "Introspect")
    while not client.bus.complete():
        client.bus.fill()
    n = len(client.bus.data)
    client.bus.reply(serial)
    return n


def stored_requests(m):
    return [name for name in m.names() if name.startswith("request-")]


@test
def a_reply_that_was_not_sent():
    """The client asks again, so nothing may be left of the first time."""
    with managed() as m, Client(m) as c, Client(m) as other:
        s = c.create()
        s.run(**dict(QUESTION, max_tokens=4))
        used = s.get("ContextUsed")
        until(lambda: not stored_requests(m), "the first request is not forgotten")
        # Replies fill the socket, which nobody reads; sd-bus then has the rest.
        sent = 0
        while sent == len_readable(c.bus.socket):
            sent += 20 * introspection_bytes(other)
            for _ in range(20):
                c.bus.start(ROOT, "org.freedesktop.DBus.Introspectable", "Introspect")
            for _ in range(50):  # each time round the daemon takes one of the others, if there is one
                other.manager_property("Instance")
        c.bus.start(s.path, SESSION, "Generate", "a{sv}", variants(dict(QUESTION, max_tokens=2)))
        until(lambda: stored_requests(m), "the request does not begin")
        until(lambda: type(s)(other, s.path).get("State") == "idle", "it does not end")
        assert type(s)(other, s.path).get("ContextUsed") > used
        m.restart()
        assert type(s)(other, s.path).get("ContextUsed") == used
        m.settle()
        assert not stored_requests(m)


def lost_stream(said):
    r = last_record(said)
    assert (r["type"], r.get("name")) == ("error", ERROR + "SessionLost"), r
    return r["message"]


@test
def damage_takes_one_session():
    """Of each part of a record, one byte."""
    options = dict(QUESTION, max_tokens=1000, logprobs=True, top_logprobs=20)
    # Session: head, tokens; request: head, tokens sampled.
    for which, at in ("session", 24), ("session", PAGE + 4096 + 9), ("request", 40), ("request", PAGE + 5):
        with managed() as m, Client(m) as c:
            good, bad, idle = c.create(), c.create(), c.create()
            idle.run(**dict(QUESTION, max_tokens=4))
            used = idle.get("ContextUsed")
            streams = [s.generate(**options) for s in (good, bad)]
            for s in good, bad:
                s.wait_state("paused")
            m.kill()
            flip(record_of(m, f"session-{bad.id}" if which == "session" else f"request-{streams[1][1]}"), at)
            c.paths.discard(bad.path)
            m.begin()
            out = read_all(streams[1][0])
            assert b'"type":"end"' not in out and lost_stream(out)
            assert last_record(read_all(streams[0][0]))["type"] == "end"
            assert idle.get("ContextUsed") == used
            log = m.log()
            if which == "session":
                assert f"session {bad.id} is lost with the restart: " in log, log
                try:
                    bad.get("State")
                    raise AssertionError("it is there")
                except BusError as e:
                    assert e.name == ERROR + "NoSuchSession", e
            else:
                assert f"request {streams[1][1]} is lost with the restart: " in log, log
                assert (bad.get("State"), bad.get("ContextUsed")) == ("idle", 0)
            m.settle()
            assert not [name for name in m.names() if name.startswith("request-")]
            assert (f"session-{bad.id}" in m.names()) == (which == "request")


@test
def another_model():
    with tempfile.TemporaryDirectory() as folder:
        other = os.path.join(folder, "other.llmd")
        subprocess.run([make_model, other], check=True)
        with managed() as m, Client(m) as c:
            first = c.manager_property("Instance")
            s = c.create()
            s.run(**dict(QUESTION, max_tokens=4))
            stream, _ = s.generate(**dict(QUESTION, max_tokens=1000, logprobs=True, top_logprobs=20))
            s.wait_state("paused")
            m.kill()
            m.model = other
            c.paths.clear()
            m.begin()
            lost_stream(read_all(stream))
            assert f"session {s.id} is lost with the restart: the session is of another model" in m.log(), m.log()
            assert c.manager_property("Instance") != first
            m.settle()
            assert m.names() == ["instance", "kv"], m.names()


@test
def no_model():
    with managed() as m, Client(m) as c:
        s = c.create()
        stream, _ = s.generate(**dict(QUESTION, max_tokens=1000, logprobs=True, top_logprobs=20))
        s.wait_state("paused")
        m.kill()
        m.model = "/nonexistent.llmd"
        c.paths.clear()
        m.begin()
        lost_stream(read_all(stream))
        assert c.manager_property("State") == "degraded"
        m.settle()
        assert m.names() == ["instance"], m.names()


@test
def another_kv_type():
    """The pool does not fit; the tokens do, and are computed again."""
    with managed("--kv", "f32") as m, Client(m) as c:
        s = c.create()
        s.run(**dict(QUESTION, max_tokens=20))
        used = s.get("ContextUsed")
        stream, _ = s.generate(**dict(QUESTION, prompt="And?", max_tokens=1000, logprobs=True, top_logprobs=20))
        s.wait_state("paused")
        m.kill()
        m.options = ("--kv", "f16")
        m.begin()
        assert last_record(read_all(stream)) == {"type": "end", "reason": "length"}
        assert s.get("ContextUsed") > used
        m.settle()
        assert m.names().count("kv") == 1


# struct page of daemon/request-record.c
HEAD = struct.Struct("=16sIIQQQQQQQIIIIQQ")


def set_working(fd):
    """As if the process had died at work on it."""
    assert os.pread(fd, 15, 0) == b"llmd-kept-reqst"
    os.pwrite(fd, struct.pack("=I", 1), HEAD.size + 8)


@test
def who_dies_of_a_request_gives_it_up():
    with managed() as m, Client(m) as c:
        s, other = c.create(), c.create()
        s.run(**dict(QUESTION, max_tokens=4))
        used = s.get("ContextUsed")
        options = dict(QUESTION, max_tokens=1000, logprobs=True, top_logprobs=20)
        stream, number = s.generate(**options)
        innocent, _ = other.generate(**options)
        for x in s, other:
            x.wait_state("paused")
        for i in range(16):
            m.kill()
            set_working(record_of(m, f"request-{number}"))
            m.begin()
            other.wait_state("paused")
            s.wait_state("paused" if i < 15 else "idle")
        assert "several times" in lost_stream(read_all(stream))
        assert f"request {number} is lost with the restart: " in m.log()
        assert s.get("ContextUsed") == used
        assert last_record(read_all(innocent)) == {"type": "end", "reason": "length"}


@test
def what_is_closed_stays_closed():
    """Even if the manager did not hear of it: its socket was full."""
    with managed() as m, Client(m) as c:
        kept, closed = c.create(label="kept"), c.create(label="closed")
        kept.run(**dict(QUESTION, max_tokens=4))
        closed.run(**dict(QUESTION, max_tokens=4))
        m.settle()
        m.deaf = True
        closed.close()
        m.kill()
        assert len([name for name in m.names() if name.startswith("session-")]) == 2
        m.deaf = False
        m.begin()
        assert kept.get("Label") == "kept"
        try:
            closed.get("Label")
            raise AssertionError("a closed session is there again")
        except BusError as e:
            assert "Unknown" in e.name or "NoSuch" in e.name, e.name
        m.settle()
        assert len([name for name in m.names() if name.startswith("session-")]) == 1, m.names()
        assert " 0 sessions lost" in m.log(), m.log()


@test
def numbers_are_given_once():
    """A call that is repeated after a restart shall not meet another's session: that of the number of a closed one."""
    for keeps in True, False:
        with managed() as m, Client(m) as c:
            kept = [c.create()] if keeps else []
            closed = c.create()
            _, number = closed.generate(**dict(QUESTION, max_tokens=2))
            closed.close()
            m.restart()
            s = c.create()
            assert s.id > closed.id, (s.id, closed.id)
            stream, again = s.generate(**dict(QUESTION, max_tokens=2))
            read_all(stream)
            assert again > number, (again, number)
            path, = s.call("Fork", "a{sv}", {})
            m.restart()
            assert c.create().id > int(path.rsplit("/", 1)[1])
            del kept


def with_an_unread_end(m, c):
    """A session whose request is over, while the end of its stream does not fit into the socket: the stream; the number; what was asked."""
    for n in range(80, 1000, 20):  # a token's record is some 1.5 KiB, and a request stays paused with 64 KiB unsent
        options = dict(QUESTION, max_tokens=n, logprobs=True, top_logprobs=20)
        s = c.create()
        stream, number = s.generate(**options)
        s.wait_state("idle")  # it may have paused before: until the loop had sent what it could
        m.settle()
        if f"request-{number}" in m.names():
            return s, stream, number, options
        stream.close()
        s.close()
    raise AssertionError("sockets take everything")


@test
def closed_before_the_end_was_read():
    """The answer was complete, and stays so: there is no error behind its end, and it is not cut."""
    for then in "restart", "no model":
        with managed() as m, Client(m) as c:
            s, stream, number, options = with_an_unread_end(m, c)
            other = c.create()
            expected = what_was_said(other.run(**options))
            if then == "restart":
                s.close()
                m.restart()
            else:
                m.kill()
                m.model = "/nonexistent.llmd"
                c.paths.clear()
                m.begin()
            assert what_was_said(read_all(stream)) == expected
            c.manager_property("Instance")  # it is done with the stream
            m.settle()
            assert f"request-{number}" not in m.names()
            assert f"request {number} is lost" not in m.log()


def word_at(fd, at):
    return struct.unpack("=I", os.pread(fd, 4, at))[0]


@test
def closed_while_it_ran():
    """Close, and a kill before its request has heard of it: the stream ends as it would have."""
    with managed() as m, Client(m) as c:
        for heard in False, True:
            s, other = c.create(), c.create()
            stream, number = s.generate(**dict(QUESTION, max_tokens=1200, logprobs=True, top_logprobs=20))
            s.wait_state("paused")
            if heard:
                s.close()
                c.manager_property("Instance")
            m.kill()
            if not heard:
                os.pwrite(record_of(m, f"request-{number}"), struct.pack("=I", 3), HEAD.size)  # JOB_CLOSED
                with m.lock:
                    m.drop(lambda name, _, gone=f"session-{s.id}": name == gone)
                c.paths.discard(s.path)
            m.begin()
            assert last_record(read_all(stream)) == {"type": "end", "reason": "closed"}
            assert f"request {number} is lost" not in m.log()
            other.close()


@test
def a_stream_ends_though_the_manager_has_it_too():
    """And does not hear that it is to forget it."""
    with managed() as m, Client(m) as c:
        s = c.create()
        m.settle()
        m.deaf = True
        stream, number = s.generate(**dict(QUESTION, max_tokens=4))
        stream.settimeout(PATIENCE)
        assert last_record(read_all(stream))["type"] == "end"
        m.settle()
        m.wait_held(f"request-{number}", 1)  # the socket has hung up for the manager, too
        used = s.get("ContextUsed")
        m.kill()
        m.deaf = False
        m.begin()
        assert s.get("ContextUsed") == used
        m.settle()
        assert f"request-{number}" not in m.names()


@test
def who_holds_the_stream_had_the_reply():
    """Killed between the reply and the note of it: the next process makes up for it, so an end that comes later is one."""
    with managed() as m, Client(m) as c:
        s = c.create()
        stream, number = s.generate(**dict(QUESTION, max_tokens=1200, logprobs=True, top_logprobs=20))
        s.wait_state("paused")
        m.kill()
        record = record_of(m, f"request-{number}")
        assert word_at(record, HEAD.size + 4) == 1
        os.pwrite(record, struct.pack("=I", 0), HEAD.size + 4)
        m.begin()
        s.wait_state("paused")
        assert word_at(record, HEAD.size + 4) == 1
        stream.close()


def build_id_at(path):
    """Where the note's 20 bytes lie in a program, by its name and type."""
    with open(path, "rb") as f:
        data = f.read()
    at = data.find(struct.pack("<III4s", 4, 20, 3, b"GNU\0"))
    return at + 16 if at >= 0 else None


@test
def another_build():
    """Its kernels may round otherwise: tokens stay, K and V do not."""
    at = build_id_at(llmd)
    assert at, "llmd has no build id"
    for changed in False, True:
        with managed() as m, Client(m) as c:
            s = c.create()
            s.run(**dict(QUESTION, max_tokens=8))
            used = s.get("ContextUsed")
            m.kill()
            if changed:
                m.llmd = os.path.join(m.folder, "another-llmd")
                shutil.copy(llmd, m.llmd)
                with open(m.llmd, "r+b") as f:
                    f.seek(at)
                    f.write(bytes(20))
            m.begin()
            assert s.get("ContextUsed") == used
            assert (s.get("KvBytes") == 0) == changed, s.get("KvBytes")
            assert last_record(s.run(**dict(QUESTION, prompt="Go on.", max_tokens=4)))["type"] == "end"
            m.settle()
            assert m.names().count("kv") == 1


@test
def an_orderly_end_leaves_nothing():
    with managed() as m, Client(m) as c:
        s = c.create(linger=True) if os.geteuid() == 0 else c.create()
        stream, _ = s.generate(**dict(QUESTION, max_tokens=1000, logprobs=True, top_logprobs=20))
        s.wait_state("paused")
        reader = threading.Thread(target=lambda: read_all(stream))
        m.process.send_signal(signal.SIGTERM)
        reader.start()
        assert m.process.wait(PATIENCE) == 0
        reader.join()
        m.settle()
        assert m.names() == [], m.names()


def main():
    names = sys.argv[4:]
    for t in tests:
        if not names or t.__name__ in names:
            print(t.__name__, end=" ", flush=True)
            start = time.monotonic()
            t()
            print(f"ok {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
