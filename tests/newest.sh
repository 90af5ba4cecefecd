#!/usr/bin/env bash
# The default tests on the newest Python and JAX that the package runs on, which
# a machine may not have: Python 3.13 of Debian 13, in a folder. As root, on
# Debian or Ubuntu with debootstrap:
#
#   tests/newest.sh FOLDER [arguments of pytest]
#
# The folder is made where it is missing; what it has installed is kept. Without
# arguments all default tests run, two at a time.
set -euo pipefail
folder=${1:?tests/newest.sh FOLDER [arguments of pytest]}
shift
cd "$(dirname "$0")/.."

if [ ! -x "$folder/usr/bin/python3" ]; then
  debootstrap --variant=minbase \
    --include=python3,python3-venv,ca-certificates,git,procps trixie "$folder"
fi
# How this machine reaches the network and its package index.
cp /etc/hosts /etc/resolv.conf "$folder/etc/"
cp /etc/pip.conf "$folder/etc/" 2> /dev/null || true
cp /etc/ssl/certs/ca-certificates.crt "$folder/etc/ssl/certs/"
mkdir -p "$folder/src"
if ! mountpoint -q "$folder/proc"; then
  mount -t proc proc "$folder/proc"
  trap 'umount "$folder/proc"' EXIT
fi
find "$folder/src" -mindepth 1 -delete
git ls-files -z | tar --null --create --files-from=- |
  tar --extract --directory "$folder/src"
find "$folder/src" -name __pycache__ -prune -exec rm -r {} +

in_folder() {
  chroot "$folder" env -i HOME=/root LANG=C.UTF-8 PATH=/venv/bin:/usr/bin:/bin \
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt bash -c "cd /src && $1" "${@:2}"
}
in_folder '[ -d /venv ] || python3 -m venv /venv
  pip install -q --upgrade --upgrade-strategy=eager -e ".[test]"
  python -c "
import sys, flax, jax, numpy
print(\"Python\", sys.version.split()[0], \"jax\", jax.__version__, end=\" \")
print(\"flax\", flax.__version__, \"numpy\", numpy.__version__)"'
if [ $# -eq 0 ]; then set -- -n 2; fi
in_folder 'pytest "$@"' pytest "$@"
