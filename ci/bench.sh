#!/usr/bin/env bash
# Measures vublk on this host, beside qemu-storage-daemon, fio and bare loops. Installs what is
# missing, builds the release binaries, and hands its options to the benchmark: --help lists them.
# The file that is served is made in the target folder, fully written, unless --file names one.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=packages.sh
. "$(dirname "$0")/packages.sh"
cd "$root"

if [ "$(id -u)" = 0 ]; then
    install_qemu
    install_packages fio
    # Whatever else runs on this machine waits for the measurement.
    priority=(nice -n -20)
else
    echo "not root: what is not installed is left out, and other programs get their share" >&2
    priority=()
fi

cargo build --release -p vublk -p vublk-tests --bin vublk --bin bench
exec env VUBLK_BIN="$target/release/vublk" "${priority[@]}" "$target/release/bench" "$@"
