#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Runs a program under Vulkan's validation layer: its status is 1 when the layer has anything to say, or was not there.

  validated.py COMMAND [ARGUMENT]...

77: the layer is not installed and COMMAND has nothing to say against that, or COMMAND says so itself.
"""
import glob
import os
import subprocess
import sys
import tempfile

LAYER = "VK_LAYER_KHRONOS_validation"
MANIFESTS = ("/usr/share/vulkan/explicit_layer.d", "/usr/local/share/vulkan/explicit_layer.d", "/etc/vulkan/explicit_layer.d")
SETTINGS = """khronos_validation.debug_action = VK_DBG_LAYER_ACTION_LOG_MSG
khronos_validation.report_flags = error,warn
khronos_validation.enables = VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT
khronos_validation.log_filename = {}
"""


def manifest():
    """The folder that the layer's manifest is in, or None."""
    found = [p for folder in MANIFESTS for p in glob.glob(folder + "/*validation*.json")]
    return os.path.dirname(found[0]) if found else None


class Validation:
    """For programs that get env(): what the layer said of them."""

    def __init__(self, folder):
        self.folder = folder
        self.log = os.path.join(folder, "validation.log")
        with open(os.path.join(folder, "vk_layer_settings.txt"), "w") as f:
            f.write(SETTINGS.format(self.log))
        self.leaks = os.path.join(folder, "leaks")
        with open(self.leaks, "w") as f:
            f.write("leak:libVkLayer_khronos_validation\n")  # what it forgets itself
            # A second file would take the place of the first.
            for option in os.environ.get("LSAN_OPTIONS", "").split(":"):
                if option.startswith("suppressions="):
                    with open(option.partition("=")[2]) as more:
                        f.write(more.read())

    def env(self, env):
        """With the layers that are there already, and nearer to the program."""
        layers = [LAYER, *filter(None, env.get("VK_INSTANCE_LAYERS", "").split(":"))]
        paths = [manifest(), *filter(None, env.get("VK_LAYER_PATH", "").split(":"))]
        options = env.get("LSAN_OPTIONS", "") + ":print_suppressions=0:suppressions=" + self.leaks
        return dict(env, LSAN_OPTIONS=options, VK_INSTANCE_LAYERS=":".join(layers), VK_LAYER_PATH=":".join(paths),
                    VK_LAYER_SETTINGS_PATH=self.folder)

    def messages(self):
        try:
            with open(self.log, errors="replace") as f:
                return f.read()
        except FileNotFoundError:
            return "the validation layer was not there\n"


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if not manifest():
        status = subprocess.run(sys.argv[1:]).returncode
        print("no validation layer (vulkan-validationlayers): what Vulkan makes of it is not known")
        return 77 if status == 0 else status if status > 0 else 1
    with tempfile.TemporaryDirectory(prefix="llmd-validated-") as folder:
        v = Validation(folder)
        status = subprocess.run(sys.argv[1:], env=v.env(dict(os.environ))).returncode
        if status == 77 and not os.path.exists(v.log):
            return 77
        said = v.messages()
    sys.stdout.write(said[:20000])
    if said or status < 0:
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
