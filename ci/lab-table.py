#!/usr/bin/env python3
"""Runs scenarios in the lab and compares their rows with benches/lab.txt, the table of all of them (docs/LAB.md).

    cargo build --release -p dirtylimit-bench  (for arm64 also: ci/arm64-build.sh build --release -p dirtylimit-bench)
    ci/lab-table.py --list                     the boots that make the table
    ci/lab-table.py [WORD...]                  runs those whose line has each word, as in: svm 6.12 exact
    ci/lab-table.py --write svm                and puts their rows into the table

Rows are printed as they come. A row that is another one than in the table is named with both; status 1 where a bound is missed that is
not missed in the table, or a machine did not run to its end.
"""
import argparse
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benches/lab.txt"
HEAD = f"{'machine':<7} {'kernel':<7} {'scenario':<12} {'case':<26}" + "".join(
    f" {name:>8}" for name in ["error %", "window %", "settle", "p99.9", "longest", "resets/s"]
) + "  lost  also, and what is beyond its bound by how much"
# One boot each, with that many CPUs: what a case measures depends on what ran before it in the same boot, in the scenario's order.
HELD = ["exact", "exact-5ms", "exact-2ms", "big-ring", "steps", "bursty", "budget", "many"]
MACHINES = {
    "svm": (["6.1", "6.12", "newest"], [(name, 1) for name in HELD] + [("beside", 2)]),
    "vmx": (["6.12", "newest"], [("defaults", 1)]),
    "arm64": (["6.12", "newest"], [("exact", 1), ("exact-5ms", 1), ("exact-2ms", 1), ("big-ring", 1)]),
}
BOOTS = [
    (machine, kernel, scenario, cpus)
    for machine, (kernels, scenarios) in MACHINES.items()
    for kernel in kernels
    for scenario, cpus in scenarios
]


def run(bench, boot):
    """The rows of a boot, and whether it came to its end."""
    machine, kernel, scenario, cpus = boot
    command = [bench, "lab", machine, "--kernel", kernel, "--cpus", str(cpus), "--silence", "3600s"]
    with subprocess.Popen(
        [*command, "--", "scenario", scenario, "--rows"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as lab, ThreadPoolExecutor(1) as reader:
        said = reader.submit(lab.stderr.read)
        rows = []
        for line in lab.stdout:
            rows.append(f"{machine:<7} {kernel:<7} {line.rstrip()}")
            print(rows[-1], flush=True)
        if lab.wait():
            print(f"lab-table: {' '.join(boot[:3])} failed:\n{said.result()}", file=sys.stderr)
        return rows, lab.returncode == 0


def of(boot, row):
    return row.split()[:3] == list(boot[:3])


def case(row):
    return row[: HEAD.index(" error %")].rstrip()


def missed(row):
    """The measures that are beyond their bounds."""
    return set(re.findall(r"BEYOND: (.*?)(?: by|,|$)", row or ""))


def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--list", action="store_true", help="say which boots there are")
    asked.add_argument("--write", action="store_true", help="put the rows into the table")
    asked.add_argument("--jobs", type=int, default=1, help="machines at a time; they do not notice each other")
    asked.add_argument("--bench", default=ROOT / "target/release/dirtylimit-bench", help="the harness, built before")
    asked.add_argument("words", nargs="*", metavar="WORD", help="machine, kernel or scenario; without any, all boots")
    asked = asked.parse_args()
    boots = [boot for boot in BOOTS if all(word in boot[:3] for word in asked.words)]
    if asked.list:
        print(*(f"{boot[0]:<7} {boot[1]:<7} {boot[2]:<12} {boot[3]} CPU" for boot in boots), sep="\n")
        return 0
    if not boots:
        sys.exit(f"lab-table: no boot has all of {asked.words}: see --list")
    print(HEAD)
    with ThreadPoolExecutor(asked.jobs) as pool:
        results = list(pool.map(lambda boot: run(asked.bench, boot), boots))
    table = TABLE.read_text().splitlines()[1:] if TABLE.exists() else []
    failed = not all(ended for _, ended in results)
    for boot, (rows, ended) in zip(boots, results):
        before = {case(row): row for row in table if of(boot, row)}
        now = {case(row): row for row in rows}
        for name in before | now:
            old, new = before.get(name), now.get(name)
            if old != new:
                print(f"lab-table: another row\n- {old or 'none'}\n+ {new or 'none'}", file=sys.stderr)
            failed |= not missed(new) <= missed(old)
        if asked.write and ended:
            table = [row for row in table if not of(boot, row)] + rows
    if asked.write:
        order = [boot[:3] for boot in BOOTS]
        table.sort(key=lambda row: order.index(tuple(row.split()[:3])))
        TABLE.write_text("\n".join([HEAD, *table]) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
