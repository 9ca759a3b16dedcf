#!/usr/bin/env bash
# dataflow.sh NAME --output gs://BUCKET/DATA --region REGION --project PROJECT [options] -- data prepare FILES [...]
#
# Prepares a dataset on Dataflow, whose workers get a wheel of the checked-out commit. The command runs here, in an
# environment with the extras beam, corpora and gcs; it starts one pipeline after another and waits for them. Given
# again, it goes on with what was interrupted.
#
#   --output DIR                 on a bucket; FILES are on a bucket too
#   --region REGION              of the workers, best that of the buckets, for example us-central1
#   --project PROJECT            or CLOUDSDK_CORE_PROJECT
#   --temp DIR                   for the files of the pipelines, on a bucket (tmp/NAME on the bucket of the output)
#   --max-workers N              machines at most (100); --machine TYPE of them, for example n2-standard-4
#   --service-account EMAIL      the account of the machines, which decides the buckets that they may use
#   --dry-run                    print the commands without running them
#
# `diffusionlm data prepare ... --dry_run` shows how much there is to read.

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

output='' region='' temp='' max_workers=100 machine='' service_account=''
parse "output region project temp max-workers machine service-account" "" "$@"
check_name
check_bucket output "$output"
[[ $region =~ ^[a-z]+-[a-z]+[0-9]+$ ]] || fail "--region '$region' is not of the form us-central1"
[[ -n $project ]] || fail "give --project, or set CLOUDSDK_CORE_PROJECT"
if [[ -z $temp ]]; then
  bucket=${output#gs://}
  temp=gs://${bucket%%/*}/tmp/$NAME
fi
check_bucket temp "$temp"
check_count max-workers "$max_workers" 1
[[ "${COMMAND[0]:-} ${COMMAND[1]:-}" == "data prepare" && ${COMMAND[2]:-} == [!-]* ]] ||
  fail "give the command after --, for example: -- data prepare 'gs://my-bucket/texts/*.jsonl' --sequence_length 2048"
for word in "${COMMAND[@]}"; do
  case $word in
    --) fail "drop the second --: Beam's options are those of this script (see $PROGRAM --help)" ;;
    --output | --output=* | --runner | --runner=*) fail "drop ${word%%=*} after the --: --output is given before it, and the runner is Dataflow" ;;
  esac
done

root=$(git -C "$HERE" rev-parse --show-toplevel 2>/dev/null) || fail "$HERE is not a git checkout"
# The wheel has what lies in the checkout, files that git does not know included.
[[ -n $dry_run || -z $(git -C "$root" status --porcelain) ]] ||
  fail "uncommitted changes or new files in $root, so the workers would not run a commit; commit them, or stash them (-u)"
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/diffusionlm/version.py")
options=(--runner=DataflowRunner "--project=$project" "--region=$region" "--job_name=$NAME" "--temp_location=$temp"
  "--extra_package=$root/dist/diffusionlm_jax-$version-py3-none-any.whl"
  "--requirements_file=$HERE/dataflow_workers.txt" "--max_num_workers=$max_workers")
if [[ -n $machine ]]; then options+=("--machine_type=$machine"); fi
if [[ -n $service_account ]]; then options+=("--service_account_email=$service_account"); fi

run python3 -m pip wheel --quiet --no-deps "--wheel-dir=$root/dist" "$root"
run diffusionlm "${COMMAND[@]}" "--output=$output" --runner=beam -- "${options[@]}"
