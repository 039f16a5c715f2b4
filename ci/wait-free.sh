#!/usr/bin/env bash
# Looks at the optimised machine code of the operations that the core documents as wait-free ("Wait-free: at most N
# instructions."), for three machines: no loop, no read-modify-write (no compare-exchange, no load-linked), no call but of
# the division that a 32-bit machine lacks, and no more instructions than documented: as each runs at most once, their
# number bounds the time. A call of another function of the core's with a bound counts as many. What breaks a rule on purpose
# (planted_* in the same file) must be caught.
set -euo pipefail
cd "$(dirname "$0")/.."

shopt -s globstar
# Each documented bound, as "function number".
bounds=$(awk '
    match($0, /Wait-free: at most [0-9]+ instructions/) { split(substr($0, RSTART, RLENGTH), words, " "); bound = words[4] }
    /^ +(pub )?fn / {
        name = $0
        sub(/.*fn /, "", name)
        sub(/[(<].*/, "", name)
        if (bound) print name, bound, $1
        bound = 0
    }
' core-nostd/src/**/*.rs)

check() { # TARGET FILE
    awk -v target="$1" -v bounds="$bounds" '
        function complain(what) { if (!fault[name]) fault[name] = what " (" $1 " " $2 ")" }
        # Depth first from a label; state 1 is on the way here, 2 done.
        function loops(label, to, i, n, cyclic) {
            state[label] = 1
            n = split(edges[label], to, " ")
            for (i = 1; i <= n && !cyclic; i++) cyclic = state[to[i]] == 1 || !state[to[i]] && loops(to[i])
            state[label] = 2
            return cyclic
        }
        BEGIN {
            for (n = split(bounds, words, /[ \n]/); n > 2; n -= 3) {
                symbol = "wait_free_" words[n - 2]
                documented[symbol] = words[n - 1]
                # What is private may be a part of its callers.
                if (words[n] == "pub") bound[symbol] = words[n - 1]
            }
        }
        # The name, as in the table, of a function of the core that has a bound.
        function bounded(symbol) {
            if (symbol !~ /^_ZN15dirtylimit_core.*17h[0-9a-f]+E:?$/) return ""
            sub(/17h[0-9a-f]+E:?$/, "", symbol)
            match(symbol, /[a-z_]+$/)
            symbol = "wait_free_" substr(symbol, RSTART)
            return symbol in documented ? symbol : ""
        }
        # Of a call: whether it is of one of those; not to be counted where that is all that the function is.
        function counts(symbol) {
            if ((symbol = bounded(symbol)) == "") return 0
            if (symbol != name) instructions[name] += documented[symbol]
            return 1
        }
        /^(wait_free|planted)_[a-z_]+:/ || bounded($1) != "" {
            name = start = label = $1
            sub(/:.*/, "", name)
            if (bounded(name) != "") name = bounded(name)
            if (!seen[name]++) names[++count] = name
            split("", edges)
            split("", state)
            falls = 1
            next
        }
        /^\.Lfunc_end/ && name { if (loops(start)) complain("loops"); name = "" }
        name == "" { next }
        /^\.L[A-Za-z0-9_]+:/ {
            sub(/:.*/, ":")
            if (falls) edges[label] = edges[label] " " $1
            label = $1
            falls = 1
            next
        }
        !/^\t[a-z]/ { next }
        { instructions[name]++ }
        $1 ~ /^(lock|xchg|cmpxchg|rep|ldrex|strex|ldaex|stlex|ldax|ldx|stx|stlx|cas|swp|ldadd|ldclr|ldeor|ldset)/ {
            complain("changes memory in one step, or tries to")
        }
        $1 ~ /^(call|bl$|blx|blr)/ {
            if ($2 == "__aeabi_uldivmod") divisions[name]++; else if (!counts($2)) complain("calls")
        }
        $1 ~ /^(j|b$|b\.|cbn?z|tbn?z|b(eq|ne|cs|hs|cc|lo|mi|pl|vs|vc|hi|ls|ge|lt|gt|le)(\.|$))/ {
            if ($NF ~ /^\.L/) edges[label] = edges[label] " " $NF ":"
            else if (!counts($NF)) complain("calls, and never returns here")
        }
        $1 ~ /^(br|tb[bh])$/ || $1 == "bx" && $2 != "lr" { complain("jumps to who knows where") }
        # pop {…, pc} returns, too.
        { falls = ($1 !~ /^(jmp|ret|b|b\.[nw]|bx)/ || $1 ~ /^b[a-z][a-z]/) && !/\{.*pc\}/ }
        END {
            for (i = 1; i <= count; i++) {
                name = names[i]
                if (name ~ /^planted/) {
                    planted++
                    fault[name] = fault[name] ? "" : "was to be caught and was not"
                } else {
                    if (!fault[name] && !(name in documented)) fault[name] = "has no bound in its docs"
                    if (!fault[name] && instructions[name] > documented[name]) fault[name] = "is over its documented bound"
                    line = line sprintf(", %s %d", substr(name, 11), instructions[name])
                    if (divisions[name]) line = line sprintf(" with %d divisions", divisions[name])
                    delete bound[name]
                }
                if (fault[name]) { printf "wait-free: %s: %s %s\n", target, name, fault[name]; bad = 1 }
            }
            for (name in bound) { printf "wait-free: %s: %s is not looked at\n", target, name; bad = 1 }
            if (!planted) { printf "wait-free: %s: found nothing planted: has the assembly changed?\n", target; bad = 1 }
            printf "wait-free: %s: instructions: %s; %d planted faults caught\n", target, substr(line, 3), planted
            exit bad
        }
    ' "$2"
}

# -Z options are nightly's. A jump by a table would hide where it goes.
export RUSTC_BOOTSTRAP=1
out=$(realpath -m "${CARGO_TARGET_DIR:-target}/firmware")
mkdir -p "$out"
for target in x86_64-unknown-none aarch64-unknown-none thumbv7em-none-eabi; do
    # In one build directory with no-panic.sh, which builds the same.
    ci/debian-cargo.sh rustc --quiet --locked --manifest-path core-nostd/firmware/Cargo.toml --target-dir "$out" \
        -Zbuild-std=core --target "$target" --release --lib -- -Zno-jump-tables --emit "asm=$out/$target.s"
    check "$target" "$out/$target.s"
done
