#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""What happens to a machine, and to files, happens to the real daemon: nothing is lost, nobody else is hurt, and whoever
is concerned hears of it by name.

  test-faults.py LLMD LLMCTL MAKE_CHAT_MODEL [TEST...]

One function a test. Nothing here is decided by time.
"""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
try:
    import dbus
    from daemon_client import PATIENCE, Daemon, make_endless_model, read_all, until
except ImportError as e:
    print(f"skipped: {e} (python3-dbus)")
    sys.exit(77)

LLMD, LLMCTL, MAKE_CHAT_MODEL = (os.path.abspath(p) for p in sys.argv[1:4])
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
    """A fault whose signal is blocked ends the process, and which thread has the first one is chance."""
    with Private(chat, "--threads", "2") as d, d.connect() as c:
        c.create().run(SEEDED, prompt="Hello")
        blocked = {}
        for tid in os.listdir(f"/proc/{d.process.pid}/task"):
            with open(f"/proc/{d.process.pid}/task/{tid}/status") as f:
                lines = dict(line.split(":", 1) for line in f)
            blocked[lines["Name"].strip()] = int(lines["SigBlk"], 16)
        assert {"llmd-engine", "llmd-compute"} <= set(blocked), blocked
        for name, mask in blocked.items():
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
    env = dict(os.environ, XDG_RUNTIME_DIR=where, HOME=where, LLMD=LLMD)
    env.pop("NOTIFY_SOCKET", None)
    with subprocess.Popen([LLMCTL, "--private", "run", "--model", model, "--ignore-end", "Hello"], env=env,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        assert p.stdout.read(20)
        os.truncate(model, 4096)
        p.stdout.read()
        said = p.stderr.read().decode()
        assert p.wait(PATIENCE) not in (0, 2), said
    assert "model's file changed" in said, said


def main():
    global chat, endless
    names = sys.argv[4:]
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
