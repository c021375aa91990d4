#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""The engine against PyTorch's predictions with the shipped weights, kept in a file (see compare.py).

  test_vectors.py LLM-EVAL MODEL.llmd VECTORS
"""
import array
import math
import os
import subprocess
import sys
import tempfile


def main():
    llm_eval, model, vectors = sys.argv[1:]
    texts = []
    with open(vectors) as f:
        for line in f:
            words = line.split()
            if ":" not in line:
                texts.append(([int(w) for w in words], []))
            else:
                texts[-1][1].append(({int(i): float(v) for i, v in (w.split(":") for w in words[:-1])}, float(words[-1])))
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/ids", "w") as f:
            f.writelines(" ".join(map(str, ids)) + "\n" for ids, _ in texts)
        subprocess.run([llm_eval, "logits", "--activations", "f32", "--kv", "f32", "--threads", "1", "--tokens", f"{folder}/ids",
                        "--output", f"{folder}/logits", model], check=True)
        logits = array.array("f")
        with open(f"{folder}/logits", "rb") as f:
            logits.frombytes(f.read())
    if sys.byteorder == "big":
        logits.byteswap()
    n = sum(len(ids) for ids, _ in texts)
    assert len(logits) % n == 0, "not whole positions"
    vocab, at, kld, worst, count = len(logits) // n, 0, 0.0, 0.0, 0
    for ids, rows in texts:
        for k, (want, log_sum) in enumerate(rows):
            i = at + len(ids) - len(rows) + k
            got = logits[i * vocab:(i + 1) * vocab]
            largest = max(got)
            got_sum = largest + math.log(sum(math.exp(v - largest) for v in got))
            # The kept pieces, and all others as one: together a lower bound of the whole divergence, and nearly it.
            p = [math.exp(v - log_sum) for v in want.values()]
            q = [math.exp(got[j] - got_sum) for j in want]
            p.append(max(1 - sum(p), 1e-12))
            q.append(max(1 - sum(q), 1e-12))
            kld += sum(a * math.log(a / b) for a, b in zip(p, q))
            worst = max(worst, max(abs(got[j] - v) for j, v in want.items()))
            count += 1
        at += len(ids)
    assert count > 0, "no vectors"
    print(f"{count} positions: mean KLD {kld / count:.2e}, largest difference of a logit {worst:.2e}")
    assert kld / count <= 1e-5 and worst <= 1e-3, "the engine differs from PyTorch"


if __name__ == "__main__":
    sys.exit(main())
