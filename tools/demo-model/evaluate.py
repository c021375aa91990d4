#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Scores a checkpoint on held-out prompts, skill by skill, with greedy answers.

  evaluate.py CHECKPOINT TOKENIZER.model [--count N] [--seed S] [--slice] [--q8] [--show K]

--q8 rounds the weights as the shipped file's are.
--slice scores the MatFormer slice (half the FFN neurons, without the droppable layers) and how often its greedy next
token is the whole model's, over the positions of right answers.
"""
import argparse
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch

import compare
import dialogues
import fused
import model
import tokenizer
import train


def agreement(m, tok, docs):
    """Share of the answers' positions at which slice and whole model predict the same token, given the right text before."""
    same = n = 0
    for _, d in docs:
        ids, want = [], []
        for part, _, answer in tok.document(d) if not d.prose else [(tok.prompt(d), "", False), (tok.text(" " + d.turns[0].answer), "", True)]:
            want += range(len(ids) - 1, len(ids) + len(part) - 1) if answer else []
            ids += part
        x, start = torch.tensor([ids]), torch.zeros(1, len(ids), dtype=torch.long)
        with torch.no_grad():
            a = m(x, start, want=torch.tensor(want)).argmax(-1)
            b = m(x, start, 0.5, train.DROPPABLE, want=torch.tensor(want)).argmax(-1)
        same += (a == b).sum().item()
        n += len(want)
    return same / n


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint")
    p.add_argument("tokenizer")
    p.add_argument("--count", type=int, default=50, help="prompts of each skill")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--slice", action="store_true")
    p.add_argument("--q8", action="store_true")
    p.add_argument("--show", type=int, default=0, help="wrong answers of each skill to print")
    p.add_argument("--skills", default=",".join(dialogues.SKILLS))
    p.add_argument("--threads", type=int, default=2)
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    tok = tokenizer.Tokenizer(o.tokenizer)
    m, state = train.load_model(o.checkpoint)
    m.ops = fused.Fused(bf16=False)
    if o.q8:
        compare.round_q8(m)
    docs = [(s, d) for s, d in dialogues.held_out(o.seed, o.count) if s in o.skills.split(",")]
    print(f"step {state['step']}, {state['tokens'] / 1e6:.2f} M tokens; {o.count} prompts of each skill")
    share, drop = (0.5, train.DROPPABLE) if o.slice else (1.0, ())
    for skill in o.skills.split(","):
        mine = sorted((d for s, d in docs if s == skill), key=lambda d: len(tok.prompt(d)))
        prompts = [tok.prompt(d) for d in mine]
        n_max = 8 + max(len(tok.text(d.turns[-1].answer)) for d in mine)
        answers = []
        for i in range(0, len(mine), 25):
            answers += model.generate(m, prompts[i:i + 25], n_max, tok.ends, share, drop)
        answers = [tok.decode(a) for a in answers]
        good = [dialogues.right(d.turns[-1].check, a) for d, a in zip(mine, answers)]
        print(f"{skill:12} {100 * sum(good) / len(good):5.1f} %", flush=True)
        for d, a, g in [x for x in zip(mine, answers, good) if not x[2]][:o.show]:
            print(f"    {(d.turns[-1].user or d.prose)[-110:]!r}\n    want {d.turns[-1].answer[:110]!r}\n    got  {a[:110]!r}")
    if o.slice:
        print(f"agreement of the slice's greedy next token: {100 * agreement(m, tok, docs):.1f} %")


if __name__ == "__main__":
    sys.exit(main())
