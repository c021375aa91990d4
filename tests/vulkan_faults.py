# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""A GPU that fails at a test's word: the layer tests/vulkan-faults.c between llmd and mesa's software driver."""
import mmap
import os
import struct

KINDS = ("none", "lost-at-submit", "lost-at-wait", "memory-at-submit", "hang", "memory", "pipeline", "no-device", "refused",
         "no-addresses", "no-import")
WORDS = ("fault", "left", "struck", "submits", "allocations", "pipelines", "devices", "touched", "release")
DEVICE = "llvmpipe"


class Faults:
    """faults.submits and so on are the layer's words, as they are now."""

    def __init__(self, layer, path):
        """layer: the built vulkan-faults.so, with its manifest beside it; path: of a new file for its words."""
        self.layer, self.path = layer, path
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(fd, 4 * len(WORDS))
        self.words = mmap.mmap(fd, 4 * len(WORDS))
        os.close(fd)

    def env(self, **more):
        env = dict(os.environ, VK_LAYER_PATH=os.path.dirname(self.layer), VK_INSTANCE_LAYERS="VK_LAYER_LLMD_faults",
                   LLMD_TEST_VULKAN_FAULTS=self.path, LD_PRELOAD=self.layer, **more)
        env["ASAN_OPTIONS"] = env.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0"
        return env

    def arm(self, kind, after=1):
        """With the call that is `after` from now; kinds of the start are there at once."""
        self.fault = 0
        self.left = after
        self.fault = KINDS.index(kind)

    def __getattr__(self, name):
        return struct.unpack_from("=I", self.words, 4 * WORDS.index(name))[0]

    def __setattr__(self, name, value):
        if name in WORDS:
            struct.pack_into("=I", self.words, 4 * WORDS.index(name), value)
        else:
            super().__setattr__(name, value)
