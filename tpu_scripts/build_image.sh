#!/usr/bin/env bash
# build_image.sh REPOSITORY [options]: builds the image for XPK from the checked-out commit, as REPOSITORY:COMMIT.
#
#   REPOSITORY   for example us-docker.pkg.dev/PROJECT/REPO/diffusionlm
#   --push       push it afterwards
#   --dry-run    print the commands without running them
#
# The last line of the output is the name of the image. A commit is built only once.

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

push=''
parse "" "push" "$@"
[[ $NAME =~ ^[a-z0-9]([a-z0-9./_-]*[a-z0-9])?$ ]] ||
  fail "repository '$NAME' must be like us-docker.pkg.dev/PROJECT/REPO/diffusionlm, without a tag"
root=$(git -C "$HERE" rev-parse --show-toplevel 2>/dev/null) || fail "$HERE is not a git checkout"
[[ -n $dry_run || -z $(git -C "$root" status --porcelain) ]] || fail "uncommitted changes in $root; commit them, or stash them"
image=$NAME:$(git -C "$root" rev-parse --short=12 HEAD)
if [[ -n $dry_run ]] || ! docker image inspect "$image" >/dev/null 2>&1; then
  # TPU hosts are x86-64; this machine may not be.
  run docker build --platform linux/amd64 --file "$HERE/Dockerfile" --tag "$image" "$root"
fi
if [[ -n $push ]]; then run docker push "$image"; fi
echo "$image"
