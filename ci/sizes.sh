#!/usr/bin/env bash
# Checks that no Rust file has more than 500 lines: split it into stages, or move its tests out.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "sizes: no Rust file over 500 lines"
git ls-files -z --cached --others --exclude-standard '*.rs' | xargs -0 wc -l |
    awk '$2 != "total" && $1 > 500 { print "sizes: " $2 " has " $1 " lines"; bad = 1 } END { exit bad }'
