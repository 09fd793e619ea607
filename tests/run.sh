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
: >"$TOMBOLO_SKIP_LIST" >"$log"

step "formatting";  cargo fmt --all --check
step "lints";       cargo clippy --workspace --all-targets --quiet -- -D warnings
step "one TLS provider"
if cargo tree --workspace --edges normal --invert ring 2>/dev/null | grep -q .; then
    echo "ring is in the dependency graph: one TLS provider only (aws-lc-rs)"; exit 1
fi
step "binaries";    cargo build --workspace --bins
step "tests"
# One selection of packages for everything, or cargo builds the dependencies again with other features.
cargo test --workspace --no-run --quiet
export RUST_TEST_THREADS=1
# Those that measure stalls, or what is left of the machine under a flood, have it for themselves. The others wait more than they
# work and go two at a time; one binary's tests always follow one another.
alone="congestion_quinn wire testbed kube_connectivity kube_upgrade mesh_failures mesh_rotation mesh_revocation mesh_hostile_gateway mesh_bad_luck mesh_bad_packets mesh_udp"
targets=$(for file in ./*/tests/*.rs crates/*/tests/*.rs tests/*/tests/*.rs {.,crates,tests}/*/tests/*/main.rs; do
    [ ! -e "$file" ] || echo "$file"
done | sed -E 's#/main\.rs$##; s#.*/##; s#\.rs$##' | sort -u)
two=() one=() last=()
for target in $targets; do
    case " $alone " in
        *" $target "*) last+=(--test "$target") ;;
        *) if [ ${#one[@]} -gt ${#two[@]} ]; then two+=(--test "$target"); else one+=(--test "$target"); fi ;;
    esac
done
lane() {
    local name=$1; shift
    cargo test --workspace --no-fail-fast "$@" 2>&1 | sed -u "s/^/$name| /" | tee -a "$log"
}
failed=""
lane 1 "${one[@]}" & first=$!
lane 2 --lib --bins "${two[@]}" & second=$!
wait $first || failed=yes
wait $second || failed=yes
lane 3 "${last[@]}" || failed=yes
lane 3 --doc || failed=yes
if [ -n "$failed" ]; then
    # Scenarios have deadlines, and a machine may stand still for a second: what failed gets one more chance, and is
    # named. What fails twice, or is ended by a signal, fails.
    ! grep -q '(signal: ' "$log" || exit 1
    again=$(sed -n 's/^.| test \(.*\) \.\.\. FAILED$/\1/p' "$log" | sort -u)
    [ -n "$again" ] || exit 1
    printf 'RETRIED %s\n' $again
    # shellcheck disable=SC2086
    cargo test --workspace --no-fail-fast -- --exact $again
fi

step "summary"
skipped=$(wc -l <"$TOMBOLO_SKIP_LIST")
cat "$TOMBOLO_SKIP_LIST"
awk -v skipped="$skipped" '/^.\| test result:/ { passed += $5; failed += $7; ignored += $9 }
    END { printf "%d passed, %d failed, %d skipped\n", passed, failed, ignored + skipped }' "$log"
