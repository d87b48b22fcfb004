# shellcheck shell=bash
# Packages of the distribution, for the scripts that source this file. The system's own apt
# configuration is read and left as it is: sources and lists of these scripts stand in a folder of
# their own, with the backports suite added where the distribution has one.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
apt_folder=$target/ci/apt
suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-stable}")
backports=$suite-backports

fail() {
    echo "${0##*/}: $*" >&2
    exit 1
}

# The system's sources, and their copies with the suite's name changed. A source of security
# updates has no suite of just that name and gives no copy.
write_sources() {
    rm -rf "$apt_folder/sources"
    mkdir -p "$apt_folder/sources" "$apt_folder/lists/partial"
    cp /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list "$apt_folder/sources" \
        2>/dev/null || true
    cp /etc/apt/sources.list "$apt_folder/sources/system.list" 2>/dev/null || true
    local from
    for from in "$apt_folder"/sources/*.sources; do
        [ -e "$from" ] || continue
        awk -v suite="$suite" -v backports="$backports" 'BEGIN { RS = ""; FS = "\n" }
            $0 ~ "(^|\n)Suites:([^\n]* )?" suite "( [^\n]*)?(\n|$)" {
                for (i = 1; i <= NF; i++)
                    print $i ~ /^Suites:/ ? "Suites: " backports : $i
                print ""
            }' "$from" >>"$apt_folder/backports.sources.new"
    done
    for from in "$apt_folder"/sources/*.list; do
        [ -e "$from" ] || continue
        awk -v suite="$suite" -v backports="$backports" '$1 == "deb" {
            for (i = 2; i <= NF; i++)
                if ($i == suite) { $i = backports; print }
        }' "$from" >>"$apt_folder/backports.list.new"
    done
    local kind
    for kind in sources list; do
        if [ -s "$apt_folder/backports.$kind.new" ]; then
            mv "$apt_folder/backports.$kind.new" "$apt_folder/sources/vublk-backports.$kind"
        fi
        rm -f "$apt_folder/backports.$kind.new"
    done
}

apt() {
    local command=$1
    shift
    DEBIAN_FRONTEND=noninteractive "apt-$command" -qq \
        -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$apt_folder/sources" \
        -o Dir::State::Lists="$apt_folder/lists" -o DPkg::Lock::Timeout=600 \
        -o APT::Sandbox::User=root "$@"
}

# Reads the package lists, once a run.
update_packages() {
    if [ -n "${packages_updated:-}" ]; then
        return
    fi
    write_sources
    if ! apt get update >"$apt_folder/update.log" 2>&1 \
        || grep -q "^E:" "$apt_folder/update.log"; then
        echo "no $backports in reach, going on without"
        rm -f "$apt_folder"/sources/vublk-backports.*
        apt get update || fail "the package lists cannot be read"
    fi
    packages_updated=yes
}

has_backports() {
    compgen -G "$apt_folder/sources/vublk-backports.*" >/dev/null
}

is_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# Installs those of the named packages that are missing.
install_packages() {
    local name missing=()
    for name in "$@"; do
        is_installed "$name" || missing+=("$name")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || fail "missing packages: ${missing[*]}; install them, or run me as root"
    echo "installing ${missing[*]}"
    update_packages
    apt get install -y --no-install-recommends "${missing[@]}" >"$apt_folder/install.log" 2>&1 \
        || { cat "$apt_folder/install.log"; fail "cannot install ${missing[*]}"; }
}

# QEMU and its storage daemon must be of one version, the newest there is: backports before the
# suite's own, unless an older one is installed already.
install_qemu() {
    if is_installed qemu-system-x86 && is_installed qemu-utils; then
        return
    fi
    [ "$(id -u)" = 0 ] || fail "missing packages: qemu-system-x86 or qemu-utils; run me as root"
    update_packages
    local installed
    installed=$(dpkg-query -W -f '${Version}' qemu-utils qemu-system-x86 2>/dev/null || true)
    if has_backports && { [ -z "$installed" ] || [[ $installed == *~bpo* ]]; }; then
        echo "installing QEMU from $backports"
        if apt get install -y --no-install-recommends -t "$backports" qemu-system-x86 qemu-utils \
            >"$apt_folder/install.log" 2>&1; then
            return
        fi
        cat "$apt_folder/install.log"
    fi
    install_packages qemu-system-x86 qemu-utils
}
