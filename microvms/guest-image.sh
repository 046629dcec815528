#!/usr/bin/env bash
# Makes the default guest image: OUT_DIR/default/{vmlinux,initramfs,manifest.json}.
#
#   vmlinux        Debian's cloud kernel, from the newest linux-image-cloud-amd64 that apt knows, unpacked: QEMU and Cloud
#                  Hypervisor enter it directly (PVH). Measured under TCG: 0.26 s of 2.5 s less than the bzImage, which
#                  unpacks itself in the guest. The price: no KASLR in the guest.
#   initramfs      the static guest agent as /init, busybox with its applets, the kernel modules that a VM needs. Not
#                  compressed: 5 MB are sooner copied than unpacked.
#   manifest.json  what is in it, how to boot it, and the files' digests
#
# Needs no root. Downloads and intermediate results are kept in target/guest-image/, so a second run with unchanged
# inputs does nothing. The same inputs give the same bytes, but for the time in the manifest.
#
# usage: microvms/guest-image.sh OUT_DIR
#   GUEST_AGENT=PATH   take this static agent instead of building it
#   KERNEL_PACKAGE=    take this package instead of the newest (linux-image-6.1.0-56-cloud-amd64)
set -euo pipefail
export LC_ALL=C

if [ $# -ne 1 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "$0"
    exit 2
fi
mkdir -p "$1"
out=$(realpath "$1")/default
root=$(realpath "$(dirname "$0")/..")
cache=$root/target/guest-image
target=x86_64-unknown-linux-gnu

# The modules that serving takes, in the order of their dependencies; the rest are inserted once the agent serves.
modules_first='drivers/virtio/virtio_ring drivers/virtio/virtio_pci_modern_dev drivers/virtio/virtio_pci_legacy_dev
    drivers/virtio/virtio drivers/virtio/virtio_pci net/vmw_vsock/vsock
    net/vmw_vsock/vmw_vsock_virtio_transport_common net/vmw_vsock/vmw_vsock_virtio_transport'
modules_later='drivers/virtio/virtio_mmio net/core/failover drivers/net/net_failover drivers/net/virtio_net
    drivers/char/virtio_console drivers/block/virtio_blk drivers/misc/pvpanic/pvpanic drivers/misc/pvpanic/pvpanic-pci'
# Inserted only when there is a root disk or a volume. (ext4 is built into the kernel.)
modules_root='lib/libcrc32c fs/erofs/erofs fs/overlayfs/overlay'

# What a hypervisor should pass the kernel; it may append.
#   console=ttyS0 quiet loglevel=1   the console shows a panic and the agent's own words, and nothing else
#   panic=-1 reboot=t                a panic ends the VM at once (by QEMU's -no-reboot, by Cloud Hypervisor's event) instead of
#                                    hanging it
#   cryptomgr.notests                no self-tests of the kernel's ciphers: 0.3 s under TCG
# Measured and left out, for they changed nothing: mitigations=off, no_timer_check, tsc=reliable, lpj=, a compressed
# initramfs, initcall_blacklist=, QEMU's qboot.rom.
cmdline='console=ttyS0 quiet loglevel=1 panic=-1 reboot=t cryptomgr.notests'

die() {
    echo "guest-image: $*" >&2
    exit 1
}

need() { # COMMAND PACKAGE
    command -v "$1" > /dev/null || missing+=" $2"
}

check_tools() {
    missing=
    need apt-get apt
    need dpkg-deb dpkg
    need cpio cpio
    need lz4 lz4
    need zstd zstd
    [ "$(dpkg --print-architecture)" = amd64 ] || die "only amd64 has a kernel package and a driver so far"
    busybox=$(command -v busybox || true)
    # The dynamic busybox would find no libraries in the guest.
    if [ -z "$busybox" ] || [[ $(ldd "$busybox" 2>&1 || true) != *'not a dynamic'* ]]; then
        missing+=' busybox-static'
    fi
    [ -n "${GUEST_AGENT:-}" ] || command -v cargo > /dev/null || die "cargo is missing: install Rust from https://rustup.rs"
    [ -z "$missing" ] || die "missing tools. Install them with:  sudo apt-get install -y$missing"
}

# Prints the path of the kernel's .deb, downloading it if the cache has none of that version.
fetch_kernel() {
    local package=${KERNEL_PACKAGE:-} version file
    if [ -z "$package" ]; then
        package=$(apt-cache depends linux-image-cloud-amd64 2> /dev/null | awk '/Depends: linux-image-/ {print $2; exit}')
    fi
    if [ -z "$package" ]; then
        # No package lists (a fresh container) or no network: what was downloaded before does as well.
        file=$(find "$cache" -maxdepth 1 -name 'linux-image-*.deb' | sort -V | tail -1)
        [ -n "$file" ] || die "apt knows no linux-image-cloud-amd64. Update its lists with:  sudo apt-get update"
        echo "$file"
        return
    fi
    version=$(apt-cache show --no-all-versions "$package" | awk '/^Version:/ {print $2; exit}')
    file=$cache/${package}_${version//:/%3a}_amd64.deb
    if [ ! -s "$file" ]; then
        echo "guest-image: downloading $package $version" >&2
        (cd "$cache/tmp" && apt-get download "$package=$version" > apt.log 2>&1) || {
            cat "$cache/tmp/apt.log" >&2
            die "cannot download $package. Perhaps apt's lists are old:  sudo apt-get update"
        }
        mv "$cache/tmp/$(basename "$file")" "$file"
    fi
    echo "$file"
}

# Prints the path of the static agent.
build_agent() {
    if [ -n "${GUEST_AGENT:-}" ]; then
        realpath "$GUEST_AGENT"
        return
    fi
    # With --target, RUSTFLAGS does not reach build scripts and procedural macros, which can't be static.
    (cd "$root" && RUSTFLAGS='-C target-feature=+crt-static' \
        cargo build --locked --profile guest --target $target -p blixard-guest-agent --bin blixard-guest-agent >&2)
    echo "${CARGO_TARGET_DIR:-$root/target}/$target/guest/blixard-guest-agent"
}

# Lays out the guest's root directory in $1.
make_root() {
    local tree=$1 kernel_tree=$2 release=$3 agent=$4 applet module
    mkdir -p "$tree"/{bin,sbin,dev,etc,lib/modules,mnt,proc,root,run,sys,tmp,usr/bin,usr/sbin,usr/local/bin,var}
    chmod 700 "$tree/root"
    chmod 1777 "$tree/tmp"
    ln -s ../run "$tree/var/run"
    ln -s ../tmp "$tree/var/tmp"
    ln -s /proc/self/mounts "$tree/etc/mtab"
    printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' > "$tree/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' > "$tree/etc/group"
    printf '127.0.0.1 localhost\n::1 localhost\n' > "$tree/etc/hosts"
    printf 'NAME="Blixard guest"\nID=blixard\n' > "$tree/etc/os-release"
    install -m 755 "$agent" "$tree/init"
    install -m 755 "$busybox" "$tree/bin/busybox"
    for applet in $("$busybox" --list-full); do
        [ "$applet" != linuxrc ] || continue
        mkdir -p "$tree/$(dirname "$applet")"
        [ -e "$tree/$applet" ] || ln -s /bin/busybox "$tree/$applet"
    done
    ln -sf /bin/busybox "$tree/usr/bin/env"
    for module in $modules_first -- $modules_later -- $modules_root; do
        if [ "$module" != -- ]; then
            install -m 644 "$kernel_tree/lib/modules/$release/kernel/$module.ko" "$tree/lib/modules/"
            module=$(basename "$module").ko
        fi
        echo "$module" >> "$tree/lib/modules/order"
    done
}

# Packs the tree $1: the same tree gives the same bytes.
pack() {
    find "$1" -exec touch --no-dereference --date=@0 {} +
    (cd "$1" && find . -mindepth 1 -printf '%P\0' | sort -z |
        cpio --null --create --format=newc --owner=0:0 --reproducible --quiet)
}

# Unpacks the kernel in the bzImage $1 to $2. The offsets are those of Linux' boot protocol 2.08 (its x86/boot.rst).
unpack_kernel() {
    local setup_sectors offset length format
    field() { od -An "-tu$2" -j "$(($1))" -N "$2" "$bzimage" | tr -d ' '; }
    local bzimage=$1
    setup_sectors=$(field 0x1f1 1)
    offset=$(((setup_sectors + 1) * 512 + $(field 0x248 4)))
    length=$(field 0x24c 4)
    format=$(od -An -tx1 -j "$offset" -N 4 "$bzimage" | tr -d ' ')
    # The payload's last four bytes are the kernel's size, not part of the compressed stream.
    dd if="$bzimage" of="$2.packed" bs=1M iflag=skip_bytes,count_bytes skip="$offset" count=$((length - 4)) status=none
    case $format in
        02214c18) lz4 -dc "$2.packed" > "$2" ;;
        28b52ffd) zstd -dqc "$2.packed" > "$2" ;;
        *) die "the kernel is packed in a way this script does not know (magic $format)" ;;
    esac
    [ "$(od -An -tx1 -N 4 "$2" | tr -d ' ')" = 7f454c46 ] || die "what was unpacked from $bzimage is no ELF kernel"
}

main() {
    check_tools
    mkdir -p "$cache/tmp"
    exec 9> "$cache/lock"
    flock 9
    local deb agent inputs tree release agent_version file
    deb=$(fetch_kernel)
    agent=$(build_agent)
    [ -x "$agent" ] || die "there is no agent at $agent"
    inputs=$(sha256sum "$0" "$agent" "$busybox" "$deb" | cut -d ' ' -f 1 | tr '\n' ' ')
    if [ "$(cat "$out/.inputs" 2> /dev/null)" = "$inputs" ] && [ -s "$out/vmlinux" ] && [ -s "$out/initramfs" ]; then
        echo "guest-image: $out is up to date"
        return
    fi

    tree=$(mktemp -d "$cache/tmp/build.XXXXXX")
    # shellcheck disable=SC2064
    trap "rm -rf '$tree'" EXIT
    dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$tree" --wildcards './boot/vmlinuz-*' './lib/modules/*/kernel/drivers/*' \
        './lib/modules/*/kernel/net/*' './lib/modules/*/kernel/fs/*' './lib/modules/*/kernel/lib/*' --no-same-owner
    release=$(basename "$tree"/lib/modules/*)
    agent_version=$("$agent" --version | awk '{print $2}')
    make_root "$tree/guest" "$tree" "$release" "$agent"
    mkdir -p "$out"
    rm -f "$out/.inputs"
    pack "$tree/guest" > "$tree/initramfs"
    unpack_kernel "$tree/boot/vmlinuz-$release" "$tree/vmlinux"
    cat > "$tree/manifest.json" << JSON
{
  "name": "default",
  "kernel": "vmlinux",
  "initramfs": "initramfs",
  "cmdline": "$cmdline",
  "root_filesystems": ["erofs", "ext4"],
  "kernel_release": "$release",
  "agent_version": "$agent_version",
  "created_at": "$(date -u +%Y-%m-%dT%H:%M:%S.000Z)",
  "sha256": {
    "vmlinux": "$(sha256sum "$tree/vmlinux" | cut -d ' ' -f 1)",
    "initramfs": "$(sha256sum "$tree/initramfs" | cut -d ' ' -f 1)"
  }
}
JSON
    # Renamed into place: a VM that boots meanwhile reads the old file or the new one.
    for file in vmlinux initramfs manifest.json; do
        install -m 644 "$tree/$file" "$out/$file.new"
        mv "$out/$file.new" "$out/$file"
    done
    rm -f "$out/vmlinuz" # the packed kernel of earlier images
    echo "$inputs" > "$out/.inputs"
    echo "guest-image: made $out (Linux $release, agent $agent_version, initramfs $(stat -c %s "$out/initramfs") bytes)"
}

main
