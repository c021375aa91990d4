# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""test-bench-peers.py BUILD DEMO_MODEL: tools/bench-peers with a peer that is played by a script: which variant it takes,
that it alternates, what it makes of the figures, and what it says when something is missing."""
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile

build, demo = (os.path.abspath(p) for p in sys.argv[1:])
TOOL = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tools", "bench-peers")

# Speeds by variant; one that is killed, one that says why it cannot. Each run of three is twice as fast as the one before.
NODE = """#!/usr/bin/python3
import json, os, signal, sys
variant = os.path.basename(os.path.dirname(sys.argv[1]))
left = os.listdir(os.path.join(os.path.dirname(sys.argv[1]), "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"))
assert sorted(left) == [f"libggml-cpu-{variant}.so", "libllama.so"], left
prompt, sessions = int(sys.argv[4]), [s for s in sys.argv[6].split(",") if s]
if variant == "sapphirerapids":
    os.kill(os.getpid(), signal.SIGSEGV)
if variant == "cooperlake":
    sys.exit("at somewhere\\nError: it wants another processor\\n\\nNode.js v0")
speed = {"zen4": 96, "icelake": 100}.get(variant, 10)
if prompt != 64:
    with open(os.environ["PEER_LOG"], "a+") as f:
        f.write("peer\\n")
        f.seek(0)
        speed *= 2 ** (f.read().count("peer") - 1)
print(json.dumps({"release": "v1", "prefill": speed, "decode": speed / 4, "sessions": {s: speed / 2 for s in sessions}}))
"""


def write(path, text):
    with open(path, "w") as f:
        f.write(text)
    os.chmod(path, stat.S_IRWXU)


def package(folder):
    """What npm would leave."""
    libraries = os.path.join(folder, "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64")
    os.makedirs(libraries)
    os.makedirs(os.path.join(folder, "node_modules/node-llama-cpp"))
    with open(os.path.join(folder, "node_modules/node-llama-cpp/package.json"), "w") as f:
        json.dump({"version": "3.22.1"}, f)
    for name in ("sapphirerapids", "zen4", "cooperlake", "icelake", "cascadelake", "skylakex", "alderlake", "haswell"):
        open(os.path.join(libraries, f"libggml-cpu-{name}.so"), "w").close()
    open(os.path.join(libraries, "libllama.so"), "w").close()


def call(folder, *args, path=None):
    env = dict(os.environ, PATH=path or folder + "/bin:" + os.environ["PATH"], PEER_LOG=os.path.join(folder, "log"))
    p = subprocess.run([sys.executable, TOOL, "--build", build, "--package", os.path.join(folder, "package"), *args],
                       capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)
    return p.returncode, p.stdout, p.stderr


def main():
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(folder + "/bin")
        write(folder + "/bin/node", NODE)
        write(folder + "/bin/npm", "#!/bin/sh\necho npm was called >&2\nexit 1\n")
        gguf = os.path.join(folder, "some.gguf")
        open(gguf, "w").close()
        usual = ("--llmd", demo, "--prompt", "20", "--decode", "2", "--sessions", "2,3", gguf)

        status, out, err = call(folder, *usual)  # nothing is installed
        assert status == 1 and out == "" and "npm: exit status 1: npm was called" in err, (status, out, err)
        package(os.path.join(folder, "package"))

        status, out, err = call(folder, "--json", *usual)
        assert status == 0, err
        said = json.loads(out)
        assert said["peer"] == "llama.cpp v1, zen4", said  # 4 % slower than icelake, but newer
        assert said["variants"]["sapphirerapids"] == "does not work here: killed by signal 11", said
        assert said["variants"]["cooperlake"] == "does not work here: exit status 1: Error: it wants another processor", said
        rows = {r["figure"]: r for r in said["results"]}
        assert list(rows) == ["prefill", "decode, 1 session", "decode, 2 sessions", "decode, 3 sessions"], rows
        assert [rows[k]["peer_tokens_per_second"] for k in rows] == [192, 48, 96, 96], rows  # the second of three
        for r in rows.values():
            assert abs(r["ratio"] * r["peer_tokens_per_second"] - r["llmd_tokens_per_second"]) < 1e-6 * r["llmd_tokens_per_second"]
            assert r["ratio_min"] <= r["ratio"] <= r["ratio_max"] and r["ratio_min"] < r["ratio_max"], r

        status, out, err = call(folder, "--repetitions=1", "--cpu-level=avx2", *usual)
        assert status == 0 or "avx2" in err, err
        if status == 0:
            assert "for haswell" in out and "cpu/avx2" in out and "zen4" not in err, (out, err)

        # told before the peer's variants are tried
        status, out, err = call(folder, *usual, "--threads=1000")
        assert status == 1 and "may use" in err and len(err.splitlines()) == 1, err
        status, out, err = call(folder, *usual, "--llmd", gguf)
        assert status == 1 and "not a model file" in err and len(err.splitlines()) == 1, err
        status, out, err = call(folder, *usual, "--package", "/proc/none")
        assert status == 1 and err.splitlines()[-1] == "bench-peers: /proc/none: No such file or directory", err
        write(folder + "/bin/node", "#!/bin/sh\necho nothing\n")
        status, out, err = call(folder, *usual)
        assert status == 1 and "prints no JSON" in err and "no variant" in err, err
        write(folder + "/bin/node", NODE)
        with open("/dev/full", "w") as full:
            env = dict(os.environ, PATH=folder + "/bin:" + os.environ["PATH"], PEER_LOG=os.path.join(folder, "log"))
            p = subprocess.run([sys.executable, TOOL, "--build", build, "--package", os.path.join(folder, "package"),
                                "--repetitions=1", "--variant=zen4", *usual], stdout=full, stderr=subprocess.PIPE, text=True, env=env)
        assert p.returncode == 1 and "No space left" in p.stderr and "Traceback" not in p.stderr, p.stderr

        status, out, err = call(folder, *usual[:-1], gguf + ".missing")
        assert status == 1 and err == f"bench-peers: {gguf}.missing: is not there or cannot be read\n", err
        status, out, err = call(folder, *usual, "--build", folder)
        assert status == 1 and "--build" in err, err
        shutil.rmtree(folder + "/bin")
        status, out, err = call(folder, *usual, path=folder)
        assert status == 1 and "node is not there" in err, err
        for wrong in ("--sessions=0", "--threads=x", "--variant=z80", "--cpu-level=sse"):
            status, out, err = call(folder, *usual, wrong)
            assert status == 2 and wrong.split("=")[0] in err, err
    print("ok")


main()
