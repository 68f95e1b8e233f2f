#!/usr/bin/env bash
# Run the tests on Debian trixie with its own Python (3.13), in a root made by debootstrap and removed
# afterwards. To be run as root on a Debian or Ubuntu; arguments go to pytest. What is tested is the last
# commit, not the work tree. Takes about as long as the tests, and 5 minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "$(id -u)" = 0 ] || { echo "$0: needs root, for debootstrap and chroot" >&2; exit 1; }

command -v debootstrap >/dev/null || { apt-get update; apt-get install --yes --no-install-recommends debootstrap; }
root=$(mktemp -d -t trixie-XXXXXXXX)
leave() {
    for place in dev proc; do mountpoint -q "$root/$place" && umount -R -l "$root/$place"; done
    rm -rf --one-file-system "$root"
}
trap leave EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates,nodejs trixie "$root"

mount -t proc proc "$root/proc"  # ours read it
mount --rbind /dev "$root/dev"
mount --make-rslave "$root/dev"
cp /etc/resolv.conf "$root/etc/resolv.conf"
# The way to the package index is this machine's: its pip settings (the PIP_* variables stay set as well),
# and the certificates it trusts.
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
mkdir -p "$root/etc/xdg" "$root/root/.config"
[ ! -e /etc/pip.conf ] || cp -L /etc/pip.conf "$root/etc/pip.conf"
[ ! -e /etc/xdg/pip ] || cp -rL /etc/xdg/pip "$root/etc/xdg/pip"
[ ! -e "$HOME/.config/pip" ] || cp -rL "$HOME/.config/pip" "$root/root/.config/pip"
mkdir "$root/checkout"
git archive HEAD | tar -x -C "$root/checkout"

chroot "$root" /usr/bin/env HOME=/root TMPDIR=/tmp LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    bash -euo pipefail -c '
        cd /checkout
        python3 -m venv /venv
        /venv/bin/pip install --quiet ".[test]"
        /venv/bin/python -VV
        /venv/bin/pip list
        /venv/bin/python -m pytest "$@"
    ' tests "$@"
