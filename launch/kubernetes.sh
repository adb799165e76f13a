#!/usr/bin/env bash
# Runs one experiment on the GPUs of a Kubernetes cluster: creates a Job, waits for it, fetches the results and deletes
# the Job, even if a step fails or Ctrl-C interrupts it. The flags of specjax.launch follow --.
#
#   launch/kubernetes.sh --name=spec --image=IMAGE --gpus=8 --out=runs/xsum -- \
#     --config=configs/chinchilla/xsum.py --config.data=/data/xsum.test.jsonl --config.mesh_model=8
#
#   --name=NAME          of the Job
#   --image=IMAGE        a container image in which pip install -e '.[cuda,experiments]' has run in this repository
#   --out=DIR            where the results go on this machine
#   --hosts=N            pods that run together, 1 by default
#   --gpus=N             GPUs per pod, 1 by default
#   --claim=NAME         a PersistentVolumeClaim, mounted at /data
#   --namespace=NAME     kubectl's own by default
#   --timeout=TIME       how long to wait for the end, 24h by default
#   --keep               do not delete the Job and its pods
#   --dry-run            print the manifest and every command, and run none
set -euo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

name='' image='' out='' hosts=1 gpus=1 claim='' namespace=() timeout=24h keep=0 dry=0
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --out=*) out=${1#*=} ;;
    --hosts=*) hosts=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --namespace=*) namespace=(--namespace="${1#*=}") ;;
    --timeout=*) timeout=${1#*=} ;;
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
for needed in name image out; do
  [[ -n ${!needed} ]] || die "--$needed is missing: --help lists what is needed"
done
for number in hosts gpus; do
  [[ ${!number} =~ ^[1-9][0-9]*$ ]] || die "--$number=${!number}: give a number, at least 1"
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "--name=$name: give lower-case letters, digits and -, as Kubernetes names are"
(($#)) || die "no run: give the flags of specjax.launch after --, such as -- --config=configs/compare.py"
for flag in "$@"; do
  [[ $flag != --workdir* ]] || die "$flag: --out says where the results go"
done

quote() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

# The pod stays until the results are fetched, and then exits with the code of the run.
# shellcheck disable=SC2016  # The container expands them.
program='code=0; python -m specjax.launch "$@" --workdir=/results || code=$?; echo $code >/results/.code
while [ "$JOB_COMPLETION_INDEX" = 0 ] && [ ! -e /results/.fetched ]; do sleep 2; done; exit $code'

manifest() {
  cat <<END
apiVersion: v1
kind: Service
metadata:
  name: $name
spec:
  clusterIP: None
  selector: {job-name: $name}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: $name
spec:
  completions: $hosts
  parallelism: $hosts
  completionMode: Indexed
  backoffLimit: 0
  template:
    spec:
      subdomain: $name
      restartPolicy: Never
      containers:
      - name: specjax
        image: $(quote "$image")
        command: ["sh", "-c", $(quote "${program//$'\n'/; }"), "sh"]
        args:
END
  ((hosts == 1)) || echo '        - "--distributed"'
  for flag in "$@"; do
    echo "        - $(quote "$flag")"
  done
  cat <<END
        env:
        - {name: JAX_COORDINATOR_ADDRESS, value: "$name-0.$name:1234"}
        - {name: JAX_NUM_PROCESSES, value: "$hosts"}
        - name: JAX_PROCESS_ID
          valueFrom: {fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
        resources:
          limits: {nvidia.com/gpu: $gpus}
        volumeMounts:
        - {name: results, mountPath: /results}
END
  [[ -z $claim ]] || echo '        - {name: data, mountPath: /data}'
  cat <<END
      volumes:
      - {name: results, emptyDir: {}}
END
  [[ -z $claim ]] || echo "      - {name: data, persistentVolumeClaim: {claimName: $(quote "$claim")}}"
}

run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  ((dry)) || "$@"
}

kube() {
  run kubectl ${namespace[@]+"${namespace[@]}"} "$@"
}

first_pod() {
  if ((dry)); then
    echo "$name-0"
  else
    kubectl ${namespace[@]+"${namespace[@]}"} get pods -o name \
      -l "job-name=$name,batch.kubernetes.io/job-completion-index=0" | head -n 1 | sed 's|^pod/||'
  fi
}

# shellcheck disable=SC2317,SC2329  # The trap runs it.
finish() {
  local code=$?
  trap - EXIT
  trap '' INT TERM
  rm -f "$file"
  if ((keep)); then
    echo "The Job $name is kept: kubectl delete job,service $name" >&2
  elif ! kube delete job,service "$name" --ignore-not-found; then
    echo "error: the Job $name could not be deleted: delete it yourself" >&2
    code=1
  fi
  exit "$code"
}

file=$(mktemp -t specjax.XXXXXX)
manifest "$@" >"$file"
if ((dry)); then
  cat "$file"
elif ! command -v kubectl >/dev/null; then
  rm -f "$file"
  die "kubectl is not installed: https://kubernetes.io/docs/tasks/tools"
elif kubectl ${namespace[@]+"${namespace[@]}"} get job "$name" >/dev/null 2>&1; then
  rm -f "$file"
  die "a Job $name exists already: choose another --name, or delete it"
fi
trap finish EXIT
trap 'exit 130' INT TERM
kube apply -f "$file"
kube wait --for=create pod -l "job-name=$name" --timeout=10m
pod=$(first_pod)
kube wait --for=condition=Ready "pod/$pod" --timeout=1h
# shellcheck disable=SC2016  # The container expands them.
kube exec "$pod" -- timeout "$timeout" sh -c 'while [ ! -e /results/.code ]; do sleep 5; done'
run mkdir -p "$out"
kube cp "$pod:/results" "$out"
kube logs "$pod" --tail=20
kube exec "$pod" -- touch /results/.fetched
((dry)) && exit 0
code=$(cat "$out/.code")
((code == 0)) || echo "error: the run ended with exit code $code" >&2
exit "$code"
