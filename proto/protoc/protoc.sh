#!/bin/sh
# protoc for the builds of dependencies that insist on one: a compiler in Rust, built beside what asks for it. With an
# environment of its own, because the outer build's flags, wrappers and target directory are not meant for it.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
built="${OUT_DIR:-${TMPDIR:-/tmp}}/tombolo-protoc"
set -- cargo run --quiet --locked --manifest-path "$here/Cargo.toml" --target-dir "$built" -- "$@"
for name in CARGO_HOME RUSTUP_HOME RUSTUP_TOOLCHAIN XDG_CACHE_HOME SSL_CERT_FILE CARGO_NET_OFFLINE HTTPS_PROXY https_proxy; do
    eval "value=\${$name:-}"
    [ -z "$value" ] || set -- "$name=$value" "$@"
done
exec env -i PATH="$PATH" HOME="${HOME:-/}" "$@"
