#!/usr/bin/env bash
# Makes a page of a simulated run and opens it in headless Chromium, without a network: report.sh [DIR]
#
# Every picture must be there and no wider than its screen, nothing be fetched, nothing be said on the console. DIR
# (target/report unless told) gets the page, and screenshots of it: light and dark, 400 and 1280 pixels wide. A machine
# that cannot have Chromium skips the browser, loudly.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-${CARGO_TARGET_DIR:-target}/report}
mkdir -p "$out"
out=$(realpath "$out")
cargo run --quiet -p dirtylimit-bench -- run --guest sim --vcpus 2 --limit 100MiB/s,50MiB/s --seconds 3 \
    --report "$out" --svg "$out/run.svg" >/dev/null 2>&1

if ! command -v chromium >/dev/null && [[ $EUID -eq 0 ]]; then
    echo "report: installing chromium"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null || true
fi
if ! command -v chromium >/dev/null; then
    echo "report: ############ SKIPPED: no chromium, so NO PAGE WAS OPENED ############"
    exit 0
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Opens a page in a new, empty profile; what the page says on the console goes to $scratch/log.
browse() {
    rm -rf "$scratch/profile"
    timeout -k 5 120 chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars \
        --disable-background-networking --disable-component-update --disable-sync --host-resolver-rules='MAP * ~NOTFOUND' \
        --allow-file-access-from-files --enable-logging=stderr --user-data-dir="$scratch/profile" "$@" 2>"$scratch/log"
}

# A frame is as narrow as a telephone; a window of Chromium's is not. It tells what the reader would see.
frame() {
    cat <<HTML
<!doctype html><meta charset="utf-8"><style>body{margin:0}iframe{border:0;width:$1px;height:$2px}</style>
<iframe src="file://$out/index.html"></iframe><pre hidden></pre>
<script>addEventListener("load", () => {
    const page = frames[0].document, root = page.documentElement;
    const seen = [...page.querySelectorAll("svg")].filter((svg) => svg.getBoundingClientRect().width > 0);
    document.querySelector("pre").textContent = [
        "pictures " + seen.length,
        "unnamed " + seen.filter((svg) => !svg.getAttribute("aria-label")).length,
        "wide " + (root.scrollWidth > root.clientWidth),
        "fetched " + frames[0].performance.getEntriesByType("resource").filter((r) => !r.name.startsWith("data:")).length,
        "paper " + frames[0].getComputedStyle(page.body).backgroundColor,
    ].join(", ");
})</script>
HTML
}

failed=0
for width in 400 1280; do
    for scheme in light dark; do
        # Chromium's own numbering.
        case $scheme in light) number=1 paper='rgb(255, 255, 255)' ;; dark) number=0 paper='rgb(13, 17, 23)' ;; esac
        frame "$width" 2300 >"$scratch/frame.html"
        told=$(browse --blink-settings=preferredColorScheme=$number --window-size=1280,2300 \
            --screenshot="$out/$width-$scheme.png" --dump-dom "file://$scratch/frame.html" |
            sed -n 's/.*<pre hidden="">\(.*\)<\/pre>.*/\1/p')
        expected="pictures 3, unnamed 0, wide false, fetched 0, paper $paper"
        if [[ $told != "$expected" ]] || grep -F CONSOLE "$scratch/log"; then
            echo "report: $width pixels, $scheme: ${told:-nothing seen}; expected $expected" >&2
            failed=1
        fi
    done
done
((failed)) || echo "report: looked at $out/index.html; screenshots beside it"
exit "$failed"
