#!/usr/bin/env bash
# The one test command: installs what the tests need, then formatting, lints, every test of the workspace and the
# scenarios through the real binaries. Tests that can't run here are listed as SKIPPED, by name and with a count.
set -euo pipefail
cd "$(dirname "$0")/.."
tests/setup.sh

step() { printf '\n== %s\n' "$*"; }
log="${TMPDIR:-/tmp}/tombolo-test.$$.log"
export TOMBOLO_SKIP_LIST="${TMPDIR:-/tmp}/tombolo-skipped.$$"
trap 'rm -f "$log" "$TOMBOLO_SKIP_LIST"' EXIT
: >"$TOMBOLO_SKIP_LIST"

step "formatting";  cargo fmt --all --check
step "lints";       cargo clippy --workspace --all-targets --quiet -- -D warnings
step "one TLS provider"
if cargo tree --workspace --edges normal --invert ring 2>/dev/null | grep -q .; then
    echo "ring is in the dependency graph: one TLS provider only (aws-lc-rs)"; exit 1
fi
step "binaries";    cargo build --workspace --bins
step "tests"
# One test at a time: scenarios measure stalls, and two cores are shared by a dozen processes each. One selection of
# packages for everything, or cargo builds the dependencies again with other features.
export RUST_TEST_THREADS=1
if ! cargo test --workspace --no-fail-fast 2>&1 | tee "$log"; then
    # Scenarios have deadlines, and a machine may stand still for a second: what failed gets one more chance, and is
    # named. What fails twice, or does not build, fails.
    again=$(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$log" | sort -u)
    [ -n "$again" ] || exit 1
    printf 'RETRIED %s\n' $again
    # shellcheck disable=SC2086
    cargo test --workspace --no-fail-fast -- --exact $again
fi

step "summary"
skipped=$(wc -l <"$TOMBOLO_SKIP_LIST")
cat "$TOMBOLO_SKIP_LIST"
awk -v skipped="$skipped" '/^test result:/ { passed += $4; failed += $6; ignored += $8 }
    END { printf "%d passed, %d failed, %d skipped\n", passed, failed, ignored + skipped }' "$log"
