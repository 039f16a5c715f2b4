#!/usr/bin/env bash
# Prints the public functions of Rust files, tests and trait implementations left out, as Type::function or function.
set -euo pipefail
awk '
    FNR == 1 { tests = 0 }
    /^#\[cfg\(test\)\]$/ { tests = 1 }
    tests { next }
    /^impl/ {
        type = $0
        sub(/ *\{$/, "", type)
        sub(/<[^<>]*>$/, "", type)
        sub(/.* /, "", type)
        trait = $0 ~ / for /
    }
    /^pub (const )?fn / || /^ +pub (const )?fn / && !trait {
        name = $0
        sub(/.*fn /, "", name)
        sub(/[(<].*/, "", name)
        print (/^ / ? type "::" : "") name
    }
' "$@"
