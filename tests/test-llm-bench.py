#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""llm-bench: its options, that the figures of its JSON fit each other and the model, and --compare.

  test-llm-bench.py LLM_BENCH MAKE_MODEL DEMO_MODEL

How fast anything was decides nothing.
"""
import copy
import json
import math
import os
import signal
import subprocess
import sys
import tempfile

CONTEXT = 256  # of make-model's models
OPTIONS = ["--prompt", "5,40", "--depth", "8,70", "--sessions", "3,1,3", "--decode", "4", "--repetitions", "2", "--probe", "4",
           "--accuracy", "20"]


def run(*command, status=0, **kw):
    p = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=250, **kw)
    assert p.returncode == status, (command, p.returncode, p.stderr)
    return p.stdout.decode(), p.stderr.decode()


def close(a, b):
    return math.isclose(a, b, rel_tol=1e-9)


class Test:
    def __init__(self, bench, demo, work):
        self.bench, self.demo, self.work = bench, demo, work
        self.a, self.b = (os.path.join(work, f"{n}.llmd") for n in "ab")

    def measure(self, *options, model=None):
        out, err = run(self.bench, "--json", *options, model or self.a)
        assert err == "", err
        return json.loads(out)

    def write(self, name, report):
        path = os.path.join(self.work, name)
        with open(path, "w") as f:
            json.dump(report, f)
        return path

    def test_json(self):
        got = self.measure(*OPTIONS, "--threads", "1")
        assert got["format"] == "llm-bench 1" and got["complete"] is True
        assert got["model"]["path"] == self.a and got["model"]["bytes"] == os.path.getsize(self.a)
        with open(self.a, "rb") as f:
            assert got["model"]["header_sha256"].encode() in f.read(200)
        assert got["engine"]["description"].startswith(f"cpu/{got['engine']['level']}, 1 thread, int8")
        assert (got["engine"]["activations"], got["engine"]["kv"]) == ("int8", "f16")

        limits, = got["limits"]
        assert limits["threads"] == 1
        assert limits["read_bytes_per_second"] == max(limits["read_before_max_bytes_per_second"],
                                                      limits["read_after_max_bytes_per_second"])
        for key in "before", "after":
            assert 0 < limits[f"read_{key}_median_bytes_per_second"] <= limits[f"read_{key}_max_bytes_per_second"]

        assert [r["prompt_tokens"] for r in got["prefill"]] == [5, 40]
        for r in got["prefill"]:
            assert close(r["tokens_per_second"], r["prompt_tokens"] / r["seconds"]) and r["repetitions"] == 2
            assert r["tokens_per_second_least"] <= r["tokens_per_second"] <= r["tokens_per_second_most"]
            assert close(r["operations_per_second"], r["operations_per_token"] * r["tokens_per_second"])
        # every number of sessions at the least depth, every depth with the least number
        assert [(r["depth_tokens"], r["sessions"]) for r in got["decode"]] == [(8, 1), (8, 3), (70, 1)]
        for r in got["decode"]:
            assert close(r["tokens_per_second"], r["sessions"] / r["seconds_per_step"])
            assert close(r["tokens_per_second_each"], 1 / r["seconds_per_step"])
            assert close(r["read_share"], r["bytes_per_second"] / limits["read_bytes_per_second"])
            assert 0 < r["bytes_per_step"] < got["model"]["bytes"]
        one, three, deep = got["decode"]
        assert one["bytes_per_step"] < three["bytes_per_step"] < 3 * one["bytes_per_step"]
        assert one["bytes_per_step"] < deep["bytes_per_step"]
        assert one["operations_per_step"] < three["operations_per_step"]
        for r in got["decode"]:
            parts = [x for x in got["operations"] if x["phase"] == "decode" and
                     (x["tokens"], x["sessions"]) == (r["depth_tokens"], r["sessions"])]
            assert close(sum(x["bytes"] or 0 for x in parts), r["bytes_per_step"])
            assert close(sum(x["operations"] or 0 for x in parts), r["operations_per_step"])
            assert {"q", "k", "v", "o", "gate", "head", "attention", "between operations", "sampling, besides"} <= \
                {x["operation"] for x in parts}
            assert close(sum(x["time_share"] for x in parts if x["operation"] != "sampling, besides"), 1)
        assert all(got["memory"][k] > 0 for k in ("anonymous_bytes", "file_bytes", "kv_bytes_used", "kv_bytes_max",
                                                  "scratch_bytes", "peak_resident_bytes"))
        assert got["accuracy"]["positions"] == 20 and 0 < got["accuracy"]["kld_mean_nats"] <= got["accuracy"]["kld_max_nats"]

        again = self.measure(*OPTIONS, "--threads", "1")
        for part in "prefill", "decode":
            for x, y in zip(got[part], again[part]):
                assert all(x[k] == y[k] for k in ("operations_per_token", "bytes_per_step") if k in x)
        assert got["accuracy"] == again["accuracy"]
        return got

    def test_exact(self):
        """The definition against itself; nothing that was not asked for."""
        got = self.measure("--prompt", "9", "--depth", "9", "--sessions", "1", "--decode", "2", "--repetitions", "1", "--probe", "0",
                           "--accuracy", "7", "--activations", "f32")
        assert got["accuracy"]["kld_mean_nats"] < 1e-9 and got["accuracy"]["same_top_share"] == 1
        assert got["limits"] == [] and got["prefill"][0]["multiply_share"] is None and got["decode"][0]["read_share"] is None
        assert got["engine"]["kv"] == "f32"

    def test_load(self):
        """All ways, and a cold start; as nobody the kernel forgets this file only."""
        out, err = run(self.bench, "load", "--rounds", "2", "--prompt", "3", "--json", self.demo, "--", "--threads", "1")
        got = json.loads(out)
        assert got["format"] == "llm-bench load 1" and got["rounds"] == 2 and got["prompt_words"] == 3
        assert got["model"]["bytes"] == os.path.getsize(self.demo) >= got["model"]["read_bytes"] > 0
        assert got["everything_forgotten"] == (os.geteuid() == 0)
        ways = {x["method"]: x for x in got["reading"]}
        missing = [line for line in err.splitlines() if "is left out" in line]
        assert len(ways) + len(missing) == 8 and {"faults", "faults_huge_pages", "read"} <= set(ways), (out, err)
        for x in ways.values():
            assert x["bytes_per_second"] >= x["bytes_per_second_median"] > 0 and x["processor_seconds"] >= 0
        best = max(x["bytes_per_second"] for x in ways.values() if x["method"] != "direct")
        for x in ways.values():
            share = None if x["method"] == "direct" else x["bytes_per_second"] / best
            assert (share is None) == (x["share_of_best"] is None) and (share is None or close(share, x["share_of_best"]))
        assert got["method"] in ("ring_populate", "populate_thread")
        assert close(got["share_of_best"], ways[got["method"]]["share_of_best"])
        start = {x["what"]: x for x in got["start"]}
        assert list(start) == ["cold_ready", "cold_first_token", "warm_ready", "warm_first_token", "warm_request"]
        assert all(0 < x["seconds_least"] <= x["seconds"] for x in start.values())
        assert start["cold_ready"]["seconds_least"] < start["cold_first_token"]["seconds_least"]
        read = got["model"]["read_bytes"] / best
        assert close(got["first_token_ratio"],
                     start["cold_first_token"]["seconds_least"] / max(read, start["warm_first_token"]["seconds_least"]))

        out, err = run(self.bench, "load", "--rounds", "1", "--no-start", self.demo)
        assert "MB are too few to tell" in err, err
        assert "OF BEST" in out and "which llmd uses, reaches" in out and "first token" not in out
        for wrong, status in (([], 2), (["--rounds", "0", self.demo], 2), ([self.demo, self.demo], 2), (["--no-start", "--llmd", "x", self.demo], 2),
                              (["/nonexistent"], 1), ([__file__], 1), (["--no-start", self.demo, "--", "--threads"], 2),
                              (["--llmd", "/nonexistent", self.demo], 1)):
            out, err = run(self.bench, "load", *wrong, status=status)
            assert out == "" and len([x for x in err.splitlines() if "is left out" not in x]) <= 2, err

    def test_threads(self):
        if len(os.sched_getaffinity(0)) < 2:
            return
        got = self.measure(*OPTIONS, "--threads", "2,1")
        assert [x["threads"] for x in got["limits"]] == [1, 2]
        assert len(got["prefill"]) == 4 and len(got["decode"]) == 6 and len(got["scaling"]) == 5
        for r in got["scaling"]:
            assert (r["threads"], r["against_threads"]) == (2, 1)
            key = "depth_tokens" if r["phase"] == "decode" else "prompt_tokens"
            one, two = (x for x in got[r["phase"]] if x[key] == r["tokens"] and x.get("sessions", 1) == r["sessions"])
            assert close(r["ratio"], two["tokens_per_second"] / one["tokens_per_second"])

    def test_tables(self):
        out, err = run(self.bench, *OPTIONS, "--threads", "1", self.demo)
        assert err == "" and "of text" in out
        for text in ("KLD ", "Limits of the machine", "Prefill", "Decode", "A prompt of 40 tokens", "A step of 1 session at depth 8",
                     "A step of 3 sessions at depth 8, 1 thread\n", "OF READ, OF MUL:"):
            assert text in out, (text, out)
        assert max(map(len, out.splitlines())) <= 140, out

    def test_compare(self, report):
        def compare(old, new, status=0, options=()):
            return run(self.bench, *options, "--compare", self.write("old.json", old), self.write("new.json", new), status=status)

        other = copy.deepcopy(report)
        other["prefill"][1]["tokens_per_second"] *= 2
        other["decode"][2]["tokens_per_second"] *= 0.5
        other["decode"][0]["sessions"] = 7  # meets nothing
        other["accuracy"]["kld_mean_nats"] *= 4
        out, err = compare(report, other, options=["--json"])
        lines = {x["what"]: x for x in json.loads(out)}
        assert err == "" and lines["prefill 1 thread, 40 tokens: tokens_per_second"]["ratio"] == 2
        assert lines["prefill 1 thread, 5 tokens: tokens_per_second"]["ratio"] == 1
        assert lines["decode 1 thread, 70 deep, 1 session: tokens_per_second"]["ratio"] == 0.5
        assert lines["accuracy: kld_mean_nats"]["ratio"] == 4
        assert not any("7 sessions" in x or "8 deep, 1 " in x for x in lines)
        for x in lines.values():
            assert close(x["ratio"], x["new"] / x["old"])
        out, err = compare(report, other)
        assert err == "" and "2.000" in out and len(out.splitlines()) == 3 + len(lines), out

        faster = copy.deepcopy(report)
        faster["limits"][0]["read_bytes_per_second"] *= 1.5
        assert "reads 1.50 times as fast" in compare(report, faster)[0]
        elsewhere = copy.deepcopy(report)
        elsewhere["machine"]["cpu"] = "Abacus"
        out, err = compare(elsewhere, report)
        assert "another machine, 'Abacus'" in err and len(err.splitlines()) == 1 and "1.000" in out

        for part, key, value, message in (("engine", "level", "avx1", "another CPU level: avx1 there"),
                                          ("engine", "activations", "f32", "other activations"), ("engine", "kv", "f32", "other K and V"),
                                          ("model", "header_sha256", "00", "another model")):
            wrong = copy.deepcopy(report)
            wrong[part][key] = value
            out, err = compare(wrong, report, status=1)
            assert out == "" and message in err and len(err.splitlines()) == 1, err
        huge = copy.deepcopy(report)
        huge["prefill"][0].update(threads=1e300, tokens_per_second=1e-300)
        huge["decode"][0]["tokens_per_second"] = 1e-300
        huge["decode"][1]["tokens_per_second"] = 1e300
        out, err = compare(huge, huge)
        assert err == "" and "prefill 1e+300 threads, 5 tokens: tokens_per_second" in out
        other = copy.deepcopy(huge)
        other["prefill"][0]["tokens_per_second"] = 1e300  # no ratio
        other["decode"][0]["tokens_per_second"] = 1
        other["decode"][1]["tokens_per_second"] = 1e290
        out, err = compare(huge, other)
        assert err == "" and "1e+300 threads, 5 tokens: operations" in out and "1e+300 threads, 5 tokens: tokens_" not in out, out
        assert " 1e+300\n" in out and " 1e-10\n" in out, out
        wrong = copy.deepcopy(report)
        for r in wrong["prefill"] + wrong["decode"]:
            r["threads"] = 99
        assert "no line with the same" in compare(wrong, report, status=1)[1]
        for wrong in ({}, [], {"format": "llm-bench 0"}, {"format": 1}, {**report, "prefill": 3, "decode": [3, {}], "accuracy": [],
                                                                      "memory": None, "limits": {"threads": 1}}):
            out, err = compare(wrong, report, status=1)
            assert out == "" and len(err.splitlines()) == 1, err

        # against a new run; what cannot be compared is refused before anything is measured
        old = self.write("old.json", report)
        out, err = run(self.bench, "--json", *OPTIONS, "--threads", "1", "--compare", old, self.a)
        got = json.loads(out)
        ratios = {x["what"]: x["ratio"] for x in got["comparison"]}
        assert err == "" and ratios["decode 1 thread, 8 deep, 3 sessions: bytes_per_step"] == 1
        assert close(ratios["prefill 1 thread, 5 tokens: tokens_per_second"],
                     got["prefill"][0]["tokens_per_second"] / report["prefill"][0]["tokens_per_second"])
        # what was measured is shown also where nothing of it is in the old file
        out, err = run(self.bench, "--json", "--prompt", "6", "--depth", "9", "--sessions", "1", "--decode", "1", "--repetitions", "1",
                       "--probe", "0", "--accuracy", "0", "--threads", "1", "--compare", old, self.a, status=1)
        assert "no line with the same" in err and json.loads(out)["prefill"][0]["prompt_tokens"] == 6
        long = ["--repetitions", "1000", "--decode", "100", "--compare", old]
        assert "another model" in run(self.bench, *long, "--threads", "1", self.b, status=1)[1]
        assert "another CPU level" in run(self.bench, *long, "--threads", "1", "--cpu-level", "reference", self.a, status=1)[1]
        if len(os.sched_getaffinity(0)) > 1:
            assert "nothing with as many threads" in run(self.bench, *long, "--threads", "2", self.a, status=1)[1]

    def test_interrupt(self):
        """What was finished is shown; here the prompts, and the case at which the signal finds it or not."""
        p = subprocess.Popen([self.bench, "--json", "--threads", "1", "--prompt", "5", "--probe", "0", "--accuracy", "0",
                              "--repetitions", "1000", "--decode", "100", self.a], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while True:  # until it has its handler
            with open(f"/proc/{p.pid}/status") as f:
                caught = next(int(x.split()[1], 16) for x in f if x.startswith("SigCgt"))
            if caught >> (signal.SIGINT - 1) & 1:
                break
            assert p.poll() is None
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=120)
        got = json.loads(out)
        assert p.returncode == -signal.SIGINT and b"interrupted" in err and got["complete"] is False, (p.returncode, err)
        assert len(got["decode"]) < 3

    def test_refusals(self):
        for status, message, *command in (
                (1, "pass the context of", "--depth", "250", self.a), (1, "passes the context of", "--prompt", "257", self.a),
                (2, "no MODEL given"), (2, "one MODEL only", self.a, self.b),
                (2, "--prompt '': a number", "--prompt", "5,,6", self.a),
                (2, "--depth '0': a number", "--depth", "0", self.a),
                (2, "--sessions '65': a number", "--sessions", "65", self.a),
                (2, "--threads '0': a number", "--threads", "1,0", self.a),
                (2, "at most 16 numbers", "--prompt", ",".join(map(str, range(1, 18))), self.a),
                (1, "may use", "--threads", "1024", self.a),
                (1, "/no/such.json: cannot read", "--compare", "/no/such.json", self.a),
                (1, "not what 'llm-bench --json'", "--compare", self.a, self.a),
                (2, "hybrid", "--backend", "hybrid", "--threads", "1,2", self.a),
                (2, "hybrid", "--backend", "hybrid", "--compare", "old.json", self.a),
                (2, "nothing is measured", "--threads", "1", "--compare", "old.json", "new.json")):
            out, err = run(self.bench, *command, status=status)
            assert out == "" and message in err and len(err.splitlines()) == status, err

    def test_hybrid(self):
        """The GPU reads while the processor decodes; without a device in software that is not tried."""
        options = ["--backend", "hybrid", "--device", "llvmpipe", "--prompt", "5,20", "--depth", "8,70", "--sessions", "1,3", "--decode", "2",
                   "--repetitions", "1", "--threads", "1"]
        p = subprocess.run([self.bench, *options, "--json", self.a], capture_output=True, text=True, timeout=250)
        if p.returncode == 1 and ("Vulkan" in p.stderr or "llvmpipe" in p.stderr):
            print("hybrid: not tried: " + p.stderr.strip())
            return
        assert p.returncode == 0, p.stderr
        got = json.loads(p.stdout)
        assert got["depth"] == 8 and "llvmpipe" in got["engine"] and got["engine"].startswith("cpu/") and "1 thread," in got["engine"], got
        assert [(r["prompt_tokens"], r["sessions"]) for r in got["hybrid"]] == [(5, 1), (5, 3), (20, 1), (20, 3)], got
        for r in got["hybrid"]:
            assert all(r[k] > 0 for k in ("gpu_read_alone", "gpu_read_beside", "cpu_decode_alone", "cpu_decode_beside")), r
        out, _ = run(self.bench, *options, self.a)
        assert len(out.splitlines()) == 8 and out.splitlines()[4].split() == ["5", "1", *out.splitlines()[4].split()[2:]], out


def main():
    bench, make_model, demo = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="llmd-bench-") as work:
        t = Test(bench, demo, work)
        run(make_model, "1", t.a)
        run(make_model, "2", t.b)
        t.test_refusals()
        report = t.test_json()
        t.test_exact()
        t.test_load()
        t.test_threads()
        t.test_tables()
        t.test_compare(report)
        t.test_interrupt()
        t.test_hybrid()
    return 0


if __name__ == "__main__":
    sys.exit(main())
