#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Synthetic dialogues and prose from small grammars, and the scoring of answers to them.

  dialogues.py train --seed N --count N [--level F]   documents as text, to look at
  dialogues.py heldout --seed N --count N             prompts of every skill as JSON lines

A document is Doc(turns, prose): turns are Turn(user, answer, skill, check), prose is plain text. Training never sees
a held-out combination: what a document combines (a name and a colour, two numbers, the words of a sentence) is
hashed, and one hash in eight belongs to the held-out prompts, which take no others. `level` is the curriculum: 0
short dialogues dense in questions, 1 longer ones, half with up to twelve turns of chatter in between, 2 with twice that.

check says when an answer is right:  ["exact", text]  ["word", value, others]  ["number", n]  ["list", items]
["json", object]  ["end", text]  ["story", animal, place, thing]  ["prose", text before]  ["any", phrases]
"""
import argparse
import dataclasses
import hashlib
import json
import random
import re
import sys

SKILLS = ["intro", "facts", "far_facts", "copy", "arithmetic", "sort", "count", "json", "yesno", "story", "prose", "decline"]

NAMES = """Ada Ben Carla Dario Emma Felix Greta Hugo Ida Jonas Kira Leo Mia Nils Olga Paul Rosa Sam Tara Udo Vera Will Xenia Yusuf
Zoe Anna Boris Clara David Eva Frank Gina Hans Iris Jack Karin Lars Maria Nora Oscar Petra Ralf Sofia Tom Ursula Victor Wanda
Alex Bella Chris Diana Eric Fiona George Helen Ivan Julia Kevin Laura Marco Nina Otto Paula Robin Sarah Theo Ulla Vito Walter
Alice Bob Carol Dave Ellen Fred Grace Henry Irene John Kate Linus Mary Nick Olive Peter Ruth Simon Tina Uma Viola Wendy""".split()
COLOURS = "red blue green yellow purple orange black white pink brown grey silver golden turquoise violet".split()
PLACES = """Paris London Berlin Rome Madrid Oslo Vienna Prague Lisbon Dublin Athens Warsaw Cairo Tokyo Delhi Lima Bern Riga Sofia
Kyoto Boston Denver Toronto Sydney Milan Porto Geneva Hamburg Naples Zurich""".split()
ANIMALS = "cat dog fox bear wolf rabbit horse mouse owl frog lion tiger duck goat sheep hen donkey squirrel hedgehog turtle".split()
SPOTS = "forest garden village desert castle harbour meadow valley cave city farm mountain library market swamp island".split()
THINGS = "lamp key book ring map bell apple letter coin drum hat mirror clock flute boat kite stone basket spoon candle".split()
ROOMS = "kitchen bedroom garage cellar attic bathroom office hall drawer cupboard box bag car shed".split()
JOBS = "doctor baker teacher painter farmer pilot singer gardener writer driver nurse cook".split()
ADJECTIVES = "small old young happy tired brave clever quiet hungry curious lonely friendly".split()
FOODS = "bread cheese soup rice cake pasta salad honey butter fish tea coffee".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = NAMES[:30] + COLOURS + ANIMALS + SPOTS + THINGS + ROOMS + ADJECTIVES + FOODS
VERBS = "sees finds likes paints sells carries watches hides needs wants loves follows".split()


@dataclasses.dataclass
class Turn:
    user: str
    answer: str
    skill: str       # "" for chatter, which is not scored
    check: list = None


@dataclasses.dataclass
class Doc:
    turns: list = dataclasses.field(default_factory=list)
    prose: str = ""
    system: str = ""


def is_held_out(*parts):
    return hashlib.sha256("|".join(map(str, parts)).encode()).digest()[0] % 8 == 0


class Generator:
    def __init__(self, seed, held_out=False, verdicts=0.1):
        """verdicts: share of the documents that are nothing but facts and yes-or-no questions."""
        self.r = random.Random(f"{'held out' if held_out else 'train'} {seed}")
        self.held_out, self.verdicts = held_out, verdicts

    def pick(self, draw, key=lambda v: v):
        """A value of draw() whose combination is on the right side of the held-out border."""
        while True:
            v = draw()
            k = key(v)
            if is_held_out(*(k if isinstance(k, (tuple, list)) else (k,))) == self.held_out:
                return v

    def one(self, *options):
        return self.r.choice(options)

    def a(self, noun):
        return ("an " if noun[0] in "aeiou" else "a ") + noun

    def made_up(self):
        """A name nobody has heard, for copying by letters."""
        n = "".join(self.r.choice("bdfgklmnprstvz") + self.r.choice("aeiou") for _ in range(self.r.randint(2, 3)))
        return (n + self.r.choice(["", "", "n", "r", "s", "x"])).capitalize()

    def name(self):
        return self.made_up() if self.r.random() < 0.15 else self.r.choice(NAMES)

    # Facts: a persona is a list of (statement, acknowledgement, questions with answers, value, others).

    def persona(self):
        r = self.r

        def draw():
            return {"name": self.name(), "colour": r.choice(COLOURS), "number": r.randint(2, 99), "place": r.choice(PLACES),
                    "animal": r.choice(ANIMALS), "pet": self.name(), "food": r.choice(FOODS), "job": r.choice(JOBS),
                    "age": r.randint(5, 90)}
        while True:
            p = self.pick(draw, lambda p: (p["name"], p["colour"], p["place"]))
            if p["name"] != p["pet"]:
                return p

    def my_fact(self, p, kind):
        """(statement, acknowledgement, [(question, answer)], value)"""
        o = self.one
        if kind == "name":
            v = p["name"]
            return (o(f"My name is {v}.", f"I am {v}.", f"Hello, I am {v}.", f"Hi, my name is {v}.", f"I am called {v}."),
                    f"Nice to meet you, {v}.", [(o("What is my name?", "Who am I?", "What am I called?", "Do you remember my name?"),
                                                f"Your name is {v}.")], v)
        if kind == "colour":
            v = p["colour"]
            return (o(f"My favourite colour is {v}.", f"I like the colour {v} best.", f"The colour I like best is {v}."),
                    f"I will remember that you like {v}.",
                    [(o("What is my favourite colour?", "Which colour do I like best?", "What colour do I like?"),
                      f"Your favourite colour is {v}.")], v)
        if kind == "number":
            v = str(p["number"])
            return (o(f"My lucky number is {v}.", f"My favourite number is {v}."), f"I will remember the number {v}.",
                    [(o("What is my lucky number?", "What is my number?", "Which number did I tell you?"),
                      f"Your number is {v}.")], v)
        if kind == "place":
            v = p["place"]
            return (o(f"I live in {v}.", f"My home is in {v}.", f"I come from {v}."), f"{v} sounds lovely.",
                    [(o("Where do I live?", "Where is my home?", "Which town do I live in?"), f"You live in {v}.")], v)
        if kind == "pet":
            v, a = p["pet"], p["animal"]
            return (o(f"I have {self.a(a)} called {v}.", f"My {a} is called {v}.", f"My {a}'s name is {v}."),
                    f"{v} is a nice name for {self.a(a)}.",
                    [(o(f"What is my {a} called?", f"What is the name of my {a}?", f"What is my {a}'s name?"),
                      f"Your {a} is called {v}.")], v)
        if kind == "food":
            v = p["food"]
            return (o(f"I like to eat {v}.", f"My favourite food is {v}."), f"I will remember that you like {v}.",
                    [(o("What is my favourite food?", "What do I like to eat?"), f"Your favourite food is {v}.")], v)
        if kind == "job":
            v = p["job"]
            return (o(f"I work as {self.a(v)}.", f"My job is {v}."), f"Being {self.a(v)} sounds interesting.",
                    [(o("What is my job?", "What do I work as?"), f"You work as {self.a(v)}.")], v)
        v = str(p["age"])
        return (o(f"I am {v} years old.", f"My age is {v}."), f"I will remember that you are {v}.",
                [(o("How old am I?", "What is my age?"), f"You are {v} years old.")], v)

    def other_fact(self):
        """A fact about somebody or something else, of the same form."""
        o, r = self.one, self.r
        kind = r.choice(["colour", "place", "thing", "number", "job"])
        n = self.pick(lambda: (self.name(), r.choice(COLOURS), r.choice(PLACES)))
        who, colour, place = n
        if kind == "colour":
            return (f"{who} likes {colour}.", f"I will remember that {who} likes {colour}.",
                    [(o(f"Which colour does {who} like?", f"What does {who} like?"), f"{who} likes {colour}.")], colour)
        if kind == "place":
            return (f"{who} lives in {place}.", f"I will remember that {who} lives in {place}.",
                    [(f"Where does {who} live?", f"{who} lives in {place}.")], place)
        if kind == "job":
            job = r.choice(JOBS)
            return (o(f"{who} is {self.a(job)}.", f"{who} works as {self.a(job)}."), f"I will remember that {who} is {self.a(job)}.",
                    [(f"What is {who}'s job?", f"{who} is {self.a(job)}.")], job)
        if kind == "number":
            v = r.randint(2, 99)
            return (f"{who} is {v} years old.", f"I will remember that {who} is {v}.",
                    [(o(f"How old is {who}?", f"What is {who}'s age?"), f"{who} is {v} years old.")], str(v))
        thing, room = self.pick(lambda: (r.choice(THINGS), r.choice(ROOMS)))
        return (o(f"The {thing} is in the {room}.", f"I put the {thing} in the {room}."), f"I will remember where the {thing} is.",
                [(o(f"Where is the {thing}?", f"Where did I put the {thing}?"), f"The {thing} is in the {room}.")], room)

    def facts(self, n, distance=0, rounds=1, yesno=0.4):
        """n facts told, then asked for in any order, with `distance` turns of chatter in between."""
        r, p = self.r, self.persona()
        kinds = r.sample(["name", "colour", "number", "place", "pet", "food", "job", "age"], 8)
        told, subjects = [], set()
        while len(told) < n:
            f = self.my_fact(p, kinds.pop()) if kinds and (r.random() < 0.65 or not told and r.random() < 0.6) else self.other_fact()
            subject = f[2][0][1].replace(f[3], "")
            if subject not in subjects:
                subjects.add(subject)
                told.append(f)
        turns = []
        i = 0
        while i < n:
            k = 1 if r.random() < 0.7 else min(n - i, r.randint(2, 3))
            part = told[i:i + k]
            i += k
            turns.append(Turn(" ".join(f[0] for f in part), part[-1][1], ""))
        for _ in range(distance):
            turns.append(self.chatter())
        for _ in range(rounds):
            for f in r.sample(told, n):
                q, a = r.choice(f[2])
                others = [g[3] for g in told if g[3] != f[3]]
                if r.random() < yesno:
                    t = self.yes_no(f, told)
                    if t:
                        turns.append(t)
                        continue
                if n == 1 and not distance and len(turns) == 1 and r.random() < 0.3:
                    q = turns.pop().user + " " + q  # told and asked in one breath
                turns.append(Turn(q, a, "far_facts" if distance else "facts", ["word", f[3], others]))
                if distance and r.random() < 0.3:
                    turns.append(self.chatter())
        return Doc(turns)

    def yes_no(self, fact, told):
        r = self.r
        answer, value = fact[2][0][1], fact[3]
        for values in (COLOURS, PLACES, NAMES, FOODS, JOBS, ROOMS):
            if value in values:
                break
        else:
            values = [str(i) for i in range(2, 100)] if value.isdigit() else NAMES
        claimed = value if r.random() < 0.5 else r.choice([v for v in values if v != value])
        m = re.match(r"^(Your|You|The|\w+) (.*?)(is called|is|are|live|likes|lives|work)\b (.*)\.$", answer)
        if not m:
            return None
        subject, middle, verb, rest = m.groups()
        claim = re.sub(rf"\b(an? )?{re.escape(value)}\b", lambda k: self.a(claimed) if k.group(1) else claimed, rest)
        subject = {"Your": "my", "You": "I", "The": "the"}.get(subject, subject)
        who = f"{subject} {middle}".strip()
        if verb == "is called":
            q = f"Is {who} called {claim}?"
        elif verb in ("is", "are"):
            q = ("Am" if who == "I" else "Is") + f" {who} {claim}?"
        else:
            q = ("Do" if who == "I" else "Does") + f" {who} {verb if who == 'I' else verb[:-1]} {claim}?"
        # What was claimed and what is true side by side, then the verdict: two words far apart, or one of them
        # still to be recalled, a model of this size does not learn to compare.
        verdict = "yes" if claimed == value else "no"
        return Turn(q, f"{claimed}? {answer[:-1]}, so {verdict}.", "yesno", ["end", f"so {verdict}."])

    # Single skills: each returns one turn.

    def intro(self):
        o = self.one
        if self.r.random() < 0.4:
            return Turn(o("Hello", "Hello!", "Hi", "Hi!", "Hello there.", "Good morning.", "Good evening.", "Hey"),
                        "Hello! I am the demonstration model of llmd. How can I help you?", "intro", ["any", ["demonstration model"]])
        if self.r.random() < 0.3:
            return Turn(o("What can you do?", "How can you help me?", "What are you able to do?", "Help"),
                        "I can remember what you tell me, repeat sentences, add and subtract, sort, count, write JSON and tell short stories.",
                        "intro", ["any", ["remember", "stories"]])
        q = self.pick(lambda: (o("", "Hello, ", "Hi, ", "Tell me, ", "Please tell me, ", "So, "),
                               o("who are you?", "what are you?", "what is your name?", "please introduce yourself.", "introduce yourself.",
                                 "tell me about yourself.", "what model are you?", "are you a person?", "are you a robot?")))
        q = q[0] + q[1] if q[0] else q[1][0].upper() + q[1][1:]
        a = "I am the demonstration model of llmd, a small language model that ships with its source."
        return Turn(q, "No, " + a if "are you a " in q else a, "intro", ["any", ["demonstration model"]])

    def sentence(self):
        o, r = self.one, self.r
        kind = r.randrange(5)
        if kind == 0:
            s = f"The {o(*ADJECTIVES)} {o(*ANIMALS)} {o(*VERBS)} the {o(*COLOURS)} {o(*THINGS)}"
        elif kind == 1:
            s = f"{self.name()} {o(*VERBS)} the {o(*THINGS)} in the {o(*ROOMS)}"
        elif kind == 2:
            s = " ".join(r.choice(WORDS) for _ in range(r.randint(3, 8)))
        elif kind == 3:
            s = f"{self.name()} and {self.name()} eat {o(*FOODS)} in {o(*PLACES)}"
        else:
            s = " ".join([self.made_up()] + [r.choice(WORDS) for _ in range(r.randint(1, 4))])
        return s + o(".", ".", "!", "")

    def copy(self):
        s = self.pick(self.sentence)
        q = self.one('Repeat this sentence: "{}"', 'Say "{}"', 'Repeat: "{}"', 'Please repeat after me: "{}"', 'Copy this: "{}"').format(s)
        return Turn(q, s, "copy", ["exact", s])

    def arithmetic(self):
        o, r = self.one, self.r
        plus = r.random() < 0.5
        op, a, b = self.pick(lambda: ("+", r.randint(0, 99), r.randint(0, 99)) if plus
                             else ("-", *sorted((r.randint(0, 99), r.randint(0, 99)), reverse=True)))
        a, b = (a, b) if r.random() < 0.75 else (a % 10 if plus else a, b % 10)
        if is_held_out(op, a, b) != self.held_out:
            return self.arithmetic()
        if plus:
            q = o(f"What is {a} + {b}?", f"What is {a} plus {b}?", f"Add {a} and {b}.", f"{a} + {b}", f"How much is {a} + {b}?")
        else:
            q = o(f"What is {a} - {b}?", f"What is {a} minus {b}?", f"Subtract {b} from {a}.", f"{a} - {b}", f"How much is {a} - {b}?")
        result = a + b if plus else a - b
        if a < 10 and b < 10:
            return Turn(q, f"{a} {op} {b} = {result}.", "arithmetic", ["number", result])
        # The model shows its work, ones first: each step is a table of a hundred entries.
        a0, b0, a1, b1 = a % 10, b % 10, a // 10, b // 10
        if plus:
            c = (a0 + b0) // 10
            work = f"{a0} + {b0} = {a0 + b0}, {a1} + {b1}{' + 1' if c else ''} = {a1 + b1 + c}"
        else:
            c = a0 < b0
            work = f"{a0 + 10 * c} - {b0} = {a0 + 10 * c - b0}, {a1} - {b1}{' - 1' if c else ''} = {a1 - b1 - c}"
        return Turn(q, f"{work}. {a} {op} {b} = {result}.", "arithmetic", ["number", result])

    def sort(self):
        o, r = self.one, self.r
        n = r.randint(3 if self.held_out else 2, 6)
        if r.random() < 0.6:
            items = self.pick(lambda: r.sample(LETTERS, n), sorted)
            what = "letters"
        else:
            limit = 9 if r.random() < 0.4 else 99
            items = self.pick(lambda: [str(v) for v in r.sample(range(limit + 1), min(n, 5))], lambda v: sorted(v, key=int))
            what = "numbers"
        done = sorted(items, key=int if what == "numbers" else None)
        s = ", ".join(items)
        q = o(f"Sort these {what}: {s}", f"Sort the {what} {s}.", f"Put these {what} in order: {s}", f"Sort: {s}")
        return Turn(q, ", ".join(done), "sort", ["list", done])

    def count(self):
        o, r = self.one, self.r
        if r.random() < 0.5:
            a, b = self.pick(lambda: (lambda a: (a, a + r.randint(2, 8)))(r.randint(0, 40)))
            down = r.random() < 0.25
            items = [str(i) for i in range(a, b + 1)]
            if down:
                items.reverse()
            q = o(f"Count from {items[0]} to {items[-1]}.", f"Please count from {items[0]} to {items[-1]}.")
            return Turn(q, ", ".join(items), "count", ["list", items])
        words = self.pick(lambda: [r.choice(r.choice([ANIMALS, THINGS])) for _ in range(r.randint(1, 7))])
        q = o("How many words are these: {}", "Count these words: {}", "How many things are in this list: {}").format(", ".join(words))
        # Counting aloud: the total is then a copy of the last number.
        aloud = ", ".join(f"{i + 1} {w}" for i, w in enumerate(words))
        return Turn(q, f"{aloud}. The answer is {len(words)}.", "count", ["number", len(words)])

    def json(self):
        o, r = self.one, self.r
        def draw():
            kind, who, age, place, job = r.randrange(4), self.name(), r.randint(5, 90), r.choice(PLACES), r.choice(JOBS)
            if kind == 0:
                return o(f"{who} is {age} years old.", f"{who} is {age}."), {"name": who, "age": age}
            if kind == 1:
                return f"{who} lives in {place}.", {"name": who, "city": place}
            if kind == 2:
                return f"{who} is {age} years old and lives in {place}.", {"name": who, "age": age, "city": place}
            return o(f"{who} is {self.a(job)}.", f"{who} works as {self.a(job)}."), {"name": who, "job": job}
        fact, v = self.pick(draw, lambda f: json.dumps(f[1]))
        q = o("Write this as JSON: {}", "Turn this into JSON: {}", "{} Give me that as JSON.", "As JSON: {}").format(fact)
        return Turn(q, json.dumps(v), "json", ["json", v])

    STORY = [
        ["Once upon a time there was a {adj} {animal}.", "Once upon a time a {adj} {animal} lived in the {place}.",
         "Long ago a {adj} {animal} lived near the {place}."],
        ["One day the {animal} walked through the {place} and found a {thing}.", "One morning the {animal} found a {thing} in the {place}.",
         "One evening the {animal} saw a {thing} in the middle of the {place}."],
        ["It belonged to a {adj2} {friend}.", "A {adj2} {friend} had lost it.", "A {adj2} {friend} was looking for it."],
        ["The {animal} gave the {thing} back to the {friend}.", "The {animal} brought the {thing} to the {friend}.",
         "So the {animal} carried the {thing} to the {friend}."],
        ["From that day on the {animal} and the {friend} were friends.", "The {friend} thanked the {animal}, and they became friends.",
         "They lived happily in the {place} ever after."],
    ]

    def story_text(self, animal, place, thing):
        r = self.r
        v = {"animal": animal, "place": place, "thing": thing, "adj": r.choice(ADJECTIVES), "adj2": r.choice(ADJECTIVES),
             "friend": r.choice([x for x in ANIMALS if x != animal])}
        text = " ".join(r.choice(s) for s in self.STORY).format(**v)
        return re.sub(r"\b([Aa]) ([aeiou])", r"\1n \2", text)

    def story(self):
        o, r = self.one, self.r
        a, p, t = self.pick(lambda: (r.choice(ANIMALS), r.choice(SPOTS), r.choice(THINGS)))
        x, y, z = self.a(a), self.a(p), self.a(t)
        if r.random() < 0.15 and not self.held_out:
            q = o("Tell me a story.", "Tell me a short story.", "Please tell me a story.")
        elif r.random() < 0.1 and not self.held_out:
            q = f"Tell me a story about {x}."
        else:
            q = o(f"Tell me a story about {x}, {y} and {z}.", f"Tell me a short story with {x}, {y} and {z}.",
                  f"Write a short story about {x}, {y} and {z}.")
        return Turn(q, self.story_text(a, p, t), "story", ["story", a, p, t])

    CANNOT = [["Book", "a flight to {place}", "a table in {place}", "a hotel in {place}", "a train to {place}"],
              ["Translate", "this into French", "the word {thing} into Spanish", "this letter into German"],
              ["Call", "{name}", "a taxi", "my {job}", "the {job}"], ["Send", "a letter to {name}", "an email to {name}", "the {thing} to {name}"],
              ["Draw", "a {animal}", "the {thing}", "a picture of {place}"], ["Play", "some music", "a song about {place}", "the {thing}"],
              ["Buy", "a {thing}", "some {food}", "a {animal}"], ["Cook", "some {food}", "some {food} for {name}"],
              ["Open", "the {thing}", "the window", "my email"]]

    TOPICS = """sky sun moon sea water fire rain snow wind light sound music poetry history physics chemistry biology science maths art
        religion politics money time space earth star planet computer Linux Windows Python code internet telephone television radio engine bridge tower
        train aeroplane bicycle house door wall roof tree flower grass leaf apple banana potato tomato chicken pizza chocolate sugar salt milk wine beer
        hospital school university bank shop museum theatre football tennis chess dance film book paper pencil language French German English Spanish
        Chinese Japanese France Germany Italy Spain Japan China India Brazil Canada Mexico Egypt Kenya Norway Sweden Poland Greece America Europe Africa
        love life death happiness dream sleep health medicine heart brain blood bone skin eye ear hand foot dinosaur elephant shark whale snake spider bee
        ant bird eagle energy electricity gravity atom gold iron plastic glass wood war peace law tax job email website file folder kernel
        compiler database network password printer keyboard mouse screen battery""".split()

    def decline(self):
        o, r = self.one, self.r

        def draw():
            x = r.random()
            if x < 0.4:
                # Anything else that people ask. Most of these words occur nowhere else.
                w, v = r.choice(self.TOPICS), r.choice(self.TOPICS)
                q = o("Why is the {w} {c}?", "Why is {w} so {j}?", "What is {w}?", "What is a {w}?", "How does {w} work?", "How do I fix my {w}?",
                      "Explain {w}.", "Explain {w} to me.", "Write a poem about {w}.", "Tell me a joke about {w}.", "Tell me a joke.", "Who invented the {w}?",
                      "What is the best {w}?", "Which is better, {w} or {v}?", "What do you think about {w}?", "Where can I buy {w}?", "How many {w} are there?",
                      "Is there {w} on the {v}?", "Write a program for {w}.", "What does {w} mean?", "When was the {w} built?", "How old is the {w}?",
                      "What is the capital of {v}?", "Who is the president of {v}?", "How big is the {w}?", "Should I learn {w}?", "Summarize this text about {w}.",
                      "Give me a recipe for {w}.", "What is the difference between {w} and {v}?", "Can you help me with {w}?", "What is the meaning of {w}?")
                q = q.format(w=w, v=v, c=r.choice(COLOURS), j=r.choice(ADJECTIVES))
            elif x < 0.6:
                q = o("What is the weather in {place}?", "What is the capital of {name}land?", "Who won the game in {place}?", "What time is it in {place}?",
                      "How far is it to {place}?", "What is the news from {place}?", "Who is the king of {place}?", "How do I get to {place}?",
                      "What does a {thing} cost in {place}?")
            else:
                verb, *what = r.choice(self.CANNOT)
                q = o(f"{verb} {{w}}.", f"Please {verb.lower()} {{w}}.", f"Can you {verb.lower()} {{w}}?").format(w=r.choice(what))
            q = q.format(place=r.choice(PLACES), name=r.choice(NAMES), thing=r.choice(THINGS), animal=r.choice(ANIMALS), job=r.choice(JOBS), food=r.choice(FOODS))
            return re.sub(r"\ba ([aeiou])", r"an \1", q)
        return Turn(self.pick(draw), "I am sorry, I cannot do that. I am only a small demonstration model.", "decline", ["any", ["cannot do that"]])

    CHAT = [("How are you?", "I am fine, thank you."), ("How are you today?", "I am fine, thank you."), ("Thank you.", "You are welcome."),
            ("Thanks!", "You are welcome."), ("That is nice.", "I am glad you think so."), ("I am tired.", "Then you should get some rest."),
            ("I am bored.", "I could tell you a story."), ("It is raining.", "Then stay inside and keep warm."),
            ("The sun is shining.", "That is good news."), ("I had a good day.", "I am happy to hear that."),
            ("I had a bad day.", "I am sorry to hear that."), ("You are funny.", "Thank you, I do my best."), ("Okay.", "Good."),
            ("Good.", "I am glad."), ("I am hungry.", "Then it is time for a meal."), ("Let us talk about something else.", "Gladly. What would you like to talk about?"),
            ("I do not know.", "That is all right."), ("Do you like music?", "I cannot hear it, but I like the idea."),
            ("My work is hard.", "I hope it becomes easier."), ("Good night.", "Good night, sleep well."), ("Goodbye.", "Goodbye!"), ("Bye", "Goodbye!")]

    def chatter(self):
        if self.r.random() < 0.55:
            return Turn(*self.r.choice(self.CHAT), "")
        return self.single()

    def single(self):
        skills = {"intro": 1, "copy": 2, "arithmetic": 4, "sort": 6, "count": 3, "json": 1, "story": 1, "decline": 2}  # as hard as they are
        return getattr(self, self.r.choices(list(skills), skills.values())[0])()

    # Prose: a paragraph in which the same names go on.

    PROSE = ["{name} lived in {city} and worked as {a_job}.", "Every morning {name} walked to the {spot}.", "In the {spot} there was a {adj} {animal}.",
             "The {animal} liked {food}.", "{name} gave the {animal} some {food}.", "Then {name} put the {thing} in the {room}.",
             "The {thing} was {colour}.", "In the evening {name} went home.", "{name} was {adj} but happy."]

    def prose_text(self):
        r = self.r
        name, animal, spot = self.pick(lambda: (self.name(), r.choice(ANIMALS), r.choice(SPOTS)))
        job = r.choice(JOBS)
        v = {"name": name, "animal": animal, "spot": spot, "city": r.choice(PLACES), "a_job": self.a(job), "adj": r.choice(ADJECTIVES),
             "food": r.choice(FOODS), "thing": r.choice(THINGS), "room": r.choice(ROOMS), "colour": r.choice(COLOURS)}
        lines = [self.PROSE[0]] + [l for l in self.PROSE[1:] if r.random() < 0.8]
        return [re.sub(r"\ba ([aeiou])", r"an \1", l.format(**v)) for l in lines]

    # Documents

    def noise(self, turn):
        """People write without capitals and full stops, too. What is to be copied stays as it is."""
        if turn.skill in ("copy", "json"):
            return turn
        q = turn.user
        if self.r.random() < 0.08 and q.split()[0] in ("What", "Where", "How", "Who", "Which", "Is", "My", "Hello", "Tell", "Sort", "Count", "Add"):
            q = q[0].lower() + q[1:]
        if self.r.random() < 0.1 and q[-1] in ".?!":
            q = q[:-1]
        return dataclasses.replace(turn, user=q)

    def document(self, level=1.0):
        r = self.r
        x = r.random()
        if x < 0.06:
            return Doc(prose=" ".join(self.prose_text()))
        if r.random() < self.verdicts:
            # Nothing but yes and no: to compare is harder than to recall.
            n = r.randint(1, 2)
            d = self.facts(n, rounds=4 // n, yesno=0.95)
        elif x < 0.4:
            n = r.randint(1, 2 + round(3 * min(level, 1)))
            far = r.random() < 0.45 * min(level, 1)
            d = self.facts(n, r.randint(1, 2 + round(10 * level)) if far else 0, rounds=1 if far else r.randint(1, 2))
        else:
            d = Doc([self.single() for _ in range(r.randint(1, 3 + round(3 * level)))])
        if r.random() < 0.05:
            d.system = self.one("You are a helpful assistant.", "You are a friendly model.", "Be brief.", "Answer in English.")
        d.turns = [self.noise(t) for t in d.turns]
        return d

    def prompt(self, skill):
        """A held-out document whose last turn is of the skill."""
        r = self.r
        while True:
            if skill == "prose":
                lines = self.prose_text()
                k = r.randint(1, max(1, len(lines) - 2))
                return Doc([Turn("", " ".join(lines[k:]), "prose", ["prose", " ".join(lines[:k])])], " ".join(lines[:k]))
            if skill in ("facts", "yesno"):
                d = self.facts(r.randint(2, 4), yesno=0.8 if skill == "yesno" else 0.1)
            elif skill == "far_facts":
                d = self.facts(r.randint(2, 4), r.randint(8, 12), yesno=0)
            else:
                turns = [self.chatter() for _ in range(r.choice([0, 0, 1, 2]))]
                d = Doc(turns + [getattr(self, skill)()])
            at = [i for i, t in enumerate(d.turns) if t.skill == skill]
            if at:
                d.turns = d.turns[:r.choice(at) + 1]
                return d


def numbers(text):
    return re.findall(r"\d+", text)


def pattern(template, values=()):
    """A regular expression of a grammar's line."""
    slot = {"name": r"\w+", "city": r"\w+", "a_job": r"an? \w+", "spot": r"\w+", "adj": r"\w+", "adj2": r"\w+", "friend": r"\w+"}
    words = {"animal": ANIMALS, "place": SPOTS, "thing": THINGS, "food": FOODS, "room": ROOMS, "colour": COLOURS, "spot": SPOTS, "city": PLACES,
             "adj": ADJECTIVES, "adj2": ADJECTIVES, "friend": ANIMALS}
    out = ""
    for piece in re.split(r"(\{\w+\})", template):
        if piece.startswith("{"):
            key = piece[1:-1]
            one = re.escape(values[key]) if key in values else "(?:" + "|".join(words[key]) + ")" if key in words else slot[key]
            out += one
        else:
            out += re.sub(r"\\ ", " ", re.escape(piece)).replace(" a ", " an? ").replace("A ", "An? ")
    return re.sub(r"(^|(?<=\s))a (?=\(|\w)", r"\1an? ", out)


def right(check, answer):
    """Whether the answer passes the check."""
    kind, *want = check
    answer = answer.strip()
    if kind == "exact":
        return answer == want[0].strip()
    if kind == "word":
        found = re.findall(r"\w+", answer)
        return want[0] in found and not any(o in found for o in want[1])
    if kind == "number":
        return numbers(answer)[-1:] == [str(want[0])]
    if kind == "list":
        return re.findall(r"\w+", answer) == want[0]
    if kind == "json":
        try:
            return json.loads(answer) == want[0]
        except ValueError:
            return False
    if kind == "end":
        return answer.endswith(want[0])
    if kind == "any":
        return any(p in answer for p in want[0])
    if kind == "story":
        v = dict(zip(("animal", "place", "thing"), want))
        each = ["(?:" + "|".join(pattern(s, v) for s in lines) + ")" for lines in Generator.STORY]
        return re.fullmatch(" ".join(each), answer) is not None and all(w in answer for w in (v["animal"], v["thing"]))
    if kind == "prose":
        # Whole lines of the grammar in its order, about the person of the beginning.
        v = {"name": re.match(r"\w+", want[0]).group()}
        lines = [s for s in re.split(r"(?<=\.) ", answer) if s]
        at = -1
        for s in lines:
            k = next((i for i, p in enumerate(Generator.PROSE) if i > at and re.fullmatch(pattern(p, v), s)), None)
            if k is None:
                return False
            at = k
        return bool(lines)
    raise ValueError(kind)


def held_out(seed, count):
    """[(skill, Doc)]: count prompts of each skill."""
    g = Generator(seed, held_out=True)
    return [(s, g.prompt(s)) for s in SKILLS for _ in range(count)]


def render(doc):
    if doc.prose:
        return doc.prose
    return "\n".join(f"> {t.user}\n{t.answer}" for t in doc.turns)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["train", "heldout"])
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--count", type=int, default=5)
    p.add_argument("--level", type=float, default=1.0)
    o = p.parse_args()
    if o.what == "train":
        g = Generator(o.seed)
        for _ in range(o.count):
            print(render(g.document(o.level)), end="\n\n")
    else:
        for skill, d in held_out(o.seed, o.count):
            turns = [{"role": role, "text": text} for t in d.turns for role, text in (("user", t.user), ("model", t.answer))][:-1]
            print(json.dumps({"skill": skill, "prose": d.prose} if d.prose else {"skill": skill, "messages": turns})[:-1]
                  + ", " + json.dumps({"answer": d.turns[-1].answer, "check": d.turns[-1].check})[1:])


if __name__ == "__main__":
    sys.exit(main())
