#!/usr/bin/env bash
# Measures vublk on this host, beside qemu-storage-daemon, fio and bare loops. Installs what is
# missing, builds the release binaries, and hands its options to the benchmark: --help lists them.
# The file that is served is made in the target folder, fully written, unless --file names one.
# Without options it takes about five minutes and writes target/bench/report.html and report.json;
# --bars says whether vublk is as fast as it has to be, --instructions counts what a request costs.
# VUBLK_BIN names another build to be measured.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=packages.sh
. "$(dirname "$0")/packages.sh"
cd "$root"

if [ "$(id -u)" = 0 ]; then
    install_qemu
    install_packages fio valgrind
    # Trace points count system calls; without them that column stays empty.
    [ -e /sys/kernel/tracing/events ] || mount -t tracefs nodev /sys/kernel/tracing || true
fi

if [ $# = 0 ]; then
    set -- --depths 1,8,32 --block-size 4K,64K --rounds 4 --seconds 0.4 --warm-up 0.1 \
        --json "$target/bench/report.json" --report "$target/bench/report.html"
fi

cargo build --release -p vublk -p vublk-tests --bin vublk --bin bench

# Two measurements at a time would be of each other.
exec 9>"${TMPDIR:-/tmp}/vublk-bench.lock"
flock --nonblock 9 || { echo "waiting for another benchmark on this machine" >&2; flock 9; }

# Whatever else runs on this machine waits for the measurement. Real-time priority does that, except
# for loops that never sleep; those are niced, and so is this session, for the kernel shares CPUs
# between sessions first.
priority=()
if chrt --rr 1 nice -n -20 true 2>/dev/null; then
    priority=(chrt --rr 1 nice -n -20)
    if session=$(sed 's/.* //' /proc/self/autogroup 2>/dev/null) \
        && echo -20 2>/dev/null >/proc/self/autogroup; then
        trap 'echo "$session" >/proc/self/autogroup' EXIT
    fi
else
    echo "no real-time priority: other programs get their share of the CPUs" >&2
fi

env VUBLK_BIN="${VUBLK_BIN:-$target/release/vublk}" "${priority[@]}" "$target/release/bench" "$@" 9>&-
