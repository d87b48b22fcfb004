#!/usr/bin/env bash
# Prepares what the guest tests boot, in target/guest or $VUBLK_GUEST_DIR: the distribution's kernel
# for virtual machines (downloaded, not installed), an initramfs of busybox, the virtio modules and
# the agent of tests/guest/init, and an ext4 image with fio, the ext4 tools and the load of
# tests/load, which also stands beside the images to fill disks on the host. Does nothing when
# nothing changed. Remove the folder to get a newer kernel.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=packages.sh
. "$(dirname "$0")/packages.sh"

folder=${VUBLK_GUEST_DIR:-$root/target/guest}
# In the order they must be loaded in.
modules=(virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk
    virtio_console virtio_balloon)
programs=(dash dd fio mke2fs e2fsck blkdiscard blockdev)

# Downloads a package and unpacks it into a folder, unless that was done before.
unpack_package() {
    local name=$1 into=$2
    [ -d "$into" ] && return
    echo "fetching $name"
    update_packages
    rm -rf "$into.new" && mkdir -p "$into.new"
    (cd "$into.new" && apt get download "$name")
    dpkg-deb -x "$into.new"/*.deb "$into.new"
    rm "$into.new"/*.deb
    mv "$into.new" "$into"
}

fetch_kernel() {
    [ -d "$folder/kernel" ] && return
    update_packages
    local name
    name=$(apt cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-\)/\1/p')
    [ -n "$name" ] || fail "the distribution has no linux-image-cloud-amd64"
    unpack_package "$name" "$folder/kernel"
}

build_initramfs() {
    local tree=$folder/build/initramfs busybox=$folder/busybox/bin/busybox name file
    [ -e "$busybox" ] || busybox=$folder/busybox/usr/bin/busybox
    mkdir -p "$tree"/{bin,dev,proc,sys,tmp,run,etc,lib,modules}
    cp "$busybox" "$tree/bin/busybox"
    install -m 755 "$root/tests/guest/init" "$tree/init"
    ln -s /proc/mounts "$tree/etc/mtab"
    # The programs of the tools disk find the loader and the libraries where they expect them.
    ln -s /tools/lib64 "$tree/lib64"
    ln -s /tools/lib "$tree/lib/x86_64-linux-gnu"
    for name in "${modules[@]}"; do
        file=$(find "$folder/kernel" -name "$name.ko*" -print -quit)
        if [ -z "$file" ]; then
            # What is built into the kernel needs no loading.
            grep -rqs "/$name.ko\$" "$folder/kernel" --include=modules.builtin \
                || fail "the kernel has no module $name"
            continue
        fi
        case $file in
        *.xz) xz -dc "$file" >"$tree/modules/$name.ko" ;;
        *) cp "$file" "$tree/modules/$name.ko" ;;
        esac
        echo "$name.ko" >>"$tree/modules/order"
    done
    (cd "$tree" && find . | "$busybox" cpio -o -H newc 2>/dev/null) | gzip -1 \
        >"$folder/build/initramfs.gz"
}

# One static program for host and guest.
build_load() {
    local host
    host=$(rustc -vV | sed -n 's/^host: //p')
    RUSTFLAGS="-C target-feature=+crt-static" cargo build --quiet --release --target "$host" \
        --target-dir "$target/guest-load" -p guest-load
    load=$target/guest-load/$host/release/guest-load
}

build_tools() {
    local tree=$folder/build/tools name path
    mkdir -p "$tree"/{bin,lib,lib64}
    for name in "${programs[@]}"; do
        path=$(command -v "$name") || fail "$name is not installed"
        cp -L "$path" "$tree/bin/"
        ldd "$path" | awk '$2 == "=>" && $3 ~ /^\// { print $3 }'
    done | sort -u | xargs cp -L -t "$tree/lib"
    cp -L /lib64/ld-linux-x86-64.so.2 "$tree/lib64/"
    cp "$load" "$tree/bin/"
    local mib
    mib=$(du -sm "$tree" | cut -f 1)
    mke2fs -q -t ext4 -O ^has_journal -m 0 -d "$tree" "$folder/build/tools.ext4" $((mib + 32))M
}

PATH=$PATH:/usr/sbin:/sbin
install_qemu
install_packages fio e2fsprogs util-linux coreutils dash xz-utils
build_load

inputs=$(
    cat "$0" "$root/tests/guest/init"
    sha256sum <"$load"
    dpkg-query -W fio e2fsprogs util-linux coreutils dash libc6
)
stamp=$(sha256sum <<<"$inputs" | cut -d ' ' -f 1)
if [ "$(cat "$folder/stamp" 2>/dev/null)" = "$stamp" ] && [ -e "$folder/vmlinuz" ] \
    && [ -e "$folder/initramfs.gz" ] && [ -e "$folder/tools.ext4" ] \
    && [ -e "$folder/guest-load" ]; then
    echo "the guest images in $folder are up to date"
    exit 0
fi

rm -rf "$folder/build" "$folder/stamp"
mkdir -p "$folder/build"
fetch_kernel
unpack_package busybox-static "$folder/busybox"
build_initramfs
build_tools
cp "$folder"/kernel/boot/vmlinuz-* "$folder/build/vmlinuz"
cp "$load" "$folder/build/"
mv -f "$folder"/build/{vmlinuz,initramfs.gz,tools.ext4,guest-load} "$folder/"
rm -rf "$folder/build"
echo "$stamp" >"$folder/stamp"
echo "the guest images in $folder are ready"
