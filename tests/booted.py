# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""A machine to try services on: this one's root folder, booted by its own systemd in namespaces of its own.

An overlay in memory takes all writes, so nothing of this machine changes. No network, no devices but the harmless ones,
an empty cgroup tree; what the machine has enabled for itself is not started. Wants root, mount and PID namespaces,
overlayfs and a cgroup2 tree; where one is lacking, Unavailable says which.
"""
import os
import shutil
import subprocess
import tempfile
import time

PATIENCE = 60  # seconds until something that must come is given up
SYSTEMD = "/lib/systemd/systemd"
UNITS = ("/lib/systemd/system/dbus.service", "/lib/systemd/system/polkit.service")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAMS = ("unshare", "nsenter", "setpriv", "systemctl", "systemd-analyze", "journalctl", "busctl", "dbus-daemon")

SETUP = r"""
umask 022
mount -t tmpfs tmpfs "$W"
mkdir "$W/upper" "$W/work" "$W/root"
R=$W/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$W/upper,workdir=$W/work" "$R"
mount -t proc proc "$R/proc"
for f in sys sysrq-trigger; do # this kernel's, not the namespace's
    [ -e "$R/proc/$f" ] || continue
    mount --bind "$R/proc/$f" "$R/proc/$f"
    mount -o remount,bind,ro "$R/proc/$f"
done
mount -t sysfs -o ro sysfs "$R/sys"
mount -t tmpfs -o mode=755 tmpfs "$R/dev"
mkdir "$R/dev/pts" "$R/dev/shm"
for d in null zero full random urandom tty; do touch "$R/dev/$d"; mount --bind "/dev/$d" "$R/dev/$d"; done
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$R/dev/pts"
ln -s pts/ptmx "$R/dev/ptmx"
ln -s /proc/self/fd "$R/dev/fd"
mount -t tmpfs -o mode=755 tmpfs "$R/run"
mount -t tmpfs -o mode=1777 tmpfs "$R/tmp"
mount -t cgroup2 cgroup2 "$R/sys/fs/cgroup"
# Its own identity, nothing of the administrator's, a journal in memory.
rm -rf "$R"/etc/systemd/system "$R"/etc/systemd/*.conf.d "$R/var/log/journal"
mkdir "$R/etc/systemd/system"
: > "$R/etc/machine-id"
printf '[Unit]\nRequires=basic.target dbus.service\nAfter=basic.target dbus.service\nAllowIsolate=yes\n' > "$R/etc/systemd/system/booted.target"
ln -s /dev/null "$R/etc/systemd/system/timers.target"
cd "$R"
mkdir .old
pivot_root . .old
umount -l .old
echo mounted >&$SAY
exec {SAY}>&-
exec env -i PATH=$PATH container=test "$SYSTEMD" --system --unit=booted.target
"""


class Unavailable(Exception):
    """What it needs is not on this machine; the text says what."""


def wait_for(what, why="it did not come"):
    """What `what` returns once it is true."""
    end = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < end, why() if callable(why) else why
        time.sleep(0.02)
    return found


def cgroup2():
    for folder in "/sys/fs/cgroup", "/sys/fs/cgroup/unified":
        if os.path.exists(folder + "/cgroup.controllers"):
            return folder
    raise Unavailable("there is no cgroup2 tree")


class Machine:
    """Booted when it is made; ends with the `with`. init: the number of its first process, as seen from here."""

    def __init__(self):
        if os.geteuid() != 0:
            raise Unavailable("only root can boot a machine in namespaces")
        for program in PROGRAMS:
            if not shutil.which(program):
                raise Unavailable(f"{program} is not there")
        for path in (SYSTEMD, *UNITS):
            if not os.path.exists(path):
                raise Unavailable(f"{path} is not there")
        self.process = self.init = None
        self.cgroup = os.path.join(cgroup2(), f"booted-{os.getpid()}")
        try:
            os.mkdir(self.cgroup)
        except OSError as e:
            raise Unavailable(f"{self.cgroup}: {e.strerror}") from None
        self.folder = tempfile.mkdtemp(prefix="booted-")
        try:
            self.boot()
        except BaseException:
            self.end()
            raise

    def boot(self):
        read, write = os.pipe()
        with tempfile.TemporaryFile() as said:
            self.process = subprocess.Popen(
                ["bash", "-euc", 'echo $$ > "$CGROUP/cgroup.procs"; exec setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --uts --ipc'
                 ' --net --cgroup --propagation private bash -euc "$SETUP"'],
                env={"PATH": PATH, "CGROUP": self.cgroup, "W": self.folder, "SETUP": SETUP, "SYSTEMD": SYSTEMD, "SAY": str(write)},
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, pass_fds=[write], start_new_session=True)
            os.close(write)
            with os.fdopen(read) as f:
                if f.readline() != "mounted\n":
                    self.process.wait(PATIENCE)
                    said.seek(0)
                    why = [line.strip() for line in said.read().decode(errors="replace").splitlines()]
                    raise Unavailable("no machine can be booted here: " + ("; ".join(why) if why else "no reason is given"))
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as f:
            self.init = int(f.read().split()[0])
        self.root = f"/proc/{self.init}/root"
        state = ""

        def is_up():
            nonlocal state
            assert self.process.poll() is None, "systemd has ended"
            state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
            return state in ("running", "degraded")

        wait_for(is_up, lambda: f"systemd does not come up: {state}")

    def command(self, *command, user=None):
        """What runs it inside, as root or as that user."""
        who = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if user else []
        return ["nsenter", f"--target={self.init}", "--mount", "--pid", "--ipc", "--uts", "--net", "--cgroup", "--",
                "env", "-i", "--chdir=/", "PATH=" + PATH, "LANG=C.UTF-8", f"HOME={'/home/' + user if user else '/root'}",
                *who, *command]

    def popen(self, *command, user=None, **kw):
        return subprocess.Popen(self.command(*command, user=user), **{
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **kw})

    def run(self, *command, user=None, check=True, **kw):
        if "input" not in kw:
            kw["stdin"] = subprocess.DEVNULL
        p = subprocess.run(self.command(*command, user=user), text=True, capture_output=True, timeout=PATIENCE, **kw)
        if check and p.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: status {p.returncode}\n{p.stdout}{p.stderr}")
        return p

    def write(self, path, text):
        os.makedirs(os.path.dirname(self.root + path), exist_ok=True)
        with open(self.root + path, "w", encoding="utf-8") as f:
            f.write(text)

    def show(self, unit, *names):
        """Properties of a unit: one as it is, several as a list."""
        said = self.run("systemctl", "show", unit, "--property=" + ",".join(names)).stdout
        values = dict(line.split("=", 1) for line in said.splitlines())
        return values[names[0]] if len(names) == 1 else [values[n] for n in names]

    def end(self):
        if self.process:
            self.process.kill()  # and the first process with it, and all others with that
            self.process.wait()
        end = time.monotonic() + PATIENCE
        while True:
            try:
                for where, _, _ in os.walk(self.cgroup, topdown=False):
                    os.rmdir(where)
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)
        os.rmdir(self.folder)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()
