#!/usr/bin/python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Prints the model's answer as it comes. Plain D-Bus, by python3-dbus; see docs/dbus-api.md.

  ask.py [--socket PATH | --user] PROMPT      (without: the system bus)
"""
import argparse
import json
import os
import signal
import sys
import urllib.parse

import dbus
import dbus.connection

NAME, ROOT = "org.llmd.Llm1", "/org/llmd/Llm1"


def connect(arguments):
    """The connection, and whom to address on it."""
    if arguments.socket:  # peer to peer: no bus, and so no names
        return dbus.connection.Connection("unix:path=" + urllib.parse.quote(arguments.socket)), None
    return dbus.SessionBus() if arguments.user else dbus.SystemBus(), NAME


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", help="where a daemon listens")
    parser.add_argument("--user", action="store_true", help="the session bus")
    parser.add_argument("prompt")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the stream goes with us, and the request with the stream

    bus, to = connect(arguments)
    session = bus.call_blocking(to, ROOT, NAME + ".Manager", "CreateSession", "a{sv}", ({},))
    options = dbus.Dictionary({"prompt": arguments.prompt, "max-tokens": dbus.UInt32(1000)}, signature="sv")
    stream, _ = bus.call_blocking(to, session, NAME + ".Session", "Generate", "a{sv}", (options,))

    with os.fdopen(stream.take(), encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if record["type"] == "delta":
                print(record["text"], end="", flush=True)
            elif record["type"] == "error":
                sys.exit(f"{sys.argv[0]}: {record['message']}")
            elif record["type"] == "end":
                print()
                return
    sys.exit(f"{sys.argv[0]}: the answer was cut")


try:
    main()
except dbus.DBusException as e:
    sys.exit(f"{sys.argv[0]}: {e.get_dbus_message()}")
