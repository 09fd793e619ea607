#!/bin/sh
# Writes tombolo-VERSION.cdx.json, the bill of materials in CycloneDX 1.5: deploy/package/sbom.sh OUTPUT-DIRECTORY
#
# Of what is linked into the binary of this machine's target, by Cargo.lock; needs cargo and jq.
. "$(dirname "$0")/version.sh"
[ $# = 1 ] || fail "usage: sbom.sh OUTPUT-DIRECTORY"
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$root"
target=${TARGET:-$(rustc -vV | sed -n 's/^host: //p')}
# Metadata joins the features of everything that is ever built; what is linked says the tree.
linked=$(cargo tree -p tombolo-cli --edges normal --target "$target" --prefix none --format '{p}' --locked --offline |
    awk '{ sub(/^v/, "", $2); print $1 "@" $2 }' | sort -u)
cargo metadata --format-version 1 --locked --offline --filter-platform "$target" |
    jq -S --arg created "$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)" --arg linked "$linked" '
    def purl: "pkg:cargo/\(.name)@\(.version)";
    (.resolve.nodes | map({key: .id, value: .}) | from_entries) as $nodes
    | (.packages | map({key: .id, value: .}) | from_entries) as $packages
    | ($linked | split("\n") | map({key: ., value: true}) | from_entries) as $kept
    | def linked($id): [$nodes[$id].deps[] | select(any(.dep_kinds[]; .kind == null)) | .pkg
                        | select($packages[.] | $kept["\(.name)@\(.version)"])];
    ([.packages[] | select(.name == "tombolo-cli") | .id][0]) as $top
    | {seen: {}, next: [$top]}
    | until(.next == []; .next[0] as $id
        | if .seen[$id] then .next |= .[1:]
          else .seen[$id] = true | .next = .next[1:] + linked($id) end)
    | (.seen | keys) as $all
    | {
        bomFormat: "CycloneDX", specVersion: "1.5", version: 1,
        metadata: {
          timestamp: $created,
          component: {type: "application", name: "tombolo", version: $packages[$top].version, "bom-ref": ($packages[$top] | purl),
                      licenses: [{expression: $packages[$top].license}]}
        },
        components: [$all[] | select(. != $top) | $packages[.] | {
          type: "library", name, version, purl: purl, "bom-ref": purl,
          licenses: (if .license then [{expression: (.license | gsub("/"; " OR "))}] else [] end)
        }] | sort_by(.name, .version),
        dependencies: [$all[] | {ref: ($packages[.] | purl), dependsOn: ([linked(.)[] | $packages[.] | purl] | sort | unique)}] | sort_by(.ref)
      }' >"$out/tombolo-$version.cdx.json"
echo "$out/tombolo-$version.cdx.json"
