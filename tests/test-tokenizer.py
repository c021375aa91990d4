#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer against SentencePiece's own, and its foreign sources against each other.

  test-tokenizer.py --tokenize-lines PROGRAM --llm-eval PROGRAM

Trains BPE models with spm_train on text made here and compares ids with those of spm_encode, line by line, over mixed
scripts, emoji, control characters, long runs and bytes that are not UTF-8. Only U+000A is left out of lines, since
spm_encode ends a line at each. Then the same vocabularies, written as tokenizer.json and as GGUF of both kinds, must give
the same tables. Skipped (77) without spm_train and spm_encode.
"""
import argparse
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile

META = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
LINES = 12000

SCRIPTS = [
    "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", "àáâãäåæçèéêëìíîïñòóôõöøùúûüýÿß",
    "абвгдежзийклмнопрстуфхцчшщъыьэюя", "αβγδεζηθικλμνξοπρστυφχψω", "ابتثجحخدذرزسشصضطظعغفقكلمنهوي",
    "अआइईउऊएऐओऔकखगघचछजझटठडढणतथदधनपफबभमयरलवशषसह", "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほ",
    "アイウエオカキクケコサシスセソ", "日本語中文字漢水火木金土山川田人大小上下", "가나다라마바사아자차카타파하",
]
EMOJI = ["😀", "🦀", "👍🏽", "👩‍👩‍👧", "🇩🇪", "❤️", "🫩", "🏴\U000e0067\U000e0062\U000e007f"]
MARKS = list(".,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~`") + ["…", "—", "«", "»", "、", "。"]
USER = ["<table>", "</table>", "<tab", "\t", "\t\t", "\t\t\t", META * 2, META * 3, META * 7, "🦀🦀", "ab" + META + "c", "\r\r"]


def words(r):
    """A vocabulary of words, each in one script, used by Zipf's law: something to learn merges from."""
    made = []
    for _ in range(600):
        script = r.choice(SCRIPTS)
        made.append("".join(r.choice(script[:12] if r.random() < .7 else script) for _ in range(r.randint(1, 9))))
    weights = [1 / (i + 1) for i in range(len(made))]
    return made, weights


def training_text(r, vocabulary):
    made, weights = vocabulary
    lines = []
    for _ in range(4000):
        line = []
        for w in r.choices(made, weights, k=r.randint(3, 20)):
            line.append(w)
            line.append(r.choice([" ", " ", " ", " ", "  ", ", ", ". ", "-", "\u00a0"]))
            if r.random() < .02:
                line.append(r.choice(EMOJI + MARKS))
        lines.append("".join(line).strip() or "x")
    return "\n".join(lines) + "\n"


def any_character(r):
    while True:
        c = r.choice([r.randrange(0x80), r.randrange(0x300), r.randrange(0x3000), r.randrange(0x10000), r.randrange(0x110000)])
        if c != 0x0a and not 0xd800 <= c < 0xe000 and c != 0x2581:
            return chr(c)


def lines_to_encode(r, vocabulary):
    """[bytes], without newlines; the last ones are no valid UTF-8."""
    made, weights = vocabulary
    lines = [b"", b" ", b"   ", b"\0", b"\r", b"<bos>", b"<unk><eos></s>", META.encode(), (META + " " + META).encode(), b"\xef\xbb\xbfx"]
    while len(lines) < LINES:
        parts = []
        for _ in range(r.randint(1, 12)):
            kind = r.randrange(10)
            if kind < 4:
                parts += [r.choices(made, weights)[0], r.choice(["", " ", " ", "  "])]
            elif kind == 4:
                parts += [any_character(r) for _ in range(r.randint(1, 6))]
            elif kind == 5:
                parts.append(r.choice(EMOJI + MARKS + ["<0x41>", "<bos>", "<unk>", "<pad>", "\u2028", "\u200d", "\ufffd"]))
            elif kind == 6:
                parts.append(r.choice(USER).replace(META, r.choice([META, " "])))
            elif kind == 7:
                parts.append(chr(r.choice([*range(0, 10), *range(11, 32), *range(0x7f, 0xa0)])))
            elif kind == 8:  # long runs: of a character, of a word, of spaces
                unit = r.choice([r.choice(made), r.choice(r.choice(SCRIPTS)), " ", "\t", "\r", r.choice(EMOJI), "ab"])
                parts.append(unit * r.choice([2, 3, 5, 31, 32, 33, r.randint(2, 400)]))
            else:
                parts.append("".join(r.choice(r.choice(SCRIPTS)) for _ in range(r.randint(1, 30))))
        lines.append("".join(parts).encode())
    for _ in range(1000):
        line = bytearray(r.choice(lines[:2000]))
        for _ in range(r.randint(1, 4)):
            line.insert(r.randint(0, len(line)), r.choice([0x80, 0xbf, 0xc0, 0xc3, 0xe2, 0xed, 0xf0, 0xf4, 0xf8, 0xff]))
        lines.append(bytes(line))
    return lines


def fields(data):
    """(number, value) of a protobuf message."""
    def varint(i):
        value = shift = 0
        while True:
            value |= (data[i] & 127) << shift
            i, shift = i + 1, shift + 7
            if data[i - 1] < 128:
                return value, i
    i = 0
    while i < len(data):
        tag, i = varint(i)
        if tag & 7 == 0:
            value, i = varint(i)
        elif tag & 7 == 2:
            n, i = varint(i)
            value, i = data[i:i + n], i + n
        else:
            n = 4 if tag & 7 == 5 else 8
            value, i = data[i:i + n], i + n
        yield tag >> 3, value


def read_model(path):
    """[(text, score, type)], add_dummy_prefix"""
    pieces, prefix = [], True
    with open(path, "rb") as f:
        for number, value in fields(f.read()):
            if number == 1:
                piece = dict(fields(value))
                pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0, piece.get(3, NORMAL)))
            elif number == 3:
                prefix = bool(dict(fields(value)).get(3, 1))
    return pieces, prefix


def merges_of(pieces):
    """[(left, right)] as converters make them: all ways to split a piece in two, by the whole's score, then at random."""
    r = random.Random(3)
    known = {text: score for text, score, kind in pieces if kind == NORMAL}
    merges = []
    for text, score in known.items():
        ways = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in known and text[i:] in known]
        r.shuffle(ways)
        merges += [(-score, way) for way in ways]
    merges.sort(key=lambda m: m[0])
    return [way for _, way in merges]


def write_json(path, pieces, prefix, arrays, raw_spaces):
    added = []
    for i, (text, _, kind) in enumerate(pieces):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            added.append({"id": i, "content": text.replace(META, " ") if raw_spaces else text, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": kind != USER_DEFINED})
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": META}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": META}, replace]} if prefix else replace
    with open(path, "w") as f:
        json.dump({
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
            "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}},
                                                                        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
                               "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}}},
            "decoder": None,
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                      "vocab": {text: i for i, (text, _, _) in enumerate(pieces)},
                      "merges": [list(m) if arrays else " ".join(m) for m in merges_of(pieces)]},
        }, f)


def write_gguf(path, pieces, prefix, kind):
    def string(s):
        b = s.encode()
        return struct.pack("<Q", len(b)) + b

    def entry(key, number, data):
        return string(key) + struct.pack("<I", number) + data

    def array(key, number, items):
        return entry(key, 9, struct.pack("<IQ", number, len(items)) + b"".join(items))

    texts, types, scores = [], [], []
    for text, score, t in pieces:
        texts.append(string(text.replace(META, " ") if t == USER_DEFINED and kind == "llama" else text))
        types.append(struct.pack("<i", NORMAL if kind == "gemma4" and t == USER_DEFINED else t))
        scores.append(struct.pack("<f", score if kind == "llama" else -1000))
    entries = [
        entry("general.architecture", 8, string("gemma3n")), entry("tokenizer.ggml.model", 8, string(kind)),
        array("tokenizer.ggml.tokens", 8, texts), array("tokenizer.ggml.scores", 6, scores), array("tokenizer.ggml.token_type", 5, types),
        entry("tokenizer.ggml.bos_token_id", 4, struct.pack("<I", 2)), entry("tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 1)),
        entry("tokenizer.ggml.unknown_token_id", 4, struct.pack("<I", 3)),
        entry("tokenizer.ggml.padding_token_id", 4, struct.pack("<I", 0)),
        entry("tokenizer.ggml.add_bos_token", 7, b"\1"), entry("tokenizer.ggml.add_space_prefix", 7, bytes([prefix])),
    ]
    if kind == "gemma4":
        entries.append(array("tokenizer.ggml.merges", 8, [string(" ".join(m)) for m in merges_of(pieces)]))
    with open(path, "wb") as f:
        f.write(b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries))


def run(*command, text=None):
    p = subprocess.run(command, input=text, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if p.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: status {p.returncode}\n{p.stderr.decode(errors='replace')}")
    return p.stdout


def compare(what, lines, expected, got):
    if len(lines) != len(expected) or len(lines) != len(got):
        sys.exit(f"{what}: {len(lines)} lines, {len(expected)} expected answers, {len(got)} answers")
    wrong = [i for i in range(len(lines)) if expected[i] != got[i]]
    for i in wrong[:5]:
        print(f"{what}: line {i} {lines[i]!r}:\nexpected {expected[i]!r}\n     got {got[i]!r}", file=sys.stderr)
    if wrong:
        sys.exit(f"{what}: {len(wrong)} of {len(lines)} lines differ")
    print(f"{what}: {len(lines)} lines agree")


def check(folder, name, options, lines, tokenize_lines, llm_eval):
    prefix = os.path.join(folder, name)
    model = prefix + ".model"
    run("spm_train", f"--input={folder}/training.txt", f"--model_prefix={prefix}", "--model_type=bpe", "--byte_fallback",
        "--normalization_rule_name=identity", "--remove_extra_whitespaces=false", "--character_coverage=0.999",
        "--user_defined_symbols=" + ",".join(USER), "--pad_id=0", "--eos_id=1", "--bos_id=2", "--unk_id=3", "--pad_piece=<pad>",
        "--eos_piece=<eos>", "--bos_piece=<bos>", "--unk_piece=<unk>", "--minloglevel=2", *options)
    text = b"\n".join(lines) + b"\n"
    expected = run("spm_encode", f"--model={model}", "--output_format=id", text=text).split(b"\n")[:-1]
    got = run(tokenize_lines, "ids", model, text=text).split(b"\n")[:-1]
    compare(f"{name}: against spm_encode", lines, expected, got)

    pieces, space_prefix = read_model(model)
    if not space_prefix:
        # U+2581 comes back as a space, and what is no UTF-8 as U+FFFD.
        valid = [x for x in lines[:LINES] if META.encode() not in x]
        back = run(tokenize_lines, "text", model, text=b"\n".join(valid) + b"\n").split(b"\n")[:-1]
        compare(f"{name}: encoded and decoded", valid, valid, back)

    write_json(prefix + ".json", pieces, space_prefix, arrays=False, raw_spaces=False)
    write_json(prefix + "-arrays.json", pieces, space_prefix, arrays=True, raw_spaces=True)
    write_gguf(prefix + "-llama.gguf", pieces, space_prefix, "llama")
    write_gguf(prefix + "-gemma4.gguf", pieces, space_prefix, "gemma4")
    table = run(tokenize_lines, "table", model).split(b"\n")
    for other in [".json", "-arrays.json", "-llama.gguf", "-gemma4.gguf"]:
        compare(f"{name}: the table from {name}{other}", table, table, run(tokenize_lines, "table", prefix + other).split(b"\n"))

    # The program people use: all of stdin is one text, newlines and all.
    text = b"\n".join(x for x in lines[:200] if META.encode() not in x)
    ids = run(llm_eval, "tokenize", "--no-special", prefix + "-llama.gguf", text=text)
    if ids[:2] != b"2 " or run(llm_eval, "tokenize", "--no-special", "--no-bos", prefix + "-llama.gguf", text=text) != ids[2:]:
        sys.exit(f"{name}: llm-eval tokenize: --no-bos must leave out just the first id")
    if not space_prefix and run(llm_eval, "detokenize", prefix + ".json", text=ids) != text:
        sys.exit(f"{name}: llm-eval detokenize: does not give the text back")
    if not space_prefix and (run(llm_eval, "tokenize", "--no-bos", prefix + ".json", text=b"<bos><eos>") != b"2 1\n" or
                             run(llm_eval, "detokenize", "--special", prefix + ".json", text=b"2 1") != b"<bos><eos>"):
        sys.exit(f"{name}: llm-eval: control pieces are matched, and written when asked for")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenize-lines", required=True)
    parser.add_argument("--llm-eval", required=True)
    args = parser.parse_args()
    if not shutil.which("spm_train") or not shutil.which("spm_encode"):
        print("skipped: spm_train and spm_encode are not there (Debian package sentencepiece)")
        return 77
    r = random.Random(1)
    vocabulary = words(r)
    with tempfile.TemporaryDirectory() as folder:
        with open(folder + "/training.txt", "w") as f:
            f.write(training_text(r, vocabulary))
        lines = lines_to_encode(r, vocabulary)
        # As Gemma's was trained.
        check(folder, "words", ["--add_dummy_prefix=false", "--vocab_size=2500"], lines, args.tokenize_lines, args.llm_eval)
        # Pieces reach across words and scripts; a space before the text.
        check(folder, "across", ["--add_dummy_prefix=true", "--vocab_size=3000", "--split_by_whitespace=false",
                                 "--split_by_unicode_script=false", "--split_by_number=false"], lines, args.tokenize_lines, args.llm_eval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
