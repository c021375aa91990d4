#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint as an ordinary Hugging Face directory, which llm-import takes.

  export.py CHECKPOINT TOKENIZER.model FOLDER    config.json, generation_config.json, model.safetensors (f32),
                                                 tokenizer.model
"""
import argparse
import json
import os
import shutil
import struct
import sys

import tokenizer
import train


def write_safetensors(path, tensors):
    """tensors: {name: f32 tensor}. A length, a JSON header, the data."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at + 4 * t.numel()]}
        at += 4 * t.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            f.write(t.detach().contiguous().numpy().astype("<f4").tobytes())


def config(c, tok):
    text = {
        "model_type": "gemma3n_text", "vocab_size": c.vocab, "vocab_size_per_layer_input": c.vocab_ple, "hidden_size": c.hidden,
        "hidden_size_per_layer_input": c.ple, "num_hidden_layers": c.layers, "intermediate_size": list(c.ffn),
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim,
        "hidden_activation": "gelu_pytorch_tanh", "sliding_window": c.window, "rope_theta": c.theta, "rope_local_base_freq": c.theta_sliding,
        "rope_scaling": None, "rms_norm_eps": c.eps, "final_logit_softcapping": c.softcap, "attention_bias": False,
        "layer_types": ["sliding_attention" if c.sliding(l) else "full_attention" for l in range(c.layers)],
        "altup_num_inputs": 4, "altup_active_idx": 0, "altup_coef_clip": c.clip, "altup_correct_scale": True, "laurel_rank": c.laurel,
        "num_kv_shared_layers": c.layers - c.kv_layers, "activation_sparsity_pattern": list(c.sparsity), "max_position_embeddings": c.context,
        "pad_token_id": tokenizer.PAD, "eos_token_id": tokenizer.EOS, "bos_token_id": tokenizer.BOS, "tie_word_embeddings": True}
    return {"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n", "eos_token_id": list(tok.ends),
            "torch_dtype": "float32", "text_config": text}


def export(checkpoint, tokenizer_model, folder):
    m, _ = train.load_model(checkpoint)
    tok = tokenizer.Tokenizer(tokenizer_model)
    os.makedirs(folder, exist_ok=True)
    write_safetensors(f"{folder}/model.safetensors", {f"model.language_model.{n}": p for n, p in m.state_dict().items()})
    shutil.copyfile(tokenizer_model, f"{folder}/tokenizer.model")
    for name, value in (("config.json", config(m.c, tok)),
                        ("generation_config.json", {"do_sample": True, "temperature": 0.0, "top_k": 64, "top_p": 0.95, "pad_token_id": tokenizer.PAD,
                                                    "bos_token_id": tokenizer.BOS, "eos_token_id": list(tok.ends)})):
        with open(f"{folder}/{name}", "w") as f:
            f.write(json.dumps(value, indent=2) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint")
    p.add_argument("tokenizer")
    p.add_argument("folder")
    o = p.parse_args()
    export(o.checkpoint, o.tokenizer, o.folder)


if __name__ == "__main__":
    sys.exit(main())
