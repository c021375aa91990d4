#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""llm-import against numpy: what goes in must be what test-model-file.py's independent reader gets out.

  test-import.py LLM_IMPORT HOSTILE_IMPORT

HOSTILE_IMPORT is tests/hostile-import.c, which imports one file in very many broken variants.
"""
import contextlib
import copy
import importlib.util
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import termios

sys.dont_write_bytecode = True
if importlib.util.find_spec("numpy") is None:
    print(f"skipped: {sys.executable} has no numpy (python3-numpy)")
    sys.exit(77)
import numpy as np  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import import_sources as src  # noqa: E402
from import_sources import Shape  # noqa: E402

spec = importlib.util.spec_from_file_location("model_file", os.path.join(HERE, "test-model-file.py"))
model_file = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model_file)

LLM_IMPORT, HOSTILE_IMPORT = sys.argv[1:3]
FOLDER = None  # of the test that runs


def path(name):
    return os.path.join(FOLDER, name)


def run(*args, **kw):
    p = subprocess.run([LLM_IMPORT, *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)
    return p.returncode, p.stdout.decode(), p.stderr.decode()


class Model:
    """A model file, read by the document: x[name] is float32, d[name] its description."""

    def __init__(self, file):
        m = model_file.ModelFile(file)
        self.metadata = m.metadata
        self.order = list(m.entries)
        self.x, self.d, self.blobs = {}, {}, {}
        for name, (d, data) in m.entries.items():
            if d["type"] == "blob":
                self.blobs[name] = data
                continue
            self.d[name] = d
            x, size = model_file.READERS[d["layout"]](d["type"], *d["shape"], np.frombuffer(data, np.uint8))
            assert size == len(data)
            self.x[name] = x

    def json(self, key):
        return json.loads(self.metadata[key])


def imported(source, *options, out="out.llmd"):
    status, stdout, stderr = run(*options, "--force", source, path(out))
    assert status == 0 and stdout == "", (status, stdout, stderr)
    assert run("--verify", path(out))[0] == 0
    return Model(path(out)), stderr


def refused(source, *words, options=(), status=1):
    """The import fails with one line that names what words say, and leaves nothing."""
    before = sorted(os.listdir(FOLDER))
    s, stdout, stderr = run(*options, source, path("refused.llmd"))
    assert s == status, (s, stderr, words)
    assert stdout == "" and stderr.count("\n") == 1 and stderr.startswith("llm-import: "), (stdout, stderr)
    for word in words:
        assert word in stderr, (word, stderr)
    assert sorted(os.listdir(FOLDER)) == before


def same_config(got, wanted):
    got = copy.deepcopy(got)
    for key in ("rms_eps", "softcap", "coef_clip"):
        assert np.float32(got.pop(key)) == np.float32(wanted[key]), key
    for a, b in zip(got["layers"], wanted["layers"]):
        assert np.float32(a.pop("sparsity_z")) == np.float32(b["sparsity_z"])
        assert a == {k: b[k] for k in a}
    assert {k: v for k, v in got.items() if k != "layers"} == {
        k: wanted[k] for k in wanted if k not in ("rms_eps", "softcap", "coef_clip", "layers")}


def equal(a, b, name):
    b = np.asarray(b, np.float32).reshape(-1, np.asarray(b).shape[-1])
    assert a.shape == b.shape, (name, a.shape, b.shape)
    assert np.array_equal(a, b), (name, np.abs(a - b).max())


def same_weights(a, b):
    """Type, layout, shape and SHA-256 of every tensor."""
    assert a.d.keys() == b.d.keys()
    for n in a.d:
        assert a.d[n] == b.d[n], (n, a.d[n], b.d[n])


# (1) What a GGUF has carries over.


def test_gguf_types():
    s = Shape(V=300, VP=290, R=32)
    w = src.weights(s)
    names = {n for n in w if src.kept(s, n)}
    own = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8", "Q4_0": "q4"}
    for kind in own:
        held, _ = src.write_gguf(path("in.gguf"), s, w, kind, tokens=300)
        m, _ = imported(path("in.gguf"))
        assert set(m.x) == names, set(m.x) ^ names
        same_config(m.json("llmd.config"), s.config())
        for n in names:
            equal(m.x[n], src.clipped(n, held[n]), n)
            d = m.d[n]
            if src.small(n):
                assert (d["type"], d["layout"]) == ("f32", "plain"), n
                continue
            assert d["type"] == own[kind], (n, d)
            sparse = n.startswith("layers.") and int(n.split(".")[1]) < s.sparse
            layout = ("rows" if n.startswith("embed_tokens_per") or (sparse and "up_proj" in n) else
                      "cols" if sparse and "down_proj" in n else "tile16")
            assert d["layout"] == layout, (n, d)
        assert np.abs(m.x["layers.0.altup.prediction_coefs.weight"]).max() == 120

        # Order of use: blobs, what comes before the layers, layers, what comes after, the PLE table.
        assert [n for n in m.order[:4]] == ["tokenizer.pieces", "tokenizer.offsets", "tokenizer.scores", "tokenizer.types"]
        stages = [int(n.split(".")[1]) + 1 if n.startswith("layers.") else
                  0 if n.startswith(("per_layer", "altup_proj", "tokenizer")) else 99 for n in m.order]
        assert stages == sorted(stages)
        assert m.order[-2:] == ["embed_tokens.weight", "embed_tokens_per_layer.weight"]

        assert m.json("llmd.generation") == {"temperature": 1, "top_p": 0.95, "top_k": 64, "stop_ids": [1]} or np.isclose(
            m.json("llmd.generation")["top_p"], 0.95)
        assert m.json("llmd.source") == {"format": "gguf", "name": "in.gguf"}
        assert m.metadata["llmd.name"] == "random" and m.metadata["llmd.license"] == "none"
        assert np.frombuffer(m.blobs["tokenizer.types"], np.uint8).tolist() == [3, 3, 3, 2] + [6] * 256 + [1] * 40
        assert m.json("llmd.tokenizer")["bos"] == 2


def test_wanted_types():
    s = Shape(R=32)
    w = src.weights(s)
    rounding = {"f32": lambda x: x, "f16": lambda x: x.astype(np.float16).astype(np.float32), "bf16": src.bf16_round}
    for kind in ("F32", "BF16", "Q8_0", "Q4_0"):
        held, _ = src.write_gguf(path("in.gguf"), s, w, kind)
        for wanted in ("f32", "f16", "bf16", "q8", "q4"):
            m, notes = imported(path("in.gguf"), "--weights", wanted)
            lossy = kind == "Q8_0" and wanted == "q4"
            assert ("requantised" in notes) == lossy, (kind, wanted, notes)
            for n, x in m.x.items():
                if src.small(n):
                    equal(x, src.clipped(n, held[n]), n)
                    continue
                got = m.d[n]["type"]
                if src.sensitive(n) and wanted in ("q4", "q8"):
                    assert got == {"F32": "f16", "BF16": "bf16", "Q8_0": "q8", "Q4_0": "q4"}[kind], (n, got)
                else:
                    assert got == wanted, (n, got)
                exact = got == {"Q8_0": "q8", "Q4_0": "q4"}.get(kind) or (kind, got) == ("Q4_0", "q8")
                if exact:
                    equal(x, held[n], n)
                elif got in rounding:
                    equal(x, rounding[got](held[n]), n)
                else:
                    error = np.mean((x - held[n].reshape(x.shape)) ** 2)
                    rule = "Q4_0" if got == "q4" else "Q8_0"
                    plain = src.decode(rule, src.encode(rule, held[n]), held[n].shape)
                    limit = np.mean((plain - held[n]) ** 2)
                    assert error <= limit * 1.0001, (n, error, limit)
            assert m.json("llmd.import")["weights"] == wanted
            assert len(m.json("llmd.import")["requantized"]) == (0 if not lossy else sum(
                1 for n in m.x if not src.small(n) and not src.sensitive(n)))


def test_shapes_that_do_not_fit():
    # Nothing is a multiple of 32, so q4 and q8 fall back, and say so.
    s = Shape(H=24, P=6, R=5, NH=4, NKV=2, D=6, V=48, VP=40, F=[40] * 5 + [36] * 5, L=10)
    w = src.weights(s)
    for kind, fallback, exact in (("F32", "f32", True), ("BF16", "bf16", True), ("F16", "f16", False)):
        held, _ = src.write_gguf(path("in.gguf"), s, w, kind)
        m, notes = imported(path("in.gguf"), "--weights", "q4")
        assert "blocks of 32" in notes
        for n, x in m.x.items():
            equal(x, src.clipped(n, held[n]), n)
            assert src.small(n) or src.sensitive(n) or m.d[n]["type"] == fallback, (n, m.d[n])
        status, table, _ = run("--dry-run", "--weights", "q4", path("in.gguf"))
        assert status == 0 and "the shape does not allow" in table


def test_sensitive_overflow():
    s = Shape(L=5, kv=5)
    w = src.weights(s)
    w["altup_projections.1.weight"][3, 4] = 2.0**17
    src.write_gguf(path("in.gguf"), s, w, "F32")
    m, _ = imported(path("in.gguf"), "--weights", "q4")
    assert m.d["altup_projections.1.weight"]["type"] == "bf16" and m.d["altup_projections.0.weight"]["type"] == "f16"
    equal(m.x["altup_projections.1.weight"], w["altup_projections.1.weight"], "overflow")
    refused(path("in.gguf"), "altup_projections.1.weight", "row 3", "f16", options=("--weights", "f16"))
    w["embed_tokens.weight"][7, 9] = 2.0**20
    src.write_gguf(path("in.gguf"), s, w, "F32")
    refused(path("in.gguf"), "embed_tokens.weight", "row 7", "q4", options=("--weights", "q4"))


def test_gguf_variants():
    s = Shape(L=5, kv=5, V=300, VP=300)
    w = src.weights(s)
    held, _ = src.write_gguf(path("a.gguf"), s, w, "F16")
    a, _ = imported(path("a.gguf"))

    def changed(change, wanted=None):
        src.write_gguf(path("b.gguf"), s, w, "F16", change=change)
        b, _ = imported(path("b.gguf"), out="b.llmd")
        assert b.metadata["llmd.config"] == (wanted or a.metadata["llmd.config"])
        same_weights(a, b)

    def fuse(md, tensors):
        for i in range(s.L):
            parts = [next(t for t in tensors if t[0] == f"blk.{i}.attn_{x}.weight") for x in "qkv"]
            for t in parts:
                tensors.remove(t)
            tensors.append([f"blk.{i}.attn_qkv.weight", [s.H, sum(t[1][1] for t in parts)], "F16",
                            b"".join(t[3] for t in parts)])

    changed(fuse)
    changed(lambda md, t: md.update({"gemma3n.attention.shared_kv_layers": (src.U32, 0)}))
    changed(lambda md, t: md.pop("gemma3n.attention.value_length"))
    changed(lambda md, t: md.update({"gemma3n.feed_forward_length": (src.U32, 96)}))
    changed(lambda md, t: md.update({"gemma3n.rope.freq_base_swa": (src.F32, 1e4)}))
    changed(lambda md, t: md.update({"gemma3n.rope.freq_base_local": (src.F32, 1e4)}))
    changed(lambda md, t: md.update({"gemma3n.final_logit_softcapping": (src.F32, 30)}))
    changed(lambda md, t: md.pop("gemma3n.attention.sliding_window_pattern"))
    changed(lambda md, t: md.update({"gemma3n.attention.sliding_window_pattern": (src.U32, 5)}))
    changed(lambda md, t: md.update({"gemma3n.activation_sparsity_scale": (
        src.ARRAY, (src.F32, [z or -3.4028234663852886e38 for z in s.z]))}))
    changed(lambda md, t: t.append(["output.weight", [s.H, s.V], "F16", src.encode("F16", w["embed_tokens.weight"])]))
    changed(lambda md, t: t.reverse())

    # Rows of <pad> at the end are slots for images and sound, [PADn] pieces are filling.
    w["embed_tokens.weight"][-20:] = w["embed_tokens.weight"][0]
    src.write_gguf(path("b.gguf"), s, w, "F16", tokens=300)
    b, _ = imported(path("b.gguf"), out="b.llmd")
    assert b.json("llmd.config")["vocab_size"] == 280
    assert len(b.blobs["tokenizer.types"]) == 280

    def unused(md, tensors):
        md["tokenizer.ggml.token_type"][1][1][270:] = [5] * 30

    src.write_gguf(path("b.gguf"), s, w, "F16", tokens=300, change=unused)
    b, _ = imported(path("b.gguf"), out="b.llmd")
    assert b.json("llmd.config")["vocab_size"] == 270


def test_padded_table():
    # Newer GGUF files fill the table up with zeros, from the end of the text vocabulary on and no earlier.
    text = 262144
    s = Shape(L=1, kv=1, H=32, P=1, F=[32], VP=text + 8, sparse=0)
    w = src.weights(s)
    table = w["embed_tokens_per_layer.weight"]
    table[text - 2:] = 0
    for last, rows in ((None, text), (text, text + 1), (text + 6, text + 7), (text + 7, text + 8)):
        table[text:] = 0
        if last:
            table[last] = 1
        held, _ = src.write_gguf(path("in.gguf"), s, w, "F16")
        a, _ = imported(path("in.gguf"))
        assert a.json("llmd.config")["vocab_size_ple"] == rows
        equal(a.x["embed_tokens_per_layer.weight"], held["embed_tokens_per_layer.weight"][:rows], "table")


# (2) The same weights from Hugging Face.


def test_huggingface():
    s = Shape()
    w = src.weights(s)
    n = 0
    for kind in ("BF16", "F32", "F16"):
        src.write_gguf(path("in.gguf"), s, w, kind)
        for wanted in (None, "q8", "bf16"):
            options = ("--weights", wanted) if wanted else ()
            a, _ = imported(path("in.gguf"), "--weights", wanted or "q4", out="a.llmd")
            folder = path(f"hf{n}")
            n += 1
            prefix = ("model.language_model.", "model.", "language_model.model.", "language_model.", "")[n % 5]
            src.write_hf(folder, s, w, kind, shards=(3, 1, 2)[n % 3], prefix=prefix)
            b, _ = imported(folder, *options, out="b.llmd")
            same_weights(a, b)
            assert a.metadata["llmd.config"] == b.metadata["llmd.config"]
            assert b.json("llmd.generation") == {"temperature": 0.5, "top_p": 0.75, "top_k": 40, "stop_ids": [1, 3]}
            assert b.metadata["llmd.license"] == "gemma"
            assert b.json("llmd.source") == {"format": "huggingface", "name": os.path.basename(folder)}

    # Other ways to write the same configuration.
    variants = []
    c = src.hf_config(s)
    c["text_config"]["intermediate_size"] = 96
    variants.append(c)
    c = src.hf_config(s)
    for key in ("rope_theta", "rope_local_base_freq", "rope_scaling"):
        del c["text_config"][key]
    variants.append(copy.deepcopy(c))
    c["text_config"]["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    variants.append(c)
    c = src.hf_config(s)
    for key in ("layer_types", "altup_coef_clip", "altup_num_inputs", "final_logit_softcapping", "rms_norm_eps"):
        del c["text_config"][key]
    variants.append(c)
    c = src.hf_config(s)["text_config"]
    variants.append(c)
    for i, c in enumerate(variants):
        folder = path(f"variant{i}")
        src.write_hf(folder, s, w, "F16", shards=1, config=c)
        b, _ = imported(folder, "--weights", "bf16", out="b.llmd")
        same_weights(a, b)
        assert a.metadata["llmd.config"] == b.metadata["llmd.config"], i


def test_huggingface_refused():
    s = Shape(L=5, kv=5)
    w = src.weights(s)
    count = 0

    def folder(**kw):
        nonlocal count
        count += 1
        f = path(f"bad{count}")
        src.write_hf(f, s, w, **kw)
        return f

    def config(change, *words):
        c = src.hf_config(s)
        change(c, c["text_config"])
        f = folder(shards=1, config=c)
        refused(f, "config.json" if words[0] != "-" else "", *[x for x in words if x != "-"])

    config(lambda c, t: c.update(model_type="llama"), "model_type")
    config(lambda c, t: c.update(text_config=[]), "text_config")
    config(lambda c, t: t.pop("hidden_size"), "hidden_size")
    config(lambda c, t: t.update(hidden_size="64"), "hidden_size")
    config(lambda c, t: t.update(hidden_size=-64), "hidden_size")
    config(lambda c, t: t.update(hidden_size=64.5), "hidden_size")
    config(lambda c, t: t.update(hidden_size=2**40), "hidden_size")
    config(lambda c, t: t.update(num_hidden_layers=0), "num_hidden_layers")
    config(lambda c, t: t.update(num_hidden_layers=2**31), "num_hidden_layers")
    config(lambda c, t: t.update(num_hidden_layers=6), "intermediate_size")
    config(lambda c, t: t.update(num_kv_shared_layers=5), "num_kv_shared_layers")
    config(lambda c, t: t.update(layer_types=["full_attention"] * 4 + ["other"]), "layer_types")
    config(lambda c, t: t.update(activation_sparsity_pattern=[0.95] * 4 + [1.5]), "activation_sparsity_pattern")
    config(lambda c, t: t.update(intermediate_size=[96] * 4), "intermediate_size")
    config(lambda c, t: t.update(intermediate_size=[96] * 4 + [None]), "intermediate_size")
    config(lambda c, t: t.update(altup_active_idx=1), "altup_active_idx")
    config(lambda c, t: t.update(altup_correct_scale=False), "altup_correct_scale")
    config(lambda c, t: t.update(hidden_activation="silu"), "hidden_activation")
    config(lambda c, t: t.update(rope_scaling={"rope_type": "yarn"}), "rope_scaling")
    config(lambda c, t: t.update(rope_parameters={"full_attention": {"rope_theta": 1}}), "rope_parameters.sliding")
    config(lambda c, t: t.update(head_dim=34), "-", "shape")
    config(lambda c, t: t.update(intermediate_size=128), "-", "mlp.", "shape [96, 64]")
    config(lambda c, t: t.update(num_key_value_heads=3), "-", "n_heads_kv")

    f = folder()
    os.remove(os.path.join(f, "model-00002-of-00003.safetensors"))
    refused(f, "model-00002-of-00003.safetensors", "missing")
    for shard in ("../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", ".x.safetensors",
                  "model.safetensors.index.json", 7):
        f = folder()
        index = os.path.join(f, "model.safetensors.index.json")
        with open(index) as file:
            v = json.load(file)
        v["weight_map"]["model.language_model.norm.weight"] = shard
        src.write_json(index, v)
        refused(f, "model.safetensors.index.json")
    f = folder()
    shard = os.path.join(f, "model-00001-of-00003.safetensors")
    os.remove(shard)
    os.symlink("model-00001-of-00003.safetensors", shard)
    refused(f, "model-00001-of-00003.safetensors", "symbolic links")
    os.remove(shard)
    os.mkfifo(shard)
    refused(f, "model-00001-of-00003.safetensors", "regular file")

    f = folder()
    index = os.path.join(f, "model.safetensors.index.json")
    with open(index) as file:
        v = json.load(file)
    v["weight_map"]["model.language_model.norm.weight"] = "model-00001-of-00003.safetensors"
    v["weight_map"]["model.language_model.embed_tokens.weight"] = "model-00001-of-00003.safetensors"
    src.write_json(index, v)
    refused(f, "says it is here")

    def weights(change, *words, kind="F32"):
        f = folder(shards=1, kind=kind)
        bad = dict(w)
        change(bad)
        with open(os.path.join(f, "model.safetensors"), "wb") as file:
            file.write(src.safetensors_bytes(bad, kind)[0])
        refused(f, "model.safetensors" if words[0] != "-" else "", *words[1:] if words[0] == "-" else words)

    def put(name, at, value):
        def change(bad):
            bad[name] = bad[name].copy()
            bad[name][at] = value
        return change

    weights(lambda b: b.pop("norm.weight"), "-", "norm.weight is missing")
    weights(lambda b: b.pop("embed_tokens.weight"), "-", "embed_tokens.weight is missing")
    weights(lambda b: b.update({"layers.0.bias": np.zeros(3, np.float32)}), "layers.0.bias", "not one of")
    weights(lambda b: b.update({"model.norm.weight": b["norm.weight"]}), "norm.weight occurs twice")
    weights(lambda b: b.update({"norm.weight": np.zeros((4, 4, 4), np.float32)}), "norm.weight", "dimensions")
    weights(lambda b: b.update({"norm.weight": np.zeros(65, np.float32)}), "norm.weight", "shape")
    weights(lambda b: b.update({"norm.weight": np.zeros(0, np.float32)}), "norm.weight", "shape")
    for bad in (float("nan"), float("inf"), -float("inf")):
        weights(put("norm.weight", 3, bad), "norm.weight", "not a number")
        weights(put("layers.3.mlp.down_proj.weight", (5, 7), bad), "layers.3.mlp.down_proj.weight", "row 5")
        weights(put("altup_projections.0.weight", (5, 7), bad), "altup_projections.0.weight", kind="BF16")
        weights(put("embed_tokens_per_layer.weight", (71, 7), bad), "embed_tokens_per_layer.weight", "row 71", kind="F16")

    f = folder(shards=1)
    with open(os.path.join(f, "model.safetensors"), "wb") as file:
        file.write(src.safetensors_bytes(w, "F32", {"norm.weight": {"dtype": "F64", "shape": [0], "data_offsets": [0, 0]}})[0])
    refused(f, "hole")
    for text in ("", "{", "[" * 100000, '{"a":' * 5000, "nonsense", '{"model_type": "gemma3n", "model_type": "x"}'):
        with open(os.path.join(f, "config.json"), "w") as file:
            file.write(text)
        refused(f, "config.json")
    os.remove(os.path.join(f, "config.json"))
    refused(f, "config.json", "missing")
    os.mkdir(path("empty"))
    refused(path("empty"), "config.json")
    refused(path("nowhere"), "nowhere")


# (3) K-quants.


def test_k_quants():
    s = Shape(L=5, kv=5, sparse=1, H=256, P=256, R=32, NH=2, NKV=1, D=128, F=[256] * 5, V=64, VP=64)
    w = src.weights(s)
    rng = np.random.default_rng(5)
    for kind, own in (("Q4_K", "q4"), ("Q5_K", "q8"), ("Q6_K", "q8")):
        held, _ = src.write_gguf(path("in.gguf"), s, w, lambda n: "F16" if src.sensitive(n) else kind, rng=rng)
        m, _ = imported(path("in.gguf"), "--weights", "f32")
        for n, x in m.x.items():
            equal(x, src.clipped(n, held[n]), n)
        m, notes = imported(path("in.gguf"))
        assert "requantised" in notes
        requantized = m.json("llmd.import")["requantized"]
        for n, x in m.x.items():
            if src.small(n) or src.sensitive(n):
                equal(x, src.clipped(n, held[n]), n)
                continue
            assert m.d[n]["type"] == own and n in requantized
            rule = "Q4_0" if own == "q4" else "Q8_0"
            plain = src.decode(rule, src.encode(rule, held[n]), held[n].shape)
            assert np.mean((x - held[n]) ** 2) <= np.mean((plain - held[n]) ** 2) * 1.0001, n
        status, table, _ = run("-n", path("in.gguf"))
        assert status == 0 and f"requantised from {kind}" in table


# (4) Slicing.


def sliced(s, held, keep, widths):
    """By gemma3n.md §8.1, in numpy: the new shape and weights."""
    t = Shape(**{**s.__dict__, "L": len(keep), "F": list(widths), "kv": sum(k < s.kv for k in keep)})
    t.sliding, t.z = [s.sliding[k] for k in keep], [s.z[k] for k in keep]
    out = {}
    for n, x in held.items():
        if n == "per_layer_model_projection.weight":
            x = x.reshape(s.L, s.P, s.H)[keep].reshape(-1, s.H)
        elif n == "embed_tokens_per_layer.weight":
            x = x.reshape(s.VP, s.L, s.P)[:, keep].reshape(s.VP, -1)
        if not n.startswith("layers."):
            out[n] = x
            continue
        _, i, rest = n.split(".", 2)
        if int(i) not in keep:
            continue
        new = keep.index(int(i))
        if rest in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            x = x[:widths[new]]
        elif rest == "mlp.down_proj.weight":
            x = x[:, :widths[new]]
        out[f"layers.{new}.{rest}"] = x
    return t, {n: x for n, x in out.items() if src.kept(t, n)}


def test_slicing():
    s = Shape(L=15, kv=10, F=[96, 64, 96] * 5)
    w = src.weights(s)
    cases = (
        ("0-9,14", "32", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14], [32] * 11),
        ("1-2,4-9,11-14", "64x3,32x2,64x7", [1, 2, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14], [64] * 3 + [32] * 2 + [64] * 7),
        ("3,8-9,10,14", "40,96,33,64,1", [3, 8, 9, 10, 14], None),
        ("0-9", None, list(range(10)), [96, 64, 96] * 3 + [96]),
        (None, "64", list(range(15)), [64] * 15),
    )
    for kind in ("F32", "Q4_0", "Q8_0"):
        held, _ = src.write_gguf(path("in.gguf"), s, w, lambda n: "F16" if "laurel" in n else kind)
        for layers, ffn, keep, widths in cases:
            if widths is None:
                if kind != "F32":
                    continue  # not whole blocks
                widths = [40, 96, 33, 64, 1]
            options = (["--layers", layers] if layers else []) + (["--ffn", ffn] if ffn else [])
            wrong = [k for k, f in zip(keep, widths) if f > s.F[k]]
            if wrong:
                refused(path("in.gguf"), "--ffn", f"layer {wrong[0]}", options=options)
                continue
            m, _ = imported(path("in.gguf"), *options)
            t, x = sliced(s, held, keep, widths)
            same_config(m.json("llmd.config"), t.config())
            assert set(m.x) == set(x)
            for n in x:
                equal(m.x[n], src.clipped(n, x[n]), n)
            assert m.json("llmd.import").get("layers") == layers and m.json("llmd.import").get("ffn") == ffn
            # Quantised blocks are cut, not made anew.
            assert m.json("llmd.import")["requantized"] == []
    held, _ = src.write_gguf(path("in.gguf"), s, w, lambda n: "F16" if "laurel" in n else "Q4_0")
    for layers in ("0-8,10-14", "0-7,9-14"):
        refused(path("in.gguf"), "--layers", "must stay", options=("--layers", layers))
    for layers in ("", "x", "0-", "3-1", "1,1", "0-20", "0,,1", "1-2-3", "5,4", "0-9,14,", "99999999999"):
        refused(path("in.gguf"), "--layers", options=("--layers", layers))
    for ffn in ("", "x", "0", "64x", "64x0", "64,64", "64x16", "9999999", "64x9999999999", "-1", "64x2"):
        refused(path("in.gguf"), "--ffn", options=(f"--ffn={ffn}",))
    refused(path("in.gguf"), "--slice e2b", "35 layers", options=("--slice", "e2b"))


def test_slice_e2b():
    s = Shape(L=35, kv=20, H=32, P=32, R=8, NH=1, NKV=1, D=32, F=[8224] * 35, V=40, VP=40, sparse=10)
    w = src.weights(s)
    held, _ = src.write_gguf(path("in.gguf"), s, w, lambda n: "Q4_0" if "mlp" in n else "F16")
    m, _ = imported(path("in.gguf"), "--slice", "e2b")
    t, x = sliced(s, held, list(range(20)) + list(range(25, 35)), [8192] * 30)
    assert t.kv == 20
    same_config(m.json("llmd.config"), t.config())
    for n in x:
        equal(m.x[n], src.clipped(n, x[n]), n)
    assert m.json("llmd.import")["slice"] == "e2b"


# (5) Hostile GGUF files.


def test_gguf_refused():
    s = Shape(L=5, kv=5, V=300, VP=300)
    w = src.weights(s)
    a = "gemma3n."

    def bad(change, *words, kind="Q4_0", tokens=None, options=()):
        src.write_gguf(path("bad.gguf"), s, w, lambda n: "F16" if "laurel" in n else kind, tokens=tokens, change=change)
        refused(path("bad.gguf"), "bad.gguf", *words, options=options)

    def meta(key, value, *words):
        bad(lambda md, t: md.pop(key) if value is None else md.update({key: value}), *(words or (key,)))

    meta("general.architecture", (src.STRING, "llama"))
    meta("general.architecture", (src.U32, 3))
    meta("general.architecture", None)
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
                "attention.key_length", "attention.sliding_window", "altup.num_inputs", "altup.active_idx",
                "embedding_length_per_layer_input", "activation_sparsity_scale", "context_length",
                "attention.layer_norm_rms_epsilon", "rope.freq_base"):
        meta(a + key, None, key, "missing")
        meta(a + key, (src.STRING, "x"), key)
    meta(a + "block_count", (src.U32, 0))
    meta(a + "block_count", (src.U32, 2**32 - 1))
    meta(a + "block_count", (src.U32, 4), "feed_forward_length")
    bad(lambda md, t: md.update({a + "block_count": (src.U32, 4), a + "feed_forward_length": (src.U32, 96),
                                 a + "attention.sliding_window_pattern": (src.U32, 5),
                                 a + "activation_sparsity_scale": (src.ARRAY, (src.F32, [1.0] * 4))}),
        "blk.4.", "beyond the 4 layers")
    meta(a + "block_count", (src.U32, 6), "feed_forward_length")
    meta(a + "embedding_length", (src.U32, 128), "shape")
    meta(a + "embedding_length", (src.F32, 64.5), "embedding_length")
    meta(a + "embedding_length", (src.I32, -64), "embedding_length")
    meta(a + "attention.shared_kv_layers", (src.F32, 1.5))
    meta(a + "attention.shared_kv_layers", (src.F32, float("nan")))
    meta(a + "attention.shared_kv_layers", (src.U32, 5))
    bad(lambda md, t: md.update({a + "attention.key_length": (src.U32, 0), a + "attention.value_length": (src.U32, 0)}),
        "attention.key_length")
    meta(a + "attention.value_length", (src.U32, 16))
    meta(a + "attention.head_count_kv", (src.U32, 0), "n_heads_kv")
    meta(a + "altup.num_inputs", (src.U32, 0))
    meta(a + "altup.num_inputs", (src.U32, 99))
    meta(a + "altup.num_inputs", (src.U32, 3), "altup_proj")
    meta(a + "altup.active_idx", (src.U32, 2))
    meta(a + "attention.layer_norm_rms_epsilon", (src.F32, float("nan")), "layer_norm_rms_epsilon")
    meta(a + "rope.freq_base", (src.F32, float("inf")), "rope.freq_base")
    meta(a + "rope.freq_base", (src.F32, -1), "rope_theta")
    meta(a + "feed_forward_length", (src.ARRAY, (src.I32, [96, 96, -1, 96, 96])))
    meta(a + "feed_forward_length", (src.ARRAY, (src.I32, [96, 96, 64, 96, 96])), "layers.2", "shape")
    meta(a + "attention.sliding_window_pattern", (src.ARRAY, (src.U32, [1] * 5)))
    meta(a + "attention.sliding_window_pattern", (src.U32, 0))
    meta("general.alignment", (src.U32, 0))
    meta("general.alignment", (src.U32, 48))

    def drop(name):
        return lambda md, t: t.remove(next(x for x in t if x[0] == name))

    def edit(name, at, value):
        def change(md, tensors):
            next(x for x in tensors if x[0] == name)[at] = value
        return change

    bad(drop("output_norm.weight"), "norm.weight is missing")
    bad(drop("token_embd.weight"), "embed_tokens.weight is missing")
    bad(drop("blk.3.attn_k.weight"), "layers.3.self_attn.k_proj.weight")
    bad(drop("blk.0.laurel_l.weight"), "laurel_l")
    for name in ("blk.00.attn_q.weight", "blk.5.attn_q.weight", "blk.4294967297.attn_q.weight", "blk..attn_q.weight",
                 "blk.1.nothing.weight", "rope_freqs.weight", "v.blk.0.weight", "blk.1", "x\0y"):
        bad(lambda md, t, name=name: t.append([name, [64, 64], "F32", bytes(64 * 64 * 4)]), "tensor")
    bad(lambda md, t: t.append(list(t[0])), "occurs twice")
    bad(edit("blk.0.attn_q.weight", 1, [64, 63]), "self_attn.q_proj.weight", "shape")
    bad(edit("blk.0.attn_q.weight", 1, [64, 2**31]), "beyond the end")
    bad(edit("blk.0.attn_q.weight", 1, [2**40, 2**40]), "attn_q")
    bad(edit("blk.0.attn_q.weight", 1, [64, 64, 2]), "attn_q")
    bad(edit("blk.0.attn_q.weight", 1, [33, 64]), "attn_q", "blocks")
    bad(edit("blk.0.attn_q.weight", 2, 3), "attn_q", "type 3")
    bad(edit("blk.0.attn_q.weight", 2, 2**32 - 1), "attn_q", "type")
    bad(edit("altup_proj.weight", 1, [64, 192]), "altup_proj")

    # Scales that are no numbers, where blocks carry over and where they are decoded.
    def poison(name, at, bits):
        def change(md, tensors):
            t = next(x for x in tensors if x[0] == name)
            t[3] = t[3][:at] + bits + t[3][at + len(bits):]
        return change

    for bits in (b"\x00\x7e", b"\x00\x7c", b"\x00\xfc"):
        bad(poison("blk.2.ffn_down.weight", 18 * 3, bits), "layers.2.mlp.down_proj.weight", "row 1")
        bad(poison("blk.2.ffn_down.weight", 18 * 3, bits), "layers.2.mlp.down_proj.weight", options=("--weights", "f32"))
        bad(poison("per_layer_token_embd.weight", 18 * 5 * 299, bits), "embed_tokens_per_layer.weight", "row 299")
        bad(poison("token_embd.weight", 34 * 2 * 299, bits), "embed_tokens.weight", "row 299", kind="Q8_0")
        bad(poison("blk.1.laurel_l.weight", 2, bits), "layers.1.laurel.linear_left.weight", "row 0")
    bad(poison("blk.1.attn_norm.weight", 4, b"\x00\x00\xc0\x7f"), "layers.1.input_layernorm.weight", "not a number")

    # Vocabularies.
    t = "tokenizer.ggml."
    bad(lambda md, x: md.update({t + "model": (src.STRING, "gpt2")}), "tokenizer", tokens=300)
    bad(lambda md, x: md.update({t + "scores": (src.ARRAY, (src.F32, [0.0] * 299))}), "tokenizer", tokens=300)
    bad(lambda md, x: md.update({t + "bos_token_id": (src.U32, 300)}), "bos", tokens=300)
    # More rows than can be run, in a hole of the file: told before they are counted one by one, and before the tokenizer
    # is blamed for having more pieces than there are rows.
    def last_and_long(md, x):
        t = next(t for t in x if t[0] == "token_embd.weight")
        x.remove(t)
        x.append(["token_embd.weight", [s.H, 2**24 + 1], "Q4_0", b""])

    src.write_gguf(path("bad.gguf"), s, w, lambda n: "F16" if "laurel" in n else "Q4_0", tokens=300, change=last_and_long)
    os.truncate(path("bad.gguf"), os.path.getsize(path("bad.gguf")) + (2**24 + 1) * s.H // 32 * 18)
    refused(path("bad.gguf"), "bad.gguf", "embed_tokens.weight has 16777217 rows")
    os.remove(path("bad.gguf"))

    for data, word in ((b"", "empty"), (b"GGU", "not a GGUF"), (b"PK\3\4" + bytes(100), "not a GGUF"),
                       (b"GGUF\1\0\0\0" + bytes(100), "version 1"), (b"GGUF\0\0\0\3" + bytes(100), "big-endian")):
        with open(path("bad.gguf"), "wb") as f:
            f.write(data)
        refused(path("bad.gguf"), "bad.gguf", word)


def hostile(mode, file, header, source):
    p = subprocess.run([HOSTILE_IMPORT, mode, file, str(header), source, path("hostile.llmd")],
                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert p.returncode == 0, (mode, file, p.returncode, p.stderr.decode(errors="replace")[-2000:])
    assert not os.path.exists(path("hostile.llmd"))


def test_mutations():
    s = Shape(L=5, kv=5, H=32, P=32, NH=1, D=32, F=[32] * 5, V=270, VP=270, sparse=1)
    w = src.weights(s)
    _, header = src.write_gguf(path("in.gguf"), s, w, lambda n: "F16" if src.sensitive(n) else "Q4_0", tokens=270)
    hostile("truncate", path("in.gguf"), header, path("in.gguf"))
    hostile("flip", path("in.gguf"), header, path("in.gguf"))
    hostile("flip", path("in.gguf"), os.path.getsize(path("in.gguf")), path("in.gguf"))
    src.write_hf(path("hf"), s, w, shards=2)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        file = path(f"hf/{name}")
        hostile("truncate", file, os.path.getsize(file), path("hf"))
        hostile("flip", file, os.path.getsize(file), path("hf"))
    file = path("hf/model-00001-of-00002.safetensors")
    with open(file, "rb") as f:
        header = 8 + int.from_bytes(f.read(8), "little")
    hostile("truncate", file, header, path("hf"))
    hostile("flip", file, header, path("hf"))


# (6) The output.


def test_output():
    s = Shape(L=5, kv=5)
    w = src.weights(s)
    src.write_gguf(path("in.gguf"), s, w, "F16")
    before = os.listdir(FOLDER)
    for args in ((path("in.gguf"),), (path("in.gguf"), path("out.llmd"))):
        status, stdout, stderr = run("--dry-run", *args)
        assert status == 0 and stderr == "" and "layers.4.mlp.up_proj.weight" in stdout
        assert os.listdir(FOLDER) == before
    last = stdout.splitlines()[-1]
    size = int(last.split("the file: ")[1].split()[0])

    status, stdout, stderr = run("--quiet", path("in.gguf"), path("out.llmd"))
    assert (status, stdout, stderr) == (0, "", "")
    assert os.path.getsize(path("out.llmd")) == size
    first = open(path("out.llmd"), "rb").read()
    status, stdout, stderr = run(path("in.gguf"), path("out.llmd"))
    assert status == 1 and "--force" in stderr
    assert open(path("out.llmd"), "rb").read() == first
    assert run("--force", "--weights", "q8", path("in.gguf"), path("out.llmd"))[0] == 0
    assert os.path.getsize(path("out.llmd")) < size
    status, _, stderr = run("--force", path("in.gguf"), path("in.gguf"))
    assert status == 1 and "source itself" in stderr
    os.mkdir(path("folder"))
    status, _, stderr = run("--force", path("in.gguf"), path("folder"))
    assert status == 1 and "directory" in stderr
    status, _, stderr = run(path("in.gguf"), path("nowhere/out.llmd"))
    assert status == 1 and "nowhere" in stderr

    # The same bytes every time.
    assert run("-f", path("in.gguf"), path("a.llmd"))[0] == run("-f", path("in.gguf"), path("b.llmd"))[0] == 0
    a = open(path("a.llmd"), "rb").read()
    assert a == open(path("b.llmd"), "rb").read() == first

    assert run("--verify", path("a.llmd"))[:2] == (0, f"{path('a.llmd')}: {len(Model(path('a.llmd')).x)} tensors, "
                                                      "all as they were written\n")
    damaged = bytearray(a)
    damaged[-3] ^= 1
    with open(path("a.llmd"), "wb") as f:
        f.write(damaged)
    status, stdout, stderr = run("--verify", path("a.llmd"))
    assert status == 1 and stdout == "" and "embed_tokens_per_layer.weight" in stderr
    status, _, stderr = run("--verify", path("in.gguf"))
    assert status == 1 and "in.gguf" in stderr
    m, _ = imported(path("in.gguf"), "--license", "own")
    assert m.metadata["llmd.license"] == "none"  # the source knows better


def test_disk_full():
    s = Shape(L=5, kv=5)
    src.write_gguf(path("in.gguf"), s, src.weights(s), "F32")
    before = sorted(os.listdir(FOLDER))
    limit = os.path.getsize(path("in.gguf")) // 2
    status, _, stderr = run(path("in.gguf"), path("out.llmd"),
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert status == 1 and stderr.count("\n") == 1 and "out.llmd" in stderr, stderr
    assert sorted(os.listdir(FOLDER)) == before

    os.mkdir(path("small"))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={limit}", "tmpfs", path("small")],
                      stderr=subprocess.DEVNULL).returncode != 0:
        print("  (no small file system: mount is not allowed)")
        return
    try:
        status, _, stderr = run(path("in.gguf"), path("small/out.llmd"))
        assert status == 1 and stderr.count("\n") == 1 and "space" in stderr, stderr
        assert os.listdir(path("small")) == []
    finally:
        subprocess.run(["umount", path("small")], check=True)


def test_interrupted():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:  # in the background, under nohup; children would inherit it
            signal.signal(number, lambda *_: None)
    # Large enough for many pieces; the zeros at the end of the file take no room.
    s = Shape(L=5, kv=5, V=200000, VP=8)
    w = src.weights(s)
    src.write_gguf(path("in.gguf"), s, w, "F32")
    before = sorted(os.listdir(FOLDER))

    def writes(p):
        """The output is open, whether it has a name yet or not."""
        with contextlib.suppress(FileNotFoundError):
            return any(os.readlink(f"/proc/{p.pid}/fd/{fd}").startswith(FOLDER) and
                       os.readlink(f"/proc/{p.pid}/fd/{fd}") not in (FOLDER, path("in.gguf"))
                       for fd in os.listdir(f"/proc/{p.pid}/fd"))

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        master, slave = pty.openpty()
        termios.tcflow(slave, termios.TCOOFF)  # it stands still where it shows its progress
        p = subprocess.Popen([LLM_IMPORT, "--force", "--weights", "f32", path("in.gguf"), path("out.llmd")],
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=slave)
        while not writes(p):
            assert p.poll() is None, p.returncode
        p.send_signal(number)
        termios.tcflow(slave, termios.TCOON)
        os.close(slave)
        text = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while more := os.read(master, 4096):
                text += more
        os.close(master)
        status = p.wait()
        assert status == 128 + number, (status, text)
        assert b"interrupted" in text
        assert sorted(os.listdir(FOLDER)) == before


def main():
    global FOLDER
    tests = [(n, f) for n, f in globals().items() if n.startswith("test_")]
    chosen = sys.argv[3:]
    for name, test in tests:
        if chosen and name not in chosen:
            continue
        print(name, flush=True)
        # In memory, where syncing every model costs nothing.
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="llm-import-", dir=memory) as FOLDER:
            test()
    return 0


if __name__ == "__main__":
    sys.exit(main())
