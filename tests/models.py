# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Random models for tests, and what a float64 reference says of them, each made once and shared by all tests.

The generator (gen_gguf.py) and the reference (gemma3n_reference.py) are not part of this source tree: they lie in
tools/ of the folder LLMD_SHARED names, or of ../shared beside the source. Made files go to the folder LLMD_TEST_MODELS
names, or to build-test-models in the source. Their names carry a hash of all that they depend on, and they are renamed
into place whole, so that tests may ask for the same one at the same time and none is ever stale.

A model's name is SHAPE-TYPE-SEED, as in tiny-q4_0-1.
"""
import contextlib
import ctypes.util
import fcntl
import glob
import hashlib
import importlib.util
import os
import subprocess
import sys

SOURCE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.environ.get("LLMD_SHARED") or os.path.join(os.path.dirname(SOURCE), "shared")
CACHE = os.environ.get("LLMD_TEST_MODELS") or os.path.join(SOURCE, "build-test-models")

TYPES = ("f32", "f16", "q8_0", "q4_0")

# Besides the generator's own: (layers, hidden, ffn, heads, KV heads, head size, vocabulary, PLE width, LAuReL rank,
# window). What `tiny` has even is odd here.
SHAPES = {
    # One layer shares KV; three heads read one KV head; odd vocabulary and rank; a window of 5.
    "odd": (21, 96, 160, 3, 1, 32, 301, 32, 24, 5),
    # No layer shares KV; every head has its own; narrow, long.
    "narrow": (13, 32, 64, 2, 2, 32, 277, 32, 7, 16),
}

SKIPPED = 77  # exit status by which a test says that it could not run


class Unavailable(Exception):
    """What a test needs is not on this machine; the text says what."""


def shared(path):
    """A file of the shared folder, or Unavailable."""
    full = os.path.join(SHARED, path)
    if not os.path.exists(full):
        raise Unavailable(f"{full} is not there (LLMD_SHARED names the folder)")
    return full


def need_numpy():
    if importlib.util.find_spec("numpy") is None:
        raise Unavailable(f"{sys.executable} has no numpy (python3-numpy)")


def need_gpu():
    """A device for Vulkan: the one that LLMD_TEST_DEVICE names, or mesa's software driver."""
    if not ctypes.util.find_library("vulkan"):
        raise Unavailable("there is no Vulkan loader (libvulkan1)")
    if not os.environ.get("LLMD_TEST_DEVICE") and not glob.glob("/usr/share/vulkan/icd.d/lvp_icd*.json"):
        raise Unavailable("there is no software driver for Vulkan (mesa-vulkan-drivers)")


def digest(*parts):
    h = hashlib.sha256()
    for p in parts:
        h.update(p if isinstance(p, bytes) else str(p).encode())
        h.update(b"\0")
    return h.hexdigest()[:12]


def contents(path):
    with open(path, "rb") as f:
        return f.read()


@contextlib.contextmanager
def locked(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def made(path, make):
    """path, after make(temporary name) when it is not there yet. One maker at a time."""
    if not os.path.exists(path):
        with locked(path):
            if not os.path.exists(path):
                partial = path + ".partial"
                make(partial)
                os.rename(partial, path)
    return path


def run_script(script, *args, patch=None):
    """Runs a Python script of the shared folder, with its text passed through patch() first."""
    text = contents(script).decode()
    if patch:
        text = patch(text)
    p = subprocess.run([sys.executable, "-", *args], input=text.encode(), stdout=subprocess.DEVNULL,
                       stderr=subprocess.PIPE)
    if p.returncode != 0:
        raise RuntimeError(f"{script} {' '.join(args)}: {p.stderr.decode(errors='replace')}")


def parse(name):
    shape, _, rest = name.partition("-")
    kind, _, seed = rest.partition("-")
    if not shape or kind not in TYPES or not seed.isdigit():
        raise ValueError(f"'{name}' is not SHAPE-TYPE-SEED with a type of {', '.join(TYPES)}")
    return shape, kind, int(seed)


def model(name):
    """Path of the random model in GGUF."""
    shape, kind, seed = parse(name)
    generator = shared("tools/gen_gguf.py")
    need_numpy()

    def add_shape(text):
        # The script runs main() at its end; its table is filled before.
        head, call, tail = text.rpartition("\nmain()")
        if not call:
            raise RuntimeError(f"{generator} does not end with main()")
        return f"{head}\nSHAPES.setdefault({shape!r}, {SHAPES[shape]!r}){call}{tail}"

    key = digest(contents(generator), SHAPES.get(shape), shape, kind, seed)
    path = os.path.join(CACHE, f"{name}-{key}.gguf")
    return made(path, lambda partial: run_script(
        generator, partial, "--shape", shape, "--type", kind, "--seed", str(seed),
        patch=add_shape if shape in SHAPES else None))


def vocabulary(name):
    """Number of ids of the model's shape."""
    shape = parse(name)[0]
    return {"tiny": 4096}[shape] if shape not in SHAPES else SHAPES[shape][6]


def reference(name, sequences):
    """
    Path of the reference's logits for lists of ids, each from position 0: little-endian f32 [positions][vocabulary],
    one sequence after the other.
    """
    script = shared("tools/gemma3n_reference.py")
    gguf = model(name)
    text = tokens_text(sequences)
    path = os.path.join(CACHE, f"{os.path.basename(gguf)[:-5]}-{digest(contents(script), text)}.f32")

    def make(partial):
        with open(partial + ".tokens", "w") as f:
            f.write(text)
        run_script(script, gguf, partial + ".tokens", partial)
        os.unlink(partial + ".tokens")

    return made(path, make)


def tokens_text(sequences):
    return "".join(" ".join(map(str, s)) + "\n" for s in sequences)
