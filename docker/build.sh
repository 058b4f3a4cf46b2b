#!/usr/bin/env bash
# Build an image without a Docker engine: `docker/build.sh TARGET [NAME]`, with Debian's buildah, as root.
#
# BASE: the image to build on. By default one is made from Debian with debootstrap, without an image registry; it gets
# this machine's certificates and PIP_* settings, so that pip finds the same packages.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$1 name=${2:-alfb_dist:$1}
export BUILDAH_ISOLATION=chroot
made=localhost/alfb_dist-base:bookworm

make_base() ( # in a subshell: its trap removes only the directory that it created
    base_directory=$(mktemp --directory)
    trap 'rm -rf "$base_directory"' EXIT
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$base_directory"
    ln --symbolic python3 "$base_directory/usr/bin/python"
    rm -rf "$base_directory"/var/cache/apt/archives/*.deb "$base_directory"/var/lib/apt/lists/*
    cp /etc/ssl/certs/ca-certificates.crt "$base_directory/etc/ssl/certs/"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$base_directory" / > /dev/null
    while IFS= read -r setting; do
        buildah config --env "$setting" "$container"
    done < <(env | grep '^PIP_' || true)
    buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    buildah commit --quiet --rm "$container" "$made"
)

options=(--layers --file docker/Dockerfile --target "$target" --tag "$name")
if [ -n "${BASE:-}" ]; then
    options+=(--build-arg "BASE=$BASE")
else
    buildah inspect --type image "$made" > /dev/null 2>&1 || make_base
    options+=(--build-arg "BASE=$made" --build-arg TORCH_INDEX=)
    for wheels in ${PIP_FIND_LINKS:-}; do
        [ ! -d "$wheels" ] || options+=(--volume "$wheels:$wheels:ro")
    done
fi
buildah bud "${options[@]}" .
