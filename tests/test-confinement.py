#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""The programs themselves are in their sandboxes, whoever starts them and with all their threads.

  test-confinement.py LLMD LLMCTL LLM_IMPORT MAKE_CHAT_MODEL DEMO_MODEL [--no-filter]
"""
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading

import dbus

from daemon_client import Broker, Daemon, SystemDaemon, until

if sys.argv[6:] == ["--no-filter"]:
    print("skipped: this build has no filter of system calls (libseccomp)")
    sys.exit(77)
LLMD, LLMCTL, LLM_IMPORT, MAKE_CHAT_MODEL, DEMO_MODEL = map(os.path.abspath, sys.argv[1:])


def status_of(path):
    with open(path) as f:
        return dict(line.rstrip("\n").split(":\t", 1) for line in f if ":\t" in line)


def check_confined(pid, confined=True):
    """Each thread: a filter, no capabilities, no way to new ones."""
    n = 0
    for tid in os.listdir(f"/proc/{pid}/task"):
        s = status_of(f"/proc/{pid}/task/{tid}/status")
        assert (s["Seccomp"] == "2") == confined, s
        assert (s["NoNewPrivs"] == "1") == confined, s
        if confined:
            assert all(int(s[k], 16) == 0 for k in ("CapInh", "CapPrm", "CapEff", "CapAmb")), s
        n += 1
    assert n > 1, "threads compute"


def private_daemon(folder, model):
    with Daemon(LLMD, model, folder + "/s") as d:
        check_confined(d.process.pid)
        assert "sandbox" not in d.log(), d.log()


def system_daemon(folder, model):
    with Broker(folder) as broker, SystemDaemon(LLMD, folder, broker, model=model) as d:
        d.wait_named()
        check_confined(d.process.pid)
        assert "sandbox" not in d.log(), d.log()
        assert os.stat(d.socket).st_mode & 0o777 == 0o666


def names_of_users_on_a_reload(folder, model):
    with Broker(folder) as broker, SystemDaemon(LLMD, folder, broker, model=model) as d:
        new = d.config + ".new"
        with open(new, "w") as f:
            f.write("[User daemon]\nMaxSessions=1\n[User nobody-has-this-name]\nMaxSessions=1\n")
        os.rename(new, d.config)
        d.process.send_signal(signal.SIGHUP)
        until(lambda: "left as it was" in d.log())
        assert "nobody-has-this-name" in d.log() and "'daemon'" not in d.log(), d.log()
        with open(new, "w") as f:
            f.write("[User daemon]\nMaxSessions=1\n")
        os.rename(new, d.config)
        d.process.send_signal(signal.SIGHUP)
        until(lambda: "was read again" in d.log())
        assert "sandbox" not in d.log(), d.log()


def daemon_of_llmctl(folder, model):
    env = dict(os.environ, XDG_RUNTIME_DIR=folder, LLMD_BINARY=LLMD, HOME=folder,
               DBUS_SESSION_BUS_ADDRESS="unix:path=/nonexistent", DBUS_SYSTEM_BUS_ADDRESS="unix:path=/nonexistent")
    subprocess.run([LLMCTL, "run", "--private", "--model", model, "--max-tokens", "1", "Hello"], env=env, check=True,
                   stdout=subprocess.DEVNULL)
    lock = os.stat(folder + "/llmd/private.sock.lock")
    inode = f":{lock.st_ino} "
    with open("/proc/locks") as f:
        pids = [line.split()[4] for line in f if inode in line]
    assert len(pids) == 1, pids
    check_confined(int(pids[0]))
    os.kill(int(pids[0]), signal.SIGTERM)
    until(lambda: not os.path.exists(folder + "/llmd/private.sock"))


def the_other_modes(folder, model):
    with Daemon(LLMD, model, folder + "/a", "--sandbox=off") as d:
        check_confined(d.process.pid, confined=False)
        assert "the sandbox is off: " in d.log()
    with Daemon(LLMD, model, folder + "/b", "--sandbox=report") as d:
        assert "only reports" in d.log()
        with d.connect() as c:
            c.create()
    assert "would refuse the" not in d.log(), d.log()
    with open(folder + "/conf", "w") as f:
        f.write("[Daemon]\nSandbox=off\n")
    with Daemon(LLMD, model, folder + "/c", "--config", folder + "/conf") as d:
        assert "the sandbox is off: " in d.log()
    with Daemon(LLMD, model, folder + "/d", "--config", folder + "/conf", "--sandbox=strict") as d:
        check_confined(d.process.pid)
    p = subprocess.run([LLMD, "--private", "--sandbox=none"], capture_output=True, text=True)
    assert p.returncode == 2 and "strict, report or off" in p.stderr, p


def models_and_links(folder, model):
    """A link in a folder of models leads elsewhere; what is not named there is out of reach."""
    elsewhere, models, own = folder + "/elsewhere", folder + "/models", folder + "/own"
    for name in elsewhere, models, own:
        os.mkdir(name)
    subprocess.run(["cp", model, elsewhere + "/real.llmd"], check=True)
    os.symlink("../elsewhere/real.llmd", models + "/linked.llmd")
    with Broker(own) as broker, \
            SystemDaemon(LLMD, own, broker, config=f"[Model]\nFolder={models}\nDefault=linked\n") as d:
        assert "serving " + models + "/linked.llmd" in d.log(), d.log()
        subprocess.run(["cp", model, elsewhere + "/other.llmd"], check=True)
        os.symlink("../elsewhere/other.llmd", models + "/later.llmd")
        d.process.send_signal(signal.SIGHUP)
        until(lambda: "was read again" in d.log())
        out = subprocess.run([LLMCTL, "--socket", d.socket, "model", "list"], capture_output=True, text=True)
        later = [line for line in out.stdout.splitlines() if line.startswith("later")]
        assert len(later) == 1 and " failed " in later[0], out


def a_folder_as_model(folder, model):
    """The sandbox, which opens no folder, has not the say of what is wrong with it."""
    for options in [], ["--sandbox=off"]:
        d = Daemon(LLMD, folder, folder + "/s", *options)
        assert d.stop() != 0 and not d.ready
        assert f"{folder}: is a folder, not a model file" in d.log() and "denied" not in d.log(), d.log()


def models_are_read_inside(folder, model):
    """Whoever opens the file waits until we give up the lease, and the kernel tells us that somebody does."""
    models, own = folder + "/models", folder + "/own"
    for name in models, own:
        os.mkdir(name)
    subprocess.run(["cp", model, models + "/other.llmd"], check=True)
    opened = threading.Event()
    seen = {}

    def look():
        opened.wait()
        with open(f"/proc/self/task/{os.getpid()}/children") as f:
            children = [status_of(f"/proc/{pid}/status") for pid in f.read().split()]
        seen.update(next(s for s in children if s["Name"] == "llmd"))
        fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    signal.signal(signal.SIGIO, lambda *_: opened.set())
    lease = os.open(models + "/other.llmd", os.O_RDWR | os.O_CLOEXEC)
    fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    threading.Thread(target=look, daemon=True).start()
    with Broker(own) as broker, SystemDaemon(LLMD, own, broker, model=model, config=f"[Model]\nFolder={models}\n") as d:
        d.wait_named()
        opened.set()
    os.close(lease)
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    assert seen["Seccomp"] == "2" and seen["NoNewPrivs"] == "1", seen


SOFTWARE_DRIVER = "/usr/share/vulkan/icd.d/lvp_icd.x86_64.json"


def opened(pid):
    """What the process holds open, and what of it can be executed."""
    files = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            files.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except FileNotFoundError:
            pass
    with open(f"/proc/{pid}/maps") as f:
        maps = [line.split(None, 5) for line in f]
    return files, [m for m in maps if "x" in m[1]]


def with_a_gpu(folder, model):
    """The device in software: the driver's threads are in the sandbox with the others, it can do its work there, and its machine
    code is never writable."""
    if not os.path.exists(SOFTWARE_DRIVER):
        return "no lavapipe (mesa-vulkan-drivers): not tried"
    home = folder + "/home"
    os.mkdir(home)
    env = dict(os.environ, VK_ICD_FILENAMES=SOFTWARE_DRIVER, HOME=home, XDG_CACHE_HOME=home + "/cache")
    for mode in "strict", "report":
        with Daemon(LLMD, model, f"{folder}/{mode}", "--backend=vulkan", "--device=llvmpipe", "--sandbox=" + mode, env=env) as d:
            until(lambda: "the GPU takes part" in d.log() or "no Vulkan backend" in d.log(), lambda: d.log())
            if "no Vulkan backend" in d.log():
                return "a build without: not tried"
            with d.connect() as c:
                text, records = c.create().run(prompt="Hello", max_tokens=dbus.UInt32(8), temperature=0.0)
                assert text and records[-1]["type"] == "end", (text, records)
            if mode == "report":
                assert "would refuse the" not in d.log(), d.log()
                continue
            pid = d.process.pid
            check_confined(pid)
            names = set()
            for tid in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{tid}/comm") as f:
                    names.add(f.read().strip())
            assert "llvmpipe-0" in names, names
            assert "sandbox" not in d.log(), d.log()
            files, code = opened(pid)
            assert not [f for f in files if f.startswith("/dev/dri")], files
            assert [m for m in code if len(m) < 6] and not [m for m in code if "w" in m[1]], code
    kept = home + "/cache/llmd"
    assert os.listdir(home) == ["cache"] and sorted(os.listdir(kept)) == ["vulkan-cache", "vulkan-crashes"], os.listdir(kept)
    assert os.stat(kept + "/vulkan-crashes").st_size == 0


def gpu_outlives_a_model(folder, model):
    """Another model is served by the device that was found before the sandbox; what it compiled is in the state folder."""
    if not os.path.exists(SOFTWARE_DRIVER):
        return "no lavapipe (mesa-vulkan-drivers): not tried"
    models, own = folder + "/models", folder + "/own"
    for name in models, own:
        os.mkdir(name)
    for name in "a", "b":
        subprocess.run(["cp", model, f"{models}/{name}.llmd"], check=True)
    config = f"[Model]\nFolder={models}\nDefault=a\n[Engine]\nBackend=vulkan\nDevice=llvmpipe\n"
    joined = "the GPU takes part"
    with Broker(own) as broker, SystemDaemon(LLMD, own, broker, config=config, env=dict(os.environ, VK_ICD_FILENAMES=SOFTWARE_DRIVER)) as d:
        until(lambda: joined in d.log() or "no Vulkan backend" in d.log(), lambda: d.log())
        if "no Vulkan backend" in d.log():
            return "a build without: not tried"
        for n, name in enumerate(("a", "b"), 1):
            until(lambda: d.log().count(joined) == n and f"serving {models}/{name}.llmd" in d.log(), lambda: d.log())
            with d.connect() as c:
                _, records = c.create().run(prompt="Hello", max_tokens=dbus.UInt32(4), temperature=0.0)
                assert records[-1]["type"] == "end", records
            subprocess.run([LLMCTL, "--socket", d.socket, "model", "default", "b"], check=True)
        assert d.log().count("GPU: ") == 1 and "sandbox" not in d.log(), d.log()
        check_confined(d.process.pid)
    assert {"vulkan-cache", "vulkan-crashes"} <= set(os.listdir(d.state)), os.listdir(d.state)


def code_is_for_software_only(folder, model):
    """Asked for hardware, and there is none: nothing but what the processor's daemon may."""
    for options in [], ["--backend=hybrid"], ["--backend=vulkan", "--device=no such"]:
        with Daemon(LLMD, model, folder + "/s", *options, env=dict(os.environ, VK_ICD_FILENAMES=SOFTWARE_DRIVER)) as d:
            check_confined(d.process.pid)
            _, code = opened(d.process.pid)
            assert all(len(m) == 6 for m in code), code
            assert not options or "no GPU is used, the processor computes: " in d.log(), d.log()
            assert "sandbox" not in d.log(), d.log()


def importer(folder, model):
    p = subprocess.Popen([LLM_IMPORT, "--verify", DEMO_MODEL], stdout=subprocess.DEVNULL)
    confined = 0
    while p.poll() is None:
        try:
            s = status_of(f"/proc/{p.pid}/status")
        except OSError:
            continue
        if s.get("Seccomp") == "2":
            confined += 1
            assert s["NoNewPrivs"] == "1" and int(s["CapEff"], 16) == 0, s
    assert p.returncode == 0 and confined > 0
    p = subprocess.run([LLM_IMPORT, "--verify", "--sandbox", "report", DEMO_MODEL], capture_output=True, text=True)
    assert p.returncode == 0 and p.stderr == "", p


def main():
    with tempfile.TemporaryDirectory(prefix="llmd-confinement-") as top:
        model = os.path.join(top, "model.llmd")
        subprocess.run([MAKE_CHAT_MODEL, model], check=True)
        for t in (private_daemon, system_daemon, names_of_users_on_a_reload, daemon_of_llmctl, the_other_modes,
                  models_and_links, a_folder_as_model, models_are_read_inside, with_a_gpu, gpu_outlives_a_model, code_is_for_software_only, importer):
            with tempfile.TemporaryDirectory(dir=top) as folder:
                print(t.__name__, end=" ", flush=True)
                print(t(folder, model) or "ok", flush=True)


main()
