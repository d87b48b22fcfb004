#!/usr/bin/env bash
# fio inside a guest: the same guest on vublk and on qemu-storage-daemon, on the same file, in turn;
# prints a table of medians. Options go to tests/src/bin/guest-fio.rs, for example
#
#   ci/guest-fio.sh --rounds 5 --seconds 5 --queues 1 --direct on
#
# Under TCG the guest's own CPU time dominates; VUBLK_GUEST_ACCEL=kvm gives figures that mean more.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=packages.sh
. "$(dirname "$0")/packages.sh"
cd "$root"

export VUBLK_GUEST_DIR=${VUBLK_GUEST_DIR:-$root/target/guest}
ci/guest-images.sh
cargo build --release --quiet -p vublk -p vublk-tests --bin vublk --bin guest-fio
exec env VUBLK_BIN="$target/release/vublk" "$target/release/guest-fio" "$@"
