#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""The model that ships keeps its scores, and `llm-eval skills` tells right answers from wrong and good files from bad.

  test_skills.py LLM-EVAL MODEL.llmd CASES
"""
import json
import subprocess
import sys
import tempfile

MINIMA = "facts=95,far_facts=85,copy=95,arithmetic=85,sort=85,json=95,story=90"


def main():
    llm_eval, model, path = sys.argv[1:]

    def skills(*args, cases=path):
        p = subprocess.run([llm_eval, "skills", "--cases", cases, *args, model], stdin=subprocess.DEVNULL, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return p.returncode, p.stdout, p.stderr

    status, out, err = skills("--min", MINIMA)
    print(out + err)
    assert status == 0, "the model is not as good as it was"

    # Of each skill the cases with the expectations of others: what the model says is right for one only.
    keys = ("expect", "reject", "expect_json")
    with open(path) as f:
        cases = [json.loads(line) for line in f]
    with tempfile.TemporaryDirectory() as folder:
        mixed = []
        for skill in ("copy", "json", "story"):
            some = [c for c in cases if c["skill"] == skill][:10]
            for a, b in zip(some, some[1:]):
                mixed.append({k: v for k, v in a.items() if k not in keys} | {k: b[k] for k in keys if k in b})
        # What is rejected is no less wrong for being expected.
        for c in [c for c in cases if c["skill"] == "facts"][:5]:
            mixed.append({**c, "skill": "rejected", "reject": c["expect"]})
        with open(f"{folder}/mixed", "w") as f:
            f.writelines(json.dumps(c) + "\n" for c in mixed)
        status, out, err = skills("--json", cases=f"{folder}/mixed")
        assert status == 0, err
        table = json.loads(out)
        assert table["total"]["right"] == 0 and table["total"]["cases"] == len(mixed), table
        assert set(table["skills"]) == {"copy", "json", "story", "rejected"}, table
        status, out, err = skills("--min", "copy=1", "--skill", "copy", cases=f"{folder}/mixed")
        assert status == 1 and "copy: 0 of 9 right, less than 1 per cent" in err and "total" in out, (out, err)
        status, out, err = skills("--failures", "--skill", "copy", cases=f"{folder}/mixed")
        assert status == 0 and out.count("  answered  ") == 9 and mixed[0]["expect"][0] in json.loads(
            next(line for line in out.splitlines() if line.startswith("  expect")).split(None, 1)[1]), out

        good = '{"skill": "a", "turns": ["Hi"], "expect": ["x"]}\n'
        for line, what in [("{", "too early"), ("[]", '"skill"'), ('{"skill": 1}', '"skill"'),
                           ('{"skill": "a", "expect": ["x"]}', '"turns" and "text"'),
                           ('{"skill": "a", "turns": ["Hi"], "text": "a", "expect": ["x"]}', '"turns" and "text"'),
                           ('{"skill": "a", "turns": ["Hi", "x"], "expect": ["x"]}', "odd number"),
                           ('{"skill": "a", "turns": [1], "expect": ["x"]}', '"turns"[0]'),
                           ('{"skill": "a", "turns": ["Hi"]}', '"expect" and "expect_json"'),
                           ('{"skill": "a", "turns": ["Hi"], "expect": ["x"], "expect_json": {}}', '"expect" and "expect_json"'),
                           ('{"skill": "a", "turns": ["Hi"], "expect": "x"}', "list of patterns"),
                           ('{"skill": "a", "turns": ["Hi"], "expect": []}', "1 to 64 patterns"),
                           ('{"skill": "a", "turns": ["Hi"], "expect": ["x", "(y"]}', '"expect"[1]'),
                           ('{"skill": "a", "turns": ["Hi"], "expect": ["x)|(.*"]}', '"expect"[0]'),
                           ('{"skill": "a", "turns": ["Hi"], "expect": ["%s"]}' % ("(" * 30000 + "x" + ")" * 30000), "1024 groups"),
                           ('{"skill": "a\\u001b[2J", "turns": ["Hi"], "expect": ["x"]}', "control character"),
                           ('{"skill": "a", "turns": ["Hi"], "expect_json": 3}', "object or a list")]:
            with open(f"{folder}/bad", "w") as f:
                f.write(good + "\n" + line + "\n")
            status, out, err = skills(cases=f"{folder}/bad")
            assert status == 1 and out == "" and f"{folder}/bad:3: " in err and what in err, (line, status, out, err)
        for args, cases_file, status, what in [([], f"{folder}/none", 1, "cannot open"), ([], "/dev/null", 1, "no cases"),
                                               (["--skill", "b"], path, 1, "skill 'b'"), (["--min", "b=3"], path, 1, "skill 'b'"),
                                               (["--min", "101"], path, 2, "from 0 to 100"), (["--min", "=1"], path, 2, "before '='"),
                                               (["--min", "a="], path, 2, "from 0 to 100")]:
            got, out, err = skills(*args, cases=cases_file)
            assert got == status and out == "" and what in err, (args, got, out, err)


if __name__ == "__main__":
    main()
