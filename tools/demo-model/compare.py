#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""How far llmd's engine is from PyTorch on held-out text: the mean Kullback-Leibler divergence of the predictions.

  compare.py CHECKPOINT TOKENIZER.model LLM-EVAL MODEL.llmd [--count N] [--q8] [--vectors FILE] [-- OPTION...]

--q8 rounds PyTorch's weights as `llm-import --weights q8` does. --vectors keeps PyTorch's predictions for a test:
for each text a line of ids, then for each of its last positions a line `id:logit ...` of the most probable pieces
and, as the last word, the logarithm of the sum of all exponentials.
Options after -- go to llm-eval logits, as in `-- --activations f32 --kv f32`.
"""
import argparse
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch

import dialogues
import tokenizer
import train


def round_q8(m):
    """Matrices in blocks of 32 with an f16 scale, the sensitive ones to f16, as tools/import does."""
    kept = ("altup_", "altup.", "laurel", "per_layer_model_projection")
    with torch.no_grad():
        for name, p in m.named_parameters():
            if p.ndim < 2 or "modality_router" in name or "coefs" in name:
                continue
            if any(k in name for k in kept):
                p.copy_(p.half().float())
                continue
            x = p.numpy().reshape(-1, 32)
            d = (np.abs(x).max(1, keepdims=True) / np.float32(127)).astype(np.float16).astype(np.float32)
            with np.errstate(divide="ignore"):
                inverse = np.where(d > 0, np.float32(1) / d, np.float32(0))
            p.copy_(torch.tensor((np.clip(np.rint(x * inverse), -127, 127) * d).reshape(p.shape)))


def write_vectors(path, texts, logits, positions=8, pieces=24):
    with open(path, "w") as f:
        at = 0
        for t in texts:
            f.write(" ".join(map(str, t)) + "\n")
            for row in logits[at + len(t) - positions:at + len(t)]:
                top = row.topk(pieces)
                f.write(" ".join(f"{i}:{v:.6f}" for v, i in zip(top.values.tolist(), top.indices.tolist())) + f" {row.logsumexp(0).item():.6f}\n")
            at += len(t)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint")
    p.add_argument("tokenizer")
    p.add_argument("llm_eval")
    p.add_argument("model")
    p.add_argument("--count", type=int, default=3, help="documents of each skill")
    p.add_argument("--seed", type=int, default=9)
    p.add_argument("--q8", action="store_true")
    p.add_argument("--vectors")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    o = p.parse_args(sys.argv[1:at])
    torch.set_num_threads(1)
    tok = tokenizer.Tokenizer(o.tokenizer)
    m, _ = train.load_model(o.checkpoint)
    if o.q8:
        round_q8(m)
    texts = [tok.prompt(d) + tok.text(d.turns[-1].answer) for _, d in dialogues.held_out(o.seed, o.count)]
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/ids", "w") as f:
            f.writelines(" ".join(map(str, t)) + "\n" for t in texts)
        subprocess.run([o.llm_eval, "logits", "--tokens", f"{folder}/ids", "--output", f"{folder}/logits", *sys.argv[at + 1:], o.model], check=True)
        theirs = np.fromfile(f"{folder}/logits", "<f4").reshape(sum(map(len, texts)), -1).astype(np.float64)
    with torch.no_grad():
        ours = torch.cat([m(torch.tensor([t]), torch.zeros(1, len(t), dtype=torch.long)) for t in texts]).double()
    theirs = torch.tensor(theirs)
    if o.vectors:
        write_vectors(o.vectors, texts, ours)
    a, b = torch.log_softmax(ours, -1), torch.log_softmax(theirs, -1)
    kld = (a.exp() * (a - b)).sum(-1)
    print(f"{len(kld)} positions, longest text {max(map(len, texts))}: mean KLD {kld.mean():.2e}, largest {kld.max():.2e}, "
          f"same greedy token {100 * (ours.argmax(-1) == theirs.argmax(-1)).double().mean():.2f} %, "
          f"largest difference of a logit {(ours - theirs).abs().max():.2e}")


if __name__ == "__main__":
    sys.exit(main())
