#!/usr/bin/env bash
# The one test command: installs what the tests need, then formatting, lints, every test of the workspace and the
# scenarios through the real binaries. Tests that can't run here are listed as SKIPPED, by name and with a count.
set -euo pipefail
cd "$(dirname "$0")/.."
tests/setup.sh

step() { printf '\n== %s\n' "$*"; }
log="${TMPDIR:-/tmp}/tombolo-test.$$.log"
trap 'rm -f "$log"' EXIT

step "formatting";  cargo fmt --all --check
step "lints";       cargo clippy --workspace --all-targets --quiet -- -D warnings
step "one TLS provider"
if cargo tree --workspace --edges normal --invert ring 2>/dev/null | grep -q .; then
    echo "ring is in the dependency graph: one TLS provider only (aws-lc-rs)"; exit 1
fi
step "binaries";    cargo build --workspace --bins
step "tests"
# One scenario at a time: they measure stalls, and two cores are shared by a dozen processes each.
cargo test --workspace --exclude tombolo-tests --no-fail-fast 2>&1 | tee "$log"
cargo test -p tombolo-tests --no-fail-fast -- --test-threads=1 --nocapture 2>&1 | tee -a "$log"

step "summary"
skipped=$(grep -c '^SKIPPED ' "$log" || true)
grep '^SKIPPED ' "$log" || true
awk -v skipped="$skipped" '/^test result:/ { passed += $4; failed += $6; ignored += $8 }
    END { printf "%d passed, %d failed, %d skipped\n", passed, failed, ignored + skipped }' "$log"
