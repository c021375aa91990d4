#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""A GPU that fails, under a daemon that uses it: the CPU goes on, no request is lost, and the log and Backends say so.

  test-gpu-faults.py LLMD MAKE_CHAT_MODEL VULKAN_FAULTS [NAME]...

The GPU is mesa's software driver behind tests/vulkan-faults.c. Seeded requests give what a daemon without a GPU gives them:
always in hybrid mode, where they are the CPU's alone, and after the failure of a GPU that had them.
"""
import contextlib
import os
import shutil
import signal
import sys
import tempfile

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
try:
    import dbus
    from daemon_client import Daemon, read_all, until
except ImportError as e:
    print(f"skipped: {e} (python3-dbus)")
    sys.exit(77)
import models
from vulkan_faults import DEVICE, Faults

try:
    models.need_gpu()
except models.Unavailable as e:
    print(f"skipped: {e}")
    sys.exit(models.SKIPPED)

LLMD, MAKE_CHAT_MODEL, LAYER = (os.path.abspath(p) for p in sys.argv[1:4])
N = 40
LONG_PROMPT = "Tell me all that you know of the sea. " * 10
SAID = "the GPU has failed ("

folder = tempfile.mkdtemp(prefix="llmd-gpu-faults-")
model = os.path.join(folder, "chat.llmd")
right = {}
tests = []


def seeded(seed, n=N):
    return {"seed": dbus.UInt64(seed), "temperature": 1.0, "ignore-end": True, "max-tokens": dbus.UInt32(n)}


def free(n=4):
    return {"temperature": 1.0, "ignore-end": True, "max-tokens": dbus.UInt32(n)}


class Failing(Daemon):
    def __init__(self, backend, kind=None, joins=True, leaks=False):
        self.where = tempfile.mkdtemp(dir=folder)
        self.joins = joins
        self.faults = Faults(LAYER, os.path.join(self.where, "faults"))
        if kind:
            self.faults.arm(kind)
        env = self.faults.env()
        if leaks:  # of a device that hangs nothing is given back
            env["ASAN_OPTIONS"] += ":detect_leaks=0"
        super().__init__(LLMD, model, os.path.join(self.where, "llmd.socket"), "--backend", backend, "--device", DEVICE,
                         "--activations", "f32", env=env)

    def __enter__(self):
        super().__enter__()
        if self.joins:
            until(lambda: "the GPU takes part" in self.log() or self.process.poll() is not None, self.log)
            with self.connect() as c:
                assert any("vulkan" in b and "not used" not in b for b in c.manager("Backends")), c.manager("Backends")
        return self

    def __exit__(self, kind, value, trace):
        super().__exit__(kind, value, trace)
        if kind is None:
            assert self.faults.touched == 0, "what a device that hangs may still use was given back"

    def without(self, c, *said):
        """It goes on without a GPU, and says why."""
        until(lambda: any(b.startswith("vulkan, not used: ") for b in c.manager("Backends")), lambda: c.manager("Backends"))
        for text in said:
            assert text in self.log(), self.log()
        for seed in right:
            check_right(c.create().run(seeded(seed), prompt=f"Hello {seed}"), seed)
        assert "vulkan" not in c.manager("Backends")[0], c.manager("Backends")


def check_whole(answer):
    text, records = answer
    assert records[-1]["type"] == "end" and records[-1]["reason"] == "length", records
    return text


def check_right(answer, seed):
    text = check_whole(answer)
    assert text == right[seed], (seed, text, right[seed])


def expect():
    with Daemon(LLMD, model, os.path.join(folder, "cpu.socket"), "--backend", "cpu", "--activations", "f32") as d, d.connect() as c:
        for seed in range(3):
            right[seed] = check_whole(c.create().run(seeded(seed), prompt=f"Hello {seed}"))


def at_work(backend, kind, after, *said, release=False):
    """It fails in the midst of requests; after: how much goes well before, 0: nothing."""
    with Failing(backend, None if after else kind, leaks=kind == "hang") as d, d.connect() as c, contextlib.ExitStack() as stack:
        before = d.faults.submits
        streams = [(stack.enter_context(c.create().generate(seeded(seed), prompt=f"Hello {seed}")), seed) for seed in right]
        if after:
            d.faults.arm(kind, after)
        others = [c.create() for _ in range(3)]
        first = [stack.enter_context(s.generate(free(), prompt=LONG_PROMPT)) for s in others]
        for f, seed in streams:
            check_right(read_all(f), seed)
        for f in first:
            check_whole(read_all(f))
        assert d.faults.submits > before or not after, "the GPU was given nothing"
        # Whatever came too early for it: while somebody decodes, prompts are the GPU's.
        while not d.faults.struck:
            with c.create().generate(free(200), prompt="Hello") as decodes:
                check_whole(c.create().run(free(), prompt=LONG_PROMPT))
                check_whole(read_all(decodes))
        until(lambda: SAID in d.log(), d.log)
        d.without(c, *said)
        if release:  # what the GPU was given up with is written now, behind everybody's back
            d.faults.release = 1
            until(lambda: d.faults.release == 2)
            d.without(c)
        for s in others:  # sessions of which it had computed something
            check_whole(s.run(free(), prompt="And then?"))
        if kind in ("lost-at-submit", "memory-at-submit"):
            come_back(d, c, backend)
        elif release:
            stay_away(d)
    assert d.log().count(SAID) == 1, d.log()


def come_back(d, c, backend):
    """Whatever it was is over, and an administrator says so."""
    d.faults.fault = 0
    d.process.send_signal(signal.SIGHUP)
    until(lambda: d.log().count("the GPU takes part") == 2, d.log)
    until(lambda: not any("not used" in b for b in c.manager("Backends")), lambda: c.manager("Backends"))
    assert "vulkan (" in c.manager("Backends")[0], c.manager("Backends")
    before = d.faults.submits
    for seed in right:
        check_right(c.create().run(seeded(seed), prompt=f"Hello {seed}"), seed)
    while backend == "hybrid" and d.faults.submits == before:
        with c.create().generate(free(200), prompt="Hello") as decodes:
            check_whole(c.create().run(free(), prompt=LONG_PROMPT))
            check_whole(read_all(decodes))
    assert d.faults.submits > before and d.log().count(SAID) == 1, d.log()


def stay_away(d):
    """Who hangs may still write to what it was given; and who was lost with the KV pool in its memory is held by that."""
    assert "tried again" not in d.log(), d.log()
    d.process.send_signal(signal.SIGHUP)
    until(lambda: "the configuration was read again" in d.log(), d.log)
    d.without(d.connect())
    assert d.log().count("the GPU takes part") == 1 and "the GPU is not used" not in d.log(), d.log()


def at_the_start(backend, kind, *said):
    with Failing(backend, kind, joins=False) as d, d.connect() as c:
        until(lambda: d.faults.struck > 0)
        d.without(c, *said)


def test(name, f, *args, **kw):
    tests.append((name, lambda: f(*args, **kw)))


test("lost at a submission, vulkan", at_work, "vulkan", "lost-at-submit", 5, "lost")
test("lost while it computes, hybrid", at_work, "hybrid", "lost-at-wait", 1, "lost")
test("out of memory at a submission, hybrid", at_work, "hybrid", "memory-at-submit", 1, "memory")
test("hangs, vulkan", at_work, "vulkan", "hang", 4, "answer", release=True)
test("hangs, hybrid", at_work, "hybrid", "hang", 1, "answer", release=True)
test("no device", at_the_start, "vulkan", "no-device")
test("lacks what is needed", at_the_start, "hybrid", "no-addresses", "buffer device addresses")
test("the driver refuses", at_the_start, "vulkan", "refused", "refuses")
test("out of memory from the start", at_the_start, "hybrid", "memory", "memory")
test("shaders cannot be compiled", at_work, "vulkan", "pipeline", 0, "memory")


def copies():
    """A driver that cannot import memory has copies of the weights and the KV pages: nothing else changes."""
    with Failing("vulkan", "no-import") as d, d.connect() as c:
        assert d.faults.struck > 0
        for seed in right:
            check_right(c.create().run(seeded(seed), prompt=f"Hello {seed}"), seed)
        assert d.faults.submits > N
        d.faults.arm("lost-at-submit")
        check_right(c.create().run(seeded(0), prompt="Hello 0"), 0)
        d.without(c, "lost")
        stay_away(d)


test("a driver that cannot import memory", copies)


def main():
    failed = 0
    wanted = sys.argv[4:]
    try:
        import subprocess
        subprocess.run([MAKE_CHAT_MODEL, model], check=True)
        expect()
        for name, f in tests:
            if wanted and not any(w in name for w in wanted):
                continue
            try:
                f()
                print(f"{name} ... ok", flush=True)
            except Exception:  # pylint: disable=broad-except
                import traceback
                traceback.print_exc()
                print(f"{name} ... FAILED", flush=True)
                failed += 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
