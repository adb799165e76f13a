#!/usr/bin/env bash
# Runs one experiment on the GPUs of a SLURM cluster. What follows -- are the flags of specjax.launch.
#
#   launch/slurm.sh --nodes=1 --gpus=8 --time=04:00:00 --out=runs/xsum -- \
#     --config=configs/chinchilla/xsum.py --config.data=xsum.test.jsonl --config.mesh_model=8
#
#   --out=DIR            where the results go, on a file system that all nodes see; log.txt is there too
#   --nodes=N            1 by default; several run together, one process on each
#   --gpus=N             GPUs per node, 1 by default
#   --time=TIME          the time limit of the job, 04:00:00 by default
#   --partition=NAME     the cluster's default partition, if not given
#   --account=NAME       your default account, if not given
#   --venv=DIR           a virtual environment (pip install -e '.[cuda,experiments]'), .venv by default
#   --dry-run            print the batch script, and submit nothing
#
# It waits until the job ends; Ctrl-C leaves the job running, and scancel ends it. A job that ran out of time resumes
# with the same command.
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

out='' nodes=1 gpus=1 time=04:00:00 partition='' account='' venv=.venv dry=0
while (($#)); do
  case $1 in
    --out=*) out=${1#*=} ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --partition=*) partition=${1#*=} ;;
    --account=*) account=${1#*=} ;;
    --venv=*) venv=${1#*=} ;;
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
[[ -n $out ]] || die "--out is missing: --help lists what is needed"
for number in nodes gpus; do
  [[ ${!number} =~ ^[1-9][0-9]*$ ]] || die "--$number=${!number}: give a number, at least 1"
done
(($#)) || die "no run: give the flags of specjax.launch after --, such as -- --config=configs/compare.py"
for flag in "$@"; do
  [[ $flag != --workdir* ]] || die "$flag: --out says where the results go"
done

flags=$(printf ' %q' "$@")
# One process per node: JAX learns its rank from SLURM.
distributed=$([[ $nodes == 1 ]] || echo ' --distributed')
script=$(
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=specjax
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$gpus
#SBATCH --time=$time
#SBATCH --output=$out/log.txt
#SBATCH --signal=INT@60
${partition:+#SBATCH --partition=$partition
}${account:+#SBATCH --account=$account
}set -euo pipefail
source $(printf %q "$venv")/bin/activate
srun --kill-on-bad-exit=1 python -m specjax.launch$distributed --workdir=$(printf %q "$out")$flags
END
)
if ((dry)); then
  echo "$script"
  exit 0
fi
command -v sbatch >/dev/null || die "sbatch is not installed: run this on a login node of the cluster"
mkdir -p "$out"
code=0
sbatch --wait <<<"$script" || code=$?
if ((code)); then
  echo "error: the job ended with exit code $code; $out/log.txt says why" >&2
  exit "$code"
fi
echo "Results: $out"
