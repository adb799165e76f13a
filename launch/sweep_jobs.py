"""Jobs of a cluster that run the cells of a sweep: a SLURM job array, or an indexed Job of Kubernetes."""

import json
import pathlib
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from specjax import files

SLURM = """\
#!/usr/bin/env bash
# Submit it with `sbatch {path}`, in the directory of the repository; add the options of your cluster, such as
# --partition, --gpus-per-task or --time, there or as lines below. Then gather with the same flags and --gather.
#SBATCH --job-name=specjax-sweep
#SBATCH --array=0-{last}
#SBATCH --output={directory}/task-%a.txt
#SBATCH --signal=INT@60
set -euo pipefail
{task} --cell="$SLURM_ARRAY_TASK_ID"
"""

KUBERNETES = """\
# The image {image} needs specjax and this repository as its working directory, and {directory} has to be on the volume
# of the claim {claim}, which all pods have at /data. Submit it with `kubectl apply -f {path}`; then gather where the
# volume is, with the same flags and --gather.
apiVersion: batch/v1
kind: Job
metadata:
  name: specjax-sweep
spec:
  completions: {number}
  parallelism: {number}
  completionMode: Indexed
  backoffLimitPerIndex: 1
  template:
    spec:
      restartPolicy: Never
      containers:
      - name: specjax
        image: {image}
        command: ["sh", "-c", {command}]
        volumeMounts:
        - {{name: data, mountPath: /data}}
      volumes:
      - {{name: data, persistentVolumeClaim: {{claimName: {claim}}}}}
"""


class Job(NamedTuple):
    """What a cluster is to run.

    Attributes:
      flags: of the sweep, with its axes and its work directory.
      num_cells: how many tasks it has.
      directory: where its file goes, and the results.
      image: of the pods.
      claim: of their common volume.
    """

    flags: Sequence[str]
    num_cells: int
    directory: pathlib.Path
    image: str
    claim: str


def write(kind: str, job: Job) -> pathlib.Path:
    """Writes the job array, or the indexed Job, that runs every cell as a task of its own.

    Args:
      kind: "slurm" or "kubernetes".
      job: the tasks.

    Returns:
      the path of the file.
    """
    task = shlex.join(["python", "launch/sweep.py", *job.flags])
    path = job.directory / ("jobs.sbatch" if kind == "slurm" else "jobs.yaml")
    if kind == "slurm":
        text = SLURM.format(path=path, directory=job.directory, last=job.num_cells - 1, task=task)
    else:
        command = json.dumps(f'exec {task} --cell="$JOB_COMPLETION_INDEX"')
        text = KUBERNETES.format(
            path=path,
            directory=job.directory,
            number=job.num_cells,
            command=command,
            image=job.image,
            claim=job.claim,
        )
    job.directory.mkdir(parents=True, exist_ok=True)
    files.write(path, text)
    return path
