#!/bin/sh
# Builds a binary that needs no library: deploy/package/static.sh prints where it is, and on standard error what it is:
# with musl where that target (`rustup target add`) and its C compiler (Debian: musl-tools) are installed, else with glibc's
# static archive. Both resolve names by /etc/hosts and /etc/resolv.conf. The one with glibc does so only where glibc's own
# configuration asks for nothing else; take musl for images.
. "$(dirname "$0")/version.sh"
machine=$(uname -m)
if rustup target list --installed 2>/dev/null | grep -qx "$machine-unknown-linux-musl" && command -v musl-gcc >/dev/null; then
    target=$machine-unknown-linux-musl libc=musl
else
    target=$machine-unknown-linux-gnu libc=glibc
fi
cd "$root"
RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=$root=/tombolo --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo" \
    cargo build --release --locked --target "$target" --bin tombolo >&2
built=${CARGO_TARGET_DIR:-$root/target}/$target/release/tombolo
is_static "$built" || fail "$built is not static: the target $target gives no such binary here"
# What only a debugger reads is four fifths of it.
strip --strip-debug "$built"
echo "static, with $libc, for $target: $(stat -c %s "$built") bytes" >&2
echo "$built"
