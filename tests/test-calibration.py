# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""llmd --calibrate, what a daemon makes of it, and what llmctl status says of that, with the device in software.

  test-calibration.py LLMCTL LLMD MAKE_CHAT_MODEL    77: there is no such device
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
try:
    from daemon_client import Daemon, until
except ImportError as e:
    print(f"skipped: {e} (python3-dbus)")
    sys.exit(77)

LLMCTL, LLMD, MAKE_MODEL = map(os.path.abspath, sys.argv[1:4])
PATIENCE = 200
folder = tempfile.mkdtemp(prefix="calibration-test-")
model, cache, socket = (os.path.join(folder, n) for n in ("chat.llmd", "cache", "socket"))
kept = os.path.join(cache, "llmd", "calibration.json")
env = dict(os.environ, XDG_CACHE_HOME=cache, XDG_RUNTIME_DIR=folder, HOME=folder)


def calibrate(*args, **more):
    return subprocess.run([LLMD, "--private", "--no-bus", "--device=llvmpipe", "--calibrate", *args], env=dict(env, **more),
                          capture_output=True, text=True, timeout=PATIENCE)


class Calibrated(Daemon):
    def __init__(self, *args):
        super().__init__(LLMD, model, socket, "--no-bus", "--backend=auto", "--device=llvmpipe", "--idle-timeout=0", *args, env=env)

    def wait_said(self, text):
        until(lambda: text in self.log() or self.process.poll() is not None, self.log)
        assert text in self.log(), self.log()

    def ctl(self, *args):
        p = subprocess.run([LLMCTL, "--socket", socket, *args], env=env, capture_output=True, text=True, timeout=PATIENCE)
        assert p.returncode == 0, (p.stderr, self.log())
        return p.stdout

    def status(self):
        return json.loads(self.ctl("status", "--json"))


def the_measurement(change=None):
    with open(kept) as f:
        all = json.load(f)
    (m,) = all["measured"].values()
    if change:
        change(m)
        with open(kept, "w") as f:
            json.dump(all, f)
    return m


def near(a, b):
    return abs(a - b) <= 1e-5 * abs(b)


def check_command():
    p = calibrate("--model", model)
    if "no GPU is used" in p.stderr:
        print("skipped: " + p.stderr.strip(), file=sys.stderr)
        sys.exit(77)
    assert p.returncode == 0, p.stderr
    lines = p.stdout.splitlines()
    assert lines[0].startswith("cpu/") and "llvmpipe" in lines[0], lines
    assert lines[1].split() == ["tokens/s", "prompts", "one", "session", "eight"], lines
    assert lines[2].startswith("CPU ") and lines[3].startswith("GPU, ") and lines[4].startswith("both ") and lines[5].startswith("prompts: "), lines
    m = the_measurement()
    assert "llvmpipe" in m["device"] and m["gpu-activations"] in ("f32", "int8")
    for lane in "cpu", "gpu":
        assert all(m[lane][rate] > 0 for rate in ("prefill", "decode", "decode-many")), m
    assert ["%.1f" % m["cpu"][r] for r in ("prefill", "decode", "decode-many")] == lines[2].split()[1:], (m, lines)
    assert os.stat(kept).st_mode & 0o777 == 0o600

    # The loader forgets some bytes of a device that was found and not opened; and is gone when that is noticed.
    p = calibrate("--model", os.path.join(folder, "none.llmd"), ASAN_OPTIONS=env.get("ASAN_OPTIONS", "") + ":detect_leaks=0")
    assert p.returncode == 1 and "none.llmd" in p.stderr and p.stdout == "", p
    p = calibrate("--model", model, "--backend=cpu")
    assert p.returncode == 0 and "GPU" not in p.stdout and "there is no GPU to measure" in p.stderr, p


def check_known():
    """What is known is not measured, and decides."""
    def a_fine_gpu(m):
        m["cpu"].update({"prefill": 10, "decode": 20, "decode-many": 30})
        m["gpu"].update({"prefill": 100, "decode": 5, "decode-many": 6})
        m.update({"both-prefill": 50, "both-decode": 7})

    m = the_measurement()
    with Calibrated() as d:
        d.wait_said("the GPU takes part")
        s = d.status()
        assert s["gpu_state"] == "in-use" and s["gpu_reason"] is None and "llvmpipe" in s["gpu"], s
        for lane in "cpu", "gpu":
            for rate in "prefill", "decode", "decode-many":
                assert near(s[f"{lane}_{rate.replace('-', '_')}_measured"], m[lane][rate]), (s, m)
        assert near(s["both_decode_measured"], m["both-decode"]) and "tokens/s" in s["placement"], s
        d.ctl("run", "--max-tokens=3", "--ignore-end", "Hello")
        assert "measured:" not in d.log()
    the_measurement(a_fine_gpu)
    with Calibrated() as d:
        d.wait_said("the GPU takes part")
        d.ctl("run", "--max-tokens=3", "--ignore-end", "--deterministic=no", "Hello")
        s = d.status()
        assert s["placement"] == "prompts: GPU (100 tokens/s, CPU 10.0); decoding: CPU (20.0, GPU 5.0)", s
        assert s["gpu_prompt_tokens"] > 0 and s["gpu_completion_tokens"] == 0 and s["cpu_completion_tokens"] == 2, s
        assert s["cpu_prompt_tokens"] == 0, s
        lines = dict((x[:16].strip(), x[16:].strip()) for x in d.ctl("status").splitlines())
        assert lines["who does what"] == s["placement"] and lines["GPU is"] == "in use", lines
        assert lines["GPU"] == s["gpu"] and lines["read by GPU"] == str(s["gpu_prompt_tokens"]), lines
    with Calibrated("--backend=cpu") as d:
        d.ctl("run", "--max-tokens=3", "Hello")
        s = d.status()
        assert s["gpu_state"] == "none" and s["gpu"] is None, s
        assert "GPU" not in d.ctl("status")


def check_damaged():
    with open(kept, "r+") as f:
        f.truncate(100)
    with Calibrated() as d:
        d.wait_said("is measured again: " + kept)
        d.wait_said("the GPU takes part")
        d.ctl("run", "--max-tokens=3", "Hello")  # in between
        d.wait_said("measured: prompts:")
        s = d.status()
        assert s["gpu_state"] == "in-use" and s["gpu_prefill_measured"] > 0, s
    assert the_measurement()["gpu"]["prefill"] > 0


try:
    subprocess.run([MAKE_MODEL, model], check=True)
    check_command()
    check_known()
    check_damaged()
finally:
    shutil.rmtree(folder)
