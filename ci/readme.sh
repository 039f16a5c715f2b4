#!/usr/bin/env bash
# Runs the README's commands, so that they cannot go stale: readme.sh [NAME]
#
# A command is the fenced block that follows a line "<!-- ci: NAME -->"; each line of it is run, from the checkout's root.
# With a NAME, that one; without, all but "test", which ci/tests.sh runs. "run" and "test" must be there.
set -euo pipefail
cd "$(dirname "$0")/.."

# Prints the block of one name.
block() {
    awk -v mark="<!-- ci: $1 -->" '
        $0 == mark { armed = 1; next }
        armed == 1 && /^```/ { armed = 2; next }
        armed == 1 && NF { exit }               # something else than a block follows
        armed == 2 && /^```/ { exit }
        armed == 2 { sub(/^\$ /, ""); print }
    ' README.md
}

run() {
    local commands
    commands=$(block "$1")
    if [[ -z ${commands//[[:space:]]/} ]]; then
        echo "readme: README.md has no command under <!-- ci: $1 -->" >&2
        exit 1
    fi
    printf 'readme: "%s":\n%s\n' "$1" "$commands"
    bash -euo pipefail -c "$commands"
}

if (($#)); then
    run "$1"
    exit
fi
mapfile -t names < <(sed -n 's/^<!-- ci: \(.*\) -->$/\1/p' README.md)
for needed in run test; do
    if [[ " ${names[*]} " != *" $needed "* ]]; then
        echo "readme: README.md has no <!-- ci: $needed -->" >&2
        exit 1
    fi
done
for name in "${names[@]}"; do
    [[ $name == test ]] || run "$name"
done
