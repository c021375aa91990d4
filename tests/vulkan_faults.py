# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""A GPU that fails at a test's word: the layer tests/vulkan-faults.c between llmd and mesa's software driver."""
import json
import mmap
import os
import struct

KINDS = ("none", "lost-at-submit", "lost-at-wait", "memory-at-submit", "hang", "memory", "pipeline", "no-device", "refused",
         "no-addresses", "no-import")
WORDS = ("fault", "left", "struck", "submits", "allocations", "pipelines", "devices", "touched", "release")
DEVICE = "llvmpipe"
NAME = "VK_LAYER_LLMD_faults"


class Faults:
    """faults.submits and so on are the layer's words, as they are now."""

    def __init__(self, layer, path):
        """layer: the built vulkan-faults.so; path: of a new file for its words. Beside it comes the layer's manifest."""
        self.layer, self.path = layer, path
        with open(path + ".json", "w") as f:
            json.dump({"file_format_version": "1.0.0",
                       "layer": {"name": NAME, "type": "GLOBAL", "library_path": layer, "api_version": "1.3.0",
                                 "implementation_version": "1", "description": "makes a GPU fail"}}, f)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(fd, 4 * len(WORDS))
        self.words = mmap.mmap(fd, 4 * len(WORDS))
        os.close(fd)

    def env(self, **more):
        env = dict(os.environ, VK_LAYER_PATH=os.path.dirname(self.path), VK_INSTANCE_LAYERS=NAME,
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
