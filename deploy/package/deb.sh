#!/bin/sh
# Makes tombolo_VERSION_ARCH.deb: deploy/package/deb.sh target/release/tombolo OUTPUT-DIRECTORY
#
# The units come disabled: `tombolo vm join`, or the operator, enables what the machine is to run. An upgrade restarts
# nothing; /etc/default/tombolo is kept when changed; purge removes settings and state.
. "$(dirname "$0")/version.sh"
inputs "$@"
tree=$work/tree
install -Dm 0755 "$binary" "$tree/usr/bin/tombolo"
for unit in "$root"/deploy/systemd/*.service; do
    install -Dm 0644 "$unit" "$tree/usr/lib/systemd/system/$(basename "$unit")"
done
install -Dm 0644 "$here/debian/default" "$tree/etc/default/tombolo"
install -dm 0755 "$tree/etc/tombolo"
install -Dm 0644 "$root/LICENSE" "$tree/usr/share/doc/tombolo/copyright"
gzip -9n <"$root/CHANGELOG.md" >"$work/changelog.gz"
install -Dm 0644 "$work/changelog.gz" "$tree/usr/share/doc/tombolo/changelog.gz"

# What the binary needs of the C library, by the newest symbol version that it names; a static one needs nothing.
depends=""
if ! is_static "$binary"; then
    glibc=$(readelf -VW "$binary" | grep -o 'GLIBC_[0-9.]*' | sed 's/GLIBC_//' | sort -uV | tail -n 1)
    depends="libc6 (>= $glibc), libgcc-s1"
fi
control=$tree/DEBIAN
mkdir "$control"
size=$(du -sk --apparent-size --exclude=DEBIAN "$tree" | cut -f1)
{
    echo "Package: tombolo"
    # Versions before the release of the same number sort before it.
    echo "Version: ${DEB_VERSION:-$(echo "$version" | sed 's/-/~/')}"
    echo "Architecture: $arch"
    echo "Maintainer: Tombolo developers <tombolo@example.invalid>"
    echo "Installed-Size: $size"
    [ -z "$depends" ] || echo "Depends: $depends"
    echo "Recommends: nftables, iproute2"
    echo "Section: net"
    echo "Priority: optional"
    echo "Description: federated service mesh of Kubernetes clusters and machines"
    echo " One binary for every role: sidecar, gateway, federator, and the operator's commands."
    echo " \`tombolo vm join\` makes this machine a member of a cluster."
} >"$control/control"
echo /etc/default/tombolo >"$control/conffiles"
for script in postinst prerm postrm; do install -m 0755 "$here/debian/$script" "$control/$script"; done
(cd "$tree" && find etc usr -type f | sort | xargs md5sum) >"$control/md5sums"
find "$tree" -exec touch -hd "@$SOURCE_DATE_EPOCH" {} +
package=$out/tombolo_${DEB_VERSION:-$version}_$arch.deb
# One thread, because more cut the stream elsewhere. DEB_COMPRESS="-Zgzip -z1" is for tests, which have no time.
# shellcheck disable=SC2086
dpkg-deb --root-owner-group --threads-max=1 ${DEB_COMPRESS:--Zxz -z6} --build "$tree" "$package" >/dev/null
echo "$package"
