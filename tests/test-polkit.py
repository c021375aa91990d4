# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""test-polkit.py LLMD MAKE_CHAT_MODEL SOURCE: the daemon as a user of its own, with the bus policy and the actions
that are installed, before a real polkitd with a rule of an administrator's. Everything that is replaced on this
machine for it is replaced in a mount namespace of the test alone."""
import os
import shutil
import subprocess
import sys
import tempfile

POLKITD = next((p for p in ("/usr/lib/polkit-1/polkitd", "/usr/libexec/polkitd") if os.path.exists(p)), None)
USER, UID = "llmd", 64321
RULES = """polkit.addRule(function(action, subject) {
    if (action.id == "org.llmd.Llm1.use" && subject.user == "games")
        return polkit.Result.NO;
    if (action.id == "org.llmd.Llm1.manage-models" && subject.user == "daemon")
        return polkit.Result.YES;
});
"""
CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={{path}}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
  </policy>
  <include>/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf</include>
  <include>{source}/policy/org.llmd.Llm1.conf</include>
</busconfig>
"""


def skip(why):
    print(why)
    sys.exit(77)


def run(*command):
    subprocess.run(command, check=True)


try:
    import dbus
    from daemon_client import BusClient, Broker, Child, Client, PATIENCE, SystemDaemon, options_of
except ImportError:
    skip("python3-dbus is not there")

if sys.argv[1] != "--inside":
    if os.geteuid() != 0 or not POLKITD or not shutil.which("dbus-daemon"):
        skip("root, polkitd and dbus-daemon are needed")
    if subprocess.run(["unshare", "-m", "true"], stderr=subprocess.DEVNULL).returncode != 0:
        skip("mount namespaces are not allowed here")
    os.execvp("unshare", ["unshare", "-m", sys.executable, __file__, "--inside", *(os.path.abspath(p) for p in sys.argv[1:])])

llmd, make_model, source = sys.argv[2:]


def cover(folder, mode):
    os.makedirs(folder, exist_ok=True)  # exists on any machine with polkit
    run("mount", "-t", "tmpfs", "-o", f"mode={mode}", "tmpfs", folder)


def replace(path, top, extra):
    """The machine's file with a line more."""
    copy = os.path.join(top, os.path.basename(path))
    with open(path) as f, open(copy, "w") as out:
        out.write("".join(line for line in f if not line.startswith(USER + ":")) + extra)
    os.chmod(copy, 0o644)
    run("mount", "--bind", copy, path)


def prepare(top):
    run("mount", "--make-rprivate", "/")
    cover("/usr/share/polkit-1/actions", "755")
    shutil.copy(os.path.join(source, "policy/org.llmd.Llm1.policy"), "/usr/share/polkit-1/actions/")
    cover("/etc/polkit-1/rules.d", "755")
    with open("/etc/polkit-1/rules.d/50-test.rules", "w") as f:
        f.write(RULES)
    replace("/etc/passwd", top, f"{USER}:x:{UID}:{UID}::/:/usr/sbin/nologin\n")
    replace("/etc/group", top, f"{USER}:x:{UID}:\n")


def try_all(child, socket, address):
    """By the socket, and by the bus: (may use, may manage models); in each case the error's name, or None."""
    del child

    def name(f):
        try:
            f()
        except dbus.DBusException as e:
            return e.get_dbus_name().rsplit(".", 1)[1]

    found = []
    for connect in (lambda: Client(socket)), (lambda: BusClient(address)):
        with connect() as c:
            found.append((name(c.create), name(lambda: c.manage("SetDefaultModel", "sa{sv}", "absent", options_of()))))
    return found


def main(top):
    prepare(top)
    os.chmod(top, 0o755)
    model = os.path.join(top, "model.llmd")
    run(make_model, model)
    os.chmod(model, 0o644)
    folder = os.path.join(top, "daemon")
    os.makedirs(os.path.join(folder, "state"))
    for path in folder, os.path.join(folder, "state"):
        os.chown(path, UID, UID)
        os.chmod(path, 0o755)
    as_user = os.path.join(top, "llmd")
    with open(as_user, "w") as f:
        f.write(f'#!/bin/sh\nexec setpriv --reuid={UID} --regid={UID} --clear-groups "{llmd}" "$@"\n')
    os.chmod(as_user, 0o755)
    if subprocess.run([as_user, "--version"], stdout=subprocess.DEVNULL).returncode in (126, 127):
        skip("another user cannot run this build")
    Broker.CONFIG = CONFIG.format(source=source)
    with Broker(top) as broker:
        polkitd = subprocess.Popen([POLKITD, "--no-debug"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env=dict(os.environ, DBUS_SYSTEM_BUS_ADDRESS=broker.address))
        try:
            with BusClient(broker.address) as c:
                while not c.bus.name_has_owner("org.freedesktop.PolicyKit1"):
                    assert polkitd.poll() is None, "polkitd does not start"
            with SystemDaemon(as_user, folder, broker, model=model) as d:
                d.wait_named()

                def ask(uid):
                    return Child(uid, try_all, d.socket, broker.address).join()

                assert ask(0) == [(None, "NoSuchModel")] * 2  # root: always
                assert ask(UID) == [(None, "NoSuchModel")] * 2  # itself: always
                assert ask(1) == [(None, "NoSuchModel")] * 2, ask(1)  # daemon: by the rule
                assert ask(2) == [(None, "NotAuthorized")] * 2, ask(2)  # bin: by the defaults
                assert ask(5) == [("NotAuthorized", "NotAuthorized")] * 2, ask(5)  # games: by the rule
                # The administrator thinks otherwise, and it counts at once, for those who are there as well.
                with open("/etc/polkit-1/rules.d/50-test.rules", "w") as f:
                    f.write("")
                while ask(5) != [(None, "NotAuthorized")] * 2:
                    pass
                # Gone after it had answered: that is no permission.
                polkitd.terminate()
                polkitd.wait(PATIENCE)
                while ask(2) != [("NotAuthorized", "NotAuthorized")] * 2:
                    pass
                assert ask(0) == [(None, "NoSuchModel")] * 2
        finally:
            polkitd.terminate()
            polkitd.wait(PATIENCE)


with tempfile.TemporaryDirectory() as where:
    main(where)
