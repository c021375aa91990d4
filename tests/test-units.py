# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""test-units.py SOURCE BUILD: what is installed for systemd, D-Bus and polkit, as those read it.

systemd-analyze complains on stderr and succeeds, so anything that it prints is a failure. The units are
looked at in a root of their own, beside the system's."""
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET

source, build = sys.argv[1:]


def units():
    if not shutil.which("systemd-analyze") or not os.path.isdir("/usr/lib/systemd/system"):
        return False
    for scope in "system", "user":
        with tempfile.TemporaryDirectory() as folder:
            # verify --root= is for the system's units only; so both are looked at where they lie, with a
            # program that is there.
            with open(os.path.join(build, f"systemd/{scope}-llmd.service")) as f:
                text = f.read()
            program = next(line for line in text.splitlines() if line.startswith("ExecStart=")).split("=", 1)[1].split()[0]
            with open(os.path.join(folder, "llmd.service"), "w") as f:
                f.write(text.replace(program, "/bin/true"))
            shutil.copy(os.path.join(source, "systemd", scope, "llmd.socket"), folder)
            check = subprocess.run(
                ["systemd-analyze", "verify", "--" + scope, "--man=no", os.path.join(folder, "llmd.service"),
                 os.path.join(folder, "llmd.socket")],
                env=dict(os.environ, XDG_RUNTIME_DIR=folder, SYSTEMD_UNIT_PATH=folder + ":/usr/lib/systemd/" + scope),
                capture_output=True, text=True)
            # Other units of the machine may be wrong; that is not ours to say.
            said = [line for line in (check.stdout + check.stderr).splitlines() if "llmd" in line or check.returncode]
            assert check.returncode == 0 and not said, (scope, check)
    return True


def policies():
    actions = ET.parse(os.path.join(source, "policy/org.llmd.Llm1.policy")).getroot().findall("action")
    assert {a.get("id") for a in actions} == {
        "org.llmd.Llm1." + n for n in ("use", "use-background", "manage-models", "inspect-sessions", "manage-quotas")}
    for a in actions:  # without it polkit answers nobody but root
        assert a.find("annotate").get("key") == "org.freedesktop.policykit.owner"
        assert a.find("annotate").text == "unix-user:llmd"
    # The bus lets through what there is, and nothing else of the service's.
    interfaces = {i.get("name") for name in os.listdir(os.path.join(source, "ipc")) if name.endswith(".xml")
                  for i in ET.parse(os.path.join(source, "ipc", name)).getroot().findall("interface")}
    policy = ET.parse(os.path.join(source, "policy/org.llmd.Llm1.conf")).getroot()
    allowed = {a.get("send_interface") for a in policy.iter("allow") if a.get("send_destination")}
    assert interfaces and interfaces <= allowed, interfaces - allowed
    assert all(i.startswith(("org.llmd.Llm1.", "org.freedesktop.DBus.")) for i in allowed), allowed


policies()
if not units():
    print("systemd-analyze is not there: the units were not looked at")
    sys.exit(77)
