#!/usr/bin/env bash
# Runs everything that checks this project, or the stages that are named; --list names them all.
# Installs what is missing: packages of the distribution (as root) and cargo's own tools.
#
# Environment: VUBLK_FUZZ_SECONDS (60) for each fuzz target; VUBLK_PROPERTY_SECONDS (60) for each
# of the tests that throw dice; VUBLK_GUEST_ACCEL, VUBLK_GUEST_DAEMON
# and VUBLK_GUEST_DIR as tests/src/guest describes them.
set -uo pipefail
# shellcheck source-path=SCRIPTDIR source=packages.sh
. "$(dirname "$0")/packages.sh"
cd "$root" || exit 1
export PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin:/usr/sbin:/sbin"

stages=(fmt clippy deny doc test failpoints loom asan fuzz guest modes)
declare -A about=(
    [fmt]="rustfmt, and shellcheck over the scripts"
    [clippy]="clippy with warnings denied"
    [deny]="cargo-deny: bans, licenses, sources"
    [doc]="the documentation builds without a warning"
    [test]="unit, integration and documentation tests; the guest tests have a stage of their own"
    [failpoints]="the daemon killed between any two steps of a completion"
    [loom]="loom models of the rings' memory ordering"
    [asan]="the iterator's and the vrings' tests under AddressSanitizer"
    [fuzz]="every fuzz target, a minute each"
    [modes]="crashes and migrations once more with every way to wait, to pin and to do I/O"
    [guest]="real guests under QEMU, on the release binary"
)

logs=$target/ci/logs
host=$(rustc -vV | sed -n 's/^host: //p')
guest_folder=${VUBLK_GUEST_DIR:-$root/target/guest}
passed=0 failed=0 skipped=0
summary=()

# Stages that must run at least one test: a filter that matches nothing proves nothing.
readonly with_tests=" test failpoints loom asan fuzz guest modes "

# Ends a stage that has nothing to run, with the reason.
readonly skip_status=77
skip() {
    echo "skipped: $*"
    exit $skip_status
}

headline() {
    printf '\n=== %s: %s ===\n' "$1" "${about[$1]}"
}

# What the tests of a stage's log add up to, as "passed failed". Tests that a filter left out were
# not asked for and are not counted. nextest ends with
#   Summary [ 1.2s] 9 tests run: 7 passed (1 slow), 1 failed, 1 timed out, 3 skipped
# and libtest with
#   test result: ok. 7 passed; 1 failed; 0 ignored; 0 measured; 3 filtered out
count_tests() {
    awk '
        function number(word, text) {
            return match(text, "[0-9]+ " word) ? substr(text, RSTART) + 0 : 0
        }
        /^ *Summary \[.*\] .* tests? run: / {
            sub(/.* run: /, "")
            passed += number("passed", $0)
            failed += number("failed", $0) + number("timed out", $0) + number("exec failed", $0)
        }
        /^test result: / {
            passed += number("passed", $0)
            failed += number("failed", $0)
        }
        /^fuzz target [^ ]+: passed$/ { passed++ }
        /^fuzz target [^ ]+: failed$/ { failed++ }
        END { print passed + 0, failed + 0 }
    ' "$1"
}

# Runs a stage in a shell of its own, so that it may leave early and set what it likes. A stage that
# has no tests, or did not come to run them, counts as one.
run_stage() {
    local stage=$1 log=$logs/$1.log start=$SECONDS status good bad tests verdict=passed
    headline "$stage"
    ("stage_$stage") 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    if [ "$status" = $skip_status ]; then
        skipped=$((skipped + 1))
        summary+=("$(printf '%-7s %s' "$stage" "$(tail -n 1 "$log")")")
        return
    fi
    read -r good bad < <(count_tests "$log")
    tests="$good passed, $bad failed"
    if [ $((good + bad)) = 0 ]; then
        tests="no tests of its own"
        if [[ $with_tests == *" $stage "* ]]; then
            tests="no test was run"
            bad=1
        elif [ "$status" = 0 ]; then
            good=1
        fi
    fi
    [ "$status" != 0 ] && [ "$bad" = 0 ] && bad=1
    [ "$bad" = 0 ] || verdict=FAILED
    passed=$((passed + good)) failed=$((failed + bad))
    summary+=("$(printf '%-7s %-7s %5ss  %s' "$stage" "$verdict" $((SECONDS - start)) "$tests")")
}

has_nextest() {
    cargo nextest --version >/dev/null 2>&1
}

# Installs a tool of cargo's from source, unless it is there.
need_cargo_tool() {
    cargo "$1" --version >/dev/null 2>&1 && return
    echo "installing cargo-$1"
    cargo install --locked --quiet "cargo-$1"
}

stage_fmt() {
    install_packages shellcheck || return
    local status=0
    cargo fmt --all --check -- --config-path ci || status=1
    shellcheck --external-sources ci/*.sh .ci/run || status=1
    shellcheck --shell=sh tests/guest/init || status=1
    return $status
}

stage_clippy() {
    cargo clippy --workspace --all-targets --features vublk-tests/failpoints -- -D warnings
}

stage_deny() {
    need_cargo_tool deny || return
    cargo deny --workspace --config ci/deny.toml check bans licenses sources
}

stage_doc() {
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
}

stage_test() {
    # Some tests start the daemon itself: the debug binary, whose assertions are on.
    cargo build -p vublk || return
    local status=0
    export VUBLK_BIN=$target/debug/vublk
    export VUBLK_PROPERTY_SECONDS=${VUBLK_PROPERTY_SECONDS:-60}
    if has_nextest; then
        cargo nextest run --config-file ci/nextest.toml --workspace \
            -E 'not binary(/^guest_/)' || status=1
    else
        local file others=()
        for file in tests/tests/*.rs; do
            file=$(basename "$file" .rs)
            [[ $file == guest_* || $file == failpoint_* ]] || others+=(--test "$file")
        done
        cargo test --no-fail-fast --workspace --exclude vublk-tests --lib --bins --tests || status=1
        cargo test --no-fail-fast -p vublk-tests --lib --bins "${others[@]}" || status=1
    fi
    cargo test --no-fail-fast --workspace --doc || status=1
    return $status
}

# A daemon that the environment can kill at an exact step.
build_failpoints() {
    cargo build -p vublk --features failpoints --target-dir "$target/failpoints" || return
    export VUBLK_FAILPOINTS_BIN=$target/failpoints/debug/vublk
}

stage_failpoints() {
    build_failpoints || return
    if has_nextest; then
        cargo nextest run --config-file ci/nextest.toml -p vublk-tests --features failpoints \
            -E 'binary(/^failpoint_/)'
    else
        cargo test --no-fail-fast -p vublk-tests --features failpoints \
            --test failpoint_crash --test failpoint_order
    fi
}

stage_loom() {
    RUSTFLAGS="--cfg loom" cargo test --release --no-fail-fast -p vublk --lib \
        --target-dir "$target/loom" loom
}

stage_asan() {
    local status=0
    # Leaks are another tool's matter, and what a test process holds at its end is none.
    export RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address ASAN_OPTIONS=detect_leaks=0
    sanitized() {
        cargo test --no-fail-fast --target "$host" --target-dir "$target/asan" "$@"
    }
    sanitized -p iov-iter --lib --tests -- --skip compile_fail || status=1
    sanitized -p vublk --lib vring || status=1
    return $status
}

stage_fuzz() {
    [ -e tests/fuzz/Cargo.toml ] || skip "there are no fuzz targets in tests/fuzz"
    need_cargo_tool fuzz || return
    export RUSTC_BOOTSTRAP=1
    local seconds=${VUBLK_FUZZ_SECONDS:-60} targets name pids=() status=0
    cargo fuzz build --fuzz-dir tests/fuzz || return
    read -r -d '' -a targets < <(cargo fuzz list --fuzz-dir tests/fuzz)
    echo "for $seconds seconds: ${targets[*]}"
    # As many at a time as there are CPUs; the last to start are the last to be awaited.
    for name in "${targets[@]}"; do
        while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do
            wait -n || true
        done
        cargo fuzz run --fuzz-dir tests/fuzz "$name" -- -max_total_time="$seconds" \
            -rss_limit_mb=4096 >"$logs/fuzz-$name.log" 2>&1 &
        pids+=($!)
    done
    for name in "${!targets[@]}"; do
        if wait "${pids[$name]}"; then
            grep -E "^Done|cov: " "$logs/fuzz-${targets[$name]}.log" | tail -n 2
            echo "fuzz target ${targets[$name]}: passed"
        else
            tail -n 60 "$logs/fuzz-${targets[$name]}.log"
            echo "fuzz target ${targets[$name]}: failed"
            status=1
        fi
    done
    return $status
}

stage_guest() {
    ci/guest-images.sh || return
    # What a run that was killed left behind.
    find "$guest_folder/run" -mindepth 1 -maxdepth 1 -mmin +1440 -exec rm -rf {} + 2>/dev/null
    cargo build --release -p vublk || return
    build_failpoints || return
    local status=0
    export VUBLK_BIN=$target/release/vublk VUBLK_GUEST_DIR=$guest_folder
    if has_nextest; then
        cargo nextest run --config-file ci/nextest.toml -p vublk-tests \
            -E 'binary(/^guest_/)' || status=1
    else
        local file guests=()
        for file in tests/tests/guest_*.rs; do
            guests+=(--test "$(basename "$file" .rs)")
        done
        cargo test --no-fail-fast -p vublk-tests "${guests[@]}" -- --test-threads 2 || status=1
    fi
    return $status
}

stage_modes() {
    has_nextest || skip "cargo-nextest is not there, and it selects the tests"
    ci/guest-images.sh || return
    cargo build --release -p vublk || return
    build_failpoints || return
    local status=0 mode
    export VUBLK_BIN=$target/release/vublk VUBLK_GUEST_DIR=$guest_folder
    for mode in --poll=always --poll=never --pin=registered --engine=threads; do
        echo "--- $mode ---"
        VUBLK_DAEMON_ARGS=$mode cargo nextest run --config-file ci/nextest.toml -p vublk-tests \
            --features failpoints -E "binary(failpoint_crash)
                + binary(/^session_(crash|inflight|log)$/)
                + test(=ten_crashes_under_load_lose_nothing)
                + test(=a_chain_of_migrations_loses_nothing)" || status=1
    done
    return $status
}

usage() {
    echo "usage: ci/test.sh [--list | stage...]"
    local stage
    for stage in "${stages[@]}"; do
        printf '  %-7s %s\n' "$stage" "${about[$stage]}"
    done
}

chosen=()
for argument in "$@"; do
    case $argument in
    --list | --help)
        usage
        exit 0
        ;;
    *)
        if [ -z "${about[$argument]:-}" ]; then
            usage >&2
            exit 2
        fi
        chosen+=("$argument")
        ;;
    esac
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${stages[@]}")

mkdir -p "$logs"
for stage in "${chosen[@]}"; do
    run_stage "$stage"
done

printf '\n=== summary: logs in %s ===\n' "$logs"
printf '%s\n' "${summary[@]}"
for stage in "${stages[@]}"; do
    [[ " ${chosen[*]} " == *" $stage "* ]] || printf '%-7s not chosen\n' "$stage"
done
echo "a stage without tests of its own counts as one; guest tests run in the stage guest alone"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
