#!/bin/sh
# Builds a binary that needs no library: deploy/package/static.sh prints where it is. Through musl where that target and
# its C compiler are installed, else through the C library's own static archive, which resolves names all the same.
. "$(dirname "$0")/version.sh"
machine=$(uname -m)
if rustup target list --installed 2>/dev/null | grep -qx "$machine-unknown-linux-musl" && command -v musl-gcc >/dev/null; then
    target=$machine-unknown-linux-musl
else
    target=$machine-unknown-linux-gnu
fi
cd "$root"
RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=$root=/tombolo --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo" \
    cargo build --release --locked --target "$target" --bin tombolo >&2
built=${CARGO_TARGET_DIR:-$root/target}/$target/release/tombolo
is_static "$built" || fail "$built is not static: the target $target gives no such binary here"
echo "$built"
