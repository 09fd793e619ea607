#!/bin/sh
# Makes tombolo-VERSION-linux-ARCH.tar.gz: deploy/package/tarball.sh BINARY OUTPUT-DIRECTORY
#
# With the binary, its units and licence. A static binary (deploy/package/static.sh) runs on any distribution; one that is
# not says so in the name.
. "$(dirname "$0")/version.sh"
inputs "$@"
kind=""
is_static "$binary" || kind=-dynamic
name=tombolo-$version-linux-$arch$kind
tree=$work/tree/$name
install -Dm 0755 "$binary" "$tree/bin/tombolo"
for unit in "$root"/deploy/systemd/*.service; do install -Dm 0644 "$unit" "$tree/systemd/$(basename "$unit")"; done
install -m 0644 "$root/LICENSE" "$root/README.md" "$tree/"
archive "$work/tree" | gzip -9n >"$out/$name.tar.gz"
(cd "$out" && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256")
echo "$out/$name.tar.gz"
