#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""What llm-eval's perplexity and kld print, against the same computed here from `llm-eval logits`.

  test-llm-eval.py --make-model PATH --llm-eval PATH

Also: outputs appear whole or not at all, and bad input is an error with its place.
"""
import argparse
import math
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time

VOCABULARY = 272  # of make-model's models
CONTEXT = 256

# Children are to be interrupted by SIGINT, also where whoever started the test in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


def run(*command, status=0, text=None, **kw):
    p = subprocess.run(command, input=text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=250, **kw)
    assert p.returncode == status, (command, p.returncode, p.stderr)
    return p.stdout, p.stderr.decode()


def log_softmax(row):
    m = max(row)
    s = m + math.log(math.fsum(math.exp(x - m) for x in row))
    return [x - s for x in row]


class Test:
    def __init__(self, args, work):
        self.args, self.work = args, work
        self.a, self.b = (os.path.join(work, f"{n}.llmd") for n in "ab")
        run(args.make_model, "1", self.a)
        run(args.make_model, "2", self.b)

    def eval(self, *command, **kw):
        return run(self.args.llm_eval, *command, **kw)

    def rows(self, model, sequences, *options):
        """log-probabilities [sequence][position][token]"""
        lines = "".join(" ".join(map(str, s)) + "\n" for s in sequences)
        out, _ = self.eval("logits", "--tokens", "-", "--output", "-", *options, model, text=lines.encode())
        n = sum(map(len, sequences))
        assert len(out) == 4 * VOCABULARY * n, (len(out), n)
        flat = struct.unpack(f"<{VOCABULARY * n}f", out)
        it = iter(range(n))
        return [[log_softmax(flat[VOCABULARY * i:VOCABULARY * (i + 1)]) for _, i in zip(s, it)] for s in sequences]

    def tokens(self, sequences):
        path = os.path.join(self.work, "tokens.txt")
        with open(path, "w") as f:
            f.writelines(" ".join(map(str, s)) + "\n" for s in sequences)
        return path

    @staticmethod
    def figures(out):
        """The first number of each line, by its label."""
        return {line[:12].strip(): float(line[12:].split()[0]) for line in out.decode().splitlines()}

    def test_perplexity(self, sequences, context, stride):
        """Every token by the definition: from the first window that covers it."""
        windows, scored = [], []
        for s in sequences:
            done, at = 1, 0
            while True:
                w = s[at:at + context]
                windows.append(w)
                scored.append(range(done - at, len(w)))
                done = at + len(w)
                if done == len(s):
                    break
                at += stride
        rows = self.rows(self.a, windows)
        nll = [-r[i - 1][w[i]] for w, r, which in zip(windows, rows, scored) for i in which]
        assert len(nll) == sum(len(s) - 1 for s in sequences)
        mean = sum(nll) / len(nll)
        error = math.sqrt(sum((x - mean) ** 2 for x in nll) / (len(nll) - 1) / len(nll))

        options = ["--context", str(context), "--stride", str(stride)]
        out, err = self.eval("perplexity", "--tokens", self.tokens(sequences), *options, self.a)
        got = self.figures(out)
        assert got["tokens"] == len(nll), (got, len(nll))
        assert abs(got["mean nll"] - mean) < 2e-5 * abs(mean), (got, mean)
        assert abs(got["perplexity"] - math.exp(mean)) < 1e-3 * math.exp(mean), (got, mean)
        assert abs(float(out.decode().splitlines()[1].split()[-1]) - error) < 1e-5 + 1e-4 * error, (out, error)
        assert f"context {context}, stride {stride}" in err and err.rstrip().endswith("tokens/s"), err

    def test_kld(self, sequences, context):
        windows = []
        for s in sequences:
            for at in range(0, len(s), context - 1):
                windows.append((s[at:at + context], at + context >= len(s)))
                if at + context >= len(s):
                    break
        ids = [w for w, _ in windows]
        p = self.rows(self.a, ids, "--activations", "f32", "--kv", "f32")
        q = self.rows(self.b, ids)
        klds, agree = [], 0
        for (w, last), rows_p, rows_q in zip(windows, p, q):
            for i in range(len(w) if last else len(w) - 1):
                klds.append(math.fsum(math.exp(x) * (x - y) for x, y in zip(rows_p[i], rows_q[i])))
                agree += rows_p[i].index(max(rows_p[i])) == rows_q[i].index(max(rows_q[i]))
        klds.sort()
        out, _ = self.eval("kld", "--reference", self.a, "--tokens", self.tokens(sequences), "--context", str(context), self.b)
        got = self.figures(out)
        for name, want in (("positions", len(klds)), ("mean KLD", sum(klds) / len(klds)), ("max KLD", klds[-1]),
                           ("99 % KLD", klds[math.ceil(0.99 * len(klds)) - 1]), ("top-1", 100 * agree / len(klds))):
            assert abs(got[name] - want) <= 1e-5 * want + 1e-9, (name, got, want)

        out, _ = self.eval("kld", "--reference", self.a, "--tokens", self.tokens(sequences), "--activations", "f32", "--kv",
                           "f32", self.a)
        got = self.figures(out)
        assert got["max KLD"] == 0 and got["top-1"] == 100, got

    def test_output(self):
        tokens = self.tokens([[1, 2, 3]])
        out = os.path.join(self.work, "out", "logits.f32")
        os.mkdir(os.path.dirname(out))
        self.eval("logits", "--tokens", tokens, "--output", out, self.a, umask=0o027)
        whole = open(out, "rb").read()
        assert len(whole) == 3 * 4 * VOCABULARY and os.listdir(os.path.dirname(out)) == ["logits.f32"]
        assert stat.S_IMODE(os.stat(out).st_mode) == 0o640

        # An error leaves what was there.
        for text, message in (("1 2\n3 x\n", "stdin:2:3: 'x' is not a token id"),
                              (f"1 {VOCABULARY}\n", f"stdin:1:3: token {VOCABULARY}: the vocabulary ends at {VOCABULARY - 1}"),
                              ("1 " * (CONTEXT + 1), f"stdin:1:{2 * CONTEXT + 1}: more than {CONTEXT} tokens, the context"),
                              ("", "stdin: no tokens")):
            got, err = self.eval("logits", "--tokens", "-", "--output", out, self.a, text=text.encode(), status=1)
            assert got == b"" and err == f"llm-eval logits: {message}\n", err
        assert open(out, "rb").read() == whole and os.listdir(os.path.dirname(out)) == ["logits.f32"]
        full = ("/dev/full", "cannot write: No space left on device")
        for n, path, message in ((3, *full), (CONTEXT, *full),  # less and more than stdio's buffer
                                 (3, os.path.join(self.work, "none", "x"), "cannot create: No such file or directory")):
            tokens = self.tokens([[1 + i % 99 for i in range(n)]])
            _, err = self.eval("logits", "--tokens", tokens, "--output", path, self.a, status=1)
            assert err == f"llm-eval logits: {path}: {message}\n", err

        # So does an interruption: work for minutes, signalled when the temporary file is there.
        os.unlink(out)
        many = self.tokens([[1 + i % 99 for i in range(CONTEXT)]] * 2000)
        for number in (signal.SIGINT, signal.SIGTERM):
            p = subprocess.Popen([self.args.llm_eval, "logits", "--cpu-level", "reference", "--threads", "1", "--tokens", many,
                                  "--output", out, self.a])
            while not os.listdir(os.path.dirname(out)):
                assert p.poll() is None, "ended before it was interrupted"
                time.sleep(0.001)
            p.send_signal(number)
            assert p.wait(60) == -number, p.returncode
            assert os.listdir(os.path.dirname(out)) == []

    def test_refusals(self):
        tokens = self.tokens([[1, 2, 3]])
        text, single = (os.path.join(self.work, n) for n in ("text", "single.txt"))
        with open(text, "w") as f:
            f.write("hello")
        with open(single, "w") as f:
            f.write("5\n6\n")
        for status, message, *command in (
                (1, "a.llmd: has no tokenizer: give ids with --tokens", "perplexity", "--text", text, self.a),
                (1, "a stride of 8 must be less than the context, 8", "perplexity", "--tokens", tokens, "--context", "8",
                 "--stride", "8", self.a),
                (1, "a context of 257 is more than the 256 of", "kld", "--tokens", tokens, "--context", "257", "--reference",
                 self.a, self.b),
                (1, "nothing to predict: no two tokens in a row", "perplexity", "--tokens", single, self.a),
                (1, "cannot open", "kld", "--reference", self.a, "--tokens", "/no/such/file", self.b),
                (2, "one of --text and --tokens expected", "perplexity", self.a),
                (2, "one of --text and --tokens expected", "perplexity", "--tokens", tokens, "--text", text, self.a),
                (2, "no --reference given", "kld", "--tokens", tokens, self.a),
                (2, "--activations 'f16': f32 or int8 expected", "logits", "--activations", "f16"),
                (2, "--cpu-level 'sse': reference, avx2, avx512 or amx expected", "logits", "--cpu-level", "sse"),
                (2, "--kv 'q8': f16 or f32 expected", "kld", "--kv", "q8"),
                (2, "--backend 'hip': cpu or vulkan expected", "kld", "--backend", "hip"),
                (2, "--threads '1x': a number from 1 to 1024 expected", "perplexity", "--threads", "1x")):
            out, err = self.eval(*command, status=status)
            assert out == b"" and message in err, (command, err)
            assert len(err.splitlines()) == status, err


def main():
    ap = argparse.ArgumentParser()
    for name in ("--make-model", "--llm-eval"):
        ap.add_argument(name, required=True)
    rng = random.Random(5)
    sequences = [[rng.randrange(VOCABULARY) for _ in range(n)] for n in (90, 2, 33, 1, 64)]
    with tempfile.TemporaryDirectory(prefix="llmd-eval-") as work:
        t = Test(ap.parse_args(), work)
        for context, stride in ((32, 16), (32, 31), (20, 1), (100, 50)):
            t.test_perplexity(sequences, context, stride)
        for context in (32, 33, 100):
            t.test_kld(sequences, context)
        t.test_output()
        t.test_refusals()
    return 0


if __name__ == "__main__":
    sys.exit(main())
