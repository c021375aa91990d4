#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""llmctl chat: in a pipe, and at a pseudo-terminal.

  test-llmctl-chat.py LLMCTL LLMD MAKE_CHAT_MODEL [TEST...]

At the terminal the model is the test model, whose seeded answers are the same bytes each time: what a message is answered
with says which messages went before. Nothing here is decided by time.
"""
import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import stat
import struct
import subprocess
import sys
import termios

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
try:
    from llmctl_home import LLMCTL, PATIENCE, Home, endless_model, main, test
except ImportError as e:
    print(f"skipped: {e} (python3-dbus)")
    sys.exit(77)

OPTIONS = ("--max-tokens=40", "--ignore-end", "--seed=3", "--temperature=1", "--context=4000")
DEMO = os.path.join(os.path.dirname(os.path.dirname(LLMCTL)), "models", "demo.llmd")


def answers(h, *messages, options=()):
    """What each of them is answered with, one after the other."""
    status, out, err = h.call("chat", *OPTIONS, "-0", *options, data="\0".join(messages).encode())
    assert (status, err) == (0, ""), (status, err)
    parts = out.split("\0")
    assert parts.pop() == "" and len(parts) == len(messages), out
    return parts


@test
def pipes():
    with Home() as h:
        one, two, three = answers(h, "one", "two", "three")
        assert len({one, two, three}) == 3
        assert answers(h, "one", "two") == [one, two] and answers(h, "two") != [two], "it remembers"
        status, out, err = h.call("chat", *OPTIONS, data=b"one\ntwo\n\nthree")
        want = "".join(t.replace("\\", "\\\\").replace("\n", "\\n") + "\n" for t in (one, two, "", three))
        assert (status, out, err) == (0, want, ""), (out, want, err)
        status, out, err = h.call("chat", *OPTIONS, "--json", data=b"one\n\ntwo\n")
        objects = list(map(json.loads, out.strip("\n").split("\n")))
        assert status == 0 and [o["output"] for o in objects] == [one, "", two], objects
        assert [o["index"] for o in objects] == [1, 2, 3] and objects[2]["input"] == "two"
        assert objects[2]["usage"]["cached_tokens"] > 0 and objects[0]["reason"] == "length", objects
        assert answers(h, "/quit", "one") != ["", ""], "what begins with a slash is a message like others"
        assert answers(h, "one", options=["--instructions=be brief"]) != [one]
        assert h.call("chat", data=b"") == (0, "", "")
        h.wait_sessions(0)


@test
def pipes_answer_at_once():
    with Home() as h:
        p = h.popen("chat", *OPTIONS, stdin=subprocess.PIPE)
        for _ in range(3):
            p.stdin.write(b"x\n")
            p.stdin.flush()
            assert p.stdout.readline().endswith(b"\n")
        p.stdin.close()
        assert p.wait(PATIENCE) == 0
        p.stdout.close()
        p.stderr.close()


@test
def pipes_that_fail():
    with Home() as h:
        status, out, err = h.call("chat", *OPTIONS[:4], "--context=64", data=b"one\n" + b"x" * 100 + b"\ntwo\n")
        assert status == 1 and out.count("\n") == 1, (status, out)
        assert len(err.splitlines()) == 1 and "room for" in err, err
        status, out, err = h.call("chat", data=b"x" * ((8 << 20) + 1))
        assert (status, out) == (1, "") and "more than 8388608 bytes" in err, err
        for args in (["--seed=x"], ["hello"], ["--raw", "--instructions=x"]):
            status, out, err = h.call("chat", *args, data=b"x\n")
            assert status == 2 and out == "" and "--help" in err, err
        with open("/dev/full", "wb") as full:
            p = h.popen("chat", *OPTIONS, stdin=subprocess.PIPE, stdout=full)
            _, err = p.communicate(b"x\n", timeout=PATIENCE)
        assert (p.returncode, err) == (1, b"llmctl: cannot write: No space left on device\n"), err
        h.wait_sessions(0)
    # Ctrl-C, and the time limit of an answer.
    with Home(endless_model) as h:
        p = h.popen("chat", "--ignore-end", "--seed=1", stdin=subprocess.PIPE)
        p.stdin.write(b"x\n")
        p.stdin.flush()
        h.wait_sessions(1)
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=PATIENCE)
        assert (p.returncode, out, err) == (130, b"", b""), (p.returncode, err)
        status, out, err = h.call("chat", "--ignore-end", "--seed=1", "--timeout=0.2", data=b"x\n")
        assert status == 124 and out == "" and "time given" in err, (status, out, err)
        h.wait_sessions(0)


def shown(text):
    """What of it a terminal shows, without spaces."""
    text = "".join("\ufffd" if (ord(c) < 0x20 and c not in "\n\t") or 0x7f <= ord(c) < 0xa0 else c for c in text)
    return re.sub(r"\s+", "", text)


class Terminal:
    """llmctl chat at a terminal of its own, of which it is the controlling process."""

    def __init__(self, home, *options, more_env=None, columns=200):
        self.home = home
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.before = termios.tcgetattr(slave)
        env = dict(home.env, TERM="xterm", XDG_STATE_HOME=os.path.join(home.path, "state"), LC_ALL="C", NO_COLOR="1")
        env.update(more_env or {})
        self.process = subprocess.Popen([LLMCTL, "--private", "chat", *options], stdin=slave, stdout=slave, stderr=slave,
                                        env=env, start_new_session=True, preexec_fn=self.take_terminal)
        self.slave = slave  # kept open: a terminal that nobody has open says nothing more
        self.seen = self.rest = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.n = 0

    @staticmethod
    def take_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def take(self, data):
        """Without what moves the cursor; a sequence may come in pieces."""
        text = self.rest + self.decoder.decode(data)
        self.rest = re.search(r"(\033(\[[0-9;?]*)?)?$", text)[0]
        text = text[:len(text) - len(self.rest)]
        self.seen += re.sub(r"\033\[[0-9;?]*[a-zA-Z]|\r|\033[=>]", "", text)

    def wait(self, pattern):
        """Reads until the pattern comes after all that was waited for; what stands before it."""
        while True:
            found = re.search(pattern, self.seen[self.n:])
            if found:
                text = self.seen[self.n:self.n + found.start()]
                self.n += found.end()
                return text
            self.more(pattern)

    def wait_answered(self, answer):
        """Reads until it has come and the next prompt, however the lines before it are drawn."""
        while shown(answer) + ">" not in shown(self.seen[self.n:]):
            self.more(answer)
        self.n = len(self.seen)
        self.is_mute()

    def more(self, awaited):
        ready, _, _ = select.select([self.master], [], [], PATIENCE)
        assert ready, (awaited, self.seen[self.n:])
        self.take(os.read(self.master, 65536))

    def prompt(self):
        text = self.wait(r"(^|\n)> ")
        self.is_mute()
        return text

    def is_mute(self):
        """What is typed now is the program's: nobody else echoes it, or makes anything of it."""
        assert not termios.tcgetattr(self.slave)[3] & (termios.ECHO | termios.ICANON)

    def send(self, text):
        os.write(self.master, text.encode())

    def say(self, text):
        """Sends a line; what is shown until the next prompt, without what we typed."""
        self.send(text + "\n")
        self.wait("\n")
        return self.prompt()

    def end(self, status=0):
        end = os.pidfd_open(self.process.pid)
        while not select.select([end], [], [], 0)[0]:  # it may have something to say still
            ready = select.select([self.master, end], [], [], PATIENCE)[0]
            assert ready, self.seen
            if select.select([self.master], [], [], 0)[0]:
                self.take(os.read(self.master, 65536))
        os.close(end)
        self.process.wait()
        assert self.process.returncode == status, (self.process.returncode, self.seen[-500:])
        after = termios.tcgetattr(self.slave)
        assert after == self.before, "the terminal is left as it was"
        os.close(self.slave)
        os.close(self.master)
        assert "Sanitizer" not in self.seen and "runtime error" not in self.seen, self.seen


@test
def terminal():
    with Home() as h:
        h.env["LLMD_MODEL"] = DEMO
        t = Terminal(h, "--temperature=0")
        assert "/help" in t.prompt()
        assert "Anna" in t.say("Hello, my name is Anna.")
        assert "Anna" in t.say("What is my name?")
        assert "85" in t.say("What is 47 + 38?")
        t.send("\x04")
        t.end()
        h.wait_sessions(0)
        # Colours only where they are wanted.
        for no, want in (("", True), ("1", False)):
            t = Terminal(h, more_env={"NO_COLOR": no})
            raw = b""
            while b"> " not in raw:
                raw += os.read(t.master, 65536)
            assert (b"\033[1m" in raw) == want, raw
            t.send("/quit\n")
            t.end()


@test
def typed_ahead():
    """What is typed while an answer comes is the next message, and is seen once."""
    with Home() as h:
        one, two = answers(h, "one", "two")
        t = Terminal(h, *OPTIONS)
        t.prompt()
        t.send("one\ntwo\n")
        assert shown(t.prompt()).endswith(shown(one))
        assert shown(t.prompt()) == "two" + shown(two), t.seen
        # Also the end, and before there is any prompt.
        t.send("one\n\x04")
        t.end()
        for keys in ("\x04", "one\n\x04", "/quit\n"):
            t = Terminal(h, *OPTIONS)
            t.send(keys)
            t.end()
    # A signal that ends it, in the middle of an answer, leaves the terminal as it was.
    with Home(endless_model) as h:
        for number in (signal.SIGTERM, signal.SIGHUP):
            t = Terminal(h, "--ignore-end", "--seed=3")
            t.prompt()
            t.send("one\n")
            t.wait("one\n.")
            t.is_mute()
            t.process.send_signal(number)
            t.end(-number)


@test
def stopped_and_continued():
    with Home() as h:
        one, two = answers(h, "one", "two")
        t = Terminal(h, *OPTIONS)
        t.prompt()
        assert shown(t.say("one")) == shown(one)
        t.process.send_signal(signal.SIGSTOP)
        os.waitpid(t.process.pid, os.WUNTRACED)
        termios.tcsetattr(t.slave, termios.TCSANOW, t.before)
        t.process.send_signal(signal.SIGCONT)
        t.wait("> ")  # drawn anew
        t.is_mute()
        assert shown(t.say("two")) == shown(two)
        t.send("/quit\n")
        t.end()


@test
def other_terminals():
    """Without cursor movement, and narrower than what is typed: all of it is read."""
    with Home() as h:
        long = "a message that is wider than the terminal, by far"
        answer, = answers(h, long)
        for env, columns in (({"TERM": "dumb"}, 80), ({"TERM": "xterm"}, 12), ({"TERM": "nonesuch"}, 20),
                             ({"LC_ALL": "C.UTF-8"}, 80), ({"TERM": ""}, 80), ({"NO_COLOR": ""}, 80)):
            t = Terminal(h, *OPTIONS, "--no-history", more_env=env, columns=columns)
            t.wait("> ")
            t.send(long + "\n")
            t.send("/measure\n")
            t.wait(r"\d+ *of +4000 *tokens")
            assert shown(answer) in shown(t.seen), (env, t.seen)
            t.send("/quit\n")
            t.end()


@test
def the_daemon_dies():
    with Home(endless_model) as h:
        for message in ("", "one\n"):
            t = Terminal(h, "--ignore-end", "--seed=3")
            t.prompt()
            if message:
                t.send(message)
                t.wait("one\n.")
            os.kill(h.starts()[-1], signal.SIGKILL)
            if not message:
                t.send("one\n")
            t.wait("llmctl: [^\n]*\n")
            t.end(1)


@test
def control_c():
    with Home(endless_model) as h:
        t = Terminal(h, "--ignore-end", "--seed=3")
        t.prompt()
        t.send("\x03")  # at an empty prompt
        t.wait("Ctrl-D or /quit leaves")
        t.prompt()
        t.send("thrown away")
        t.wait("away")
        t.send("\x03")
        assert "leaves" not in t.prompt()
        t.send("hello\n")
        t.wait("hello\n")
        t.wait(r"[^\n]")  # the answer has begun
        t.send("\x03")
        t.wait("cancelled: the conversation is as it was before your message")
        t.prompt()
        assert re.search(r"\n?0 of \d+ tokens", t.say("/measure")), t.seen
        t.send("\x04")
        t.end()


@test
def lines_and_history():
    with Home() as h:
        first, second = answers(h, "one\ntwo", "grüße")
        t = Terminal(h, *OPTIONS)
        t.prompt()

        t.send("one\\\n")
        t.wait(r"\.\.\. ")
        assert shown(t.say("two")) == shown(first)
        assert shown(t.say("grüße")) == shown(second), "UTF-8, also where the locale is C"
        t.send("\x04")
        t.end()
        path = os.path.join(h.path, "state", "llmd", "history")
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
        assert len(open(path).read().splitlines()) == 3  # a heading and two messages
        os.chmod(path, 0o644)
        # Another chat has them: two up is the first one; it is sent as it was.
        t = Terminal(h, *OPTIONS)
        t.prompt()
        t.send("\x10\x10\n")
        t.wait_answered(first)
        t.send("/quit\n")
        t.end()
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        before = open(path).read()
        t = Terminal(h, *OPTIONS, "--no-history")
        t.prompt()
        t.say("secret")
        t.send("/quit\n")
        t.end()
        assert open(path).read() == before and "secret" not in before
        # Where it cannot be kept, one is told, and can talk all the same.
        os.unlink(path)
        os.mkdir(path)
        t = Terminal(h, *OPTIONS)
        assert "history is not kept" in t.prompt()
        t.say("one")
        t.send("/quit\n")
        t.end()


@test
def commands():
    with Home() as h:
        one, two, three = answers(h, "one", "two", "three")
        brief = answers(h, "one", options=["--instructions=be brief"])[0]
        t = Terminal(h, *OPTIONS)

        def says(message, answer):
            got = t.say(message)
            assert shown(got) == shown(answer), (message, got, answer)

        t.prompt()
        assert "/undo" in t.say("/help")
        assert "no turn" in t.say("/undo")
        says("one", one)
        says("two", two)
        assert "taken back" in t.say("/undo")
        says("two", two)
        says("three", three)
        for _ in range(2):
            assert "taken back" in t.say("/undo")
        says("two", two)
        assert "first message" in t.say("/system be brief")
        assert "new conversation" in t.say("/reset")
        says("one", one)
        t.say("/reset")
        t.say("/system be brief")
        assert "be brief" in t.say("/system")
        says("one", brief)
        assert "same /system" in t.say("/reset")
        says("one", brief)
        # /set
        assert re.search(r"max-tokens +40\n", t.say("/set"))
        t.say("/set max-tokens 4")
        assert re.search(r"max-tokens +4\n", t.say("/set"))
        t.say("/undo")
        assert shown(brief).startswith(shown(t.say("one")))
        assert "whole number" in t.say("/set max-tokens x")
        assert "no option" in t.say("/set speed 9")
        t.say("/set max-tokens")
        assert re.search(r"max-tokens +\(default\)", t.say("/set"))
        # /measure, /status
        assert re.search(r"\n?\d+ of 4000 tokens", t.say("/measure"))
        assert re.search(r"\d+ tokens; \d+ are left", t.say("/measure two"))
        assert re.search(r"context +\d+ of 4000", t.say("/status"))
        # what is no command
        assert "unknown command /frobnicate" in t.say("/frobnicate now")
        assert "takes no argument" in t.say("/undo 2")
        t.say("/set max-tokens 40")
        assert "llmctl:" not in t.say("//one")
        t.send("/quit\n")
        t.end()
        h.wait_sessions(0)


@test
def files():
    with Home() as h:
        one, two, three = answers(h, "one", "two", "three")
        path = os.path.join(h.path, "talk")
        t = Terminal(h, *OPTIONS)
        t.prompt()

        t.say("one")
        assert "saved" in t.say(f"/save {path}")
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert shown(t.say("two")) == shown(two)
        assert "saved" in t.say(f"/save {path}"), "its own file may be written again"
        size = os.path.getsize(path)
        t.say("/reset")
        assert "goes on" in t.say(f"/load {path}")
        assert shown(t.say("three")) == shown(three)
        assert "no turn" not in t.say("/undo") and "no turn" in t.say("/undo")
        assert shown(t.say("three")) == shown(three)
        # Nothing is lost when a file is no such file, and nothing of another's is written over.
        precious = os.path.join(h.path, "precious")
        with open(precious, "w") as f:
            f.write("mine")
        used = re.search(r"(\d+) of", t.say("/measure"))[1]
        assert "llmctl: " in t.say(f"/load {precious}")
        assert "No such file" in t.say(f"/load {precious}.not")
        assert re.search(r"(\d+) of", t.say("/measure"))[1] == used
        assert "another name" in t.say(f"/save {precious}")
        assert "missing" in t.say("/save")
        assert open(precious).read() == "mine" and os.path.getsize(path) == size
        assert sorted(os.listdir(h.path)) == sorted({"talk", "precious", "run", "starts", "llmd", "state"} &
                                                    set(os.listdir(h.path))), "no temporary files"
        t.send("/quit\n")
        t.end()
        h.wait_sessions(0)


main()
