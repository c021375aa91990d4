#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""The checkers take the generator's own answers and refuse others; the two sides of the held-out border do not meet."""
import os
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import dialogues as d


def test_own_answers():
    prompts = d.held_out(3, 60)
    for skill, doc in prompts:
        t = doc.turns[-1]
        assert t.skill == skill and d.right(t.check, t.answer), (skill, t)
        assert not d.right(t.check, ""), (skill, t)
    # An answer to another prompt of the same skill is wrong, unless there is but one answer to all.
    for skill in set(d.SKILLS) - {"intro", "decline", "yesno", "prose"}:
        own = [doc.turns[-1] for s, doc in prompts if s == skill]
        wrong = sum(d.right(a.check, b.answer) for a, b in zip(own, own[1:]))
        assert wrong <= 6, (skill, wrong)


def test_border():
    seen = {t.answer for g in [d.Generator(1)] for _ in range(3000) for t in g.document(1.0).turns if t.skill in ("copy", "json", "story")}
    for skill, doc in d.held_out(1, 200):
        if skill in ("copy", "json", "story"):
            assert doc.turns[-1].answer not in seen, doc.turns[-1]


def test_seeds():
    a, b, c = (d.render(d.Generator(s).document()) for s in (1, 1, 2))
    assert a == b != c


def test_mistakes():
    assert not d.right(["exact", "a b"], "a  b")
    assert not d.right(["word", "red", ["blue"]], "Your favourite colour is red or blue.")
    assert not d.right(["number", 12], "1 + 1 = 2.")
    assert not d.right(["list", ["a", "b"]], "b, a")
    assert not d.right(["json", {"age": 3}], '{"age": 4}')
    assert not d.right(["json", {"age": 3}], '{"age": 3')
    assert not d.right(["prose", "Ada lived in Rome and worked as a cook."], "In the evening Ben went home.")
    assert d.right(["prose", "Ada lived in Rome and worked as a cook."], "In the evening Ada went home.")


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print(f"ok {name}")
