#!/usr/bin/env bash
# Runs the README's two commands where nothing is installed but what the README lists: a new Debian in a folder.
#
#   packaging/clean_machine.sh FOLDER [REQUIREMENT...]
#
# FOLDER is made and must not exist; REQUIREMENTs (torch==2.13.0) are what pip installs first. Variables CCE_* and PIP_*
# and the CA certificates are handed on; the folders in BIND ("a b") are shown inside, for a package index on the disk.
# Needs root, debootstrap and the committed state of a clone. About 8 GB and 20 minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly SUITE=bookworm PACKAGES="python3,python3-venv,python3-dev,g++,ca-certificates"
if [ $# -lt 1 ] || [ -e "$1" ]; then
  printf 'usage: %s FOLDER [REQUIREMENT...]; FOLDER is new, but was: %s\n' "$0" "${1:-not given}" >&2
  exit 2
fi
root=$1
shift

debootstrap --variant=minbase --include="$PACKAGES" "$SUITE" "$root"
root=$(cd "$root" && pwd)
mounts=(/proc /dev)
for folder in ${BIND:-}; do mounts+=("$folder"); done
finish() {
  for folder in "${mounts[@]}"; do umount "$root$folder" 2>/dev/null || true; done
}
trap finish EXIT
for folder in "${mounts[@]}"; do
  mkdir -p "$root$folder"
  mount --bind "$folder" "$root$folder"
done
cp /etc/resolv.conf "$root/etc/resolv.conf"
printf '127.0.0.1 localhost %s\n' "$(hostname)" >"$root/etc/hosts" # gloo asks for the address of the host's name
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
mkdir "$root/cce_ext"
git archive HEAD | tar -x -C "$root/cce_ext"

variables=(HOME=/root PATH=/usr/bin:/bin)
while IFS= read -r line; do variables+=("$line"); done < <(env | grep -E '^(CCE|PIP)_[A-Z_]+=' || true)
inside() {
  chroot "$root" /usr/bin/env -i "${variables[@]}" bash -euc "$1"
}
commands=$(sed -nE 's/^ *(pip install "\.\[(train|test)\]" && .+)$/\1/p' README.md)
[ "$(wc -l <<<"$commands")" = 2 ]

inside 'for name in nvcc cmake ninja git; do ! command -v "$name"; done; python3 --version; g++ --version | head -n 1'
inside 'python3 -m venv /environment'
for requirement in "$@"; do inside ". /environment/bin/activate; pip install --quiet '$requirement'"; done
while IFS= read -r command; do
  printf '\n=== %s\n' "$command"
  begin=$SECONDS
  inside ". /environment/bin/activate; cd /cce_ext; $command"
  printf '=== %d s\n' $((SECONDS - begin))
done <<<"$commands"
inside '. /environment/bin/activate; python -m cce_ext; pip list'
