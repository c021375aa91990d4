#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""llmd as a system service, as an administrator and two users meet it, under a systemd of its own (tests/booted.py).

  test-booted.py BUILD_ROOT MESON...

BUILD_ROOT is configured with --prefix=/usr, without sanitizers. Status 77: this machine can boot no other.
"""
import concurrent.futures
import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile

from booted import Machine, Unavailable, wait_for

BUILD, MESON = os.path.abspath(sys.argv[1]), sys.argv[2:]
QUESTION, ANSWER = "What is 47 + 38?", "47 + 38 = 85."
MARKER = "quillwort-zephyr"  # in prompts, and nowhere else
NAME, ROOT, MANAGER = "org.llmd.Llm1", "/org/llmd/Llm1", "org.llmd.Llm1.Manager"
MODELS = NAME + ".manage-models"
DROP_IN = "/etc/llmd/llmd.conf.d/50-test.conf"
UNIT_DROP_IN = "/run/systemd/system/llmd.service.d/test.conf"

tests = []


def test(f):
    tests.append(f)
    return f


def journal(m, *matches):
    """Entries, oldest first."""
    m.run("journalctl", "--sync")
    said = m.run("journalctl", "--output=json", "--all", "--no-pager", *matches).stdout
    return [json.loads(line) for line in said.splitlines()]


def messages(m):
    return [e["MESSAGE"] for e in journal(m, "_SYSTEMD_UNIT=llmd.service")]


def wait_said(m, text):
    wait_for(lambda: any(text in line for line in messages(m)), lambda: f"{text!r} is not in {messages(m)}")


def ask(m, user, *options):
    """The demo model's answer is right; the notes that llmctl made."""
    p = m.run("llmctl", *options, "run", "--no-stdin", "--temperature=0", QUESTION, user=user)
    assert p.stdout.endswith(ANSWER + "\n"), p
    return p.stderr


def refused(m, user, *command):
    """The one line that says why."""
    p = m.run(*command, user=user, check=False)
    assert p.returncode == 1 and p.stdout == "" and p.stderr.count("\n") == 1, (command, p)
    return p.stderr


def call(m, user, method, *args):
    return m.run("busctl", "call", NAME, ROOT, MANAGER, method, *args, user=user).stdout


def main_pid(m):
    return m.show("llmd.service", "MainPID")


def install(m):
    staging = tempfile.mkdtemp(prefix="booted-install-")
    os.chmod(staging, 0o755)  # the root folder is to be that, too
    try:
        subprocess.run([*MESON, "install", "-C", BUILD, "--no-rebuild", "--destdir", staging], check=True,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for left in "etc/llmd", "var/lib/llmd", "usr/lib/llmd":  # of an installation on this machine
            shutil.rmtree(os.path.join(m.root, left), ignore_errors=True)
        subprocess.run(["cp", "-a", staging + "/.", m.root + "/"], check=True)
    finally:
        shutil.rmtree(staging)
    for i, name in enumerate(("alice", "bob")):
        m.write(f"/usr/lib/sysusers.d/{name}.conf", f'u {name} {50001 + i} "" /home/{name} /bin/sh\n')
        os.makedirs(f"{m.root}/home/{name}")
        os.chown(f"{m.root}/home/{name}", 50001 + i, 50001 + i)


@test
def is_installed(m):
    """As README.md tells it."""
    install(m)
    m.run("systemd-sysusers")
    m.run("systemd-tmpfiles", "--create")
    m.run("systemctl", "daemon-reload")
    m.run("systemctl", "reload", "dbus")
    m.run("systemctl", "enable", "--now", "llmd.socket")
    assert m.show("llmd.service", "ActiveState") == "inactive"
    for scope in "--system", "--user":
        folder = f"/usr/lib/systemd/{scope[2:]}"
        p = m.run("env", "XDG_RUNTIME_DIR=/run", "systemd-analyze", scope, "verify", "--recursive-errors=no", folder + "/llmd.service",
                  folder + "/llmd.socket")
        assert p.stdout + p.stderr == "", p


@test
def starts_on_first_use(m):
    assert ask(m, "alice", "--socket=/run/llmd/llmd.socket") == ""
    state, status, user = m.show("llmd.service", "ActiveState", "StatusText", "User")
    assert (state, user) == ("active", "llmd") and status.startswith("Serving demo: "), (state, status, user)
    assert ask(m, "bob", "--system") == ""
    scope = json.loads(m.run("llmctl", "--json", "status", user="bob").stdout)["scope"]
    assert scope == "system", scope
    said = m.run("systemctl", "status", "--no-pager", "llmd").stdout
    assert 'Status: "Serving demo: ' in said and "serving on the system bus as " + NAME in said, said
    assert m.run("stat", "--format=%U:%a", "/var/lib/llmd").stdout == "llmd:700\n"


def threads(m, pid):
    names = set()
    for tid in os.listdir(f"{m.root}/proc/{pid}/task"):
        with open(f"{m.root}/proc/{pid}/task/{tid}/comm") as f:
            names.add(f.read().strip())
    return names


def status_of(m, pid):
    """/proc/PID/status by name."""
    with open(f"{m.root}/proc/{pid}/status") as f:
        return dict((name, value.strip()) for name, value in (line.split(":", 1) for line in f))


@test
def is_confined(m):
    """What the unit asks for is so; whatever a systemd does not know or cannot do here it leaves out in silence."""
    pid = main_pid(m)
    status = status_of(m, pid)
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2", status
    assert {status[n] for n in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}, status
    assert m.show("llmd.service", "ControlGroup") == "/llmd.slice/llmd.service"
    assert m.show("llmd.slice", "CPUWeight") == m.show("llmd.slice", "IOWeight") == "50"
    with open(f"{m.root}/proc/{pid}/oom_score_adj") as f:
        assert f.read() == "500\n"

    def inside(*command):
        """As root, in the daemon's view of the machine."""
        return m.run("nsenter", "--target=" + pid, "--mount", "--net", "--ipc", "--wdns=/", *command, check=False)

    assert inside("ls", "/sys/class/net").stdout.split() in ([], ["lo"]), "a network"
    # Two lines head the list; a loopback that is up is in neither.
    with open(f"{m.root}/proc/{pid}/net/dev") as f:
        assert {line.split(":")[0].strip() for line in f.readlines()[2:]} == {"lo"}
    for path in "/usr/x", "/etc/x", "/run/x", "/run/llmd/x", "/home/alice/x", "/sys/fs/cgroup/x", "/proc/sys/vm/x":
        assert inside("touch", path).returncode != 0, path
    assert inside("ls", "/home").stdout == "" and inside("test", "-e", "/home/alice").returncode != 0
    assert inside("setpriv", "--reuid=llmd", "--regid=llmd", "--clear-groups", "touch", "/var/lib/llmd/x").returncode == 0
    os.unlink(m.root + "/var/lib/llmd/x")
    # As llmd: no processes of others. Devices that are none.
    as_llmd = ("setpriv", "--reuid=llmd", "--regid=llmd", "--clear-groups", "sh", "-c")
    said = inside(*as_llmd, "cd /proc; echo *").stdout.split()
    assert "self" in said and "1" not in said, said
    # The kernel tells of memory pressure if it tells anybody.
    watch = "printf 'some 200000 2000000' 1<>/proc/pressure/memory"
    assert inside(*as_llmd, watch).returncode == m.run("sh", "-c", watch, user="alice", check=False).returncode
    devices = set(inside("ls", "/dev").stdout.split())
    assert {"null", "urandom"} <= devices and not devices & {"dri", "mem", "kmsg", "sda", "vda", "rtc0"}, devices


@test
def gpu_only_if_asked_for(m):
    """llmd-vulkan.conf: the render node, no card, and no more of /dev than before."""
    m.write("/usr/lib/sysusers.d/render.conf", "g render -\n")
    m.run("systemd-sysusers")
    os.makedirs(m.root + "/dev/dri")
    for name in "card0", "renderD128":  # a device that is there everywhere, under these names
        m.run("mknod", "--mode=666", "/dev/dri/" + name, "c", "1", "3")
    drop_in = "/etc/systemd/system/llmd.service.d/llmd-vulkan.conf"

    def devices(*below):
        m.run("systemctl", "daemon-reload")
        m.run("systemctl", "restart", "llmd.service")
        return set(os.listdir(os.path.join(f"{m.root}/proc/{main_pid(m)}/root/dev", *below)))

    before = devices()
    m.run("install", "-D", "-m", "644", "/usr/share/doc/llmd/examples/llmd-vulkan.conf", drop_in)
    assert devices() == before | {"dri"}, before
    assert devices("dri") == {"renderD128"}
    groups = status_of(m, main_pid(m))["Groups"].split()
    assert m.run("getent", "group", "render").stdout.split(":")[2] in groups, groups
    assert ask(m, "alice") == ""
    os.unlink(m.root + drop_in)
    assert devices() == before


@test
def gpu_in_software(m):
    """llmd-vulkan-software.conf: what makes code is let, and there is no device. Without it the processor goes on alone."""
    if not glob.glob(m.root + "/usr/share/vulkan/icd.d/lvp_icd.*"):
        return "no lavapipe (mesa-vulkan-drivers): not tried"
    config, drop_in = "/etc/llmd/llmd.conf.d/60-gpu.conf", "/etc/systemd/system/llmd.service.d/llmd-vulkan-software.conf"
    m.write(config, "[Engine]\nBackend=vulkan\nDevice=llvmpipe\n")
    m.run("systemctl", "restart", "llmd.service")
    wait_said(m, "no GPU is used, the processor computes: ")
    if any("no Vulkan backend" in line for line in messages(m)):
        assert ask(m, "alice") == ""
        os.unlink(m.root + config)
        m.run("systemctl", "restart", "llmd.service")
        return "this build has no Vulkan backend: not tried"
    wait_said(m, "no GPU is used, the processor computes: llvmpipe")
    wait_said(m, "llmd-vulkan-software.conf")
    assert ask(m, "alice") == ""
    assert "vulkan, not used: llvmpipe" in m.run("llmctl", "status", user="alice").stdout
    m.run("install", "-D", "-m", "644", "/usr/share/doc/llmd/examples/llmd-vulkan-software.conf", drop_in)
    m.run("systemctl", "daemon-reload")
    m.run("systemctl", "restart", "llmd.service")
    wait_said(m, "GPU: llvmpipe")
    wait_said(m, "the GPU takes part")
    assert ask(m, "alice") == ""
    wait_for(lambda: os.path.exists(m.root + "/var/lib/llmd/vulkan-cache"))
    assert m.run("stat", "--format=%U:%a", "/var/lib/llmd/vulkan-cache").stdout == "llmd:600\n"
    pid = main_pid(m)
    assert any(name.startswith("llvmpipe-") for name in threads(m, pid)), threads(m, pid)
    for tid in os.listdir(f"{m.root}/proc/{pid}/task"):
        status = status_of(m, f"{pid}/task/{tid}")
        assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2" and status["CapEff"] == "0" * 16, status
    assert "dri" not in os.listdir(f"{m.root}/proc/{pid}/root/dev")
    with open(f"{m.root}/proc/{pid}/maps") as f:
        assert not [line for line in f if "w" in line.split()[1] and "x" in line.split()[1]]
    os.unlink(m.root + drop_in)
    os.unlink(m.root + config)
    m.run("systemctl", "daemon-reload")
    m.run("systemctl", "restart", "llmd.service")


@test
def starts_by_the_bus(m):
    """The socket is not there; who calls the name gets it all."""
    for user, ask_it in (("alice", lambda u: call(m, u, "GetStatistics")),
                         ("bob", lambda u: m.run("python3", "-B", "/usr/share/doc/llmd/examples/ask.py", QUESTION, user=u).stdout)):
        m.run("systemctl", "stop", "llmd.socket", "llmd.service")
        assert m.show("llmd.service", "ActiveState") == "inactive"
        before = main_pid(m)
        said = ask_it(user)
        assert said.strip() and said.endswith("\n"), said
        assert before == "0" != main_pid(m)
    m.run("systemctl", "stop", "llmd.socket", "llmd.service")
    assert ask(m, "alice", "--system") == ""  # llmctl, too
    m.run("systemctl", "start", "llmd.socket")


@test
def sessions_are_private(m):
    def listed(user, *more):
        return json.loads(m.run("llmctl", "--json", "session", "list", *more, user=user).stdout)

    ids = {u: m.run("llmctl", "session", "create", "--label", "of-" + u, user=u).stdout.strip() for u in ("alice", "bob")}
    assert ids["alice"] != ids["bob"]
    for user, id_ in ids.items():
        assert [s["label"] for s in listed(user)] == ["of-" + user], listed(user)
        m.run("llmctl", "run", "--no-stdin", "--session", id_, QUESTION, user=user)
    assert "there is no such session" in refused(m, "bob", "llmctl", "session", "show", ids["alice"])
    assert "there is no such session" in refused(m, "bob", "llmctl", "session", "close", ids["alice"])
    assert NAME + ".inspect-sessions" in refused(m, "bob", "llmctl", "session", "list", "--all")
    # Whatever way one asks on the bus: it is not there.
    path = f"{ROOT}/session/{ids['alice']}"
    for asked in (("call", NAME, path, "org.freedesktop.DBus.Introspectable", "Introspect"),
                  ("call", NAME, path, "org.freedesktop.DBus.Properties", "GetAll", "s", NAME + ".Session"),
                  ("get-property", NAME, path, NAME + ".Session", "Label"), ("call", NAME, path, NAME + ".Session", "Cancel")):
        m.run("busctl", *asked, user="alice")
        assert "session" in refused(m, "bob", "busctl", *asked), asked
    for asked in (("--list", "tree", NAME), ("call", NAME, ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")):
        seen = {u: m.run("busctl", *asked, user=u).stdout for u in ids}
        assert path in seen["alice"] and path not in seen["bob"] and "of-alice" not in seen["bob"], seen
    everybody = listed(None, "--all")
    assert {s["uid"] for s in everybody} == {50001, 50002} and not any(s["label"] for s in everybody), everybody
    for user, id_ in ids.items():
        m.run("llmctl", "session", "close", id_, user=user)


@test
def polkit_decides(m):
    """Refused by the action's default, with no agent there; allowed by a rule; root always."""
    wanted = ("llmctl", "model", "default", "demo")
    said = refused(m, "alice", *wanted)
    assert MODELS in said and "authentication" in said and "nobody could be asked" in said, said
    m.run(*wanted)
    assert m.show("polkit.service", "ActiveState") == "active"
    rule = "/etc/polkit-1/rules.d/10-test.rules"
    m.write(rule, 'polkit.addRule(function(a, s) { if (a.id == "%s" && s.user == "alice") return "yes"; });\n' % MODELS)
    wait_for(lambda: m.run(*wanted, user="alice", check=False).returncode == 0, "the rule does not apply")
    assert MODELS in refused(m, "bob", *wanted)
    os.unlink(m.root + rule)
    wait_for(lambda: m.run(*wanted, user="alice", check=False).returncode == 1, "the rule's end does not apply")


@test
def groups_have_roles(m):
    """The example among the documents. Alice works in the background, bob runs the place, and neither is the other."""
    example = "/usr/share/doc/llmd/examples/llmd.rules"
    with open(m.root + example) as f:
        recipe = [line[3:].strip() for line in f if line.startswith("//     ")]
    assert len(recipe) == 2, recipe
    m.run("sh", "-ec", "cd /usr/share/doc/llmd/examples; " + "\n".join(recipe))
    m.run("gpasswd", "--add", "alice", "llm-background")
    m.run("gpasswd", "--add", "bob", "llm-operator")
    create, models = ("llmctl", "session", "create"), ("llmctl", "model", "default", "demo")
    quota = ("llmctl", "quota", "set", "--max-sessions=1", "alice")
    wait_for(lambda: m.run(*models, user="bob", check=False).returncode == 0, "the rules do not apply")
    assert NAME + ".use-background" in refused(m, "bob", *create)
    kept = m.run(*create, user="alice").stdout.strip()
    assert MODELS in refused(m, "alice", *models)
    assert NAME + ".manage-quotas" in refused(m, "alice", *quota)
    m.run(*quota, user="bob")
    # One session is all that alice may have; it is not what bob may.
    p = m.run(*create, user="alice", check=False)
    assert p.returncode == 75 and "session" in p.stderr and p.stdout == "", p
    runs = [m.popen("llmctl", "chat", user="bob", stdin=subprocess.PIPE) for _ in range(2)]
    wait_for(lambda: len(json.loads(m.run("llmctl", "--json", "session", "list", user="bob").stdout)) == 2)
    for p in runs:
        p.communicate(timeout=60)
    m.run("llmctl", "session", "close", kept, user="alice")
    assert ask(m, "alice") == ""
    os.unlink(m.root + "/etc/polkit-1/rules.d/50-llmd.rules")
    wait_for(lambda: m.run(*models, user="bob", check=False).returncode == 1, "the rules' end does not apply")
    m.run("systemctl", "restart", "llmd.service")  # a quota that was set lasts as long as the daemon


@test
def name_is_the_services_own(m):
    """It gets everybody's prompts: nobody else may have the name, not even while it is free."""
    m.run("systemctl", "stop", "llmd.socket", "llmd.service")
    for user in "alice", None:
        said = refused(m, user, "busctl", "call", "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "RequestName",
                       "su", NAME, "0")
        assert "Access denied" in said, said
    m.run("systemctl", "start", "llmd.socket")


@test
def without_polkit(m):
    """It answered before: its absence allows nothing. To a daemon that never met it, it is not there."""
    wanted = ("llmctl", "model", "default", "demo")
    m.run("systemctl", "mask", "--now", "polkit.service")
    assert MODELS in refused(m, "alice", *wanted)
    m.run(*wanted)
    m.run("systemctl", "restart", "llmd.service")
    assert ask(m, "alice") == ""
    said = refused(m, "alice", *wanted)
    assert MODELS in said and "where there is no polkit, only root may" in said, said
    m.run(*wanted)
    wait_said(m, "polkit cannot be asked: everybody may use the model, only root may manage it")
    m.run("systemctl", "unmask", "polkit.service")
    m.run("systemctl", "restart", "llmd.service")
    assert "authentication" in refused(m, "alice", *wanted)


@test
def configuration_is_reloaded(m):
    pid = main_pid(m)
    m.write(DROP_IN, "[Daemon]\nLogLevel=debug\n[Limits]\nMaxSessions=1\n[User bob]\nMaxSessions=2\n")
    m.run("systemctl", "reload", "llmd")
    wait_said(m, "the configuration was read again")
    for user, most in ("alice", 1), ("bob", 2):
        wait_for(lambda: f'"max-sessions" u {most} ' in call(m, user, "GetQuota", "u", m.run("id", "-u", user).stdout.strip()))
        ids = [m.run("llmctl", "session", "create", user=user).stdout.strip() for _ in range(most)]
        p = m.run("llmctl", "session", "create", user=user, check=False)
        assert p.returncode == 75 and "session" in p.stderr and p.stdout == "", p
        m.run("llmctl", "session", "close", *ids, user=user)
    # One that is wrong makes the command fail, and is not taken.
    m.write(DROP_IN, "[Limits]\nMaxSessions=many\n")
    p = m.run("systemctl", "reload", "llmd", check=False)
    assert p.returncode == 1 and "llmd.service" in p.stderr, p
    wait_said(m, DROP_IN + ":2: [Limits] MaxSessions=many")
    assert '"max-sessions" u 2 ' in call(m, "bob", "GetQuota", "u", "50002")
    m.write(DROP_IN, "[Daemon]\nLogLevel=debug\n")
    m.run("systemctl", "reload", "llmd")
    assert main_pid(m) == pid and m.show("llmd.service", "NRestarts") == "0"


@test
def journal_has_fields_and_no_prompt(m):
    m.run("llmctl", "run", "--no-stdin", "Say " + MARKER, user="alice")
    m.run("busctl", "call", NAME, ROOT, MANAGER, "Measure", "a{sv}", "1", "prompt", "s", "Read " + MARKER, user="alice")
    finished = wait_for(lambda: journal(m, "MESSAGE_ID=0e840b98b1e54562972e4eecb8c49a7a", "LLMD_UID=50001"))[-1]
    assert int(finished["LLMD_SESSION"]) > 0 and int(finished["LLMD_REQUEST"]) > 0, finished
    assert int(finished["LLMD_PROMPT_TOKENS"]) > 0 and int(finished["LLMD_COMPLETION_TOKENS"]) > 0, finished
    assert finished["_SYSTEMD_UNIT"] == "llmd.service" and finished["PRIORITY"] == "7", finished
    ready = journal(m, "MESSAGE_ID=ebd92389b4a6494e8d71b614d9cd9918")
    assert ready and all(e["LLMD_MODEL"] == "demo" for e in ready), ready
    # Nowhere on the machine that it runs on. That grep finds it where it is is seen as well.
    m.write("/run/llmd-marker", MARKER)
    said = m.run("grep", "-rlaF", MARKER, "/run", "/var/lib/llmd", "/var/log", "/tmp", "/var/tmp", "/etc", check=False).stdout
    assert said == "/run/llmd-marker\n", said
    assert not [e for e in journal(m) if MARKER in json.dumps(e)]


@test
def stop_ends_streams(m):
    """Nobody reads, and what has been written fills all there is to hold it: no answer can be over before."""
    asked = ("llmctl", "--json", "run", "--no-stdin", "--ignore-end", "--logprobs", "--top-logprobs=20", "Count.")
    runs = [m.popen(*asked, user=user) for user in ("alice", "bob")]
    assert all(p.stdout.read(1) == "{" for p in runs)
    m.run("systemctl", "stop", "--no-block", "llmd.service")
    # Both at once: a daemon that ends waits for its readers only so long.
    with concurrent.futures.ThreadPoolExecutor() as threads:
        said = list(threads.map(lambda p: p.communicate(timeout=60), runs))
    for p, (out, err) in zip(runs, said):
        end = json.loads(out.splitlines()[-1])
        assert (end["type"], end["reason"]) == ("end", "shutdown"), (end, err)
        assert p.returncode == 1 and "the daemon ended before the answer did" in err, (p.returncode, err)
    wait_for(lambda: m.show("llmd.service", "ActiveState") == "inactive")
    assert m.show("llmd.service", "Result", "ExecMainStatus") == ["success", "0"]
    assert m.show("llmd.socket", "ActiveState") == "active"
    assert ask(m, "alice") == ""  # and the socket starts it again


@test
def kill_and_restart(m):
    """A crash costs a tenth of a second and no restart by hand; one that was asked for is no crash."""
    def state():
        return m.show("llmd.service", "ActiveState", "SubState")

    assert ask(m, "alice") == ""
    before = main_pid(m)
    m.run("systemctl", "reset-failed", "llmd.service")  # NRestarts counts from here
    restarts = int(m.show("llmd.service", "NRestarts"))
    for i in range(6):  # more than systemd's own limit in ten seconds
        pid = main_pid(m)
        m.run("kill", "-KILL", pid)
        wait_for(lambda: main_pid(m) not in ("0", pid) and state() == ["active", "running"], lambda: f"it does not come back: {state()}")
        assert int(m.show("llmd.service", "NRestarts")) == restarts + i + 1
    assert ask(m, "bob") == ""
    assert before != main_pid(m) and m.show("llmd.socket", "ActiveState") == "active"
    restarts, pid = m.show("llmd.service", "NRestarts", "MainPID")
    m.run("systemctl", "restart", "llmd.service")
    assert m.show("llmd.service", "Result") == "success" and main_pid(m) != pid
    assert ask(m, "alice") == ""
    assert m.show("llmd.service", "NRestarts") in ("0", restarts)


@test
def conversations_outlive_the_daemon(m):
    """The service manager holds them, and what is unread of an answer: nothing is lost, nothing comes twice."""
    asked = ("llmctl", "--json", "run", "--no-stdin", "--temperature=0", "--ignore-end", "--logprobs", "--top-logprobs=20", "--max-tokens=400")

    def text(out):
        records = [json.loads(line) for line in out.splitlines()]
        assert (records[-1]["type"], records[-1]["reason"]) == ("end", "length"), records[-1]
        return "".join(r["text"] for r in records if r["type"] == "delta")

    def kept(id_):
        return json.loads(m.run("llmctl", "--json", "session", "show", id_, user="alice").stdout)["context_used"]

    def kill(result):
        """As if that had been the end."""
        m.write(UNIT_DROP_IN, f"[Service]\nExecStopPost=\nExecStopPost=env SERVICE_RESULT={result} /usr/bin/llmd --after-stop\n")
        m.run("systemctl", "daemon-reload")
        pid = main_pid(m)
        m.run("kill", "-KILL", pid)
        wait_for(lambda: main_pid(m) not in ("0", pid) and m.show("llmd.service", "SubState") == "running")
        os.unlink(m.root + UNIT_DROP_IN)
        m.run("systemctl", "daemon-reload")

    whole = text(m.run(*asked, "Count.", user="bob").stdout)
    id_ = m.run("llmctl", "session", "create", user="alice").stdout.strip()
    for end in lambda: kill("signal"), lambda: m.run("systemctl", "restart", "llmd.service"), lambda: kill("oom-kill"):
        p = m.popen(*asked, "Count.", user="bob", text=False, bufsize=0)
        first = p.stdout.read(1)  # and no more: it is not over, since there is no room for all of it
        m.run("llmctl", "run", "--no-stdin", "--session", id_, QUESTION, user="alice")
        before, pid = kept(id_), main_pid(m)
        end()
        assert main_pid(m) != pid and kept(id_) == before > 0
        out, err = p.communicate(timeout=60)
        assert p.returncode == 0 and text((first + out).decode()) == whole, (p.returncode, err, out[-300:])
    said = [e["MESSAGE"] for e in journal(m, "_SYSTEMD_UNIT=llmd.service", "PRIORITY=4")]
    assert sum(line.startswith("killed for lack of memory") for line in said) == 1, said
    m.run("llmctl", "session", "close", id_, user="alice")


@test
def restart_is_no_stop(m):
    """One signal for both: the daemon asks systemd. A chat, and an answer that nobody has read yet, go on after a restart."""
    def begin():
        return m.popen("llmctl", "chat", "--temperature=0", user="alice", stdin=subprocess.PIPE)

    def say(chat, text):
        chat.stdin.write(text + "\n")
        chat.stdin.flush()
        said = chat.stdout.readline()
        assert said, chat.communicate()
        return said

    calm, chat, after = begin(), begin(), "And what did I ask before?"
    assert say(calm, QUESTION) == say(chat, QUESTION)
    wanted = say(calm, after)
    assert calm.communicate(timeout=60) == ("", "")
    run = m.popen("llmctl", "--json", "run", "--no-stdin", "--ignore-end", "--logprobs", "--top-logprobs=20", "--max-tokens=400",
                  "Count.", user="bob", text=False, bufsize=0)
    first, pid = run.stdout.read(1), main_pid(m)
    m.run("systemctl", "restart", "llmd.service")
    assert main_pid(m) not in ("0", pid) and m.show("llmd.service", "Result") == "success"
    assert any("stopping to be started again" in line for line in messages(m))
    assert say(chat, after) == wanted
    out, err = run.communicate(timeout=60)
    end = json.loads((first + out).splitlines()[-1])
    assert run.returncode == 0 and (end["type"], end["reason"]) == ("end", "length"), (run.returncode, end, err)

    m.run("systemctl", "stop", "llmd.service")
    out, err = chat.communicate("Still there?\n", timeout=60)
    assert chat.returncode == 1 and out == "" and "session" in err and err.count("\n") == 1, (chat.returncode, out, err)


@test
def no_restart_where_none_helps(m):
    """Until somebody wants it again."""
    m.run("systemctl", "stop", "llmd.service")
    os.unlink(m.root + DROP_IN)
    os.mkdir(m.root + DROP_IN)  # which cannot be read
    m.run("systemctl", "reset-failed", "llmd.service")
    assert m.run("systemctl", "start", "llmd.service", check=False).returncode == 1
    assert m.show("llmd.service", "ActiveState", "Result", "ExecMainStatus", "NRestarts") == ["failed", "exit-code", "3", "0"]
    wait_said(m, DROP_IN)
    os.rmdir(m.root + DROP_IN)
    m.write(DROP_IN, "[Daemon]\nLogLevel=debug\n")
    assert ask(m, "alice") == ""


@test
def watchdog_restarts(m):
    m.write(UNIT_DROP_IN, "[Service]\nWatchdogSec=4s\n")
    m.run("systemctl", "daemon-reload")
    m.run("systemctl", "restart", "llmd.service")
    pid = main_pid(m)
    m.run("kill", "-STOP", pid)
    wait_for(lambda: m.show("llmd.service", "NRestarts") != "0", "it is not restarted")
    wait_for(lambda: m.show("llmd.service", "ActiveState") == "active")
    assert main_pid(m) not in ("0", pid)
    assert [e for e in journal(m, "UNIT=llmd.service") if "Watchdog timeout" in e["MESSAGE"]]
    assert ask(m, "bob") == ""
    os.unlink(m.root + UNIT_DROP_IN)
    m.run("systemctl", "daemon-reload")


@test
def user_service(m):
    """Alice's own, by the manager of her units."""
    if m.run("systemctl", "start", "user@50001.service", check=False).returncode != 0:
        return "skipped: users have no manager here"
    env = ("env", "XDG_RUNTIME_DIR=/run/user/50001")
    m.run(*env, "systemctl", "--user", "enable", "--now", "llmd.socket", user="alice")

    def ask_it():
        return m.run(*env, "llmctl", "--user", "run", "--no-stdin", "--temperature=0", QUESTION, user="alice").stdout

    assert ask_it().endswith(ANSWER + "\n")
    said = m.run(*env, "systemctl", "--user", "status", "--no-pager", "llmd", user="alice").stdout
    assert 'Status: "Serving demo: ' in said, said
    m.run(*env, "systemctl", "--user", "reload", "llmd", user="alice")
    m.run(*env, "systemctl", "--user", "stop", "llmd.socket", "llmd.service", user="alice")
    if os.path.exists(m.root + "/usr/lib/systemd/user/dbus.socket"):
        assert ask_it().endswith(ANSWER + "\n")  # by the session bus
    m.run("systemctl", "stop", "user@50001.service")
    return None


@test
def service_that_does_not_answer(m):
    """llmctl starts no other in its place, but uses one that runs. One that is switched off is none."""
    m.run("systemctl", "stop", "llmd.socket", "llmd.service")
    denial = "/etc/dbus-1/system.d/test.conf"
    m.write(denial, f'<busconfig><policy user="bob"><deny send_destination="{NAME}"/></policy></busconfig>\n')
    m.run("systemctl", "reload", "dbus")
    said = refused(m, "bob", "llmctl", "run", "--no-stdin", QUESTION)
    assert "the system's llmd: " in said and "--private" in said, said
    assert ask(m, "bob", "--private") == ""
    said = ask(m, "bob")
    assert "the system's llmd: " in said and "private one answers" in said, said
    os.unlink(m.root + denial)
    m.run("systemctl", "reload", "dbus")
    m.run("systemctl", "mask", "llmd.service", "llmd.socket")
    assert ask(m, "alice") == ""
    assert m.run("llmctl", "--system", "status", user="alice", check=False).returncode == 3


@test
def its_own_sandbox_refused_nothing(m):
    """In all that was done here; a refusal is told of with this id."""
    assert not journal(m, "MESSAGE_ID=bbeb82e44517460f9428aefdbe10ba61")
    assert not [line for line in messages(m) if "sandbox" in line.lower()], messages(m)


def main():
    try:
        m = Machine()
    except Unavailable as e:
        print(e)
        sys.exit(77)
    with m:
        for t in tests:
            print(f"{t.__name__} ... ", end="", flush=True)
            try:
                said = t(m)
            except BaseException:
                print("FAILED", flush=True)
                print(m.run("journalctl", "--no-pager", "--lines=40", check=False).stdout)
                raise
            print(said or "ok", flush=True)


main()
