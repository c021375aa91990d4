#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""The held-out cases that ship: they are what held_out.py writes, and `llm-eval skills` takes the same answers for right
as the generator does.

  test_held_out.py demo-skills.jsonl
"""
import json
import os
import random
import re
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import dialogues
import held_out


def matches(case, answer):
    """What llm-eval does. These patterns mean the same to Python."""
    answer = answer.strip()
    if "expect_json" in case:
        try:
            return json.loads(answer) == case["expect_json"]
        except ValueError:
            return False
    return (all(re.fullmatch(p, answer, re.S) for p in case["expect"])
            and not any(re.fullmatch(p, answer, re.S) for p in case.get("reject", [])))


def broken(r, answer, others):
    """The answer with a mistake, or one that is still right: the two judges must only agree."""
    words = answer.split(" ")
    i = r.randrange(len(words))
    yield " ".join(words[:i] + words[i + 1:])
    yield " ".join(words[:i] + [words[i]] + words[i:])
    yield " ".join(words[:i] + ["fox"] + words[i + 1:])
    yield answer[:-1]
    yield answer + "."
    yield "7 " + answer
    yield answer + " 7"
    yield answer.swapcase()
    yield answer.replace(" ", "  ", 1)
    yield " " + answer + "\n"
    yield answer.replace(" ", "\n")
    yield answer + "\n" + answer
    yield r.choice(others)
    yield ""


def main():
    cases = held_out.cases()
    with open(sys.argv[1]) as f:
        assert f.read() == "".join(json.dumps(c) + "\n" for c, _ in cases), f"not what held_out.py writes: {sys.argv[1]}"
    r, n, wrong = random.Random(1), 0, 0
    for case, doc in cases:
        turn = doc.turns[-1]
        others = [d.turns[-1].answer for c, d in cases if c["skill"] == case["skill"]]
        assert matches(case, turn.answer), (case, turn.answer)
        assert not matches(case, ""), case
        for answer in broken(r, turn.answer, others):
            right = dialogues.right(turn.check, answer)
            assert matches(case, answer) == right, (case, answer, right)
            n += 1
            wrong += not right
    assert wrong > n / 4, (wrong, n)
    print(f"{len(cases)} cases, {n} answers, {wrong} of them wrong")


if __name__ == "__main__":
    main()
