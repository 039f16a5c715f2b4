#!/usr/bin/env bash
# Checks the orderings that cross to the kernel by herd7, under the kernel's own memory model.
#
# Each loom-tests/litmus/NAME.litmus must be impossible (*Never*), and each line of NAME.mutants, a sed script with one
# ordering or one step changed, must make it possible (*Sometimes*). herd7 (Debian's herdtools7, of the unstable suite,
# with its C library) and tools/memory-model of Debian's linux-source are fetched by apt into ~/.cache/dirtylimit and
# unpacked there; nothing is installed. Where they are not to be had it is said that NOTHING was checked.
set -euo pipefail
cd "$(dirname "$0")/../loom-tests/litmus"

home=${XDG_CACHE_HOME:-$HOME/.cache}/dirtylimit/herd
lib=$home/usr/lib/x86_64-linux-gnu

fetch() {
    local new=$home.new site apt
    rm -rf "$new"
    mkdir -p "$new"/{lists,cache/archives}/partial "$new/packages"
    # Debian's archive as this machine reaches it.
    site=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -m1 -E '/debian$')
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $site sid main" >"$new/sources.list"
    apt=(-qq -o "Dir::Etc::SourceList=$new/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$new/lists"
        -o "Dir::Cache=$new/cache" -o APT::Sandbox::User=root)
    apt-get "${apt[@]}" update
    (cd "$new/packages" && apt-get "${apt[@]}" download herdtools7 libc6 libgmp10)
    for package in "$new"/packages/*.deb; do dpkg-deb -x "$package" "$new"; done
    (cd "$new/packages" && apt-get download -qq -o APT::Sandbox::User=root linux-source-6.1)
    dpkg-deb --fsys-tarfile "$new"/packages/linux-source-*.deb | tar -xO --wildcards '*.tar.xz' |
        tar -xJ -C "$new" --strip-components=2 --wildcards '*/tools/memory-model/*'
    rm -r "$new"/{lists,cache,packages}
    "$new/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" --library-path "$new/usr/lib/x86_64-linux-gnu" \
        "$new/usr/bin/herd7" -version >/dev/null
    rm -rf "$home"
    mv "$new" "$home"
}

# What herd7 says of the test on standard input: Never, Sometimes, Always.
verdict() {
    local test said
    test=$(mktemp --suffix=.litmus)
    cat >"$test"
    said=$(cd "$home/memory-model" && "$lib/ld-linux-x86-64.so.2" --library-path "$lib" "$home/usr/bin/herd7" \
        -set-libdir "$home/usr/share/herdtools7/herd" -conf linux-kernel.cfg "$test" 2>&1) || true
    rm "$test"
    awk '/^Observation/ { print $3; seen = 1 } END { exit !seen }' <<<"$said" || echo "no verdict: $said"
}

if [[ ! -e $home/memory-model/linux-kernel.cat ]] && ! (fetch); then
    echo "litmus: ############ herd7 cannot be had here (it takes Debian's archive), so NOTHING WAS CHECKED ############"
    exit 0
fi

failed=0 tests=0 mutants=0
expect() { # WHAT EXPECTED SAID
    [[ $3 == "$2" ]] || { echo "litmus: $1: $3, and must be $2" >&2; failed=1; }
}
for test in *.litmus; do
    name=${test%.litmus} mutants_before=$mutants
    expect "$name" Never "$(verdict <"$test")"
    tests=$((tests + 1))
    while read -r line; do
        if [[ $line == '#'* ]]; then what=${line#\# }; continue; fi
        expect "$name, where $what" Sometimes "$(sed -E "$line" "$test" | verdict)"
        mutants=$((mutants + 1))
    done <"$name.mutants"
    ((mutants > mutants_before)) || { echo "litmus: $name has no mutant" >&2; failed=1; }
done
echo "litmus: $tests tests and $mutants mutants of them, under the kernel's memory model"
((tests > 0 && failed == 0))
