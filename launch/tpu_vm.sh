#!/usr/bin/env bash
# Creates a TPU VM slice, installs specjax on all of its hosts, runs one experiment on it, fetches the results and
# deletes the slice, even if a step fails or Ctrl-C interrupts it. The flags of specjax.launch follow --.
#
#   launch/tpu_vm.sh --name=spec --zone=us-east5-b --type=v6e-8 --out=runs/xsum --data=xsum.test.jsonl -- \
#     --config=configs/chinchilla/xsum.py --config.data=xsum.test.jsonl --config.mesh_model=8
#
#   --name=NAME          of the slice
#   --zone=ZONE          of Google Cloud
#   --type=TYPE          accelerator type as gcloud names it: v6e-8 and v5litepod-16 count chips, v5p-8 and v4-8 cores;
#                        the hosts of a large slice run together
#   --out=DIR            where the results go on this machine
#   --project=PROJECT    the Google Cloud project; gcloud's own by default
#   --version=VERSION    runtime version, by default that of the type: v2-alpha-tpuv6e, v2-alpha-tpuv5-lite,
#                        v2-alpha-tpuv5 (v5p) or tpu-ubuntu2204-base (v4 and older)
#   --data=FILE          is copied to every host, into the directory in which the run starts; may be repeated. The run
#                        names it without its directories: --data=texts/a.jsonl, --config.data=a.jsonl
#   --spot               spot capacity, which may be preempted at any time
#   --keep               do not delete the slice; the same command uses it again
#   --dry-run            print every command, and run none
#
# Flags and files are checked before anything is rented, those of the run too if python has specjax's packages. What DIR
# holds of an earlier run is sent to the slice first, so that the same command resumes it.
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

name='' zone='' type='' out='' project='' version=''
data=() spot=() keep=0 dry=0
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --out=*) out=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --data=*) data+=("${1#*=}") ;;
    --spot) spot=(--spot) ;;
    --keep) keep=1 ;;
    --dry-run) dry=1 ;;
    --help | -h)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *) die "unknown argument $1: --help lists them; flags of the run come after --" ;;
  esac
  shift
done
for needed in name zone type out; do
  [[ -n ${!needed} ]] || die "--$needed is missing: --help lists what is needed"
done
(($#)) || die "no run: give the flags of specjax.launch after --, such as -- --config=configs/compare.py"
for flag in "$@"; do
  [[ $flag != --workdir* ]] || die "$flag: --out says where the results go"
done
root=$(cd "$(dirname "$0")/.." && pwd)

case $type in
  v5e-*) die "--type=$type: gcloud calls it v5litepod-${type#*-}" ;;
  v6e-* | v5litepod-* | v5p-* | v4-* | v3-* | v2-*)
    [[ ${type#*-} =~ ^[1-9][0-9]*$ ]] || die "--type=$type: a number follows the -, as in v6e-8"
    ;;
  *) die "--type=$type: give one of v6e-N, v5litepod-N, v5p-N, v4-N, v3-N and v2-N, such as v6e-8" ;;
esac
if [[ -z $version ]]; then
  case $type in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi
[[ $name =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] ||
  die "--name=$name: lower-case letters, digits and -, at most 63; a letter first, no - at the end"
[[ ! -e $out || -d $out ]] || die "--out=$out: a file, not a directory"
copied=()
for file in ${data[@]+"${data[@]}"}; do
  [[ -f $file ]] || die "--data=$file: there is no such file"
  [[ -s $file && -r $file ]] || die "--data=$file: empty, or not readable"
  for other in ${copied[@]+"${copied[@]}"}; do
    [[ $other != "$(basename "$file")" ]] || die "--data=$file: two files would be called $other on the hosts"
  done
  copied+=("$(basename "$file")")
done
# What the run reads has to be on the hosts.
for flag in "$@"; do
  value=${flag#*=}
  case $flag in
    --config=*)
      [[ $value != /* && -f $root/${value%%:*} ]] ||
        die "$flag: not a file of $root, which alone is copied to the hosts"
      ;;
    --config.data=?* | --config.valid=?*)
      # configs/plan.py has a number there.
      [[ ! $value =~ ^[0-9]+$ ]] || continue
      found=0
      for other in ${copied[@]+"${copied[@]}"}; do
        [[ $value != "$other" ]] || found=1
      done
      [[ $value != /* && -f $root/$value ]] && found=1
      if ((!found)) && [[ -f $value ]]; then
        key=${flag%%=*}
        die "$flag: is not sent: give --data=$value before --, and $key=$(basename "$value") after it"
      fi
      ((found)) || die "$flag: no file of that name is sent: give it by --data=FILE"
      ;;
  esac
done
# Checks the names and types of the run's keys; without specjax's packages on this machine, the run itself does.
for python in python3 "$root/.venv/bin/python"; do
  if "$python" -c 'import absl, ml_collections' 2>/dev/null; then
    said=$(cd "$root" && "$python" - "$@" 2>&1 <<'END'
import sys
from specjax import launch
try:
    launch.parse(["launch", *sys.argv[1:]])
except launch.UsageError as error:
    sys.exit(str(error))
END
    ) || die "$said"
    break
  fi
done
((dry)) || command -v gcloud >/dev/null || die "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
where=(--zone="$zone" ${project:+--project="$project"})

# Printed so that it can be pasted into a shell.
run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  ((dry)) || "$@"
}

on_hosts() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

# Only the first host writes results.
fetch() {
  run mkdir -p "$out"
  run gcloud compute tpus tpu-vm scp --recurse "$name:specjax/runs/out/*" "$out" "${where[@]}" --worker=0
}

archive='' started=0
# shellcheck disable=SC2317,SC2329  # The trap runs it.
finish() {
  local code=$?
  trap - EXIT
  # Ctrl-C again does not stop the deletion.
  trap '' INT TERM
  [[ -z $archive ]] || rm -f "$archive"
  # After a failure, too: whatever is finished.
  if ((started)) && ! fetch; then
    echo "error: the results could not be fetched" >&2
    code=$((code ? code : 1))
  fi
  if ((keep)); then
    echo "The slice $name is kept: gcloud compute tpus tpu-vm delete $name ${where[*]}" >&2
  elif ! run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet; then
    echo "error: the slice $name could not be deleted, and costs money: delete it yourself" >&2
    code=1
  fi
  exit "$code"
}

if ((dry)) || ! gcloud compute tpus tpu-vm describe "$name" "${where[@]}" >/dev/null 2>&1; then
  # From here on, since a creation that fails half-way may leave a slice behind.
  trap finish EXIT
  trap 'exit 130' INT TERM
  run gcloud compute tpus tpu-vm create "$name" "${where[@]}" --accelerator-type="$type" --version="$version" \
    ${spot[@]+"${spot[@]}"}
elif ((keep)); then
  trap finish EXIT
  trap 'exit 130' INT TERM
else
  die "a slice $name exists already: choose another --name, or give --keep to use it"
fi

archive=$(mktemp -t specjax.XXXXXX)
run tar -czf "$archive" -C "$root" --exclude=./runs --exclude=./.git --exclude=./.venv \
  --exclude=__pycache__ .
run gcloud compute tpus tpu-vm scp "$archive" "$name:specjax.tar.gz" "${where[@]}" --worker=all
on_hosts 'mkdir -p specjax/runs/out && tar -xzf specjax.tar.gz -C specjax'
if [[ -n $(ls -A "$out" 2>/dev/null) ]]; then
  run gcloud compute tpus tpu-vm scp --recurse "$out"/* "$name:specjax/runs/out/" "${where[@]}" --worker=0
fi
for file in ${data[@]+"${data[@]}"}; do
  run gcloud compute tpus tpu-vm scp "$file" "$name:specjax/$(basename "$file")" "${where[@]}" --worker=all
done
# Images of Ubuntu 22.04 have Python 3.10, which is too old for specjax: uv brings a newer one.
on_hosts "test -x specjax-venv/bin/python || \
{ python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' && python3 -m venv specjax-venv; } || \
{ python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --seed --python=3.12 specjax-venv; }"
# shellcheck disable=SC2016  # $HOME is that of the host.
on_hosts 'specjax-venv/bin/pip install --quiet -e "$HOME/specjax[tpu,experiments]"'
flags=$(printf ' %q' "$@")
started=1
on_hosts "cd specjax && ../specjax-venv/bin/python -m specjax.launch --distributed --workdir=runs/out$flags" || {
  code=$?
  echo "error: the run ended with exit code $code" >&2
  exit "$code"
}
