#!/usr/bin/env bash
# Counts the instructions of the hot paths (core-nostd/benches/instructions.rs) by callgrind, and compares them exactly with
# core-nostd/benches/callgrind.txt, which has a table for each toolchain: no timing, so no noise. A few seconds after the build.
#
# UPDATE=1 ci/callgrind.sh writes this toolchain's table anew: after a change that is meant to cost something, or to save.
# A toolchain without a table, or a machine that cannot have valgrind, compares nothing, and says so, loudly.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."

table=core-nostd/benches/callgrind.txt
not_compared() {
    echo "callgrind: ############ $1, so NOTHING WAS COMPARED ############"
    exit 0
}
if ! command -v valgrind >/dev/null; then
    echo "callgrind: installing valgrind"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends valgrind ||
        not_compared "valgrind cannot be installed"
fi

# Nothing of the environment goes into the code, nor how many units it happens to be split into.
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
build=(cargo bench --locked --quiet -p dirtylimit-core --bench instructions --no-run --message-format=json
    --config 'profile.bench.codegen-units=1' --target-dir "$target/callgrind")
binary=$("${build[@]}" | sed -n 's/.*"name":"instructions".*"executable":"\([^"]*\)".*/\1/p')
[[ -x $binary ]] || { echo "callgrind: the build made no binary" >&2; exit 1; }

out=$(mktemp)
trap 'rm -f "$out" "$out.log"' EXIT
count() {
    # An empty environment, as its size moves the stack.
    env -i valgrind --tool=callgrind --callgrind-out-file="$out" --toggle-collect='instructions::counted*' \
        "$binary" "$1" >"$out.log" 2>&1 || { cat "$out.log" >&2; exit 1; }
    awk '/^(summary|totals):/ { sum = $2 } END { print sum + 0 }' "$out"
}

toolchain=$(rustc -vV | awk '/^release:/ { release = $2 } /^host:/ { host = $2 } END { print release, host }')
cases=$(sed -n 's/^ *"\([a-z0-9-]*[a-z0-9]\)" => .*/\1/p' core-nostd/benches/instructions.rs)
lines=$(
    for case in $cases; do
        instructions=$(count "$case")
        ((instructions > 0)) || { echo "callgrind: $case: nothing was counted" >&2; exit 1; }
        printf '%s  %-16s %8d\n' "$toolchain" "$case" "$instructions"
    done
)

if [[ ${UPDATE:-} == 1 ]]; then
    { grep -vF "$toolchain  " "$table" 2>/dev/null || true; echo "$lines"; } >"$out"
    cat "$out" >"$table"
    echo "callgrind: $table has the figures of Rust $toolchain now:"
    echo "$lines"
    exit 0
fi
expected=$(grep -F "$toolchain  " "$table" || true)
if [[ -z $expected ]]; then
    printf '%s\n' "$lines"
    not_compared "$table has no figures of Rust $toolchain (those above; UPDATE=1 adds them)"
fi
if ! diff <(echo "$expected") <(echo "$lines"); then
    echo "callgrind: > is not as < in $table; if that is meant to be: UPDATE=1 ci/callgrind.sh" >&2
    exit 1
fi
echo "callgrind: $(wc -l <<<"$lines") counts are those of $table, for Rust $toolchain"
