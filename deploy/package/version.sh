# Sourced by the others: where things are, what this build is called, and how archives are made so that the same inputs
# give the same bytes. SOURCE_DATE_EPOCH is the time in every archive; unless given it is that of the last commit.
set -eu
export LC_ALL=C TZ=UTC
umask 022
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$root/Cargo.toml")
[ -n "$version" ] || { echo "no version in $root/Cargo.toml" >&2; exit 1; }
if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
    SOURCE_DATE_EPOCH=$(git -C "$root" log -1 --format=%ct 2>/dev/null) ||
        { echo "no git history here: give SOURCE_DATE_EPOCH, in seconds since 1970" >&2; exit 1; }
fi
export SOURCE_DATE_EPOCH

fail() { echo "$(basename "$0"): $*" >&2; exit 1; }

# usage BINARY OUT: both must be there.
inputs() {
    [ $# = 2 ] || fail "usage: $(basename "$0") BINARY OUTPUT-DIRECTORY"
    binary=$1 out=$2
    [ -f "$binary" ] || fail "$binary: no such file; build it with: cargo build --release"
    [ "$(head -c 4 "$binary" | od -An -tx1 | tr -d ' ')" = 7f454c46 ] || fail "$binary is no ELF program"
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    case $(od -An -tu2 -j18 -N2 "$binary" | tr -d ' ') in
        62) arch=amd64 ;;
        183) arch=arm64 ;;
        *) fail "$binary is for a machine that no package is made for: amd64 or arm64" ;;
    esac
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
}

# Needs no interpreter, so it runs where there is no library at all.
is_static() { ! readelf -lW "$1" | grep -q INTERP; }

# archive DIRECTORY: its contents as a tar on standard output, owned by root, in the order of their names.
archive() {
    tar -C "$1" --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --format=ustar -cf - .
}
