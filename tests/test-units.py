# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""test-units.py SOURCE BUILD: what is installed for systemd, D-Bus and polkit, as those read it.

systemd-analyze complains on stderr and succeeds, so anything that it prints is a failure. The units are
looked at in a root of their own, beside the system's."""
import os
import re
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
            names = [n for n in os.listdir(os.path.join(source, "systemd", scope)) if n.endswith((".socket", ".slice"))]
            assert "llmd.socket" in names
            for name in names:
                shutil.copy(os.path.join(source, "systemd", scope, name), folder)
            check = subprocess.run(
                ["systemd-analyze", "verify", "--" + scope, "--man=no", *(os.path.join(folder, n) for n in ["llmd.service", *names])],
                env=dict(os.environ, XDG_RUNTIME_DIR=folder, SYSTEMD_UNIT_PATH=folder + ":/usr/lib/systemd/" + scope),
                capture_output=True, text=True)
            # Other units of the machine may be wrong; that is not ours to say.
            said = [line for line in (check.stdout + check.stderr).splitlines() if "llmd" in line or check.returncode]
            assert check.returncode == 0 and not said, (scope, check)
    return True


def exposure(*drop_ins):
    """As `systemd-analyze security` has it, of the system's unit in a root of its own: 0 none, 10 all there is."""
    with tempfile.TemporaryDirectory() as root:
        folder = os.path.join(root, "usr/lib/systemd/system")
        os.makedirs(folder + "/llmd.service.d")
        shutil.copy(os.path.join(build, "systemd/system-llmd.service"), folder + "/llmd.service")
        for name in "llmd.socket", "llmd.slice":
            shutil.copy(os.path.join(source, "systemd/system", name), folder)
        for name in drop_ins:
            shutil.copy(os.path.join(source, "systemd", name), folder + "/llmd.service.d")
        p = subprocess.run(["systemd-analyze", "security", "--offline=true", "--root=" + root, "--no-pager", "llmd.service"],
                           capture_output=True, text=True)
        found = re.search(r"^→ Overall exposure level for llmd.service: ([0-9.]+) ", p.stdout, re.M)
        assert p.returncode == 0 and found, p
        # What systemd does not understand it says, and then does without.
        assert "llmd" not in p.stderr, p.stderr
        return float(found[1]), p.stdout


def exposures():
    """The second figure is what the first was bought for: each setting that the drop-in changes is in it."""
    alone, said = exposure()
    assert alone <= 1.0, said
    vulkan, said = exposure("llmd-vulkan.conf")
    assert alone <= vulkan <= 1.2 and "char-drm:rw" in said, said
    assert re.search("^✓ MemoryDenyWriteExecute=", said, re.M), "a GPU needs no code at run time"
    software, said = exposure("llmd-vulkan-software.conf")
    assert alone <= software <= 1.2, said
    assert re.search("^✗ MemoryDenyWriteExecute=", said, re.M), "the drop-in is not looked at"
    both, said = exposure("llmd-vulkan.conf", "llmd-vulkan-software.conf")
    assert both <= 1.2, said
    print(f"exposure: {alone}; {vulkan} with llmd-vulkan.conf, {software} with llmd-vulkan-software.conf, {both} with both")


def settings(path):
    """(key, value) of each line of a unit."""
    with open(path) as f:
        return [tuple(line.rstrip("\n").split("=", 1)) for line in f if "=" in line and not line.startswith("#")]


def calls_of(name):
    """Of a set of systemd's, as @system-service, all that is in it; else the call itself."""
    if not name.startswith("@"):
        return {name}
    said = subprocess.run(["systemd-analyze", "syscall-filter", "--no-pager", name], check=True, capture_output=True, text=True).stdout
    inner = [line.strip() for line in said.splitlines()[1:]]
    return set().union(*(calls_of(n) for n in inner if n and not n.startswith("#")))


def filters_agree():
    """Two belts, one of the unit's and one of the daemon's own: what the tighter one allows the other one must not stop."""
    of_scope = {scope: [v for k, v in settings(os.path.join(build, f"systemd/{scope}-llmd.service")) if k == "SystemCallFilter"]
                for scope in ("system", "user")}
    assert of_scope["system"] + ["capset"] == of_scope["user"], of_scope
    allowed = calls_of("@default")  # whatever else is said
    for value in of_scope["system"]:
        calls = set().union(*(calls_of(name) for name in value.lstrip("~").split()))
        allowed = allowed - calls if value.startswith("~") else allowed | calls
    lists = [n for n in os.listdir(os.path.join(source, "policy")) if n.endswith(".seccomp")]
    assert {"llmd.seccomp", "process.seccomp"} <= set(lists), lists
    for name in set(lists) - {"llm-import.seccomp", "sanitizers.seccomp"}:  # no part of the service, or not of one that is installed
        with open(os.path.join(source, "policy", name)) as f:
            needed = {line.split()[0] for line in f if line.strip() and not line.startswith("#")}
        assert needed and needed <= allowed, (name, needed - allowed)
    # And the sandbox is put on at all.
    assert {"landlock_restrict_self", "seccomp", "prctl", "io_uring_setup"} <= allowed
    assert not {"ptrace", "mount", "bpf", "capset", "setuid", "shmget", "process_vm_readv", "keyctl", "mlock",
                "io_submit"} & allowed


def drop_ins_relax_no_more():
    """A name for each line; whoever adds one has to think of it here."""
    of_hardware = settings(os.path.join(source, "systemd/llmd-vulkan.conf"))
    assert [key for key, _ in of_hardware] == ["BindPaths", "DeviceAllow", "SupplementaryGroups"], of_hardware
    for node in dict(of_hardware)["BindPaths"].split():
        assert re.fullmatch(r"-/dev/dri/renderD[0-9]+", node), node
    of_software = settings(os.path.join(source, "systemd/llmd-vulkan-software.conf"))
    assert of_software == [("MemoryDenyWriteExecute", "no")], of_software


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
    owners = [p.attrib for p in policy.iter("policy") if [a for a in p if a.get("own") or a.get("own_prefix")]]
    assert owners == [{"user": "llmd"}], owners
    assert {a.get("own") for a in policy.iter("allow")} == {None, "org.llmd.Llm1"} and not list(policy.iter("deny"))


def apparmor():
    """Compiled, not loaded. Whether its rules are the right ones shows only where the kernel has AppArmor."""
    profile = os.path.join(build, "policy/llmd.apparmor")
    with open(os.path.join(source, "systemd/system/llmd.service.in")) as unit, open(profile) as f:
        text = f.read()
        assert "\nAppArmorProfile=-llmd\n" in unit.read() and "\nprofile llmd " in text
    assert "@" not in re.sub(r"@\{\w+\}", "", text), "a path was not filled in"
    parser = shutil.which("apparmor_parser", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if not parser or not os.path.isdir("/etc/apparmor.d/abstractions"):
        print("apparmor_parser is not there: the profile was not compiled")
        return
    with tempfile.TemporaryDirectory() as folder:
        def compiles(text):
            with open(os.path.join(folder, "llmd"), "w") as f:
                f.write(text)
            return subprocess.run([parser, "--skip-kernel-load", "--skip-cache", os.path.join(folder, "llmd")],
                                  capture_output=True, text=True)
        p = compiles(text)
        assert p.returncode == 0, p
        # With what it tells to put into local/llmd for a GPU.
        gpu = re.findall(r"^#     (\S.*,)$", text, re.M)
        assert len(gpu) > 3, text
        p = compiles(text.replace("  include if exists <local/llmd>", "\n".join(gpu)))
        assert p.returncode == 0, p
        assert compiles(text.replace(" mr,", " mr", 1)).returncode != 0, "it takes anything"


policies()
apparmor()
drop_ins_relax_no_more()
if not units():
    print("systemd-analyze is not there: the units were not looked at")
    sys.exit(77)
exposures()
filters_agree()
