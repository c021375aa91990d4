# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""A D-Bus connection of which the test sees every message and can forge every byte: no main loop, no library.

Values are Python's; a variant is a pair (signature, value), a dictionary a dict, a structure a tuple.
"""
import array
import os
import select
import socket
import struct

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
PATH, INTERFACE, MEMBER, ERROR_NAME, REPLY_SERIAL, DESTINATION, SENDER, SIGNATURE, FDS = range(1, 10)
FIELD_TYPES = {PATH: "o", INTERFACE: "s", MEMBER: "s", ERROR_NAME: "s", REPLY_SERIAL: "u", DESTINATION: "s", SENDER: "s",
               SIGNATURE: "g", FDS: "u"}
FIXED = {"y": "B", "b": "I", "n": "h", "q": "H", "i": "i", "u": "I", "x": "q", "t": "Q", "d": "d", "h": "I"}
ALIGN = dict({c: struct.calcsize(f) for c, f in FIXED.items()}, s=4, o=4, g=1, v=1, a=4, **{"(": 8, "{": 8})
PATIENCE = 120


def first_type(signature):
    """The first complete type of a signature."""
    if signature[0] == "a":
        return "a" + first_type(signature[1:])
    if signature[0] in "({":
        depth = 0
        for i, c in enumerate(signature):
            depth += (c in "({") - (c in ")}")
            if depth == 0:
                return signature[:i + 1]
    return signature[0]


def types(signature):
    while signature:
        t = first_type(signature)
        yield t
        signature = signature[len(t):]


class Writer:
    def __init__(self, fds=None):
        self.data, self.fds = bytearray(), fds

    def align(self, n):
        self.data += b"\0" * (-len(self.data) % n)

    def put(self, t, value):
        self.align(ALIGN[t[0]])
        c = t[0]
        if c == "h":
            self.fds.append(value)
            value = len(self.fds) - 1
        if c in FIXED:
            self.data += struct.pack("<" + FIXED[c], value)
        elif c in "sog":
            raw = value if isinstance(value, bytes) else value.encode()
            self.data += struct.pack("<B" if c == "g" else "<I", len(raw)) + raw + b"\0"
        elif c == "v":
            self.put("g", value[0])
            self.put(value[0], value[1])
        elif c == "a":
            self.data += b"\0\0\0\0"
            at = len(self.data)
            self.align(ALIGN[t[1]])
            start = len(self.data)
            if t[1] == "{":
                key, item = types(t[2:-1])
                for k, v in value.items() if isinstance(value, dict) else value:
                    self.align(8)
                    self.put(key, k)
                    self.put(item, v)
            else:
                for v in value:
                    self.put(t[1:], v)
            self.data[at - 4:at] = struct.pack("<I", len(self.data) - start)
        else:
            for part, v in zip(types(t[1:-1]), value):
                self.put(part, v)


class Reader:
    def __init__(self, data, order="<", fds=()):
        self.data, self.at, self.order, self.fds = data, 0, order, fds

    def align(self, n):
        self.at += -self.at % n

    def take(self, form):
        value, = struct.unpack_from(self.order + form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def get(self, t):
        c = t[0]
        self.align(ALIGN[c])
        if c in FIXED:
            value = self.take(FIXED[c])
            return bool(value) if c == "b" else self.fds[value] if c == "h" else value
        if c in "sog":
            n = self.take("B" if c == "g" else "I")
            self.at += n + 1
            return bytes(self.data[self.at - n - 1:self.at - 1]).decode()
        if c == "v":
            t = self.get("g")
            return t, self.get(t)
        if c == "a":
            n = self.take("I")
            self.align(ALIGN[t[1]])
            end = self.at + n
            values = []
            while self.at < end:
                if t[1] == "{":
                    self.align(8)
                    values.append(tuple(self.get(part) for part in types(t[2:-1])))
                else:
                    values.append(self.get(t[1:]))
            return dict(values) if t[1] == "{" else values
        return tuple(self.get(part) for part in types(t[1:-1]))


class Message:
    def __init__(self, kind, fields, body, fds=(), flags=0, serial=0):
        self.kind, self.fields, self.body, self.fds, self.flags, self.serial = kind, fields, body, fds, flags, serial
        self.member, self.path, self.interface = fields.get(MEMBER), fields.get(PATH), fields.get(INTERFACE)
        self.error, self.sender = fields.get(ERROR_NAME), fields.get(SENDER)

    def __repr__(self):
        return f"<{self.kind} {self.path} {self.interface} {self.member or self.error} {self.body}>"


def encode(kind, serial, fields, signature="", body=(), flags=0):
    """(bytes, descriptors)"""
    fds = []
    w = Writer(fds)
    for t, v in zip(types(signature), body):
        w.put(t, v)
    fields = dict(fields)
    if signature:
        fields[SIGNATURE] = signature
    if fds:
        fields[FDS] = len(fds)
    head = Writer()
    for t, v in (("y", ord("l")), ("y", kind), ("y", flags), ("y", 1), ("u", len(w.data)), ("u", serial)):
        head.put(t, v)
    head.put("a(yv)", [(k, (FIELD_TYPES[k], v)) for k, v in fields.items()])
    head.align(8)
    return bytes(head.data + w.data), fds


class BusError(Exception):
    def __init__(self, name, text):
        super().__init__(f"{name}: {text}")
        self.name, self.text = name, text


class RawBus:
    """address: a socket's path. broker: says Hello, and calls go to `destination`."""

    def __init__(self, path, broker=False, destination=None):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.socket.settimeout(PATIENCE)
        self.data, self.fds = bytearray(), []
        self.serial = 0
        self.destination = destination
        self.others = []  # messages that came while a reply was awaited
        self.socket.sendall(b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode() + b"\r\n")
        assert self.line().startswith(b"OK "), "not let in"
        self.socket.sendall(b"NEGOTIATE_UNIX_FD\r\n")
        assert self.line() == b"AGREE_UNIX_FD"
        self.socket.sendall(b"BEGIN\r\n")
        self.name = None
        if broker:
            self.name, = self.call("/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello", destination="org.freedesktop.DBus")

    def line(self):
        while b"\r\n" not in self.data:
            got = self.socket.recv(4096)
            if not got:
                raise ConnectionResetError("closed")
            self.data += got
        line, _, rest = bytes(self.data).partition(b"\r\n")
        self.data = bytearray(rest)
        return line

    def send(self, data, fds=()):
        more = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        n = self.socket.sendmsg([data], more)
        self.socket.sendall(data[n:])

    def fill(self):
        data, ancillary, *_ = self.socket.recvmsg(65536, socket.CMSG_SPACE(4 * 64))
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                got = array.array("i")
                got.frombytes(raw[:len(raw) - len(raw) % got.itemsize])
                self.fds += got
        if not data:
            raise ConnectionResetError("closed")
        self.data += data

    def complete(self):
        """The next message's (header length, body length) when all of it is there."""
        if len(self.data) < 16:
            return None
        order = "<" if self.data[0] == ord("l") else ">"
        n_body, _, n_fields = struct.unpack_from(order + "III", self.data, 4)
        n_head = (16 + n_fields + 7) // 8 * 8
        return (order, n_head, n_body) if len(self.data) >= n_head + n_body else None

    def receive(self):
        """The next message, waited for."""
        while not (found := self.complete()):
            self.fill()
        order, n_head, n_body = found
        head, body = bytes(self.data[:n_head]), bytes(self.data[n_head:n_head + n_body])
        self.data = self.data[n_head + n_body:]
        r = Reader(head, order)
        _, kind, flags, _, _, serial = (r.get(t) for t in "yyyyuu")
        fields = {k: v for k, (_, v) in r.get("a(yv)")}
        fds = [self.fds.pop(0) for _ in range(fields.get(FDS, 0))]
        r = Reader(body, order, fds)
        return Message(kind, fields, [r.get(t) for t in types(fields.get(SIGNATURE, ""))], fds, flags, serial)

    def message(self, path, interface, member, signature="", *body, destination=None, flags=0):
        """Bytes and descriptors of a call with the next serial."""
        self.serial += 1
        fields = {PATH: path, MEMBER: member}
        if interface:
            fields[INTERFACE] = interface
        if destination or self.destination:
            fields[DESTINATION] = destination or self.destination
        return encode(CALL, self.serial, fields, signature, body, flags)

    def reply(self, serial):
        while True:
            m = self.receive()
            if m.kind in (RETURN, ERROR) and m.fields.get(REPLY_SERIAL) == serial:
                if m.kind == ERROR:
                    raise BusError(m.error, m.body[0] if m.body else "")
                return m.body
            self.others.append(m)

    def start(self, *args, **kw):
        """Sends a call; its serial, for reply()."""
        self.send(*self.message(*args, **kw))
        return self.serial

    def call(self, *args, **kw):
        return self.reply(self.start(*args, **kw))

    def pending(self):
        """All messages that are here without waiting, earlier ones included."""
        while self.complete() or select.select([self.socket], [], [], 0)[0]:
            try:
                self.others.append(self.receive())
            except ConnectionResetError:
                break
        others, self.others = self.others, []
        return others

    def wait_for(self, wanted):
        """The first message, here already or to come, for which wanted(m)."""
        for i, m in enumerate(self.others):
            if wanted(m):
                return self.others.pop(i)
        while True:
            m = self.receive()
            if wanted(m):
                return m
            self.others.append(m)

    def match(self, rule):
        self.call("/org/freedesktop/DBus", "org.freedesktop.DBus", "AddMatch", "s", rule, destination="org.freedesktop.DBus")

    def close(self):
        self.socket.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
