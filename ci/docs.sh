#!/usr/bin/env bash
# Checks that rustdoc has no warning (broken links above all; the docs end up in target/doc), and that what
# docs/VERIFICATION.md and docs/GLOSSARY.md name is there.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "docs: the workspace, warnings denied"
RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps

# What docs/VERIFICATION.md names (`some_test`, `ci/some.sh`, `some/file.rs`) is there.
bad=0
for name in $(grep -oE '`[^` ]+`' docs/VERIFICATION.md | tr -d '`' | sort -u); do
    case $name in
        */*.*) [[ -e $name ]] ;;
        *_*_*) grep -rqE "fn $name\b" --include='*.rs' . --exclude-dir=target ;;
    esac || { echo "docs: docs/VERIFICATION.md names $name, which is not there" >&2; bad=1; }
done
# The fields that docs/GLOSSARY.md names are in the harness' JSON.
for name in $(grep -oE '`[a-z0-9]+(_[a-z0-9]+)+`' docs/GLOSSARY.md | tr -d '`' | grep -v '^dirtylimit_' | sort -u); do
    grep -rqE "pub $name: " benches/src || { echo "docs: docs/GLOSSARY.md names $name, which is no field" >&2; bad=1; }
done
exit "$bad"
