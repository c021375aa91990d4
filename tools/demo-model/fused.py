# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""The operations of model.py: Plain, by the book, on any device, and Fused, for training on a CPU.

Fused runs kernels.c, compiled for this machine on first use, forward and backward, and the matrix products in
bf16. test_model.py holds it to Plain, values and gradients.
"""
import ctypes
import hashlib
import os
import subprocess
import tempfile

import torch
import torch.nn.functional as F


def attention_masked(q, k, v, mask):
    """q [B, T, NH, D], k and v [B, M, NKV, D], mask [B, T, M] → [B, T, NH, D]. The score scale is 1."""
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2).transpose(1, 2) for t in (k, v))
    s = (q.transpose(1, 2) @ k.transpose(2, 3)).masked_fill(~mask[:, None], float("-inf"))
    return (torch.softmax(s, -1) @ v).transpose(1, 2)


class Plain:
    def shared(self, x):
        return x

    def linear(self, x, w):
        return F.linear(x, w).float()

    def wide(self, x, w):
        """linear() for what only gate() reads; Fused leaves it in bf16."""
        return self.linear(x, w)

    def rms(self, x, w, eps):
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return y if w is None else y * w

    def rescale(self, y, m):
        return y * m * torch.rsqrt(y.square().mean(-1, keepdim=True).clamp_min(1e-5))

    def rope(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(self, q, k, v, first):
        i = torch.arange(q.shape[1], device=q.device)
        mask = (i[None, None, :] <= i[None, :, None]) & (i[None, None, :] >= first[:, :, None])
        return attention_masked(q, k, v, mask)

    # predict() and correct() return stream 0 also by itself: taken out of four it would cost a gradient for four.
    def predict(self, h, c):
        pred = h + torch.einsum("nji,inh->jnh", c.view(-1, 4, 4), h)
        return pred, pred[0]

    def correct(self, pred, b, k):
        h = pred + k.t()[:, :, None] * (b - pred[0])
        return h, h[0]

    def add_to_others(self, h, v):
        return torch.cat([h[:1], h[1:] + v])

    def gate(self, g, u, z):
        if z > 0:
            mean = g.mean(-1, keepdim=True)
            g = F.relu(g - mean - z * (g - mean).square().mean(-1, keepdim=True).sqrt())
        return F.gelu(g, approximate="tanh") * u


_lib = None


def library():
    """kernels.c as a shared object, compiled once for each version of it and kept in the user's cache."""
    global _lib
    if _lib is None:
        source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels.c")
        command = ["gcc", "-Ofast", "-march=native", "-fopenmp", "-shared", "-fPIC", "-w"]
        with open(source, "rb") as f:
            key = hashlib.sha256(f.read() + " ".join(command).encode()).hexdigest()[:16]
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "llmd-demo-model")
        path = os.path.join(cache, f"kernels-{os.uname().machine}-{key}.so")
        if not os.path.exists(path):
            os.makedirs(cache, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as d:
                subprocess.run([*command, source, "-o", f"{d}/k.so", "-lm"], check=True)
                os.rename(f"{d}/k.so", path)
        _lib = ctypes.CDLL(path)
        # Activations come and go by the megabyte; fresh pages for each would take a fifth of the time.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    return _lib


def call(name, *args):
    """Tensors become pointers (contiguous, on the CPU), ints longs, floats floats."""
    def convert(a):
        if a is None:
            return ctypes.c_void_p(None)
        if isinstance(a, torch.Tensor):
            assert a.is_contiguous() and a.device.type == "cpu"
            return ctypes.c_void_p(a.data_ptr())
        return ctypes.c_long(a) if isinstance(a, int) else ctypes.c_float(a)
    getattr(library(), name)(*map(convert, args))


class Rms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps):
        x = x.contiguous()
        d = x.shape[-1]
        y, inv = torch.empty_like(x), x.new_empty(x.numel() // d)
        call("rms", x, w, y, inv, inv.numel(), d, float(eps))
        ctx.save_for_backward(x, w, inv)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w, inv = ctx.saved_tensors
        dx, dw = torch.empty_like(x), None if w is None else torch.zeros_like(w)
        call("rms_back", dy.contiguous(), x, w, inv, dx, dw, inv.numel(), x.shape[-1])
        return dx, dw, None


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        y = torch.empty_like(x)
        call("rope", x, cos, sin, y, *x.shape, 1.0)
        ctx.save_for_backward(cos, sin)
        return y

    @staticmethod
    def backward(ctx, dy):
        dx = torch.empty_like(dy)
        call("rope", dy.contiguous(), *ctx.saved_tensors, dx, *dy.shape, -1.0)
        return dx, None, None


class Predict(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, c):
        h, c, y = h.contiguous(), c.contiguous(), torch.empty_like(h)
        call("predict", h, c, y, *h.shape[1:])
        ctx.save_for_backward(h, c)
        return y, y[0].clone()

    @staticmethod
    def backward(ctx, dy, d0):
        h, c = ctx.saved_tensors
        dy[0] += d0  # Correct's own, and nobody else's
        dh, dc = torch.empty_like(h), torch.empty_like(c)
        call("predict_back", dy.contiguous(), h, c, dh, dc, *h.shape[1:])
        return dh, dc


class Correct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, b, k):
        b, k, y = b.contiguous(), k.contiguous(), torch.empty_like(pred)
        call("correct", pred, b, k, y, *b.shape)
        ctx.save_for_backward(pred, b, k)
        return y, y[0].clone()

    @staticmethod
    def backward(ctx, dy, d0):
        pred, b, k = ctx.saved_tensors
        dy = dy.clone(memory_format=torch.contiguous_format)
        dy[0] += d0
        dp, db, dk = torch.empty_like(pred), torch.empty_like(b), torch.empty_like(k)
        call("correct_back", dy.contiguous(), pred, b, k, dp, db, dk, *b.shape)
        return dp, db, dk


class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, u, z):
        ctx.z, ctx.kind = float(z), "bf16" if g.dtype == torch.bfloat16 else "f32"
        g, u, y, stat = g.contiguous(), u.contiguous(), torch.empty_like(g), torch.empty(g.shape[0], 2)
        call("gate_" + ctx.kind, g, u, y, stat, *g.shape, ctx.z)
        ctx.save_for_backward(g, u, stat)
        return y

    @staticmethod
    def backward(ctx, dy):
        g, u, stat = ctx.saved_tensors
        dg, du = torch.empty_like(g), torch.empty_like(u)
        call("gate_back_" + ctx.kind, dy.contiguous(), g, u, stat, dg, du, *g.shape, ctx.z)
        return dg, du, None


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, first):
        q, k, v, first = q.contiguous(), k.contiguous(), v.contiguous(), first.int().contiguous()
        B, T, NH, D = q.shape
        out, lse = torch.empty_like(q), q.new_empty(B, NH, T)
        ctx.size = (B, T, NH, k.shape[2], D)
        call("attention", q, k, v, first, out, lse, *ctx.size)
        ctx.save_for_backward(q, k, v, first, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, first, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        call("attention_back", dout.contiguous(), q, k, v, first, out, lse, dq, dk, dv, *ctx.size)
        return dq, dk, dv, None


class AddToOthers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, v):
        y = torch.empty_like(h)
        y[0] = h[0]
        torch.add(h[1:], v, out=y[1:])
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy, dy[1] + dy[2] + dy[3]


class Linear(torch.autograd.Function):
    """x W^T with bf16 operands; x and the result may be either type."""

    @staticmethod
    def forward(ctx, x, w, narrow):
        xb, wb = x.bfloat16(), w.bfloat16()
        ctx.save_for_backward(xb, wb)
        ctx.x_type = x.dtype
        y = xb @ wb.t()
        return y if narrow else y.float()

    @staticmethod
    def backward(ctx, dy):
        xb, wb = ctx.saved_tensors
        dy = dy.bfloat16()
        return (dy @ wb).to(ctx.x_type), (dy.t() @ xb).float(), None


class Fused(Plain):
    def __init__(self, bf16=True):
        library()
        self.bf16 = bf16

    def shared(self, x):
        return x.bfloat16() if self.bf16 else x

    def linear(self, x, w, narrow=False):
        if not self.bf16 or min(w.shape) < 16:
            return F.linear(x.float(), w)
        return Linear.apply(x, w, narrow)

    def wide(self, x, w):
        return self.linear(x, w, narrow=True)

    def rms(self, x, w, eps):
        return Rms.apply(x, w, eps)

    def rope(self, x, cos, sin):
        return Rope.apply(x, cos, sin)

    def attention(self, q, k, v, first):
        return Attention.apply(q, k, v, first)

    def predict(self, h, c):
        return Predict.apply(h, c)

    def correct(self, pred, b, k):
        return Correct.apply(pred, b, k)

    def add_to_others(self, h, v):
        return AddToOthers.apply(h, v)

    def gate(self, g, u, z):
        return Gate.apply(g, u, z)
