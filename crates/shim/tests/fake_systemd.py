"""Answers for systemd on a message bus of a test's own: makes scopes as directories in the cgroup
hierarchies that systemd would use, moves the processes it is given there, and writes down what it was told.

Usage: fake_systemd.py LOG ROOT (a directory in every hierarchy's root that all scopes are below)."""

import json
import os
import sys

import dbus
import dbus.mainloop.glib
import dbus.service
from gi.repository import GLib

LOG, TOP = sys.argv[1], sys.argv[2]
MANAGER = "org.freedesktop.systemd1.Manager"
HIERARCHIES = [h for h in ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified") if os.path.isdir(h)] or ["/sys/fs/cgroup"]


def note(**what):
    with open(LOG, "a") as log:
        log.write(json.dumps(what) + "\n")


def plain(value):
    if isinstance(value, dbus.Boolean):
        return bool(value)
    if isinstance(value, (list, dbus.Array)):
        return [plain(v) for v in value]
    return int(value) if isinstance(value, int) else str(value)


class Manager(dbus.service.Object):
    def __init__(self, bus):
        super().__init__(bus, "/org/freedesktop/systemd1")
        self.units, self.jobs = {}, 0

    def job(self, unit, result="done"):
        self.jobs += 1
        path = f"/org/freedesktop/systemd1/job/{self.jobs}"
        GLib.idle_add(self.JobRemoved, dbus.UInt32(self.jobs), dbus.ObjectPath(path), unit, result)
        return dbus.ObjectPath(path)

    @dbus.service.signal(MANAGER, signature="uoss")
    def JobRemoved(self, number, job, unit, result):
        pass

    @dbus.service.method(MANAGER)
    def Subscribe(self):
        pass

    @dbus.service.method(MANAGER, in_signature="ssa(sv)a(sa(sv))", out_signature="o")
    def StartTransientUnit(self, name, mode, properties, aux):
        values = {str(k): plain(v) for k, v in properties}
        note(call="start", name=str(name), mode=str(mode), properties=values)
        if name in self.units:
            raise dbus.DBusException("Unit exists.", name="org.freedesktop.systemd1.UnitExists")
        if "refused" in name:
            raise dbus.DBusException("Not today.", name="org.freedesktop.DBus.Error.AccessDenied")
        if "failing" in name:
            return self.job(name, "failed")
        self.units[name] = [os.path.join(h, TOP, values["Slice"], name) for h in HIERARCHIES]
        for path in self.units[name]:
            os.makedirs(path, exist_ok=True)
            for pid in values["PIDs"]:
                with open(os.path.join(path, "cgroup.procs"), "w") as procs:
                    procs.write(str(pid))
        return self.job(name)

    @dbus.service.method(MANAGER, in_signature="sba(sv)")
    def SetUnitProperties(self, name, runtime, properties):
        note(call="set", name=str(name), runtime=bool(runtime), properties={str(k): plain(v) for k, v in properties})

    @dbus.service.method(MANAGER, in_signature="ss", out_signature="o")
    def StopUnit(self, name, mode):
        note(call="stop", name=str(name))
        if name not in self.units:
            raise dbus.DBusException("Not loaded.", name="org.freedesktop.systemd1.NoSuchUnit")
        for path in self.units.pop(name):
            if os.path.isdir(path):
                os.rmdir(path)
        return self.job(name)

    @dbus.service.method(MANAGER, in_signature="s")
    def ResetFailedUnit(self, name):
        note(call="reset", name=str(name))
        if name in self.units and "stale" in name:
            del self.units[name]


dbus.mainloop.glib.DBusGMainLoop(set_as_default=True)
BUS = dbus.bus.BusConnection(os.environ["DBUS_SYSTEM_BUS_ADDRESS"])
NAME = dbus.service.BusName("org.freedesktop.systemd1", BUS)
MANAGER_OBJECT = Manager(BUS)
note(call="ready")
GLib.MainLoop().run()
