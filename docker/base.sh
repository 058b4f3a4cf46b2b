#!/usr/bin/env bash
# Make a base image for tests where registries of images cannot be reached: NAME, of Debian, with pip's settings of
# this machine (its certificates and PIP_*), so that a build finds what pip finds here. Needs root, buildah, debootstrap.
set -euo pipefail
name=$1
folder=$(mktemp --directory)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$folder"
ln --symbolic python3 "$folder/usr/bin/python"
rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/*
cp /etc/ssl/certs/ca-certificates.crt "$folder/etc/ssl/certs/"
container=$(buildah from scratch)
buildah add --quiet "$container" "$folder" / > /dev/null
while IFS= read -r setting; do
    buildah config --env "$setting" "$container"
done < <(env | grep '^PIP_' || true)
buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
buildah commit --quiet --rm "$container" "$name"
