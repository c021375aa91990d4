#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Held-out cases of every skill for `llm-eval skills`: models/demo-skills.jsonl.

  held_out.py [--seed S] [--count N] > models/demo-skills.jsonl

A line is an object:
  skill        which one
  turns        texts of user, model, user, ..., the last one a user's: a conversation that the model goes on with
  text         instead of turns: plain text that the model goes on with
  expect       POSIX extended regular expressions; each matches the whole answer, white space around it taken away
  reject       none of these matches the whole answer
  expect_json  instead: the answer is JSON, and has this value

What these patterns say is what dialogues.right() does, but for two things: a letter beyond ASCII ends a word here, and a
JSON number 3.0 is not 3. Nothing the model can have learned holds either.
"""
import argparse
import json
import re
import sys

import dialogues

SEED, COUNT = "shipped", 50
WORD, OTHER = "[A-Za-z0-9_]", "[^A-Za-z0-9_]"


def literal(text):
    return re.sub(r"([][\\.^$*+?(){}|])", r"\\\1", text)


def extended(p):
    """A pattern of dialogues.pattern() as POSIX writes it."""
    p = re.sub(r"\\([^\w])", lambda m: literal(m.group(1)), p)
    p = p.replace("(?:", "(").replace(r"\w", WORD)
    assert not re.search(r"\\\w|\(\?", p), p
    return p


def has_word(w):
    return f"(.*{OTHER})?{literal(w)}({OTHER}.*)?"


def expectation(check):
    """The fields of a case that say what is right."""
    kind, *want = check
    if kind == "exact":
        return {"expect": [literal(want[0].strip())]}
    if kind == "word":
        others = {"reject": [has_word(w) for w in sorted(set(want[1]))]} if want[1] else {}
        return {"expect": [has_word(want[0])], **others}
    if kind == "number":
        return {"expect": [f"(.*[^0-9])?{want[0]}[^0-9]*"]}
    if kind == "list":
        return {"expect": [f"{OTHER}*" + f"{OTHER}+".join(map(literal, want[0])) + f"{OTHER}*"]}
    if kind == "json":
        return {"expect_json": want[0]}
    if kind == "end":
        return {"expect": [".*" + literal(want[0])]}
    if kind == "any":
        return {"expect": [".*(" + "|".join(map(literal, want[0])) + ").*"]}
    if kind == "story":
        v = dict(zip(("animal", "place", "thing"), want))
        each = ["(" + "|".join(dialogues.pattern(s, v) for s in lines) + ")" for lines in dialogues.Generator.STORY]
        return {"expect": [extended(" ".join(each))] + [f".*{literal(v[w])}.*" for w in ("animal", "thing")]}
    if kind == "prose":
        # Any of the lines, at least one, in their order; a space after each but the last.
        v = {"name": re.match(r"\w+", want[0]).group()}
        lines = ["(" + extended(dialogues.pattern(p, v)) + "( |$))?" for p in dialogues.Generator.PROSE]
        return {"expect": ["".join(lines), ".*[^ ]"]}
    raise ValueError(kind)


def cases(seed=SEED, count=COUNT):
    """[(case, Doc)]: `count` different ones of each skill."""
    g = dialogues.Generator(seed, held_out=True)
    out = []
    for skill in dialogues.SKILLS:
        seen = set()
        while len(seen) < count:
            d = g.prompt(skill)
            if d.prose:
                prompt = {"text": d.prose}
            else:
                prompt = {"turns": [x for t in d.turns for x in (t.user, t.answer)][:-1]}
            key = json.dumps(prompt)
            # Where another fact is of the one asked about, the right answer may hold what it must not.
            if key not in seen and dialogues.right(d.turns[-1].check, d.turns[-1].answer):
                seen.add(key)
                out.append(({"skill": skill, **prompt, **expectation(d.turns[-1].check)}, d))
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", default=SEED)
    p.add_argument("--count", type=int, default=COUNT, help="cases of each skill")
    o = p.parse_args()
    for case, _ in cases(o.seed, o.count):
        print(json.dumps(case))


if __name__ == "__main__":
    sys.exit(main())
