#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""The real llmctl with the real daemon, as a shell uses them.

  test-llmctl.py LLMCTL LLMD MAKE_CHAT_MODEL [TEST...]

Each test has a runtime directory of its own. Nothing here is decided by time.
"""
import contextlib
import fcntl
import json
import os
import pty
import pwd
import re
import select
import shutil
import signal
import subprocess
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
try:
    import dbus
    from llmctl_home import ENDLESS, LLMCTL, PATIENCE, Home, complaint, endless_model, main, model, test
except ImportError as e:
    print(f"skipped: {e} (python3-dbus)")
    sys.exit(77)


def text_of(records):
    return "".join(r["text"] for r in records if r["type"] == "delta")


@test
def answers():
    with Home() as h:
        options = ("--max-tokens", "30", "--ignore-end")
        first = h.call("run", *options, "--seed", "5", "hello")
        assert first[0] == 0 and len(first[1]) > 10 and first[2] == "", first
        assert h.call("run", *options, "--seed", "5", "hello") == first
        assert h.call("run", *options, "--seed", "6", "hello") != first
        for how in ("--deterministic", "--deterministic=yes", "--deterministic=no"):
            assert h.call("run", *options, how, "--seed", "5", "hello") == first  # one device: the same
        assert h.call("run", *options, "--seed", "5", "--instructions", "be brief", "hello")[1] != first[1]
        status, out, _ = h.call("run", *options, "--seed", "5", "--json", "hello")
        records = list(map(json.loads, out.splitlines()))
        assert status == 0 and text_of(records) + "\n" == first[1], "the last line of a text ends"
        assert records[-2]["completion_tokens"] == 30 and records[-1] == {"type": "end", "reason": "length"}
        # A line feed of the model's own is the only one.
        hot = ("--raw", "--ignore-end", "--seed", "1", "--temperature", "2", "x", "--max-tokens")
        for n in range(1, 400):
            out = h.call("run", *hot, str(n), "--json")[1]
            if text_of(map(json.loads, out.splitlines())).endswith("\n"):
                break
        assert n < 399 and h.call("run", *hot, str(n))[1] == text_of(map(json.loads, out.splitlines()))
        assert len(h.starts()) == 1, "one daemon for all of them"
        status, out, _ = h.call("status")
        assert status == 0 and "ready" in out and "chat" in out, out


@test
def relative_paths():
    with Home() as h:
        env = dict(h.env, LLMD_BINARY="./llmd", LLMD_MODEL=os.path.relpath(model, h.path))
        os.makedirs(os.path.dirname(h.socket), 0o700)
        socket = os.path.relpath(h.socket, h.path)
        status, out, err = h.call("run", "--socket", socket, "--max-tokens", "3", "x", env=env, cwd=h.path)
        assert status == 0, err
        h.wait_sessions(0)


@test
def standard_input():
    with Home() as h:
        def tokens(*args, data=None):
            status, out, err = h.call("run", "--raw", "--json", "--max-tokens", "1", *args, data=data)
            assert status == 0, err
            return next(r for r in map(json.loads, out.splitlines()) if r["type"] == "usage")["prompt_tokens"] - 1

        assert tokens("one", "two") == 9  # the space is three bytes in this vocabulary
        assert tokens("one", data=b"") == 3
        assert tokens("one", data=b"two") == 7
        assert tokens(data=b"two\0\xff\n") == 5 + 3  # what is not UTF-8 becomes U+FFFD, three bytes
        assert tokens("-n", "one", data=b"two") == 3
        assert tokens("one", data=b"x" * 5000) == 5004
        complaint(h.call("run", data=b"x" * (8 << 20) + b"x"), 1, "more than 8388608 bytes")
        complaint(h.call("run", "--raw", data=b"x" * 9000), 1, "9001", "8192")
        complaint(h.call("run", "--context", "64", "x" * 100), 1, "room for 64", "nothing was cut", "--context")
        complaint(h.call("run", "--raw", data=b"x" * (1 << 20)), 1, "at least", "nothing was cut", "--context")
        with open("/dev/full", "wb") as full:
            p = h.popen("run", "--max-tokens=4", "--ignore-end", "x", stdout=full)
            assert p.communicate(timeout=PATIENCE)[1] == b"llmctl: cannot write: No space left on device\n"
            assert p.returncode == 1
        complaint(h.call("run"), 2, "no prompt", "--help")
        complaint(h.call("run", "--no-stdin", data=b"x"), 2, "no prompt")


@test
def complaints():
    with Home() as h:
        complaint(h.call("run", "--no-start", "x"), 3, "does not run")
        complaint(h.call("status"), 3, "does not run")
        complaint(h.call("run", "--model", "/nonexistent/x.llmd", "x"), 1, "/nonexistent/x.llmd")
        bad = os.path.join(h.path, "bad.llmd")
        with open(bad, "w") as f:
            f.write("nothing like a model")
        complaint(h.call("run", "--model", bad, "x"), 1, "did not start", bad)
        complaint(h.call("run", "x", env=dict(h.env, LLMD_BINARY="/nonexistent/llmd")), 1, "/nonexistent/llmd")
        complaint(h.call("run", "x", env=dict(h.env, LLMD_BINARY="/bin/false")), 1, "did not start")
        complaint(h.call("run", "--socket", "/tmp/" + "x" * 200, "x"), 1, "path of a socket")
        precious = os.path.join(h.path, "precious")
        with open(precious, "w") as f:
            f.write("mine")
        before = sorted(os.listdir(h.path))
        complaint(h.call("run", "--socket", precious, "x"), 1, precious, "not a socket")
        assert open(precious).read() == "mine" and sorted(os.listdir(h.path)) == before
        os.chmod(os.path.dirname(h.socket), 0o755)
        complaint(h.call("run", "x"), 1, "open to other users")
        os.chmod(os.path.dirname(h.socket), 0o700)
        for args in (["--temperature", "hot"], ["--max-tokens", "-1"], ["--seed", ""], ["--timeout", "0"], ["--deterministic=maybe"],
                     ["--context", "0"], ["--raw", "--instructions", "x"]):
            complaint(h.call("run", *args, "x"), 2, "--help")
        assert h.call("run", "--top-logprobs", "65", "x")[0] == 1
        complaint(h.call("run", "--temperature", "1000", "x"), 1, "temperature")
        # The daemon that runs now serves another model than this one.
        other = shutil.copy(model, os.path.join(h.path, "other.llmd"))
        complaint(h.call("run", "--model", other, "x"), 1, other, "'chat'")


@test
def global_options():
    with Home() as h:
        # Before the command, after it, among its arguments.
        for args in (["--timeout=0.2", "run"], ["run", "--timeout", "0.2"], ["run", "x", "--timeout=0.2", "y"]):
            p = h.popen(*args, stdin=subprocess.PIPE)
            assert p.wait(PATIENCE) == 124, args
            p.communicate()
        for args in (["--system", "status"], ["status", "--system"], ["--user", "run", "x"]):
            complaint(h.call(*args), 2, "exclude each other")
            if not os.path.exists("/run/llmd"):
                complaint(h.call(*args, any_scope=True), 3, "does not run")
        complaint(h.call("--socket=/x", "status", "--user", any_scope=True), 2, "--socket excludes")
        for args in (["--json=loud", "status"], ["status", "--session="], ["--timeout=inf", "status"], ["--timeout", "-1", "run", "x"]):
            complaint(h.call(*args), 2, "wants", "--help")
        complaint(h.call("statsu"), 2, "did you mean status?", "--help")
        complaint(h.call("stat"), 2, "did you mean status?")
        complaint(h.call("xyzzy"), 2, "unknown command xyzzy;")
        complaint(h.call(), 2, "no command")
        assert h.starts() == []
        for args in (["--version"], ["run", "--version"], ["status", "--version", "x"]):
            status, out, err = h.call(*args)
            assert status == 0 and re.fullmatch(r"llmctl \d+\.\d+\.\d+\n", out) and err == "", (args, out, err)
        assert h.call("--quiet", "-q", "--no-pager", "--no-legend", "--no-ask-password", "--json=off", "run",
                      "--max-tokens=1", "x")[0] == 0


@test
def interrupt_that_the_parent_ignores():
    with Home() as h:
        p = h.popen("run", stdin=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
        status = f"/proc/{p.pid}/status"

        def ignored():
            lines = dict(line.split(":\t") for line in open(status) if ":\t" in line)
            return int(lines["SigIgn"], 16) >> (signal.SIGINT - 1) & 1, int(lines["SigCgt"], 16) >> (signal.SIGALRM - 1) & 1

        while not ignored()[1]:
            pass  # until it has its own handlers
        assert ignored()[0] == 1
        p.send_signal(signal.SIGINT)
        p.stdin.write(b"x")
        p.stdin.close()
        assert p.wait(PATIENCE) == 0
        p.stdout.close()
        p.stderr.close()


@test
def default_models():
    with Home() as h:
        # Where the build put it, llmctl finds the demo model that the build has as well.
        alone = {"program": shutil.copy(LLMCTL, h.path)}
        env = {k: v for k, v in h.env.items() if k != "LLMD_MODEL"}
        env["LD_LIBRARY_PATH"] = os.path.dirname(LLMCTL)
        complaint(h.call("run", "x", env=env, **alone), 1, "llm-import", h.data)
        homeless = {k: v for k, v in env.items() if k not in ("HOME", "XDG_DATA_HOME")}
        own = pwd.getpwuid(os.geteuid()).pw_dir + "/.local/share/llmd/models"
        if not os.path.exists(own):  # whoever has models there keeps them to himself
            complaint(h.call("run", "x", env=homeless, **alone), 1, f" {own} ")
        models = os.path.join(h.data, "llmd", "models")
        os.makedirs(models)
        shutil.copy(model, os.path.join(models, "a.llmd"))
        shutil.copy(model, os.path.join(models, "b.llmd"))
        shutil.copy(model, os.path.join(models, "demo.llmd"))
        complaint(h.call("run", "x", env=env), 1, "several", "--model")
        os.symlink("b.llmd", os.path.join(models, "default.llmd"))
        assert h.call("run", "--max-tokens", "1", "x", env=env)[0] == 0
        assert "default" in h.call("status")[1]
    for names, chosen in ((["demo"], "demo"), (["demo", "a"], "a"), (["a", "demo"], "a")):
        with Home() as h:
            env = {k: v for k, v in h.env.items() if k != "LLMD_MODEL"}
            models = os.path.join(h.data, "llmd", "models")
            os.makedirs(models)
            for name in names:
                shutil.copy(model, os.path.join(models, name + ".llmd"))
            assert h.call("run", "--max-tokens", "1", "x", env=env)[0] == 0
            assert re.search(rf"^model +{chosen}$", h.call("status")[1], re.M)


@test
def demo_model():
    """What a newcomer sees first: no option, no model of his own."""
    demo = os.path.join(os.path.dirname(os.path.dirname(LLMCTL)), "models", "demo.llmd")
    assert os.path.exists(demo)
    with Home() as h:
        env = {k: v for k, v in h.env.items() if k != "LLMD_MODEL"}
        for prompt, answer in (("What is 47 + 38?", "85"), ("Hello, my name is Anna. What is my name?", "Anna")):
            status, out, err = h.call("run", prompt, env=env)
            assert status == 0 and answer in out, (out, err)


@test
def interrupted():
    with Home() as h:
        p = h.popen("run", *ENDLESS, "x")
        assert json.loads(p.stdout.readline())["type"] == "delta"
        p.send_signal(signal.SIGINT)
        p.stdout.close()  # else it may still be writing to us
        assert p.wait(PATIENCE) in (130, -signal.SIGPIPE)
        h.wait_sessions(0)
    # Interrupted while it waits for the daemon.
    with Home(endless_model) as h:
        p = h.popen("run", "--ignore-end", "x")
        p.stdout.read(1)
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=PATIENCE)
        assert p.returncode == 130 and err == b"", (p.returncode, err)
        h.wait_sessions(0)


@test
def interrupted_while_nobody_reads():
    with Home() as h:
        for args, number, status, complaint in (((), signal.SIGINT, 130, b""),
                                                (("--timeout", "3"), 0, 124, b"llmctl: no answer within the time given\n")):
            read, write = os.pipe()
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
            p = h.popen("run", *ENDLESS, *args, "x", stdout=write)
            while p.poll() is None and select.select([], [write], [], 0)[1]:
                pass  # until the pipe is full
            if number:
                p.send_signal(number)
            _, err = p.communicate(timeout=PATIENCE)
            assert (p.returncode, err) == (status, complaint), (p.returncode, err)
            os.close(read)
            os.close(write)
            h.wait_sessions(0)


@test
def interrupted_while_the_daemon_hangs():
    with Home() as h:
        env = dict(h.env, SYSTEMD_BUS_TIMEOUT="1h")
        p = h.popen("run", *ENDLESS, "x", env=env)
        p.stdout.readline()
        os.kill(h.starts()[0], signal.SIGSTOP)
        try:
            p.send_signal(signal.SIGINT)
            _, err = p.communicate(timeout=PATIENCE)
            assert (p.returncode, err) == (130, b""), (p.returncode, err)
        finally:
            p.kill()
            os.kill(h.starts()[0], signal.SIGCONT)
        h.wait_sessions(0)


@test
def output_that_does_not_block():
    with Home() as h:
        options = ("run", "--json", "--max-tokens", "300", "--ignore-end", "--top-logprobs", "64", "--seed", "1", "x")
        read, write = os.pipe()
        os.set_blocking(write, False)
        p = h.popen(*options, stdout=write)
        while p.poll() is None and select.select([], [write], [], 0)[1]:
            pass
        os.close(write)
        with os.fdopen(read, "rb") as f:
            out = f.read()
        _, err = p.communicate(timeout=PATIENCE)
        assert (p.returncode, err) == (0, b"") and len(out) > 1 << 17, (p.returncode, err, len(out))


@test
def killed():
    with Home() as h:
        for number in (signal.SIGKILL, signal.SIGTERM):
            p = h.popen("run", *ENDLESS, "x")
            p.stdout.readline()
            h.wait_sessions(1)
            p.send_signal(number)
            assert p.wait(PATIENCE) == -number
            h.wait_sessions(0)
            p.communicate()


@test
def quiet_sigpipe():
    with Home() as h:
        p = h.popen("run", *ENDLESS, "x", restore_signals=True)
        p.stdout.readline()
        p.stdout.close()
        assert p.wait(PATIENCE) == -signal.SIGPIPE and p.stderr.read() == b""
        h.wait_sessions(0)


@test
def answers_that_cannot_be_written():
    with Home() as h:
        for options in ((), ("--json",)):
            with open("/dev/full", "wb") as full:
                p = h.popen("run", *options, *ENDLESS[1:], "x", stdout=full)
                _, err = p.communicate(timeout=PATIENCE)
            assert (p.returncode, err) == (1, b"llmctl: cannot write: No space left on device\n"), (p.returncode, err)
        # A parent that ignores SIGPIPE, as Python does.
        p = h.popen("run", *ENDLESS, "x", restore_signals=False)
        p.stdout.readline()
        p.stdout.close()
        assert p.wait(PATIENCE) == 1 and p.stderr.read() == b"llmctl: cannot write: Broken pipe\n"
        p.stderr.close()
        h.wait_sessions(0)


@test
def out_of_time():
    with Home(endless_model) as h:
        h.call("run", "--max-tokens", "1", "x")  # the daemon is up
        p = h.popen("run", "--ignore-end", "--timeout", "0.5", "x")
        p.communicate(timeout=PATIENCE)
        assert p.returncode == 124, p.returncode
        # While it waits for input that does not come.
        p = h.popen("run", "--timeout", "0.2", "x", stdin=subprocess.PIPE)
        assert p.wait(PATIENCE) == 124
        p.communicate()
        h.wait_sessions(0)


@test
def busy():
    with Home() as h:
        h.call("run", "--max-tokens", "1", "x")
        clients = [h.client() for _ in range(4)]
        for c in clients:
            for _ in range(16):
                c.create()
        complaint(h.call("run", "x"), 75, "are open")
        for c in clients:
            c.close()
        h.wait_sessions(0)

        def admitted():  # once the daemon has seen others leave
            while True:
                try:
                    c = h.client()
                    c.manager("State")
                    return c
                except dbus.DBusException:
                    pass

        clients = [admitted() for _ in range(64)]
        complaint(h.call("run", "--max-tokens", "1", "x"), 75, "no more connections")
        for c in clients:
            c.close()
        result = (75,)
        while result[0] == 75:
            result = h.call("run", "--max-tokens", "1", "x")
        assert result[0] == 0, result


@test
def together_one_daemon():
    with Home() as h:
        running = [h.popen("run", "--max-tokens", "5", "--seed", "1", "--ignore-end", "x") for _ in range(8)]
        answers = [(p.communicate(timeout=PATIENCE), p.returncode) for p in running]
        assert all(a == answers[0] for a in answers) and answers[0][1] == 0, answers
        assert len(h.starts()) == 1, h.starts()
        # And after it was killed, leaving its socket.
        fd = os.pidfd_open(h.starts()[0])
        os.kill(h.starts()[0], signal.SIGKILL)
        select.select([fd], [], [])
        os.close(fd)
        running = [h.popen("run", "--max-tokens", "5", "--seed", "1", "--ignore-end", "x") for _ in range(8)]
        assert [(p.communicate(timeout=PATIENCE), p.returncode) for p in running] == answers
        assert len(h.starts()) == 2, h.starts()


@test
def closed_standard_files():
    with Home() as h:
        # Whatever is opened instead must not be written to, by llmctl or by the daemon it starts.
        p = h.popen("run", "--max-tokens", "3", "x", preexec_fn=lambda: [os.close(fd) for fd in range(3)])
        p.communicate(timeout=PATIENCE)
        assert p.returncode == 1
        assert os.path.getsize(h.socket + ".lock") == 0 and "serving" in open(h.socket + ".log").read()
        p = h.popen("run", "--max-tokens", "3", "x", preexec_fn=lambda: os.close(1))
        assert (p.communicate(timeout=PATIENCE)[1], p.returncode) == (b"llmctl: cannot write: Bad file descriptor\n", 1)
        h.wait_sessions(0)


@test
def daemon_inherits_nothing():
    with Home() as h:
        read, write = os.pipe()
        p = h.popen("run", "--max-tokens", "1", "x", pass_fds=[write])
        os.close(write)
        p.communicate(timeout=PATIENCE)
        assert p.returncode == 0
        os.set_blocking(read, False)
        with h.client() as c:
            assert c.manager("State") == "ready"
            assert os.read(read, 1) == b"", "nobody has the other end any more"
        os.close(read)


def has_open(p, path):
    for fd in os.listdir(f"/proc/{p.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/{p.pid}/fd/{fd}") == path:
                return True
    return False


@test
def daemon_dies():
    with Home() as h:
        p = h.popen("run", *ENDLESS, "x")
        p.stdout.readline()
        os.kill(h.starts()[0], signal.SIGKILL)
        out, err = p.communicate(timeout=PATIENCE)
        assert p.returncode == 1 and b"went away" in err, (p.returncode, err)
        # One that is on its way out holds its lock, and does not listen any more: the next one waits for that.
        lock = open(h.socket + ".lock")
        fcntl.flock(lock, fcntl.LOCK_EX)  # as soon as it can be had
        p = h.popen("run", *ENDLESS, "x")
        while not has_open(p, h.socket + ".lock"):
            assert p.poll() is None, p.communicate()
        assert len(h.starts()) == 1
        lock.close()
        assert p.stdout.readline(), p.communicate()
        os.kill(h.starts()[1], signal.SIGTERM)
        out, err = p.communicate(timeout=PATIENCE)
        assert p.returncode == 1 and b"daemon ended" in err or out.endswith(b'"shutdown"}\n'), (p.returncode, err)


@test
def terminal():
    with Home() as h:
        # All 32 control characters come up among 500 random bytes.
        options = ("--raw", "--max-tokens", "500", "--seed", "1", "--ignore-end", "--temperature", "2", "x")
        plain = h.call("run", *options)[1]
        assert any(ord(c) < 0x20 and c not in "\n\t" for c in plain)
        master, slave = pty.openpty()
        import termios
        mode = termios.tcgetattr(slave)
        mode[1] &= ~termios.OPOST
        termios.tcsetattr(slave, termios.TCSANOW, mode)
        p = h.popen("run", *options, stdout=slave)
        os.close(slave)
        shown = b""
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:
                break  # the other end is closed
            shown += data
        os.close(master)
        assert p.wait(PATIENCE) == 0
        p.stderr.close()
        want = "".join("\ufffd" if (ord(c) < 0x20 and c not in "\n\t") or 0x7f <= ord(c) < 0xa0 else c for c in plain)
        if not want.endswith("\n"):
            want += "\n"
        assert shown.decode() == want, (shown.decode(), want)


main()
