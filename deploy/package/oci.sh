#!/bin/sh
# Makes an OCI image layout FROM scratch: deploy/package/oci.sh STATIC-BINARY OUTPUT-DIRECTORY
#
# OUTPUT-DIRECTORY/tombolo-VERSION-ARCH.oci has oci-layout, index.json and the blobs by digest (OCI image layout 1.0.0);
# `skopeo copy oci:DIR docker://...` pushes it. One layer: the binary, an empty /tmp, and a user 65532 to run as.
. "$(dirname "$0")/version.sh"
inputs "$@"
is_static "$binary" || fail "$binary needs an interpreter, and in an empty image there is none: build it with deploy/package/static.sh"

layer=$work/layer
install -Dm 0755 "$binary" "$layer/usr/bin/tombolo"
mkdir -m 1777 "$layer/tmp"
mkdir -p "$layer/etc"
echo 'tombolo:x:65532:65532:tombolo:/nonexistent:/sbin/nologin' >"$layer/etc/passwd"
echo 'tombolo:x:65532:' >"$layer/etc/group"
archive "$layer" >"$work/layer.tar"
gzip -9n <"$work/layer.tar" >"$work/layer.tar.gz"

image=$out/tombolo-$version-$arch.oci
rm -rf "$image"
mkdir -p "$image/blobs/sha256"
digest() { sha256sum "$1" | cut -d' ' -f1; }
size() { stat -c %s "$1"; }
# blob FILE: stores it, and prints its digest.
blob() { d=$(digest "$1"); cp "$1" "$image/blobs/sha256/$d"; chmod 0644 "$image/blobs/sha256/$d"; echo "$d"; }

created=$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)
printf '%s' "{\"architecture\":\"$arch\",\"os\":\"linux\",\"created\":\"$created\",\"config\":{\"User\":\"65532:65532\",\"Env\":[\"PATH=/usr/bin\"],\"Entrypoint\":[\"/usr/bin/tombolo\"],\"Cmd\":[\"--help\"],\"WorkingDir\":\"/\",\"StopSignal\":\"SIGTERM\",\"Labels\":{\"org.opencontainers.image.title\":\"tombolo\",\"org.opencontainers.image.version\":\"$version\",\"org.opencontainers.image.licenses\":\"Apache-2.0\"}},\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[\"sha256:$(digest "$work/layer.tar")\"]},\"history\":[{\"created\":\"$created\",\"created_by\":\"deploy/package/oci.sh\"}]}" >"$work/config"
layer_digest=$(blob "$work/layer.tar.gz")
config_digest=$(blob "$work/config")
printf '%s' "{\"schemaVersion\":2,\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\"config\":{\"mediaType\":\"application/vnd.oci.image.config.v1+json\",\"digest\":\"sha256:$config_digest\",\"size\":$(size "$work/config")},\"layers\":[{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar+gzip\",\"digest\":\"sha256:$layer_digest\",\"size\":$(size "$work/layer.tar.gz")}]}" >"$work/manifest"
manifest_digest=$(blob "$work/manifest")
printf '%s' '{"imageLayoutVersion":"1.0.0"}' >"$image/oci-layout"
printf '%s' "{\"schemaVersion\":2,\"mediaType\":\"application/vnd.oci.image.index.v1+json\",\"manifests\":[{\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\"digest\":\"sha256:$manifest_digest\",\"size\":$(size "$work/manifest"),\"platform\":{\"architecture\":\"$arch\",\"os\":\"linux\"},\"annotations\":{\"org.opencontainers.image.ref.name\":\"$version\"}}]}" >"$image/index.json"
echo "$image sha256:$manifest_digest"
