#!/usr/bin/env bash
# Plants every bug that cargo-mutants knows in the core, one after the other, and demands that a test sees it. By hand, not
# in CI: each of some 450 takes seconds. Arguments are cargo-mutants' own: mutants.sh --file core-nostd/src/ring.rs, or
# mutants.sh --shard 0/8.
#
# Who survives fails this, but for those that .cargo/mutants.toml explains. What was found is below target/mutants.out.
set -euo pipefail
cd "$(dirname "$0")/.."

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
PATH=$PATH:$target/tools/bin
if ! command -v cargo-mutants >/dev/null; then
    echo "mutants: installing cargo-mutants below target/"
    cargo install --quiet --locked --root "$target/tools" cargo-mutants
fi

# A copy of the tree, so that nobody edits or builds this one with a bug in it; its own target, so that what the tests
# depend on is built once. Fewer random cases than usual: a bug that only one case in hundreds sees is not well tested.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$copy"
cd "$copy"
CARGO_TARGET_DIR=$target/mutants PROPTEST_CASES=64 \
    cargo mutants --in-place -p dirtylimit-core "$@" --timeout 20 -o "$target" -- --lib --tests ||
    [[ $? -eq 3 ]] # a bug that makes a test run for ever is one that was seen
