# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Gemma 3n's text model in PyTorch, complete and trainable, with the tensor names of Hugging Face.

Written for small models and for training them MatFormer-style: forward() takes the share of the FFN neurons
(the first ones) to use and the layers to leave out. Activations are f32; the matrix products may run in bf16.
The hot elementwise parts have a second, fused form in kernels.c (see fused.py); this file is their definition.
"""
import dataclasses
import json
import math

import torch
import torch.nn.functional as F
from torch import nn

import fused


@dataclasses.dataclass
class Config:
    vocab: int = 2048
    vocab_ple: int = 2048
    hidden: int = 128
    layers: int = 10
    kv_layers: int = 5          # the first so many own K and V, the others read theirs
    ffn: tuple = (512,) * 10
    sparsity: tuple = (0.95,) * 2 + (0.0,) * 8
    ple: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    window: int = 128           # positions a sliding layer sees, its own included
    laurel: int = 16
    context: int = 2048
    eps: float = 1e-6
    theta: float = 1e6
    theta_sliding: float = 1e4
    softcap: float = 30.0
    clip: float = 120.0

    def sliding(self, l):
        return l % 5 != 4

    def kv_source(self, l):
        return l if l < self.kv_layers else max(i for i in range(self.kv_layers) if self.sliding(i) == self.sliding(l))

    def z(self, l):
        p = self.sparsity[l]
        return math.sqrt(2) * torch.erfinv(torch.tensor(2 * p - 1)).item() if p > 0 else 0.0

    def to_json(self):
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text):
        d = json.loads(text)
        return Config(**{**d, "ffn": tuple(d["ffn"]), "sparsity": tuple(d["sparsity"])})


class Weight(nn.Module):
    """A tensor called NAME.weight, as Hugging Face's linear, norm and embedding modules call theirs."""

    def __init__(self, *shape, std=None, fill=None):
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, float(fill)) if fill is not None else torch.randn(shape) * std)


def holder(**children):
    m = nn.Module()
    for name, child in children.items():
        setattr(m, name, child)
    return m


class Layer(nn.Module):
    def __init__(self, c, l):
        super().__init__()
        H, D, f = c.hidden, c.head_dim, c.ffn[l]
        std = H ** -0.5
        self.input_layernorm = Weight(H, fill=1)
        # Every block ends in a norm, so these weights, not the projections, say how loud it starts.
        self.post_attention_layernorm = Weight(H, fill=0.7)
        self.pre_feedforward_layernorm = Weight(H, fill=1)
        self.post_feedforward_layernorm = Weight(H, fill=0.5)
        self.post_per_layer_input_norm = Weight(H, fill=0.1)
        # The score scale is 1: without this the first softmax would be nearly a maximum.
        sharp = D ** -0.25 * 1.2
        attn = dict(q_proj=Weight(c.heads * D, H, std=std), o_proj=Weight(H, c.heads * D, std=(c.heads * D) ** -0.5),
                    q_norm=Weight(D, fill=sharp))
        if l < c.kv_layers:
            attn.update(k_proj=Weight(c.kv_heads * D, H, std=std), v_proj=Weight(c.kv_heads * D, H, std=std),
                        k_norm=Weight(D, fill=sharp))
        self.self_attn = holder(**attn)
        self.mlp = holder(gate_proj=Weight(f, H, std=std), up_proj=Weight(f, H, std=std), down_proj=Weight(H, f, std=f ** -0.5))
        self.laurel = holder(linear_left=Weight(c.laurel, H, std=std), linear_right=Weight(H, c.laurel, std=c.laurel ** -0.5),
                             post_laurel_norm=Weight(H, fill=0.1))
        self.altup = holder(router_norm=Weight(H, fill=1), modality_router=Weight(4, H, std=std * H),
                            prediction_coefs=Weight(16, 4, fill=0), correction_coefs=Weight(4, 4, fill=0))
        self.altup.correct_output_scale = nn.Parameter(torch.ones(H))
        self.per_layer_input_gate = Weight(c.ple, H, std=std)
        self.per_layer_projection = Weight(H, c.ple, std=c.ple ** -0.5)


class Gemma3n(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        H, std = c.hidden, c.hidden ** -0.5
        self.embed_tokens = Weight(c.vocab, H, std=std)
        self.embed_tokens_per_layer = Weight(c.vocab_ple, c.layers * c.ple, std=c.ple ** -0.5)
        self.per_layer_model_projection = Weight(c.layers * c.ple, H, std=std)
        self.per_layer_projection_norm = Weight(c.ple, fill=1)
        self.altup_projections = nn.ModuleList(Weight(H, H, std=std) for _ in range(3))
        self.altup_unembed_projections = nn.ModuleList(Weight(H, H, std=std) for _ in range(3))
        self.layers = nn.ModuleList(Layer(c, l) for l in range(c.layers))
        self.norm = Weight(H, fill=1)
        self.ops = fused.Plain()

    def forward(self, ids, start, share=1.0, drop=(), want=None, cache=None, position=None):
        """Logits [n, vocab] of the positions `want` (flat indices into ids, None: all).

        ids    [B, T]
        start  [B, T] the first index of its row that a token may see: packed documents do not see each other
        share  of the FFN neurons, counted from the first
        drop   layers left out; no KV source among them
        cache  Cache, for generation: ids are then new tokens at position [B, T], and start is ignored
        """
        c, o = self.c, self.ops
        B, T = ids.shape
        N, H, L, P = B * T, c.hidden, c.layers, c.ple
        x0 = F.embedding(ids.reshape(-1), self.embed_tokens.weight) * math.sqrt(H)
        ple_ids = torch.where(ids < c.vocab_ple, ids, torch.zeros_like(ids)).reshape(-1)
        e = F.embedding(ple_ids, self.embed_tokens_per_layer.weight) * math.sqrt(P)
        g = o.linear(x0, self.per_layer_model_projection.weight) * H ** -0.5
        g = o.rms(g.view(N * L, P), self.per_layer_projection_norm.weight, c.eps).view(N, L * P)
        # One tensor a layer, unbound at once: slices would each cost a full-size gradient.
        ple = ((g + e) * 2 ** -0.5).view(N, L, P).transpose(0, 1).contiguous().unbind(0)

        m = x0.square().mean(-1, keepdim=True).sqrt()
        h = torch.stack([x0] + [o.rescale(o.linear(x0, w.weight), m) for w in self.altup_projections])  # [4, N, H]
        first = x0  # h[0]

        index = torch.arange(T, device=ids.device)[None, :]
        if cache is None:
            # Only differences of positions matter, so a packed row counts through.
            pos = index.expand(B, T).contiguous()
            see = {False: start, True: torch.maximum(start, index - (c.window - 1))}
        else:
            pos, see = position, cache.visible(position, c.window)
        angle = {s: pos.reshape(-1, 1).double() * (c.theta_sliding if s else c.theta)
                 ** (-torch.arange(c.head_dim // 2, device=ids.device).double() * 2 / c.head_dim) for s in (True, False)}
        turn = {s: (a.cos().float(), a.sin().float()) for s, a in angle.items()}

        kv = {}
        for l, layer in enumerate(self.layers):
            if l in drop:
                continue
            a, u, s = layer.self_attn, layer.altup, c.sliding(l)
            # Predict; the router's clip on coefficients belongs to the converted weights and never bites here.
            pred, active = o.predict(h, self.router(layer, first) @ u.prediction_coefs.weight.t())
            xn = o.rms(active, layer.input_layernorm.weight, c.eps)
            xb = o.shared(xn)  # what several products read
            lau = o.linear(o.linear(xb, layer.laurel.linear_left.weight), layer.laurel.linear_right.weight)
            lau = xn + o.rms(lau, layer.laurel.post_laurel_norm.weight, c.eps)
            q = self.heads(o.linear(xb, a.q_proj.weight), a.q_norm.weight, turn[s])
            if l < c.kv_layers:
                k = self.heads(o.linear(xb, a.k_proj.weight), a.k_norm.weight, turn[s])
                v = o.rms(o.linear(xb, a.v_proj.weight).view(-1, c.head_dim), None, c.eps)
                k, v = (t.view(B, T, c.kv_heads, c.head_dim) for t in (k, v))
                kv[l] = (k, v) if cache is None else cache.append(l, k, v, pos)
            k, v = kv[c.kv_source(l)]
            out = o.attention(q.view(B, T, c.heads, c.head_dim), k, v, see[s]) if cache is None \
                else fused.attention_masked(q.view(B, T, c.heads, c.head_dim), k, v, see[s])
            out = o.linear(out.reshape(N, -1), a.o_proj.weight)
            t = active + o.rms(out, layer.post_attention_layernorm.weight, c.eps)
            t = (t + lau) * 2 ** -0.5
            z = o.shared(o.rms(t, layer.pre_feedforward_layernorm.weight, c.eps))
            w = int(c.ffn[l] * share)
            y = o.gate(o.wide(z, layer.mlp.gate_proj.weight[:w]), o.wide(z, layer.mlp.up_proj.weight[:w]), c.z(l))
            y = o.linear(y, layer.mlp.down_proj.weight[:, :w])
            b = t + o.rms(y, layer.post_feedforward_layernorm.weight, c.eps)
            h, first = o.correct(pred, b, 1 + self.router(layer, b) @ u.correction_coefs.weight.t())
            r = o.linear(first * u.correct_output_scale, layer.per_layer_input_gate.weight)
            r = o.linear(F.gelu(r, approximate="tanh") * ple[l], layer.per_layer_projection.weight)
            h = o.add_to_others(h, o.rms(r, layer.post_per_layer_input_norm.weight, c.eps))

        if want is not None:
            h = h[:, want]
        m = h[0].square().mean(-1, keepdim=True).sqrt()
        x = h[0]
        for k, w in enumerate(self.altup_unembed_projections):
            x = x + o.rescale(o.linear(h[k + 1], w.weight), m)
        x = o.rms(x * 0.25, self.norm.weight, c.eps)
        return c.softcap * torch.tanh(o.linear(x, self.embed_tokens.weight) / c.softcap)

    def router(self, layer, x):
        x = self.ops.rms(x, layer.altup.router_norm.weight, self.c.eps)
        return torch.tanh(F.linear(x, layer.altup.modality_router.weight / self.c.hidden))

    def heads(self, x, w, turn):
        D = self.c.head_dim
        return self.ops.rope(self.ops.rms(x.view(-1, D), w, self.c.eps).view(x.shape[0], -1, D), *turn)


class Cache:
    """Keys and values of B sequences, each with its own length."""

    def __init__(self, batch, size):
        self.batch, self.size, self.kv = batch, size, {}

    def append(self, l, k, v, position):
        if l not in self.kv:
            self.kv[l] = tuple(torch.zeros(self.batch, self.size, *t.shape[2:], device=t.device) for t in (k, v))
        at = (torch.arange(self.batch, device=k.device)[:, None].expand_as(position), position)
        for old, new in zip(self.kv[l], (k, v)):
            old[at] = new
        return self.kv[l]

    def visible(self, position, window):
        key = torch.arange(self.size, device=position.device)[None, None, :]
        full = key <= position[:, :, None]
        return {False: full, True: full & (key > position[:, :, None] - window)}


@torch.no_grad()
def generate(model, prompts, n_max, ends, share=1.0, drop=()):
    """Greedy answers to prompts (lists of ids), without the end that stopped them."""
    device = model.norm.weight.device
    B, longest = len(prompts), max(map(len, prompts))
    n = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)
    cache = Cache(B, longest + n_max)
    position = torch.arange(longest, device=device)[None, :].expand(B, -1)
    rows = torch.arange(B, device=device)
    # A padding token's K and V lie behind the sequence's end and are overwritten before they are seen.
    logits = model(ids, None, share, drop, want=rows * longest + n - 1, cache=cache, position=position)
    out, live = [[] for _ in prompts], [True] * B
    for i in range(n_max):
        new = logits.argmax(-1)
        for b, t in enumerate(new.tolist()):
            live[b] = live[b] and t not in ends
            if live[b]:
                out[b].append(t)
        if not any(live) or i + 1 == n_max:
            break
        logits = model(new[:, None], None, share, drop, cache=cache, position=(n + i)[:, None])
    return out
