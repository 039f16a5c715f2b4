#!/usr/bin/env bash
# Checks the core's two rules about atomics, outside its tests:
# - nobody but sync.rs names an atomic crate or module, so that loom's can take their place;
# - every line with a memory ordering has a comment, on it or within the three lines above, that says whom it pairs with
#   ("pairs with …") or why it needs not ("Relaxed: …").
set -euo pipefail
cd "$(dirname "$0")/.."

shopt -s globstar
files=()
for file in core-nostd/src/**/*.rs; do
    [[ $file == */sync.rs || $file == */tests.rs || $file == */tests/* ]] || files+=("$file")
done
((${#files[@]})) || { echo "atomics: core-nostd/src has no source to check" >&2; exit 1; }

echo "atomics: ${#files[@]} files of core-nostd/src"
awk '
    function complain(what) { printf "atomics: %s:%d: %s\n  %s\n", FILENAME, FNR, what, $0; bad = 1 }
    FNR == 1 { in_tests = 0; pending = 0; said = -3 }
    pending && /^mod tests/ { in_tests = 1 }    # a test module is the last thing in its file
    { pending = /^#\[cfg\(test\)\]$/ }
    in_tests { next }
    /\/\/.*([Pp]airs with|Relaxed: )/ { said = FNR }
    {
        code = $0
        sub(/\/\/.*/, "", code)
    }
    code ~ /(^|[^A-Za-z0-9_])((core|std)::sync([^A-Za-z0-9_]|$)|(atomic|spin|loom)::)/ {
        complain("names an atomic or a lock; take it from crate::sync")
    }
    code ~ /Ordering::(Relaxed|Acquire|Release|AcqRel|SeqCst|[{*])/ {
        operations++
        if (FNR - said > 3) complain("an ordering without a comment (\"pairs with\" or \"Relaxed:\")")
    }
    END {
        if (!operations) { print "atomics: found no atomic operation at all: has the spelling changed?"; bad = 1 }
        printf "atomics: %d lines with an ordering\n", operations
        exit bad
    }
' "${files[@]}"
