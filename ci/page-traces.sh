#!/usr/bin/env bash
# By hand: records again which pages two real programs write, for the migration simulator (core-nostd/tests/migrate/*.trace):
# SQLite on a database in memory, and GCC on a generated C file, under valgrind's lackey. Minutes; needs valgrind, sqlite3
# and gcc. Addresses are the run's own, so that a recording differs a little from the one before: bless the table after it.
# `ci/page-traces.sh sqlite` or `gcc` records one of them.
#
# A trace is a row of LEB128 numbers: pages, windows, and for each window of 250,000 instructions its runs of written
# pages, as their count and then (gap since the last run's end, length) each. Pages are numbered in the order of their
# addresses, those that are never written left out.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in valgrind sqlite3 gcc python3; do command -v "$tool" >/dev/null || { echo "page-traces: no $tool" >&2; exit 1; }; done
out=core-nostd/tests/migrate
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

only=${1:-}
record() { # NAME COMMAND…
    [[ -z $only || $only == "$1" ]] || return 0
    nice -n 5 valgrind --tool=lackey --trace-mem=yes --log-fd=9 "${@:2}" 9>&1 >/dev/null 2>/dev/null | awk '
        /^I/ { if (++instructions % 250000 == 0) { window++; split("", seen) } next }
        /^ [SM]/ { page = substr($2, 1, index($2, ",") - 4); if (!(page in seen)) { seen[page] = 1; print window + 0, page } }
    ' | python3 -c '
import sys
windows = {}
for line in sys.stdin:
    window, page = line.split()
    windows.setdefault(int(window), set()).add(int(page, 16))
number = {page: i for i, page in enumerate(sorted(set().union(*windows.values())))}
out = bytearray()
def put(value):
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
put(len(number))
put(max(windows) + 1)
for window in range(max(windows) + 1):
    runs, end = [], 0
    for page in sorted(number[page] for page in windows.get(window, ())):
        if runs and page == end:
            runs[-1][1] += 1
        else:
            runs.append([page - end, 1])
        end = page + 1
    put(len(runs))
    for gap, length in runs:
        put(gap)
        put(length)
open(sys.argv[1], "wb").write(out)
print(f"{sys.argv[1]}: {len(number)} pages, {max(windows) + 1} windows, {len(out)} bytes")
' "$out/$1.trace"
}

cat >"$work/load.sql" <<'SQL'
CREATE TABLE t(id INTEGER PRIMARY KEY, k INTEGER, v TEXT);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000)
INSERT INTO t SELECT i, (i * 7919) % 3001, hex(zeroblob(150)) FROM n;
CREATE INDEX by_k ON t(k);
UPDATE t SET v = hex(zeroblob(151)) WHERE k < 600;
SELECT count(*), sum(length(v)) FROM t WHERE k BETWEEN 300 AND 2200;
DELETE FROM t WHERE id % 5 = 0;
UPDATE t SET k = k + 1 WHERE id % 3 = 0;
SELECT k, count(*) FROM t GROUP BY k ORDER BY 2 DESC LIMIT 5;
SQL
record sqlite sqlite3 :memory: ".read $work/load.sql"

{
    echo 'int printf(const char *, ...);'
    for i in $(seq 2); do
        echo "static int f$i(int *a, int n) { int s = $i; for (int i = 0; i < n; i++) { s = s * 31 + a[i] % ($i + 1);" \
            "if (s & 1) a[i] ^= s; else switch (s & 7) { case 2: s += i; break; case 4: s -= a[n - 1 - i]; default: s >>= 1; } } return s; }"
    done
    echo 'int main(void) { int a[64] = {0}, s = 0;'
    for i in $(seq 2); do echo "s += f$i(a, 64);"; done
    echo 'printf("%d\n", s); return 0; }'
} >"$work/source.c"
record gcc "$(gcc -print-prog-name=cc1)" -quiet -O1 "$work/source.c" -o /dev/null
