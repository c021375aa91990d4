#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Makes a manual page of a document, so that there is one text of both.

  md-to-man.py NAME SECTION "one line about it" FILE.md > NAME.SECTION

It knows what docs/dbus-api.md is written with and no more: headings, paragraphs, tables, indented code, and
definitions (a line, then one that begins with a colon, with indented paragraphs and tables). Anything else that
could be markup is refused rather than printed as it stands.
"""
import re
import sys


def inline(text):
    """Text as roff has it: `code` bold, **strong** bold, *emphasis* italic, links to pages of the manual bold."""
    def plain(s):
        s = s.replace("\\", "\\e").replace("-", "\\-")
        s = re.sub(r"\*\*([^*]+)\*\*", r"\\fB\1\\fP", s)
        s = re.sub(r"\*([^*\s][^*]*)\*", r"\\fI\1\\fP", s)
        s = re.sub(r"\b([a-zA-Z][\w.\\-]*)\((\d)\)", r"\\fB\1\\fP(\2)", s)
        return s.replace("→", "\\(->")

    parts = text.split("`")
    if len(parts) % 2 == 0:
        sys.exit(f"an open ` in: {text}")
    out = ""
    for i, part in enumerate(parts):
        out += plain(part) if i % 2 == 0 else "\\fB" + part.replace("\\", "\\e").replace("-", "\\-").replace("→", "\\(->") + "\\fP"
    if re.search(r"(?<!\\)\[[^]]*\]\(", text):
        sys.exit(f"a link in: {text}")
    return "\\&" + out if out[:1] in (".", "'") else out


def table(lines):
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])] for line in lines]
    head, rule, body = rows[0], rows[1], rows[2:]
    if not all(re.fullmatch(r":?-+:?", c) for c in rule) or any(len(r) != len(head) for r in body):
        sys.exit(f"not a table: {lines[0]}")
    for first, *middle, last in body:
        note = ", ".join(inline(c) for c in middle if c)
        print(".TP")
        print(inline(first) + (f" ({note})" if note else ""))
        print(inline(last) or "\\ ")


def blocks(text):
    """Runs of lines between empty ones, with what they are indented by taken off."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.split("\n") if line.strip()]
        if lines:
            indent = min(len(line) - len(line.lstrip()) for line in lines)
            yield indent, [line[indent:] for line in lines]


def main():
    name, section, about, path = sys.argv[1:]
    with open(path, encoding="utf-8") as f:
        text = f.read()
    print('.\\" SPDX-FileCopyrightText: the llmd authors\n.\\" SPDX-License-Identifier: Apache-2.0')
    print(f'.TH {name.upper()} {section} "" "llmd" "Interfaces"\n.SH NAME\n{name} \\- {inline(about)}\n.SH DESCRIPTION')
    inside = False  # a definition
    for indent, lines in blocks(text):
        if inside and indent == 0:
            inside = False
            print(".RE")
        if lines[0].startswith("# "):
            lines = lines[1:]
            if not lines:
                continue
        if lines[0].startswith("## "):
            print(f".SH {inline(lines[0][3:])}")
        elif lines[0].startswith("#"):
            sys.exit(f"{path}: {lines[0]}")
        elif indent >= 4:
            print(".PP\n.nf\n.RS 4")
            for line in lines:
                print("\\&" + line.replace("\\", "\\e").replace("-", "\\-"))
            print(".RE\n.fi")
        elif lines[0].startswith("|"):
            table(lines)
            print(".PP")
        elif len(lines) > 1 and lines[1].startswith(": "):
            print(f".PP\n{inline(lines[0])}\n.RS 4")
            print(inline(" ".join([lines[1][2:]] + [line.strip() for line in lines[2:]])))
            inside = True
        else:
            print(f".PP\n{inline(' '.join(lines))}")
    if inside:
        print(".RE")


main()
