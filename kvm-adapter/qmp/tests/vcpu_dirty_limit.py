#!/usr/bin/env python3
"""QEMU's own test of its dirty limit, on any QMP socket: vcpu_dirty_limit.py SOCKET

The sequence of QEMU's tests/qtest/migration (vcpu_dirty_limit): measure the free rate, limit to half of it, see that held,
cancel, see the rate rise again. The guest must dirty memory steadily. Needs qemu.qmp.
"""

import sys
import time

from qemu.qmp.legacy import QEMUMonitorProtocol

TOLERANCE = 25  # MB/s, QEMU's
TRIES = 20  # seconds, QEMU's


def measure(monitor):
    """The first vCPU's dirty page rate over a second, in MiB/s."""
    monitor.cmd("calc-dirty-rate", **{"calc-time": 1, "mode": "dirty-ring"})
    for _ in range(200):
        info = monitor.cmd("query-dirty-rate")
        if info["status"] == "measured":
            return info["vcpu-dirty-rate"][0]["dirty-rate"]
        # "measuring", or with QEMU for a moment "unstarted".
        time.sleep(0.05)
    sys.exit(f"the measurement does not end: {info}")


def until(monitor, what, holds):
    """Measures until it holds; a few seconds are QEMU's patience."""
    rates = []
    for _ in range(TRIES):
        rates.append(measure(monitor))
        if holds(rates[-1]):
            print(f"{what}: {rates[-1]} MiB/s, after {len(rates)} s", flush=True)
            return rates[-1]
    sys.exit(f"not {what}: {rates} MiB/s")


def main(path):
    monitor = QEMUMonitorProtocol(path)
    monitor.connect()
    version = monitor.cmd("query-version")
    print("at the other end:", version["package"] or version["qemu"])

    # QEMU's test asks for more than nothing; half of this is told from all of it.
    quota = until(monitor, "free", lambda rate: rate > 2 * TOLERANCE) // 2
    monitor.cmd("set-vcpu-dirty-limit", **{"dirty-rate": quota})
    limits = monitor.cmd("query-vcpu-dirty-limit")
    assert limits[0]["limit-rate"] == quota, limits
    time.sleep(2)
    until(monitor, f"held at {quota}", lambda rate: rate < quota + TOLERANCE)

    monitor.cmd("cancel-vcpu-dirty-limit")
    assert monitor.cmd("query-vcpu-dirty-limit") == []
    until(monitor, "risen again", lambda rate: rate > quota + TOLERANCE)
    monitor.close()


main(*sys.argv[1:])
