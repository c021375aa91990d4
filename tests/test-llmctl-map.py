#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""llmctl map: many inputs, one daemon.

  test-llmctl-map.py LLMCTL LLMD MAKE_CHAT_MODEL [TEST...]

What an input must be answered with is what llmctl run answers it with: seeded answers are the same bytes alone and in
company. Nothing here is decided by time.
"""
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
try:
    from llmctl_home import ENDLESS, LLMCTL, PATIENCE, Home, endless_model, main, test
except ImportError as e:
    print(f"skipped: {e} (python3-dbus)")
    sys.exit(77)

OPTIONS = ("--max-tokens=60", "--ignore-end", "--seed=3", "--temperature=2")  # hot: all kinds of characters
WORDS = ["one", "two", "three \\ four", "fünf", "six", "seven", "x" * 300, "9", "10", "11", "12", "13", "14"]


def escaped(text):
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def lines(words):
    return "".join(w + "\n" for w in words).encode()


def answer_of(h, *args):
    status, out, err = h.call("run", *OPTIONS, "--json", *args)
    assert status == 0, err
    return "".join(r.get("text", "") for r in map(json.loads, out.strip("\n").split("\n")))


@test
def answers_in_order():
    with Home() as h:
        want = [answer_of(h, w) for w in WORDS]
        assert any("\n" in w for w in want), "nothing to be escaped"
        assert len(set(want)) > len(WORDS) // 2
        for options in ((), ("-j", "1"), ("--jobs=13",)):
            status, out, err = h.call("map", *OPTIONS, *options, data=lines(WORDS))
            assert (status, err) == (0, ""), err
            assert out == "".join(escaped(w) + "\n" for w in want), (out, want)
        status, out, err = h.call("map", *OPTIONS, "--unordered", data=lines(WORDS))
        assert (status, err) == (0, "") and sorted(out.split("\n")) == sorted(["", *map(escaped, want)])
        # The last one without a line feed; empty ones are kept in place.
        status, out, err = h.call("map", *OPTIONS, data=b"\none\n\ntwo")
        assert (status, out, err) == (0, f"\n{escaped(want[0])}\n\n{escaped(want[1])}\n", "")
        assert h.call("map", *OPTIONS, data=b"") == (0, "", "")
        # NUL in and out, line feeds within.
        status, out, err = h.call("map", *OPTIONS, "-0", data=b"one\0a\nb\0two")
        assert (status, err) == (0, "") and out == want[0] + "\0" + answer_of(h, "a\nb") + "\0" + want[1] + "\0"
        h.wait_sessions(0)


@test
def objects():
    with Home() as h:
        status, out, err = h.call("map", *OPTIONS, "--json", data=b"one\n\n\xff\0x\n")
        assert (status, err) == (0, "")
        one, empty, odd = map(json.loads, out.strip("\n").split("\n"))
        assert one["index"] == 1 and one["input"] == "one" and one["output"] == answer_of(h, "one"), one
        assert one["reason"] == "length" and one["usage"]["completion_tokens"] == 60 and "error" not in one, one
        assert one["usage"]["prompt_tokens"] > 3
        assert empty["index"] == 2 and empty["output"] == "" and "reason" not in empty, empty
        assert odd["input"] == "\ufffd\0x" and odd["usage"]["completion_tokens"] == 60, odd
        status, pretty, err = h.call("--json=pretty", "map", *OPTIONS, data=b"one\n")
        assert pretty.count("\n") > 5 and json.loads(pretty) == one


@test
def inputs_that_fail():
    with Home() as h:
        data = lines(["one", "x" * 200, "two"])
        options = (*OPTIONS, "--context=64")
        status, out, err = h.call("map", *options, data=data)
        assert status == 1 and [bool(x) for x in out.split("\n")] == [True, False, True, False], (status, out)
        assert len(err.splitlines()) == 1 and "line 2: " in err and "room for 64" in err, err
        status, out, err = h.call("map", *options, "--json", data=data)
        objects = list(map(json.loads, out.strip("\n").split("\n")))
        assert status == 1 and [o["index"] for o in objects] == [1, 2, 3]
        assert objects[1]["error"]["name"] == "org.llmd.Llm1.Error.ContextFull" and "output" not in objects[1], objects
        assert "error" not in objects[0] and "error" not in objects[2]
        assert objects[1]["error"]["message"] in err
        status, out, err = h.call("map", *options, "--fail-fast", "-j1", data=data)
        assert status == 1 and out.count("\n") == 2 and len(err.splitlines()) == 1, (out, err)
        h.wait_sessions(0)
        # Longer than any prompt: refused by its number, before and after a delimiter; the others are answered.
        huge = b"x" * ((8 << 20) + 1)
        for data in (b"one\n" + huge + b"\ntwo\n", b"one\n" + huge + b"yyy" * 99999 + b"\ntwo"):
            status, out, err = h.call("map", *OPTIONS, data=data)
            assert status == 1 and [bool(x) for x in out.split("\n")] == [True, False, True, False], out
            assert err.startswith("llmctl: line 2: more than 8388608 bytes") and len(err.splitlines()) == 1, err
        status, out, err = h.call("map", *OPTIONS, "-0", data=b"one\0" + huge)
        assert status == 1 and err.startswith("llmctl: input 2: more than"), err


@test
def wrong_arguments():
    with Home() as h:
        for args in (["--jobs=0"], ["--jobs=257"], ["--jobs=many"], ["--seed=x"], ["--class=first"],
                     ["--session=1", "--context=9"], ["--raw", "--instructions=x"]):
            status, out, err = h.call("map", *args, data=b"x\n")
            assert status == 2 and out == "" and "--help" in err, (args, err)
        assert h.starts() == []
        status, _, err = h.call("map", "--no-start", data=b"x\n")
        assert status == 3 and "does not run" in err
        fd = os.open("/", os.O_RDONLY)
        p = h.popen("map", *OPTIONS, stdin=fd)
        os.close(fd)
        out, err = p.communicate(timeout=PATIENCE)
        assert p.returncode == 1 and b"standard input: Is a directory" in err, err


@test
def streams():
    """An answer comes before the next input is there, and before the end of input."""
    with Home() as h:
        p = h.popen("map", *OPTIONS, stdin=subprocess.PIPE)
        for word in ("one", "two", "three"):
            p.stdin.write(word.encode() + b"\n")
            p.stdin.flush()
            assert p.stdout.readline().decode() == escaped(answer_of(h, word)) + "\n"
        p.stdin.close()
        assert p.wait(PATIENCE) == 0 and p.stdout.read() == b""
        p.stdout.close()
        p.stderr.close()


@test
def reads_no_more_than_it_can_answer():
    with Home() as h:
        # Inputs without end, and nobody who reads the answers: what it has read must stay bounded.
        read, write = os.pipe()
        out_read, out_write = os.pipe()
        p = h.popen("map", *OPTIONS, "-j2", stdin=read, stdout=out_write)
        os.close(read)
        os.close(out_write)
        os.set_blocking(write, False)
        line = b"x" * 199 + b"\n"
        written = 0

        def feed():
            nonlocal written
            while True:
                try:
                    written += os.write(write, line)
                except BlockingIOError:
                    return

        # One answer is read for each round: so it is at work, and has taken what it wants.
        with os.fdopen(out_read, "rb", buffering=0) as out:
            for _ in range(30):
                feed()
                while not out.read(1).endswith(b"\n"):
                    pass
        # A pipe's 64 KiB, a block of the same size, and the items in memory: far from the end of nothing.
        assert written < 400000, written
        os.close(write)
        p.send_signal(signal.SIGINT)
        p.communicate(timeout=PATIENCE)
        assert p.returncode in (130, -signal.SIGPIPE), p.returncode


@test
def interrupted():
    with Home(endless_model) as h:
        h.call("run", "--max-tokens=1", "x")
        for number, options, status in ((signal.SIGINT, (), 130), (0, ("--timeout=0.5",), 124)):
            p = h.popen("map", "--ignore-end", "--seed=1", *options, "-j4", stdin=subprocess.PIPE)
            p.stdin.write(lines(["a", "b", "c", "d", "e", "f"]))
            p.stdin.flush()
            if number:
                h.wait_sessions(4)
                p.send_signal(number)
            out, err = p.communicate(timeout=PATIENCE)
            assert p.returncode == status and b"Sanitizer" not in err, (p.returncode, err)
            h.wait_sessions(0)


@test
def status_line():
    """On a terminal one line says how far it is, no wider than that; it goes before anything else is said, and at the end."""
    with Home(endless_model) as h:
        h.call("run", "--max-tokens=1", "x")
        for env, options, columns in (({"TERM": "xterm"}, (), 80), ({"TERM": "xterm"}, (), 12),
                                      ({"TERM": "dumb"}, (), 80), ({"TERM": "xterm"}, ("--quiet",), 80)):
            master, slave = pty.openpty()
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            p = subprocess.Popen([LLMCTL, "--private", "map", *options, "--ignore-end", "--seed=1"], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, stderr=slave, env=dict(h.env, **env))
            os.close(slave)
            p.stdin.write(b"one\n" + b"x" * ((8 << 20) + 1) + b"\ntwo\n")  # the second one is too long
            p.stdin.flush()
            h.wait_sessions(2)
            seen = b""
            wants = env["TERM"] == "xterm" and not options
            while b"more than 8388608 bytes" not in seen or wants and not re.search(rb"1 answered, 2 running|\r1 answered,\x1b", seen):
                assert select.select([master], [], [], PATIENCE)[0], seen
                seen += os.read(master, 65536)
            p.send_signal(signal.SIGINT)
            p.stdin.close()
            p.stdout.read()
            p.stdout.close()
            assert p.wait(PATIENCE) == 130
            try:
                while data := os.read(master, 65536):
                    seen += data
            except OSError:
                pass  # the other end is closed
            os.close(master)
            if wants:
                assert seen.endswith(b"\r\033[K"), seen
                lines_shown = re.findall(rb"\r([^\r\n\033]+)\033\[K", seen)
                assert lines_shown and max(map(len, lines_shown)) < columns, lines_shown
                assert b"\033[Kllmctl: line 2: " in seen, seen
            else:
                assert b"running" not in seen and b"\033" not in seen, seen


@test
def the_daemon_dies():
    with Home(endless_model) as h:
        p = h.popen("map", "--ignore-end", "--seed=1", stdin=subprocess.PIPE)
        p.stdin.write(b"a\nb\n")
        p.stdin.flush()
        while not h.starts() or not os.path.exists(h.socket):
            pass
        h.wait_sessions(2)
        os.kill(h.starts()[0], signal.SIGKILL)
        out, err = p.communicate(timeout=PATIENCE)
        assert p.returncode == 1 and b"went away" in err and len(err.splitlines()) == 1, (p.returncode, err)


@test
def the_daemon_dies_between_answers():
    with Home() as h:
        p = h.popen("map", *OPTIONS, stdin=subprocess.PIPE)
        p.stdin.write(b"a\n")
        p.stdin.flush()
        assert p.stdout.readline().endswith(b"\n")
        os.kill(h.starts()[0], signal.SIGKILL)
        out, err = p.communicate(b"b\n", timeout=PATIENCE)
        assert (p.returncode, out, err) == (3, b"", b"llmctl: llmd has gone away\n"), (p.returncode, out, err)


@test
def one_instruction():
    """It is read once, and each input is answered as if it stood before it alone."""
    with Home() as h:
        words = ["one", "two", "x" * 300, "four"]
        options = ("--instructions=be brief",)
        want = [answer_of(h, *options, w) for w in words]
        assert want[0] != answer_of(h, "one")
        text = "".join(escaped(w) + "\n" for w in want)
        for args in (["be", "brief"], ["--instructions=be brief"], ["-j1", "be brief"], ["-j13", "be brief"]):
            status, out, err = h.call("map", *OPTIONS, *args, data=lines(words))
            assert (status, out, err) == (0, text, ""), (args, out, text, err)
        both = answer_of(h, "--instructions=be brief\n\nand kind", "one")
        assert h.call("map", *OPTIONS, "--instructions=be brief", "and kind", data=b"one\n")[1] == escaped(both) + "\n"
        raw = answer_of(h, "--raw", "AB")
        assert h.call("map", *OPTIONS, "--raw", "A", data=b"B\n")[1] == escaped(raw) + "\n", "no chat template"
        status, out, err = h.call("map", *OPTIONS, "--json", "be brief", data=lines(words))
        objects = list(map(json.loads, out.splitlines()))
        cached = {o["usage"]["cached_tokens"] for o in objects}
        assert len(cached) == 1 and cached.pop() > len("be brief"), objects
        # One that fails among others; one that is too long for all of them.
        status, out, err = h.call("map", *OPTIONS, "--context=100", "be brief", data=lines(["one", "x" * 200, "two"]))
        assert status == 1 and [bool(x) for x in out.split("\n")] == [True, False, True, False], out
        assert len(err.splitlines()) == 1 and "line 2: " in err and "--context" in err, err
        for n in (100, 100000):
            status, out, err = h.call("map", *OPTIONS, "--context=64", "x" * n, data=b"one\n")
            assert (status, out) == (1, "") and len(err.splitlines()) == 1 and "--context" in err, err
        h.wait_sessions(0)
    # Ctrl-C, and a daemon that dies.
    with Home(endless_model) as h:
        for end in ("interrupt", "kill"):
            p = h.popen("map", "--ignore-end", "--seed=1", "-j3", "be brief", stdin=subprocess.PIPE)
            p.stdin.write(lines(["a", "b", "c", "d"]))
            p.stdin.flush()
            h.wait_sessions(4)
            if end == "interrupt":
                p.send_signal(signal.SIGINT)
            else:
                os.kill(h.starts()[-1], signal.SIGKILL)
            out, err = p.communicate(timeout=PATIENCE)
            if end == "interrupt":
                assert (p.returncode, err) == (130, b""), (p.returncode, err)
                h.wait_sessions(0)
            else:
                assert p.returncode == 1 and b"went away" in err and len(err.splitlines()) == 1, (p.returncode, err)


@test
def a_session():
    """Each input goes on with a copy: the session stays as it was, and holds what was said in it."""
    with Home() as h:
        session = h.call("session", "create")[1].strip()

        def say(text):
            status, out, err = h.call("run", *OPTIONS, "--json", "--session", session, text)
            assert status == 0, err
            return "".join(r.get("text", "") for r in map(json.loads, out.splitlines()))

        say("first")
        with h.client() as c:
            used = json.loads(h.call("session", "show", session, "--json")[1])["context_used"]
            status, out, err = h.call("map", *OPTIONS, "--session", session, data=b"one\ntwo\none\n")
            assert (status, err) == (0, ""), err
            while c.manager("Sessions") != 1:  # its copies go with its connection
                pass
            answers = out.split("\n")
            assert answers[0] == answers[2] != answers[1]
            assert used == json.loads(h.call("session", "show", session, "--json")[1])["context_used"]
            assert answers[0] == escaped(say("one")) != escaped(answer_of(h, "one"))
            status, out, err = h.call("map", *OPTIONS, "--session", session, "Say:", data=b"two\n")
            assert status == 0 and out == escaped(say("Say:\ntwo")) + "\n", (out, err)
            for args in (["map", "--session", "999"], ["run", "--session", "999", "--no-stdin", "x"],
                         ["chat", "--session", "999"]):
                status, out, err = h.call(*args, data=b"x\n")
                assert (status, out) == (1, "") and "999" in err and len(err.splitlines()) == 1, (args, status, err)
            # Interrupted, run leaves the session as it was; a message that finds it at work is told so.
            used = json.loads(h.call("session", "show", session, "--json")[1])["context_used"]
            p = h.popen("run", *ENDLESS, "--session", session, "x")
            p.stdout.readline()
            status, out, err = h.call("run", "--session", session, "--no-stdin", "y")
            assert (status, out) == (75, "") and len(err.splitlines()) == 1, (status, err)
            status, out, err = h.call("map", "--session", session, data=b"y\n")
            assert (status, out) == (75, "") and len(err.splitlines()) == 1, (status, err)
            p.send_signal(signal.SIGINT)
            p.communicate(timeout=PATIENCE)
            assert p.returncode == 130
            while "idle" not in h.call("session", "show", session)[1]:
                pass
            assert used == json.loads(h.call("session", "show", session, "--json")[1])["context_used"]


@test
def more_jobs_than_the_quota():
    with Home() as h:
        words = [str(i) for i in range(100)]
        status, out, err = h.call("map", "--max-tokens=3", "--ignore-end", "--seed=3", "--jobs=256", data=lines(words))
        assert (status, err) == (0, "") and out.count("\n") == 100, (status, err)
        # All of it is taken by others.
        h.wait_sessions(0)
        with h.client() as c:
            sessions = []
            try:
                while True:
                    sessions.append(c.create())
            except Exception as e:  # noqa: BLE001: the quota, whatever its size
                assert "QuotaExceeded" in str(e), e
            status, out, err = h.call("map", *OPTIONS, data=b"x\n")
            assert status == 75 and out == "" and len(err.splitlines()) == 1, (status, err)


main()
