#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Builds llmd and runs its tests, in stages that differ in compiler and instrumentation.

The last line of the output is `N passed, N failed[, N skipped]`, summed over the stages; a stage that does not
configure or build counts as one failure. Status 0 when nothing failed, 2 for usage errors.

Needs only what tools/setup-packages installs; tools/test calls it.
"""
import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

SOURCE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# name: (what it is, environment, meson options). In the order of running: the first is the one that finds most.
STAGES = {
    "sanitizers": ("gcc, ASan and UBSan", {"CC": "gcc"}, ["--native-file", "build-dev.ini"]),
    # With the prefix of a distribution, so that it is also tried as a system's service.
    "clang": ("clang, no sanitizers, no Vulkan", {"CC": "clang"},
              ["--prefix=/usr", "-Dwerror=true", "-Dvulkan=disabled", "-Dapparmor=true"]),
    "release": ("gcc -O3, NDEBUG, LTO, features off", {"CC": "gcc"},
                ["--buildtype=release", "-Db_lto=true", "-Dwerror=true", "-Dauto_features=disabled"]),
    "debug": ("clang -O0", {"CC": "clang"}, ["--buildtype=debug", "-Dwerror=true"]),
    "tsan": ("clang, TSan", {}, ["--native-file", "build-tsan.ini"]),
}
PACKAGES = "packages"
ALL = [*STAGES, PACKAGES]
DEFAULT = ["sanitizers", "clang", PACKAGES]
QUICK = ["clang"]
SYSTEM = ["booted"]  # of the stage in QUICK, and PACKAGES

PASSED, SKIPPED = ("OK", "EXPECTEDFAIL"), ("SKIP",)


class Stage:
    def __init__(self, name, patterns, jobs):
        self.name, self.patterns, self.jobs = name, patterns, jobs
        self.what, env, self.options = STAGES[name]
        # Flags from outside would make the run another one than its name says.
        self.env = {k: v for k, v in os.environ.items() if k not in ("CFLAGS", "CPPFLAGS", "LDFLAGS", "MAKEFLAGS")}
        self.env.update(env)
        self.build = os.path.join(SOURCE, "build-test-" + name)
        self.passed, self.failed, self.skipped = [], [], []  # of names; skipped: (name, reason)

    def fail(self, what):
        self.failed.append(what)

    def call(self, *command):
        return subprocess.run(command, cwd=SOURCE, env=self.env, stdin=subprocess.DEVNULL).returncode

    def configure(self):
        setup = ["meson", "setup", self.build, *self.options]
        if os.path.exists(os.path.join(self.build, "build.ninja")):
            # Takes over options that changed here. It fails when a compiler or the folder moved; then anew.
            if subprocess.run([*setup, "--reconfigure"], cwd=SOURCE, env=self.env, stdin=subprocess.DEVNULL,
                              capture_output=True).returncode == 0:
                return True
        shutil.rmtree(self.build, ignore_errors=True)
        p = subprocess.run(setup, cwd=SOURCE, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
        if p.returncode != 0:
            sys.stdout.write(p.stdout.decode(errors="replace"))
        return p.returncode == 0

    def matching(self):
        """meson's names of the tests that match one of the patterns, by part of name or suite."""
        out = subprocess.run(["meson", "introspect", "--tests", self.build], cwd=SOURCE, env=self.env, check=True,
                             capture_output=True).stdout
        names = []
        for t in json.loads(out):
            words = [t["name"]] + [s.split(":")[-1] for s in t["suite"]]
            if any(p in w for p in self.patterns for w in words):
                names.append(t["name"])
        return names

    def run(self):
        print(f"\n== {self.name}: {self.what}", flush=True)
        if not self.configure():
            return self.fail("configure")
        if self.call("ninja", "-C", self.build, "-j", str(self.jobs), "--quiet") != 0:
            return self.fail("build")
        names = []
        if self.patterns:
            names = self.matching()
            if not names:
                return self.fail("no test matches " + " ".join(self.patterns))
        log = os.path.join(self.build, "meson-logs", "testlog.json")
        if os.path.exists(log):
            os.unlink(log)
        # One more than the cores: many tests wait for most of their time.
        status = self.call("meson", "test", "-C", self.build, "--no-rebuild", "--num-processes", str(self.jobs + 1),
                           "--timeout-multiplier", "4", "--print-errorlogs", *names)
        self.read(log)
        if status != 0 and not self.failed:
            self.fail(f"meson test (status {status})")

    def read(self, log):
        if not os.path.exists(log):
            return self.fail("no test ran")
        with open(log, encoding="utf-8", errors="replace") as f:
            for line in f:
                t = json.loads(line)
                name = t["name"].split(" / ")[-1]
                if t["result"] in PASSED:
                    self.passed.append(name)
                elif t["result"] in SKIPPED:
                    said = (t.get("stdout") or "") + "\n" + (t.get("stderr") or "")
                    said = [s.strip() for s in said.splitlines() if s.strip()]
                    self.skipped.append((name, said[-1] if said else "no reason given"))
                else:
                    self.fail(f"{name} ({t['result'].lower()})")


class PackagesStage(Stage):
    """No build of meson's: the Debian packages are built as they are built for people, and tried."""

    def __init__(self, jobs):
        self.name, self.what, self.jobs = PACKAGES, "Debian packages", jobs
        self.folder = os.path.join(SOURCE, "build-test-" + PACKAGES)
        self.env = {k: v for k, v in os.environ.items() if k not in ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS", "MAKEFLAGS")}
        self.passed, self.failed, self.skipped = [], [], []

    def run(self):
        print(f"\n== {self.name}: {self.what}", flush=True)
        if not shutil.which("dpkg-buildpackage"):
            return self.skipped.append((PACKAGES, "this is no Debian: dpkg-buildpackage is not there"))
        shutil.rmtree(self.folder, ignore_errors=True)
        self.env["DEB_BUILD_OPTIONS"] = f"parallel={self.jobs}"
        if self.call("tools/build-packages", self.folder) != 0:
            return self.fail("build-packages")
        self.passed.append("build-packages")
        # One line for each test: NAME ... ok, or skipped: REASON.
        last = "no reason given"
        with subprocess.Popen(["tools/check-package", self.folder], cwd=SOURCE, env=self.env, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as p:
            for line in p.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                if m := re.fullmatch(r"(\w+) \.\.\. (ok|skipped: (.*))\n", line):
                    self.skipped.append((m[1], m[3])) if m[3] else self.passed.append(m[1])
                elif m := re.match(r"(\w+) \.\.\. FAILED", line):
                    self.fail(m[1])
                last = line.strip() or last
        if p.returncode == 77:
            self.skipped.append(("check-package", last))
        elif p.returncode != 0 and not self.failed:
            self.fail(f"check-package (status {p.returncode})")


def main():
    ap = argparse.ArgumentParser(prog="tools/test", description="Builds llmd and runs its tests.",
                                 epilog="stages: " + "; ".join(f"{n} ({s[0]})" for n, s in STAGES.items())
                                 + f"; {PACKAGES} (Debian packages: built, tried as root). Without an option: " + ", ".join(DEFAULT) + ".")
    ap.add_argument("--all", action="store_true", help="every stage")
    ap.add_argument("--quick", action="store_true", help="only the stage " + ", ".join(QUICK))
    ap.add_argument("--system", action="store_true", help="only llmd as the service of a booted system (root)")
    ap.add_argument("--stage", action="append", choices=ALL, help="only this stage; may be repeated")
    ap.add_argument("--jobs", type=int, default=max(2, os.cpu_count() or 2), metavar="N",
                    help="compile and test N at a time (default: the cores, at least 2)")
    ap.add_argument("--backend", choices=("vulkan", "hybrid"),
                    help="the whole-system tests, with a daemon that uses mesa's software driver as its GPU")
    ap.add_argument("patterns", nargs="*", metavar="NAME", help="only tests with this in their name or suite")
    args = ap.parse_args()
    if args.system:
        if args.all or args.stage or args.patterns:
            ap.error("--system is all that is run with it")
        args.quick, args.patterns = True, SYSTEM
    if args.backend:
        os.environ["LLMD_TEST_BACKEND"] = args.backend
        args.patterns = args.patterns or ["system"]
        args.stage = args.stage or [DEFAULT[0]]
    if args.jobs < 1:
        ap.error("--jobs must be at least 1")

    stages = []
    interrupted = False
    names = args.stage or (ALL if args.all else [*QUICK, PACKAGES] if args.system else QUICK if args.quick else DEFAULT)
    if args.patterns and not args.stage and not args.system:  # which are meson's tests
        names = [n for n in names if n != PACKAGES]
    for name in names:
        stage = PackagesStage(args.jobs) if name == PACKAGES else Stage(name, args.patterns, args.jobs)
        stages.append(stage)
        start = time.monotonic()
        try:
            stage.run()
        except KeyboardInterrupt:
            stage.fail("interrupted")
            interrupted = True
        stage.seconds = time.monotonic() - start
        if interrupted:
            break

    print("\n== summary")
    for s in stages:
        print(f"{s.name}: {len(s.passed)} passed, {len(s.failed)} failed, {len(s.skipped)} skipped, "
              f"{s.seconds:.0f} s")
    for s in stages:
        for name, reason in s.skipped:
            print(f"skipped  {s.name}: {name}: {reason}")
    for s in stages:
        for what in s.failed:
            print(f"FAILED   {s.name}: {what}")
    passed, failed, skipped = (sum(len(getattr(s, k)) for s in stages) for k in ("passed", "failed", "skipped"))
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""), flush=True)
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
