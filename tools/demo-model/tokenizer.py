#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Trains the SentencePiece tokenizer on the dialogues, by Gemma's conventions, and renders documents to ids.

  tokenizer.py FOLDER [--vocab N] [--documents N]    writes FOLDER/tokenizer.model
"""
import argparse
import os
import string
import subprocess
import sys
import tempfile

import sentencepiece

import dialogues

PAD, EOS, BOS, UNK = 0, 1, 2, 3
TURN, END = "<start_of_turn>", "<end_of_turn>"


def train(folder, vocab, documents):
    g = dialogues.Generator("tokenizer")
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as d:
        with open(f"{d}/text", "w") as f:
            for _ in range(documents):
                f.write(dialogues.render(g.document()) + "\nuser\nmodel\n")
            f.write(" ".join(string.ascii_letters + string.digits + string.punctuation) + "\n")  # each a piece
        subprocess.run(["spm_train", f"--input={d}/text", f"--model_prefix={d}/tokenizer", "--model_type=bpe", f"--vocab_size={vocab}",
                        f"--pad_id={PAD}", f"--eos_id={EOS}", f"--bos_id={BOS}", f"--unk_id={UNK}", "--pad_piece=<pad>", "--eos_piece=<eos>",
                        "--bos_piece=<bos>", "--byte_fallback=true", "--normalization_rule_name=identity", "--add_dummy_prefix=false",
                        "--remove_extra_whitespaces=false", "--split_digits=true", "--character_coverage=1.0",
                        f"--user_defined_symbols={TURN},{END},\n", "--num_threads=1", "--minloglevel=2"], check=True)
        os.rename(f"{d}/tokenizer.model", f"{folder}/tokenizer.model")


class Tokenizer:
    def __init__(self, path):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=path)
        self.turn, self.end = self.sp.piece_to_id(TURN), self.sp.piece_to_id(END)
        self.newline = self.text("\n")
        assert len(self.newline) == 1 and self.turn > UNK and self.end > UNK
        self.ends = (EOS, self.end)

    def text(self, s):
        return self.sp.encode(s)

    def decode(self, ids):
        return self.sp.decode(ids)

    def document(self, doc):
        """[(ids, skill, is an answer)] of a whole document, from <bos> on."""
        if doc.prose and not doc.turns:
            return [([BOS], "", False), (self.text(doc.prose) + [EOS], "prose", True)]
        out = [([BOS], "", False)]
        for i, t in enumerate(doc.turns):
            user = (doc.system + "\n\n" if doc.system and i == 0 else "") + t.user
            out.append(([self.turn] + self.text("user\n" + user) + [self.end] + self.newline, "", False))
            out.append(([self.turn] + self.text("model\n"), "", False))
            # <end_of_turn> is the answer's; the line break after it belongs to the next turn.
            out.append((self.text(t.answer) + [self.end], t.skill or "chat", True))
            out.append((self.newline, "", False))
        return out

    def prompt(self, doc):
        """Ids of everything before the last answer."""
        if doc.prose:
            return [BOS] + self.text(doc.prose)
        parts = self.document(doc)
        return [t for ids, _, _ in parts[:-2] for t in ids]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder")
    p.add_argument("--vocab", type=int, default=1536)
    p.add_argument("--documents", type=int, default=20000)
    o = p.parse_args()
    train(o.folder, o.vocab, o.documents)


if __name__ == "__main__":
    sys.exit(main())
