#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""The real daemon on a socket, by its bus interface.

  test-daemon.py LLMD MAKE_CHAT_MODEL IPC_FOLDER [TEST...]

One function a test, named; each has a daemon of its own in a temporary folder. Nothing here is decided by time.
"""
import json
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
import xml.etree.ElementTree as ET

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
try:
    import dbus
    from daemon_client import (Client, Daemon, ERROR, MANAGER, MODEL, PATIENCE, ROOT, SESSION, error_of, make_endless_model,
                               read_all, until)
except ImportError as e:
    print(f"skipped: {e} (python3-dbus)")
    sys.exit(77)

LLMD, MAKE_MODEL, IPC = sys.argv[1:4]
# Never ends by itself within the context, and is more than all buffers hold: as long as nobody reads, it runs.
LONG = {"ignore-end": True, "top-logprobs": dbus.UInt32(64), "seed": dbus.UInt64(1), "temperature": 1.0}
CONTEXT = 8192  # of the test model; one byte of text is one token

tests = []
folder = tempfile.mkdtemp(prefix="llmd-test-")
model = os.path.join(folder, "chat.llmd")
endless_model = os.path.join(folder, "endless.llmd")


def test(f):
    tests.append(f)
    return f


def daemon(*options, **kw):
    return Daemon(LLMD, kw.pop("model", model), os.path.join(folder, "test.sock"), *options, **kw)


def memfd(data):
    fd = os.memfd_create("test")
    os.write(fd, data)
    return fd


# ---- what is served ----


def described(interface):
    """An interface element as comparable data."""
    def args(e):
        return [(a.get("name"), a.get("type"), a.get("direction", "in")) for a in e.findall("arg")]

    def notes(e):
        return sorted((a.get("name"), a.get("value")) for a in e.findall("annotation"))

    return sorted((e.tag, e.get("name"), args(e), e.get("type"), e.get("access"), notes(e)) for e in interface
                  if e.tag in ("method", "signal", "property"))


def managed(c):
    return c.call(ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")


def from_xml(name):
    return described(ET.parse(os.path.join(IPC, name + ".xml")).getroot().find(f"interface[@name='{name}']"))


@test
def introspection_equals_xml():
    with daemon() as d, d.connect() as c:
        s = c.create()
        here = [(ROOT, MANAGER), (s.path, SESSION)]
        here += [(path, MODEL) for path in managed(c) if path.startswith(ROOT + "/model/")]
        for path, name in here:
            root = ET.fromstring(c.call(path, "org.freedesktop.DBus.Introspectable", "Introspect"))
            served = [i for i in root.findall("interface") if i.get("name").startswith("org.llmd.")]
            assert [i.get("name") for i in served] == [name], (path, served)
            assert described(served[0]) == from_xml(name), (described(served[0]), from_xml(name))


@test
def properties():
    with daemon("--context", "100") as d, d.connect() as c:
        assert re.fullmatch(r"\d+\.\d+\.\d+", c.manager("Version"))
        assert c.manager("State") == "ready"
        assert c.manager("DefaultModel") == "chat"
        assert len(c.manager("Backends")) == 1 and c.manager("Backends")[0].startswith("cpu")
        assert c.manager("KvBytesUsed") == 0 < c.manager("KvBytesMax")
        assert c.manager("Sessions") == 0
        s = c.create()
        assert c.manager("Sessions") == 1
        assert s.get("Model") == "chat" and s.get("State") == "idle"
        assert s.get("ContextUsed") == 0 and s.get("ContextMax") == 100
        assert c.create(context=dbus.UInt32(50)).get("ContextMax") == 50
        _, (usage, end) = s.run(prompt="hello", max_tokens=dbus.UInt32(3), ignore_end=True)
        assert end == {"type": "end", "reason": "length"}
        assert usage["completion_tokens"] == 3 and usage["cached_tokens"] == 0
        # All that was given out counts, the last token as well, which no step has seen yet.
        assert s.get("ContextUsed") == usage["prompt_tokens"] + usage["completion_tokens"]
        assert c.manager("KvBytesUsed") > 0
        s.call("Close")
        assert error_of(s.get, "State")[0] == "NoSuchSession"
        assert c.manager("Sessions") == 1


# ---- answers ----


@test
def threads_keep_to_their_cores():
    if os.environ.get("LLMD_TEST_BACKEND"):
        return "skipped: a GPU's driver has threads of its own"
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        return "skipped: needs two processors"
    config = os.path.join(folder, "pin.conf")
    with open(config, "w") as f:
        f.write("[Engine]\nPinThreads=no\n")
    for options, pinned in (([], True), (["--config", config], False), (["--config", config, "--pin-threads", "yes"], True),
                            (["--pin-threads", "no"], False)):
        with daemon("--threads", str(len(cpus)), *options) as d, d.connect() as c:
            c.create().run(prompt="x", max_tokens=dbus.UInt32(2))
            found = {"engine": [], "others": []}
            for thread in os.listdir(f"/proc/{d.process.pid}/task"):
                with open(f"/proc/{d.process.pid}/task/{thread}/comm") as f:
                    part = "engine" if f.read().strip() in ("llmd-engine", "llmd-compute") else "others"
                found[part].append(sorted(os.sched_getaffinity(int(thread))))
            assert sorted(found["engine"]) == ([[n] for n in cpus] if pinned else [cpus] * len(cpus)), (options, found)
            assert found["others"] and all(x == cpus for x in found["others"]), (options, found)


@test
def same_seed_same_bytes():
    with daemon() as d, d.connect() as c:
        options = {"prompt": "hello", "ignore-end": True, "max-tokens": dbus.UInt32(60), "temperature": 1.0}
        alone = c.create().run(options, seed=dbus.UInt64(7))
        assert len(alone[0]) > 10
        assert c.create().run(options, seed=dbus.UInt64(7)) == alone
        assert c.create().run(options, seed=dbus.UInt64(8)) != alone
        assert c.create().run(options) != c.create().run(options), "the default seed must be random"
        # And among others that run at the same time.
        streams = [c.create().generate(options, seed=dbus.UInt64(i)) for i in range(4, 10)]
        together = [read_all(f) for f in streams]
        assert together[3] == alone
        for f in streams:
            f.close()


@test
def formats_and_prompts():
    with daemon() as d, d.connect() as c:
        options = {"ignore-end": True, "max-tokens": dbus.UInt32(20), "seed": dbus.UInt64(1)}
        text = c.create().run(options, prompt="hello")[0]
        with c.create().generate(options, prompt="hello", format="text") as f:
            assert f.read().decode() == text
        fd = memfd(b"hello")
        assert c.create().run(options, prompt_fd=dbus.types.UnixFd(fd))[0] == text
        os.close(fd)
        message = dbus.Array([("user", "hello")], signature="(ss)")
        assert c.create().run(options, messages=message)[0] == text
        system = dbus.Array([("system", "be brief")], signature="(ss)")
        assert c.create().run(options, messages=system, prompt="hello")[0] != text
        _, (usage, _) = c.create().run(options, prompt="hello", raw=True)
        assert usage["prompt_tokens"] == 1 + len("hello")
        fd = memfd(b"nul\0is_a_character\n")
        _, (usage, _) = c.create().run(options, prompt_fd=dbus.types.UnixFd(fd), raw=True)
        assert usage["prompt_tokens"] == 1 + 19
        os.close(fd)
        # The stop text is not given out, nor anything after it.
        cut = text[3:5]
        got, (_, end) = c.create().run(options, prompt="hello", stop=dbus.Array([cut], signature="s"))
        assert got == text[:text.index(cut)] and end["reason"] == "stop"


@test
def conversation():
    with daemon() as d, d.connect() as c:
        s = c.create()
        options = {"ignore-end": True, "max-tokens": dbus.UInt32(5), "seed": dbus.UInt64(1)}
        _, (first, _) = s.run(options, prompt="one")
        _, (second, _) = s.run(options, prompt="two")
        assert second["cached_tokens"] == first["prompt_tokens"] + first["completion_tokens"], (first, second)
        # The end of the answer's turn comes before the second question; the beginning of the text only once.
        assert second["prompt_tokens"] == first["prompt_tokens"] - 1 + 2
        # Raw text continues byte by byte.
        r = c.create()
        assert r.run(options, prompt="one", raw=True)[1][0]["prompt_tokens"] == 4
        assert r.run(options, prompt="two", raw=True)[1][0]["prompt_tokens"] == 3


@test
def logprobs():
    with daemon() as d, d.connect() as c:
        with c.create().generate(prompt="x", ignore_end=True, max_tokens=dbus.UInt32(5), temperature=0.0,
                                 top_logprobs=dbus.UInt32(3)) as f:
            deltas = [r for r in map(json.loads, f) if r["type"] == "delta"]
        assert len(deltas) == 5
        for r in deltas:
            assert [t["id"] for t in r["top"]][0] == r["id"], "greedy takes the most probable"
            assert r["top"][0]["logprob"] == r["logprob"] <= 0 and r["entropy"] > 0
            assert sorted(t["logprob"] for t in r["top"]) == [t["logprob"] for t in r["top"]][::-1]
        with c.create().generate(prompt="x", ignore_end=True, max_tokens=dbus.UInt32(1), logprobs=True) as f:
            assert "top" not in json.loads(f.readline())


# ---- refusals ----


def documented_options():
    """{method: {option: type}} of the tables of options in docs/dbus-api.md"""
    with open(os.path.join(os.path.dirname(IPC.rstrip("/")), "docs", "dbus-api.md")) as f:
        text = f.read()
    found = {}
    for section in re.split(r"^(?=`[A-Z])", text, flags=re.M):
        method = re.match(r"`(\w+)\(", section)
        table = re.search(r"^  \| option \| type \|.*\n((?:  \|.*\n)+)", section, re.M)
        if not method or not table:
            continue
        rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table[1].splitlines()[1:]]
        found[method[1]] = {name.strip("` "): kind for names, kinds in rows
                            for name, kind in zip(names.split(","), kinds.split(", "))}
    return found


@test
def options_are_checked():
    prompt = {"prompt": "s", "prompt-fd": "h", "messages": "a(ss)", "raw": "b"}
    types = {
        **prompt, "format": "s", "max-tokens": "u", "temperature": "d", "top-k": "u", "top-p": "d", "min-p": "d",
        "repetition-penalty": "d", "presence-penalty": "d", "frequency-penalty": "d", "penalty-last-n": "u", "seed": "t",
        "deterministic": "b",
        "stop": "as", "logit-bias": "a{ud}", "logprobs": "b", "top-logprobs": "u", "ignore-end": "b",
    }
    life = {"class": "s", "label": "s", "linger": "b"}
    quota = {"max-sessions": "u", "max-kv-bytes": "t", "max-queued": "u", "weight": "u", "tokens-per-minute": "u"}
    expected = {
        "CreateSession": {"model": "s", "context": "u", **life}, "ListSessions": {"all": "b"},
        "InstallModel": {"replace": "b", "default": "b"}, "Measure": {**prompt, "session": "o"},
        "Subscribe": {"all": "b"}, "Generate": types, "Fork": life,
    }
    assert documented_options() == expected, documented_options()
    fd = memfd(b"")
    calls = {name: (ROOT, MANAGER, name, "a{sv}") for name in ("CreateSession", "ListSessions", "ListModels", "Measure",
                                                              "Subscribe")}
    calls.update(SetDefaultModel=(ROOT, MANAGER, "SetDefaultModel", "sa{sv}", "x"),
                 InstallModel=(ROOT, MANAGER, "InstallModel", "hsa{sv}", dbus.types.UnixFd(fd), "x"),
                 RemoveModel=(ROOT, MANAGER, "RemoveModel", "sa{sv}", "x"),
                 SetQuota=(ROOT, MANAGER, "SetQuota", "ua{sv}", dbus.UInt32(1)))
    expected.update(ListModels={}, SetDefaultModel={}, RemoveModel={}, SetQuota=quota,
                    Append={**prompt, "format": "s", "deterministic": "b"})
    with daemon() as d, d.connect() as c:
        s = c.create()
        calls.update({name: (s.path, SESSION, name, "a{sv}") for name in ("Generate", "Append", "Fork")})
        assert set(calls) == set(expected)
        for method, call in calls.items():
            for name, kind in dict(expected[method], **{"no-such-option": None}).items():
                options = dbus.Dictionary({name: dbus.Byte(1)}, signature="sv")
                error, message = error_of(c.call, *call, options)
                assert error == "InvalidOption" and message.startswith(name + ":"), (method, error, message)
                assert kind is None or f"is {kind}" in message, (method, message)
        for options in ({"class": "urgent"}, {"label": "x" * 65}, {"label": "a\nb"}, {"label": "\x7f"}):
            error, message = error_of(c.create, **options)
            assert error == "InvalidOption" and message.startswith(*options), message
        for weight in (0, 10001):
            error, message = error_of(c.call, *calls["SetQuota"], {"weight": dbus.UInt32(weight)})
            assert error == "InvalidOption" and message.startswith("weight:"), message
    os.close(fd)
    bad = {
        "temperature": [-1.0, 0.001, 101.0, float("nan"), float("inf")], "top-p": [-0.1, 1.1], "min-p": [-0.1, 1.1],
        "repetition-penalty": [0.0, -1.0, 1e9], "presence-penalty": [-1e9, float("nan")], "frequency-penalty": [1e9],
        "top-logprobs": [dbus.UInt32(65)], "format": ["xml"],
        "stop": [dbus.Array([""], signature="s"), dbus.Array(["x" * 257], signature="s"),
                 dbus.Array(["x"] * 17, signature="s")],
        "logit-bias": [dbus.Dictionary({dbus.UInt32(1): float("nan")}, signature="ud"),
                       dbus.Dictionary({dbus.UInt32(i): 0.0 for i in range(1025)}, signature="ud")],
    }
    with daemon() as d, d.connect() as c:
        s = c.create()
        for name, values in bad.items():
            for value in values:
                error, message = error_of(s.generate, {"prompt": "x", name: value})
                assert error == "InvalidOption" and message.startswith(name + ":"), (name, value, message)
        error, message = error_of(c.create, context=dbus.UInt32(CONTEXT + 1))
        assert error == "InvalidOption" and "context" in message
        error, message = error_of(c.create, model="other")
        assert error == "NoSuchModel" and "other" in message and "chat" in message
        assert c.create(model="chat").get("Model") == c.create(model=model).get("Model") == "chat"
        error, message = error_of(s.generate, prompt="x", logit_bias=dbus.Dictionary({dbus.UInt32(5000): 1.0},
                                                                                     signature="ud"))
        assert error == "InvalidOption" and message.startswith("logit-bias:"), (error, message)
        assert s.run(prompt="x", max_tokens=dbus.UInt32(1))[1][1]["type"] == "end", "the session goes on"


@test
def prompts_are_checked():
    messages = lambda *m: dbus.Array(m, signature="(ss)")  # noqa: E731
    with daemon() as d, d.connect() as c:
        s = c.create()
        fd = memfd(b"x")
        assert error_of(s.generate)[0] == "InvalidPrompt"
        assert error_of(s.generate, prompt="x", prompt_fd=dbus.types.UnixFd(fd))[0] == "InvalidOption"
        assert error_of(s.generate, messages=messages(("user", "x")), raw=True)[0] == "InvalidOption"
        assert error_of(s.generate, messages=messages(("king", "x")))[0] == "InvalidPrompt"
        read, write = os.pipe()
        for other in (read, os.open(folder, os.O_RDONLY), os.open("/dev/zero", os.O_RDONLY)):
            assert error_of(s.generate, prompt_fd=dbus.types.UnixFd(other))[0] == "InvalidPrompt"
            os.close(other)
        os.close(write)
        os.ftruncate(fd, 9 << 20)
        assert error_of(s.generate, prompt_fd=dbus.types.UnixFd(fd))[0] == "PromptTooLong"
        os.close(fd)
        assert error_of(s.generate, prompt="x" * (9 << 20))[0] == "PromptTooLong"
        assert error_of(s.generate, messages=messages(("user", "x" * (5 << 20)), ("model", "x" * (5 << 20))))[0] == \
            "PromptTooLong"
        for wrong in (messages(("model", "x")), messages(("user", "x"), ("user", "y")), messages(("user", "x"),
                      ("system", "y"), ("user", "z"))):
            assert error_of(s.generate, messages=wrong)[0] == "InvalidPrompt"
        assert s.get("ContextUsed") == 0


@test
def context_full():
    with daemon() as d, d.connect() as c:
        s = c.create(context=dbus.UInt32(64))
        _, (end,) = s.run(prompt="x" * 100, raw=True)
        assert end["name"] == ERROR + "ContextFull" and end["requested"] == 101 and end["available"] == 64, end
        assert s.get("ContextUsed") == 0
        # Exactly full is allowed, and leaves room for one token that is not evaluated.
        _, (usage, end) = s.run(prompt="x" * 63, raw=True, ignore_end=True)
        assert end["reason"] == "length" and usage["completion_tokens"] == 1
        # Where the size alone says so, at once.
        error, message = error_of(s.generate, prompt="more", raw=True)
        assert error == "ContextFull" and "at least" in message and "room for 0" in message, (error, message)
        s = c.create(context=dbus.UInt32(64))
        _, (usage, end) = s.run(prompt="x", raw=True, ignore_end=True)
        assert end["reason"] == "length" and usage["prompt_tokens"] + usage["completion_tokens"] == 65


@test
def busy_and_quota():
    with daemon() as d, d.connect() as c:
        s = c.create()
        f = s.generate(LONG, prompt="x")
        assert error_of(s.generate, prompt="x")[0] == "Busy"
        assert s.get("State") != "idle"
        f.close()
        s.wait_idle()
        assert s.run(prompt="x", max_tokens=dbus.UInt32(1))[1][1]["type"] == "end"
        # All connections of a user count together.
        with d.connect() as other:
            held = [x.create() for x in ([c, other] * 32)[1:]]
            error, message = error_of(c.create)
            assert error == "QuotaExceeded" and "requested 1, available 0" in message and "64" in message, message
            assert error_of(other.create)[0] == "QuotaExceeded"
            held[0].call("Close")
            c.create()
        while c.manager("Sessions") != 33:  # those of the other connection are gone
            pass
        c.create()


@test
def absent_sessions():
    with daemon() as d, d.connect() as mine, d.connect() as other:
        s = mine.create()
        generate = ("Generate", "a{sv}", dbus.Dictionary({}, signature="sv"))
        for name in ("999", "0", "01", "-1", "x", "1/1", "18446744073709551617"):
            path = os.path.dirname(s.path) + "/" + name.replace("-", "_")
            for method in (("Close",), ("Cancel",), generate):
                error, message = error_of(mine.call, path, SESSION, *method)
                assert error == "NoSuchSession" and f"session {os.path.relpath(path, os.path.dirname(s.path))}:" in message, message
            assert error_of(mine.get, path, SESSION, "State")[0] == "NoSuchSession"
            assert error_of(mine.call, path, "org.freedesktop.DBus.Properties", "GetAll", "s", SESSION)[0] == \
                "NoSuchSession"
            assert error_of(mine.call, path, "org.freedesktop.DBus.Introspectable", "Introspect")[0] == "NoSuchSession"
        # The same user's other connections may use it.
        assert other.get(s.path, SESSION, "State") == "idle"
        assert error_of(mine.call, ROOT, MANAGER, "CreateSession", "s", "x")[0].endswith("InvalidArgs")
        assert error_of(mine.call, ROOT, MANAGER, "NoSuchMethod")[0].endswith("UnknownMethod")
        assert s.get("State") == "idle"


@test
def malformed_messages():
    with daemon() as d, d.connect() as c:
        hello = b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"
        good = bytes.fromhex("6c0100010000000001000000" "1f000000" "01016f000d0000002f6f72672f6c6c6d642f4c6c6d310000")
        for garbage in (b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", hello, hello + b"\xff" * 64, hello + b"l" + b"\xff" * 15,
                        hello + good, hello + good[:4] + b"\xff\xff\xff\x0f" + good[8:], os.urandom(4096)):
            for shut in (True, False):
                with socket.socket(socket.AF_UNIX) as raw:
                    raw.connect(d.socket)
                    try:
                        raw.sendall(garbage)
                        if shut:
                            raw.shutdown(socket.SHUT_WR)
                            while raw.recv(4096):
                                pass
                    except (BrokenPipeError, ConnectionResetError):
                        pass
        assert c.manager("State") == "ready"
        assert c.create().run(prompt="x", max_tokens=dbus.UInt32(1))[1][1]["type"] == "end"


@test
def other_users_are_refused():
    if os.getuid() != 0:
        return "only root can try this"
    with daemon() as d, d.connect() as c:
        os.chmod(folder, 0o711)
        os.chmod(d.socket, 0o666)  # so that only the daemon's own check is in the way
        child = os.fork()
        if child == 0:
            try:
                os.setgid(65534)
                os.setuid(65534)
                with socket.socket(socket.AF_UNIX) as raw:
                    raw.connect(d.socket)
                    raw.sendall(b"\0AUTH EXTERNAL " + b"65534".hex().encode() + b"\r\n")
                    os._exit(0 if raw.recv(100) == b"" else 1)
            except (BrokenPipeError, ConnectionResetError):
                os._exit(0)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert c.manager("State") == "ready"


# ---- ends ----


@test
def cancel_rolls_back():
    with daemon() as d, d.connect() as c:
        s = c.create()
        s.run(prompt="one", max_tokens=dbus.UInt32(5), ignore_end=True)
        used = s.get("ContextUsed")
        s.call("Cancel")  # nothing runs: nothing happens
        assert s.get("ContextUsed") == used
        with s.generate(LONG, prompt="two") as f:
            assert json.loads(f.readline())["type"] == "delta"
            s.call("Cancel")
            _, records = read_all(f)
        assert records[-1] == {"type": "end", "reason": "cancelled"}
        s.wait_idle()
        assert s.get("ContextUsed") == used
        # It goes on as if the cancelled turn had never been.
        options = {"prompt": "three", "max-tokens": dbus.UInt32(20), "seed": dbus.UInt64(3), "ignore-end": True}
        fresh = c.create()
        fresh.run(prompt="one", max_tokens=dbus.UInt32(5), ignore_end=True, seed=dbus.UInt64(9), temperature=0.0)
        again = c.create()
        again.run(prompt="one", max_tokens=dbus.UInt32(5), ignore_end=True, seed=dbus.UInt64(9), temperature=0.0)
        f = again.generate(LONG, prompt="never")
        f.readline()
        f.close()
        again.wait_idle()
        assert fresh.run(options) == again.run(options)


@test
def cancel_during_prefill():
    long_prompt = "x" * (1 << 18)  # many steps away from a first token
    with daemon(model=endless_model) as d, d.connect() as c:
        s = c.create()
        f = s.generate(LONG, prompt=long_prompt, raw=True)
        f.close()
        s.wait_idle()
        assert s.get("ContextUsed") == 0
        with s.generate(LONG, prompt=long_prompt, raw=True) as f:
            s.call("Cancel")
            text, (*_, end) = read_all(f)
        assert end["reason"] == "cancelled" and text == "", "cancelled before the first token"
        s.wait_idle()
        assert s.get("ContextUsed") == 0


@test
def vanishing_clients():
    with daemon() as d, d.connect() as watcher:
        assert watcher.manager("Sessions") == 0  # only now its connection is certainly there
        fds = d.fds()
        for prompt in ("x", "x" * 5000):  # while decoding and while prefilling
            c = d.connect()
            f = c.create().generate(LONG, prompt=prompt, raw=True)
            if prompt == "x":
                f.readline()
            assert watcher.manager("Sessions") == 1
            c.close()
            while watcher.manager("Sessions"):
                pass
            records = read_all(f)[1]
            assert records[-1] == {"type": "end", "reason": "closed"}, "its stream still tells how it ended"
            f.close()
        with d.connect() as c:
            s = c.create()
            f = s.generate(LONG, prompt="x")
            s.call("Close")
            assert read_all(f)[1][-1]["reason"] == "closed"
            f.close()
        while watcher.manager("KvBytesUsed"):
            pass
        while d.fds() != fds:
            pass


@test
def stalled_reader_stalls_only_itself():
    with daemon() as d, d.connect() as a, d.connect() as b:
        stalled = a.create()
        f = stalled.generate(LONG, prompt="x", max_tokens=dbus.UInt32(1000))

        def other_goes_on():
            """And whether the stalled one stood still meanwhile."""
            before = stalled.get("ContextUsed")
            assert b.create().run(prompt="y", max_tokens=dbus.UInt32(300), ignore_end=True)[1][1]["reason"] == "length"
            return stalled.get("State") == "paused" and stalled.get("ContextUsed") == before

        until(other_goes_on)  # when all buffers are full
        assert other_goes_on() and stalled.get("ContextUsed") < 600, "it does not move while nobody reads"
        _, (usage, end) = read_all(f)
        assert end["reason"] == "length" and usage["completion_tokens"] == 1000
        f.close()


@test
def shutdown_ends_streams():
    with daemon() as d, d.connect() as c:
        f = c.create().generate(LONG, prompt="x")
        f.readline()
        d.process.send_signal(signal.SIGTERM)
        assert read_all(f)[1][-1] == {"type": "end", "reason": "shutdown"}
        f.close()
        assert d.stop() == 0
        assert not os.path.exists(d.socket)
    # A reader that does not read does not keep it.
    with daemon() as d, d.connect() as c:
        f = c.create().generate(LONG, prompt="x")
        f.readline()
        assert d.stop() == 0
        f.close()


@test
def leaves_when_idle():
    c = None
    while not c:
        with daemon("--idle-timeout", "1") as d:
            try:
                c = d.connect()
                s = c.create()
            except dbus.DBusException:
                c = None  # it has left before we came: once more
            else:
                f = s.generate(LONG, prompt="x")
                c.close()
                assert d.process.poll() is None
                read_all(f)
                f.close()
            assert d.process.wait(PATIENCE) == 0
            assert not os.path.exists(d.socket)


@test
def one_daemon_a_socket():
    with daemon() as d:
        second = Daemon(LLMD, model, d.socket)
        assert not second.ready and second.stop() == 3
        assert "another llmd" in second.log()
        with d.connect() as c:
            assert c.manager("State") == "ready"
        d.process.kill()
        d.process.wait()
        assert os.path.exists(d.socket), "what a killed one leaves"
        with daemon() as third, third.connect() as c:
            assert c.manager("State") == "ready"
        d.process.returncode = 0  # for __exit__


@test
def replaces_no_other_file():
    for make in (lambda p: open(p, "w").close(), os.mkdir, lambda p: os.symlink("nowhere", p)):
        path = os.path.join(tempfile.mkdtemp(dir=folder), "precious")
        make(path)
        d = Daemon(LLMD, model, path)
        assert not d.ready and d.stop() == 3 and "not a socket" in d.log(), d.log()
        assert not os.path.islink(path) or os.readlink(path) == "nowhere"
        assert os.path.lexists(path) and not os.path.exists(path + ".lock")


@test
def notifies_and_keeps_secrets():
    path = os.path.join(folder, "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(path)
        canary = "Xylophon-" + os.urandom(8).hex()
        heard = queue.SimpleQueue()  # taken as it comes, as by any manager: who tells it something waits for a while

        def hear():
            while True:
                try:
                    heard.put(notify.recv(1000))
                except OSError:  # closed
                    return

        def wait_for(what):
            while heard.get(timeout=PATIENCE) != what:  # STATUS= and others come as well
                pass

        threading.Thread(target=hear, daemon=True).start()
        with daemon(env=dict(os.environ, NOTIFY_SOCKET=path)) as d, d.connect() as c:
            wait_for(b"READY=1")
            c.create().run(prompt=canary, max_tokens=dbus.UInt32(1))
            error_of(c.create, model=canary)
            with open(f"/proc/{d.process.pid}/limits") as f:
                assert re.search(r"^Max core file size +0 +0 ", f.read(), re.M)
            d.stop()
            wait_for(b"STOPPING=1")
            assert canary not in d.log() and re.match(r"<6>serving ", d.said()), d.log()
    os.unlink(path)


@test
def bad_models():
    cases = {"absent": None, "empty": b"", "text": b"no model\n" * 1000}
    with open(model, "rb") as f:
        whole = f.read()
    cases["cut"] = whole[:len(whole) // 2]
    for name, data in cases.items():
        path = os.path.join(folder, name + ".llmd")
        if data is not None:
            with open(path, "wb") as f:
                f.write(data)
        d = daemon(model=path)
        assert not d.ready and d.stop() == 1
        assert len(d.said().splitlines()) == 1 and path in d.said(), d.log()
        assert not os.path.exists(d.socket)
    for option in (["--context", "9999999"], ["--cpu-level", "quantum"]):
        d = daemon(*option)
        assert not d.ready and d.stop() == 1 and len(d.said().splitlines()) == 1, d.log()


@test
def many_sessions_leave_nothing():
    with daemon() as d, d.connect() as c:
        def some():
            for i in range(40):
                s = c.create()
                if i % 3 == 0:
                    s.generate(LONG, prompt="x").close()
                else:
                    s.run(prompt="x", max_tokens=dbus.UInt32(2))
                s.call("Close")
        some()
        while c.manager("KvBytesUsed"):
            pass
        fds = d.fds()
        some()
        while c.manager("KvBytesUsed"):
            pass
        until(lambda: d.fds() <= fds)
        assert c.manager("Sessions") == 0


def main():
    subprocess.run([MAKE_MODEL, model], check=True)
    make_endless_model(MAKE_MODEL, endless_model)
    wanted = sys.argv[4:]
    for t in tests:
        if not wanted or t.__name__ in wanted:
            print(t.__name__, end=" ", flush=True)
            print(t() or "ok", flush=True)
    shutil.rmtree(folder)


main()
