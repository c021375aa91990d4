#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Trains the demonstration model, MatFormer-style, and can be stopped and resumed at any time.

  train.py FOLDER [--minutes M] [--decay SHARE]    FOLDER/tokenizer.model must be there; FOLDER/checkpoint is
                                                   continued if it is there, and saved every few minutes

Hidden matrices go by Muon (orthogonalised momentum), everything else by AdamW. SIGINT and SIGTERM save and end. The
learning rate is constant after a warm-up; --decay 1 lets it fall to nothing over this run, which is how a model to ship
is finished: the checkpoint of such a run is called `final`, and `checkpoint` stays what training goes on from.
"""
import argparse
import collections
import math
import os
import random
import signal
import sys
import time

# Waiting threads must not take time from the others on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch
import torch.nn.functional as F

import dialogues
import fused
import model
import tokenizer

DROPPABLE = range(5, 10)


class Muon:
    """Momentum, made orthogonal by a Newton-Schulz iteration; matrices of one shape go together."""

    def __init__(self, params, momentum=0.95, decay=0.05):
        self.momentum, self.decay = momentum, decay
        self.groups = collections.defaultdict(list)
        for p in params:
            self.groups[tuple(sorted(p.shape))].append(p)
        self.state = {p: torch.zeros_like(p) for p in params}

    @torch.no_grad()
    def step(self, lr):
        for params in self.groups.values():
            params = [p for p in params if p.grad is not None]
            if not params:
                continue
            updates = []
            for p in params:
                m = self.state[p].mul_(self.momentum).add_(p.grad)
                u = p.grad + self.momentum * m
                updates.append(u if u.shape[0] <= u.shape[1] else u.t())
            x = torch.stack(updates)
            x = (x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)).bfloat16()
            for _ in range(5):
                a = x @ x.transpose(1, 2)
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
            x = x.float() * (0.2 * math.sqrt(x.shape[2]))
            for p, u in zip(params, x):
                p.mul_(1 - lr * self.decay).sub_(u if p.shape[0] <= p.shape[1] else u.t(), alpha=lr)


class Rows:
    """Packs documents into rows of T ids, first fit over a handful of open rows."""

    def __init__(self, generator, tok, T):
        self.g, self.tok, self.T, self.skills, self.held = generator, tok, T, {}, []

    def document(self, level):
        ids, weight, skill = [], [], []
        while True:
            for part, name, answer in self.tok.document(self.g.document(level * random.uniform(0.2, 1))):
                ids += part
                weight += [1.0 if answer else 0.0] * len(part)
                if name == "yesno":
                    weight[-4] = 10.0  # yes or no; the rest of the answer only recalls
                skill += [self.skills.setdefault(name, len(self.skills)) if answer else -1] * len(part)
            if len(ids) <= self.T + 1:
                return ids, weight, skill
            ids, weight, skill = [], [], []

    def batch(self, rows, level, aside):
        """ids, start [rows, T]; positions to predict, their targets, weights and skills."""
        T = self.T
        out = [[] for _ in range(rows)]
        room = [T] * rows
        misses = 0
        while misses < 6:
            d = self.held.pop() if self.held else self.document(level)
            fits = [i for i in range(rows) if room[i] >= len(d[0]) - 1]
            if not fits:
                self.held.append(d) if misses == 5 else None
                misses += 1
                continue
            i = min(fits, key=lambda i: room[i])
            out[i].append(d)
            room[i] -= len(d[0]) - 1
        ids = torch.zeros(rows, T, dtype=torch.long)
        start = torch.zeros(rows, T, dtype=torch.long)
        want, target, weight, skill = [], [], [], []
        for i, docs in enumerate(out):
            at = 0
            for tokens, w, s in docs:
                n = len(tokens) - 1
                ids[i, at:at + n] = torch.tensor(tokens[:-1])
                start[i, at:at + n] = at
                for j in range(n):
                    # What users say is worth knowing as well, but a sample of it will do.
                    if w[j + 1] or random.random() < aside:
                        want.append(i * T + at + j)
                        target.append(tokens[j + 1])
                        weight.append(w[j + 1] or 0.3)
                        skill.append(s[j + 1])
                at += n
            start[i, at:] = at  # the padding sees itself
        return ids, start, torch.tensor(want), torch.tensor(target), torch.tensor(weight), torch.tensor(skill)


def save(path, state):
    torch.save(state, path + ".new")
    os.replace(path + ".new", path)


def load_model(path):
    state = torch.load(path, map_location="cpu")
    m = model.Gemma3n(model.Config.from_json(state["config"]))
    m.load_state_dict(state["model"])
    return m, state


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder")
    p.add_argument("--minutes", type=float, default=60)
    p.add_argument("--decay", type=float, default=0, help="share of this run, at its end, over which the learning rate falls to 0")
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--batch", type=int, default=4096, help="tokens a step")
    p.add_argument("--row", type=int, default=512, help="tokens a row")
    p.add_argument("--level", type=float, help="fixed curriculum level, 0 to 2 (default: 0 to 1, by the tokens trained)")
    p.add_argument("--verdicts", type=float, default=0.1, help="share of the documents that practise yes-or-no questions")
    p.add_argument("--slices", type=float, default=0.3, help="share of the steps that train a slice")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--from", dest="source", help="checkpoint to start from (default FOLDER/checkpoint)")
    o = p.parse_args()
    torch.set_num_threads(o.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tok = tokenizer.Tokenizer(f"{o.folder}/tokenizer.model")

    source = o.source or f"{o.folder}/checkpoint"
    if os.path.exists(source):
        m, state = load_model(source)
    else:
        torch.manual_seed(1)
        n = tok.sp.get_piece_size()
        m, state = model.Gemma3n(model.Config(vocab=n, vocab_ple=n)), None
    m.to(device)
    if device == "cpu":
        m.ops = fused.Fused()
    named = dict(m.named_parameters())
    tables = ("embed_tokens", "coefs", "modality_router")
    hidden = [p for n, p in named.items() if p.ndim == 2 and not any(t in n for t in tables)]
    rest = [p for p in named.values() if not any(p is h for h in hidden)]
    muon = Muon(hidden)
    adam = torch.optim.AdamW(rest, lr=o.lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
    step = tokens = 0
    if state:
        step, tokens = state["step"], state["tokens"]
        if "muon" in state:  # else only the weights were kept
            for p, v in zip(hidden, state["muon"]):
                muon.state[p].copy_(v)
            adam.load_state_dict(state["adam"])
    random.seed(tokens)
    rows = Rows(dialogues.Generator(f"{tokens}", verdicts=o.verdicts), tok, o.row)
    print(f"{sum(p.numel() for p in named.values())} parameters, {device}, at step {step}, {tokens / 1e6:.2f} M tokens", flush=True)

    def checkpoint(path):
        save(path, {"config": m.c.to_json(), "model": m.state_dict(), "muon": [muon.state[p].bfloat16() for p in hidden],
                    "adam": adam.state_dict(), "step": step, "tokens": tokens})

    begin = reported = saved = time.time()
    total, count, seen, first_step = collections.Counter(), collections.Counter(), 0, step
    name = "final" if o.decay else "checkpoint"
    stop = []
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda *_: stop.append(1))
    while not stop:
        done = (time.time() - begin) / (o.minutes * 60)
        if done >= 1:
            break
        lr = o.lr * min(1, (step + 1) / 100, (step - first_step + 1) / 20) * min(1, (1 - done) / o.decay if o.decay else 1)
        level = o.level if o.level is not None else min(1, max(0, (tokens / 1e6 - 1.5) / 5))
        x = random.random()
        share, drop = 1.0, ()
        if x < o.slices * 0.6:
            share, drop = 0.5, DROPPABLE
        elif x < o.slices * 0.8:
            drop = DROPPABLE
        elif x < o.slices:
            share = 0.5
        ids, start, want, target, weight, skill = (t.to(device) for t in rows.batch(o.batch // o.row, level, 0.25))
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = m(ids, start, share, drop, want)
        each = F.cross_entropy(logits.float(), target, reduction="none")
        loss = (each * weight).sum() / weight.sum()
        m.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for g in adam.param_groups:
            g["lr"] = lr
        adam.step()
        muon.step(lr)
        step += 1
        tokens += ids.numel()
        seen += ids.numel()
        if share == 1 and not drop:
            sums = torch.zeros(len(rows.skills) + 1).index_add_(0, skill.cpu() + 1, each.detach().cpu())
            counts = torch.bincount(skill.cpu() + 1, minlength=len(rows.skills) + 1)
            for s, i in rows.skills.items():
                total[s] += sums[i + 1].item()
                count[s] += counts[i + 1].item()
        now = time.time()
        if now - reported > 60:
            each = " ".join(f"{s} {total[s] / count[s]:.3f}" for s in sorted(total) if count[s])
            print(f"{time.strftime('%H:%M:%S')} step {step} {tokens / 1e6:.2f} M tokens, {seen / (now - reported):.0f}/s, level {level:.2f}, "
                  f"lr {lr:.1e}, {each}", flush=True)
            total, count, seen, reported = collections.Counter(), collections.Counter(), 0, now
        if now - saved > 180:
            checkpoint(f"{o.folder}/{name}")
            saved = now
    checkpoint(f"{o.folder}/{name}")


if __name__ == "__main__":
    sys.exit(main())
