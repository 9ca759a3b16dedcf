#!/usr/bin/env bash
# build_image.sh REPOSITORY [options]: the image for XPK, of the commit that is checked out, as REPOSITORY:COMMIT.
#
#   REPOSITORY   for instance us-docker.pkg.dev/PROJECT/REPO/diffusionlm
#   --push       then push it
#   --dry-run    print the commands, run none
#
# The last line of its output is the image's name. A commit that is built already is not built again.

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

push=''
parse "" "push" "$@"
[[ $NAME =~ ^[a-z0-9]([a-z0-9./_-]*[a-z0-9])?$ ]] ||
  fail "repository '$NAME' must be like us-docker.pkg.dev/PROJECT/REPO/diffusionlm, without a tag"
root=$(git -C "$HERE" rev-parse --show-toplevel 2>/dev/null) || fail "$HERE is no git checkout"
[[ -n $dry_run || -z $(git -C "$root" status --porcelain) ]] || fail "uncommitted changes in $root; commit them, or stash them"
image=$NAME:$(git -C "$root" rev-parse --short=12 HEAD)
if [[ -n $dry_run ]] || ! docker image inspect "$image" >/dev/null 2>&1; then
  # TPU hosts are x86-64, laptops need not be.
  run docker build --platform linux/amd64 --file "$HERE/Dockerfile" --tag "$image" "$root"
fi
if [[ -n $push ]]; then run docker push "$image"; fi
echo "$image"
