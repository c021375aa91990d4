# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Small random Gemma 3n models for the importer's tests: as numpy arrays by their Hugging Face names, written as GGUF
or as a Hugging Face directory; and GGUF's block formats worked out in numpy, independently of our C code."""
import json
import os
import struct

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
GGML = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "BF16": 30}
BLOCK = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144),
         "Q5_K": (256, 176), "Q6_K": (256, 210)}
Z95 = 1.6448533535003662


class Shape:
    def __init__(self, **kw):
        self.L, self.H, self.P, self.R, self.A, self.NH, self.NKV, self.D = 10, 64, 32, 8, 4, 2, 1, 32
        self.V, self.VP, self.window, self.kv, self.sparse, self.F = 80, 72, 8, 6, 3, None
        self.__dict__.update(kw)
        self.F = self.F or [96] * self.L
        self.sliding = [(i + 1) % 5 != 0 for i in range(self.L)]
        self.z = [Z95 if i < self.sparse else 0 for i in range(self.L)]

    def config(self, vocab=None):
        """What llmd.config must hold."""
        return {
            "vocab_size": vocab or self.V, "vocab_size_ple": self.VP, "n_layers": self.L, "n_layers_kv": self.kv,
            "hidden": self.H, "ple_width": self.P, "laurel_rank": self.R, "n_streams": self.A, "n_heads": self.NH,
            "n_heads_kv": self.NKV, "head_dim": self.D, "window": self.window, "context_max": 4096, "rms_eps": 1e-6,
            "rope_theta": 1e6, "rope_theta_sliding": 1e4, "softcap": 30, "coef_clip": 120,
            "layers": [{"ffn_width": f, "sliding": s, "sparsity_z": z} for f, s, z in zip(self.F, self.sliding, self.z)],
        }


def bf16_round(x):
    """To the nearest bf16, ties to even, as float32."""
    u = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def small(name):
    return "norm" in name or "altup." in name


def sensitive(name):
    return name.startswith("altup_") or "laurel.linear" in name or name == "per_layer_model_projection.weight"


def weights(s, seed=1):
    """name -> float32 array; every value is a bf16 and an f16 as well."""
    rng = np.random.default_rng(seed)
    w = {}

    def add(name, *shape, scale=None):
        x = rng.standard_normal(shape) * (scale or shape[-1] ** -0.5)
        # Multiples of 2^-16, so that f16 has them as well.
        w[name] = bf16_round(np.rint((x + 1 if "norm" in name else x) * 65536) / 65536)

    add("embed_tokens.weight", s.V, s.H)
    add("embed_tokens_per_layer.weight", s.VP, s.L * s.P)
    add("per_layer_model_projection.weight", s.L * s.P, s.H)
    add("per_layer_projection_norm.weight", s.P)
    for k in range(s.A - 1):
        add(f"altup_projections.{k}.weight", s.H, s.H)
        add(f"altup_unembed_projections.{k}.weight", s.H, s.H)
    add("norm.weight", s.H)
    for i in range(s.L):
        b = f"layers.{i}."
        for n in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
                  "post_per_layer_input_norm", "laurel.post_laurel_norm", "altup.router_norm"):
            add(f"{b}{n}.weight", s.H)
        add(f"{b}self_attn.q_proj.weight", s.NH * s.D, s.H)
        add(f"{b}self_attn.k_proj.weight", s.NKV * s.D, s.H)
        add(f"{b}self_attn.v_proj.weight", s.NKV * s.D, s.H)
        add(f"{b}self_attn.o_proj.weight", s.H, s.NH * s.D)
        add(f"{b}self_attn.q_norm.weight", s.D)
        add(f"{b}self_attn.k_norm.weight", s.D)
        add(f"{b}mlp.gate_proj.weight", s.F[i], s.H)
        add(f"{b}mlp.up_proj.weight", s.F[i], s.H)
        add(f"{b}mlp.down_proj.weight", s.H, s.F[i])
        add(f"{b}laurel.linear_left.weight", s.R, s.H)
        add(f"{b}laurel.linear_right.weight", s.H, s.R)
        add(f"{b}altup.modality_router.weight", s.A, s.H)
        add(f"{b}altup.prediction_coefs.weight", s.A * s.A, s.A, scale=90)  # some beyond the clip
        add(f"{b}altup.correction_coefs.weight", s.A, s.A, scale=90)
        add(f"{b}altup.correct_output_scale", s.H)
        add(f"{b}per_layer_input_gate.weight", s.P, s.H)
        add(f"{b}per_layer_projection.weight", s.H, s.P)
    return w


def kept(s, name):
    """Whether the model file has the tensor: K and V of sharing layers are dead."""
    part = name.split(".")
    return not (part[0] == "layers" and int(part[1]) >= s.kv and part[3] in ("k_proj", "v_proj", "k_norm"))


def clipped(name, x):
    return np.clip(x, -120, 120) if "_coefs" in name else x


# GGUF's types: numbers to bytes, and back.


def f16_scales(blocks, at):
    return np.ascontiguousarray(blocks[:, at:at + 2]).view("<f2").astype(np.float32)


def encode(kind, x, rng=None):
    """The bytes of x (or, for K-quants, of random blocks of its size)."""
    x = np.ascontiguousarray(x, np.float32)
    if kind == "F32":
        return x.astype("<f4").tobytes()
    if kind == "F16":
        return x.astype("<f2").tobytes()
    if kind == "BF16":
        return (bf16_round(x).view(np.uint32) >> 16).astype("<u2").tobytes()
    if kind == "Q8_0":
        b = x.reshape(-1, 32)
        d = np.abs(b).max(1) / 127
        q = np.rint(b / np.where(d == 0, 1, d)[:, None]).astype(np.int8)
        return np.hstack([d.astype("<f2").view(np.uint8).reshape(-1, 2), q.view(np.uint8)]).tobytes()
    if kind == "Q4_0":
        b = x.reshape(-1, 32)
        d = b[np.arange(len(b)), np.abs(b).argmax(1)] / -8
        q = np.clip(np.trunc(b / np.where(d == 0, 1, d)[:, None] + 8.5), 0, 15).astype(np.uint8)
        return np.hstack([d.astype("<f2").view(np.uint8).reshape(-1, 2), q[:, :16] | q[:, 16:] << 4]).tobytes()
    values, size = BLOCK[kind]
    blocks = rng.integers(0, 256, (x.size // values, size), np.uint8)
    places = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
    for at in places:
        d = (rng.standard_normal(len(blocks)) * 0.01).astype("<f2")
        blocks[:, at:at + 2] = d.view(np.uint8).reshape(-1, 2)
    return blocks.tobytes()


def k_scales(b):
    """Eight 6-bit scales and minima from 12 bytes."""
    b = b.astype(np.uint8)
    scales = np.concatenate([b[:, :4] & 63, (b[:, 8:] & 15) | (b[:, :4] >> 6) << 4], axis=1)
    minima = np.concatenate([b[:, 4:8] & 63, (b[:, 8:] >> 4) | (b[:, 4:8] >> 6) << 4], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def decode(kind, data, shape):
    n_values, size = BLOCK[kind]
    if kind in ("F32", "F16"):
        return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[kind]).astype(np.float32).reshape(shape)
    if kind == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    b = np.frombuffer(data, np.uint8).reshape(-1, size)
    if kind == "Q8_0":
        return (f16_scales(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)).reshape(shape)
    if kind == "Q4_0":
        q = np.concatenate([b[:, 2:] & 15, b[:, 2:] >> 4], axis=1).astype(np.float32) - 8
        return (f16_scales(b, 0) * q).reshape(shape)
    if kind in ("Q4_K", "Q5_K"):
        scales, minima = k_scales(b[:, 4:16])
        nibbles = b[:, -128:].reshape(-1, 4, 1, 32)
        q = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(-1, 8, 32)
        if kind == "Q5_K":
            bits = b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None] & 1
            q = q | bits << 4
        d, m = f16_scales(b, 0), f16_scales(b, 2)
        x = (d * scales)[:, :, None] * q.astype(np.float32) - (m * minima)[:, :, None]
        return x.reshape(shape)
    low, high = b[:, :128].reshape(-1, 2, 64), b[:, 128:192].reshape(-1, 2, 32)
    q = np.empty((len(b), 2, 4, 32), np.uint8)
    for group, (at, shift) in enumerate(((0, 0), (32, 0), (0, 4), (32, 4))):
        q[:, :, group] = (low[:, :, at:at + 32] >> shift & 15) | (high >> 2 * group & 3) << 4
    scales = b[:, 192:208].view(np.int8).astype(np.float32)
    x = (f16_scales(b, 208) * scales)[:, :, None] * (q.reshape(-1, 16, 16).astype(np.float32) - 32)
    return x.reshape(shape)


# Files.


def gguf_string(s):
    b = s if isinstance(s, bytes) else s.encode()
    return struct.pack("<Q", len(b)) + b


def gguf_value(kind, v):
    if kind == STRING:
        return gguf_string(v)
    if kind == ARRAY:
        of, values = v
        return struct.pack("<IQ", of, len(values)) + b"".join(gguf_value(of, x) for x in values)
    return struct.pack({U8: "<B", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q", F64: "<d"}[kind], v)


def gguf_metadata(s, tokens=None):
    a = "gemma3n."
    md = {
        "general.architecture": (STRING, "gemma3n"), "general.name": (STRING, "random"),
        "general.license": (STRING, "none"), "general.alignment": (U32, 32),
        a + "context_length": (U32, 4096), a + "embedding_length": (U32, s.H), a + "block_count": (U32, s.L),
        a + "feed_forward_length": (ARRAY, (I32, s.F)), a + "attention.head_count": (U32, s.NH),
        a + "attention.head_count_kv": (U32, s.NKV), a + "attention.key_length": (U32, s.D),
        a + "attention.value_length": (U32, s.D), a + "attention.layer_norm_rms_epsilon": (F32, 1e-6),
        a + "attention.sliding_window": (U32, s.window), a + "attention.sliding_window_pattern": (ARRAY, (BOOL, s.sliding)),
        a + "attention.shared_kv_layers": (F32, float(s.L - s.kv)), a + "rope.freq_base": (F32, 1e6),
        a + "altup.active_idx": (U32, 0), a + "altup.num_inputs": (U32, s.A),
        a + "embedding_length_per_layer_input": (U32, s.P),
        a + "activation_sparsity_scale": (ARRAY, (F32, [z or float("-inf") for z in s.z])),
    }
    if tokens:
        t = "tokenizer.ggml."
        types = [3, 3, 3, 2] + [6] * 256 + [1] * (tokens - 260)
        md[t + "model"] = (STRING, "llama")
        md[t + "tokens"] = (ARRAY, (STRING, ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{i:02X}>" for i in range(256)] +
                                    [f"t{i}" for i in range(260, tokens)]))
        md[t + "scores"] = (ARRAY, (F32, [-float(i) for i in range(tokens)]))
        md[t + "token_type"] = (ARRAY, (I32, types))
        for name, i in (("bos", 2), ("eos", 1), ("unknown", 3), ("padding", 0)):
            md[f"{t}{name}_token_id"] = (U32, i)
        md[t + "add_bos_token"] = (BOOL, True)
        md[t + "add_space_prefix"] = (BOOL, False)
    return md


LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm", "self_attn.q_proj.weight": "attn_q", "self_attn.k_proj.weight": "attn_k",
    "self_attn.v_proj.weight": "attn_v", "self_attn.o_proj.weight": "attn_output", "self_attn.q_norm.weight": "attn_q_norm",
    "self_attn.k_norm.weight": "attn_k_norm", "post_attention_layernorm.weight": "post_attention_norm",
    "pre_feedforward_layernorm.weight": "ffn_norm", "mlp.gate_proj.weight": "ffn_gate", "mlp.up_proj.weight": "ffn_up",
    "mlp.down_proj.weight": "ffn_down", "post_feedforward_layernorm.weight": "post_ffw_norm",
    "laurel.linear_left.weight": "laurel_l", "laurel.linear_right.weight": "laurel_r",
    "laurel.post_laurel_norm.weight": "laurel_post_norm", "altup.router_norm.weight": "altup_router_norm",
    "altup.modality_router.weight": "altup_router", "altup.prediction_coefs.weight": "altup_predict_coef",
    "altup.correction_coefs.weight": "altup_correct_coef", "altup.correct_output_scale": "altup_correct_scale",
    "per_layer_input_gate.weight": "inp_gate", "per_layer_projection.weight": "proj",
    "post_per_layer_input_norm.weight": "post_norm",
}
GLOBAL_NAMES = {
    "embed_tokens.weight": "token_embd", "embed_tokens_per_layer.weight": "per_layer_token_embd",
    "per_layer_model_projection.weight": "per_layer_model_proj", "per_layer_projection_norm.weight": "per_layer_proj_norm",
    "norm.weight": "output_norm",
}


def gguf_tensors(s, w, kind_of, rng=None):
    """[name, ne, kind, bytes] of every tensor, and what they hold: HF name -> float32 array."""
    out, held = [], {}

    def put(name, hf_names, ne):
        kind = "F32" if small(hf_names[0]) else kind_of(hf_names[0])
        data = b""
        for n in hf_names:
            part = encode(kind, w[n], rng)
            held[n] = decode(kind, part, w[n].shape)
            data += part
        out.append([name + ".weight", list(ne), kind, data])

    for name, x in w.items():
        if name.startswith("altup_"):
            continue
        if name in GLOBAL_NAMES:
            target = GLOBAL_NAMES[name]
        else:
            _, i, rest = name.split(".", 2)
            target = f"blk.{i}.{LAYER_NAMES[rest]}"
        put(target, [name], x.shape[::-1])
    for stack, target in (("altup_projections", "altup_proj"), ("altup_unembed_projections", "altup_unembd_proj")):
        put(target, [f"{stack}.{k}.weight" for k in range(s.A - 1)], (s.H, s.H, s.A - 1))
    return out, held


def gguf_bytes(md, tensors, version=3, align=32):
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(md))
    for key, (kind, v) in md.items():
        head += gguf_string(key) + struct.pack("<I", kind) + gguf_value(kind, v)
    body, at = b"", 0
    for name, ne, kind, data in tensors:
        number = GGML[kind] if isinstance(kind, str) else kind
        head += gguf_string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, number, at)
        pad = -len(data) % align
        body += data + b"\0" * pad
        at += len(data) + pad
    return head + b"\0" * (-len(head) % align) + body, len(head)


def write_gguf(path, s, w, kind, tokens=None, rng=None, change=None):
    """kind: a type, or a function of the name. Returns what the file holds and the header's length."""
    md = gguf_metadata(s, tokens)
    tensors, held = gguf_tensors(s, w, kind if callable(kind) else lambda _: kind, rng)
    if change:
        change(md, tensors)
    data, header = gguf_bytes(md, tensors)
    with open(path, "wb") as f:
        f.write(data)
    return held, header


def safetensors_bytes(w, kind, extra=None):
    table, at, body = {"__metadata__": {"format": "pt"}}, 0, b""
    for name, x in w.items():
        data = encode(kind, x)
        table[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
        body += data
    table.update(extra or {})
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + body, 8 + len(text)


def hf_config(s):
    return {
        "architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n", "eos_token_id": [1, 7],
        "vision_config": {"vocab_size": 128}, "text_config": {
            "model_type": "gemma3n_text", "vocab_size": s.V, "vocab_size_per_layer_input": s.VP, "hidden_size": s.H,
            "hidden_size_per_layer_input": s.P, "num_hidden_layers": s.L, "intermediate_size": s.F,
            "num_attention_heads": s.NH, "num_key_value_heads": s.NKV, "head_dim": s.D,
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": ["sliding_attention" if x else "full_attention" for x in s.sliding],
            "sliding_window": s.window, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": None,
            "rms_norm_eps": 1e-06, "final_logit_softcapping": 30.0, "altup_num_inputs": s.A, "altup_active_idx": 0,
            "altup_coef_clip": 120.0, "altup_correct_scale": True, "laurel_rank": s.R,
            "num_kv_shared_layers": s.L - s.kv, "activation_sparsity_pattern": [0.95 if z else 0.0 for z in s.z],
            "max_position_embeddings": 4096, "attention_bias": False,
        },
    }


def write_json(path, v):
    with open(path, "w") as f:
        json.dump(v, f)


def write_hf(folder, s, w, kind="BF16", shards=3, prefix="model.language_model.", config=None):
    os.makedirs(folder)
    write_json(os.path.join(folder, "config.json"), config or hf_config(s))
    write_json(os.path.join(folder, "generation_config.json"), {"temperature": 0.5, "top_k": 40, "top_p": 0.75,
                                                                "eos_token_id": [1, 3]})
    with open(os.path.join(folder, "README.md"), "w") as f:
        f.write("---\nlicense: gemma\ntags: [x]\n---\n# Card\nlicense: other\n")
    full = {prefix + n: x for n, x in w.items()}
    full["model.vision_tower.blocks.0.weight"] = np.zeros((3, 5, 7), np.float32)
    full["model.embed_audio.x"] = np.zeros((), np.float32)
    full["lm_head.weight"] = w["embed_tokens.weight"]
    if shards == 1:
        with open(os.path.join(folder, "model.safetensors"), "wb") as f:
            f.write(safetensors_bytes(full, kind)[0])
        return
    names, index = sorted(full), {}
    for i in range(shards):
        part = names[i::shards]
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        with open(os.path.join(folder, file), "wb") as f:
            f.write(safetensors_bytes({n: full[n] for n in part}, kind)[0])
        index.update({n: file for n in part})
    write_json(os.path.join(folder, "model.safetensors.index.json"), {"metadata": {"total_size": 1}, "weight_map": index})
