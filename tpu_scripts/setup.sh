#!/usr/bin/env bash
# setup.sh NAME --zone ZONE [options]: installs Python, diffusionlm-jax[tpu] and gcsfs on every host of NAME.
#
#   (default)          the checked-out commit of the repository of this script; uncommitted changes are refused
#   --package SPEC     instead, a requirement for pip: "diffusionlm-jax[tpu] @ git+https://...@COMMIT" (on PyPI
#                      the name belongs to another project)
#   --wheel FILE       instead, a wheel on this machine
#   --python VERSION   of Python (3.12); --uv VERSION, of the installer (0.13.5)
#   --check            afterwards, let all hosts count their chips together
#   --slices N --zone ZONE --project PROJECT, as for create.sh
#   --dry-run          print the commands without running them
#
# Hosts that already have this version are left alone.

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

package='' wheel='' python=3.12 uv=0.13.5 check=''
parse "package wheel python uv zone project slices" "check" "$@"
check_name
check_location
check_slices
if ! [[ $python =~ ^3\.[0-9]+$ ]] || ((${python#3.} < 11)); then fail "--python '$python' must be 3.11 or later"; fi
[[ $uv =~ ^[0-9]+(\.[0-9]+)+$ ]] || fail "--uv '$uv' must be a version, like 0.13.5"
[[ -z $package || -z $wheel ]] || fail "--package and --wheel exclude each other; drop one"
[[ ${#COMMAND[@]} -eq 0 ]] || fail "takes no command; drop what follows --"

install=(bash "$WORKER" install --python "$python" --uv "$uv")
upload=''
if [[ -n $package ]]; then
  install+=(--package "$package")
elif [[ -n $wheel ]]; then
  [[ -f $wheel && $wheel == *.whl ]] || fail "--wheel '$wheel' is not a file that ends with .whl"
  # With the checksum, a rebuilt wheel of the same name is another version.
  upload=$wheel
  install+=(--package "${wheel##*/}" --commit "$(cksum <"$wheel" | tr ' ' -)")
else
  root=$(git -C "$HERE" rev-parse --show-toplevel 2>/dev/null) || fail "$HERE is not a git checkout; give --package or --wheel"
  [[ -n $dry_run || -z $(git -C "$root" status --porcelain --untracked-files=no) ]] ||
    fail "uncommitted changes in $root would not run on the hosts; commit them, or stash them"
  commit=$(git -C "$root" rev-parse HEAD)
  install+=(--bundle diffusionlm.bundle --commit "$commit")
fi

to_hosts "$HERE/worker.sh" "$WORKER"
if [[ -n $upload ]]; then
  to_hosts "$upload" "${wheel##*/}"
elif [[ -z $package ]]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  bundle=$scratch/diffusionlm.bundle
  if [[ -n $dry_run ]]; then bundle=diffusionlm.bundle; fi
  run git -C "$root" bundle create --quiet "$bundle" HEAD
  to_hosts "$bundle" diffusionlm.bundle
fi
on_hosts all "${install[@]}" || fail "the installation failed on one of the hosts" 1
if [[ -n $check ]]; then
  # On all hosts at once: the first one waits for the others.
  on_hosts all bash "$WORKER" chips || fail "the hosts did not find each other or their chips" 1
fi
