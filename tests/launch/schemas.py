# SPDX-License-Identifier: Apache-2.0
"""What JobSet and SkyPilot take, as JSON schemas: of each object the fields that launch/ may use.

JOBSET: jobset.x-k8s.io/v1alpha2 as in config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of
kubernetes-sigs/jobset (commit 08dfbdf, after v0.9.1), with the enumerations and formats that its
descriptions name; a field that is not there is refused, as `kubectl apply` does.
TASK: sky/utils/schemas.py of skypilot-org/skypilot (commit 00052df).
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
LABEL: Schema = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", "maxLength": 63}


def record(*required: str, **fields: Schema) -> Schema:
    """An object of these fields and no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


def several(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def one(*values: str) -> Schema:
    return {"enum": list(values)}


def table(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


QUANTITY: Schema = {
    "anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^[0-9.]+[A-Za-z]*$"}]
}
CONTAINER = record(
    "name",
    name=LABEL,
    image=TEXT,
    command=several(TEXT),
    args=several(TEXT),
    ports=several(record("containerPort", containerPort={"type": "integer", "maximum": 65535})),
    resources=record(limits=table(QUANTITY), requests=table(QUANTITY)),
)
POD = record(
    "containers",
    containers=several(CONTAINER),
    restartPolicy=one("Always", "OnFailure", "Never"),
    serviceAccountName=TEXT,
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=table(TEXT),
    tolerations=several(
        record(
            key=TEXT,
            operator=one("Exists", "Equal"),
            value=TEXT,
            effect=one("NoSchedule", "PreferNoSchedule", "NoExecute"),
        )
    ),
)
EXIT_CODES = record(
    "operator",
    "values",
    containerName=TEXT,
    operator=one("In", "NotIn"),
    values=several({"type": "integer"}),
)
POD_RULE = record(
    "action", action=one("FailJob", "FailIndex", "Ignore", "Count"), onExitCodes=EXIT_CODES
)
JOB = record(
    "template",
    parallelism=COUNT,
    completions=COUNT,
    completionMode=one("Indexed", "NonIndexed"),
    backoffLimit=COUNT,
    podFailurePolicy=record("rules", rules=several(POD_RULE)),
    template=record(metadata=table({}), spec=POD),
)
RULE = record(
    "action",
    "name",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action=one(
        "FailJobSet",
        "RestartJobSet",
        "RestartJobSetAndIgnoreMaxRestarts",
        "RestartJob",
        "RestartJobAndIgnoreMaxRestarts",
    ),
    onJobFailureReasons=several(
        one("BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy")
    ),
    targetReplicatedJobs=several(TEXT),
)
JOBSET = record(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion=one("jobset.x-k8s.io/v1alpha2"),
    kind=one("JobSet"),
    metadata=record("name", name=LABEL, annotations=table(TEXT), labels=table(TEXT)),
    spec=record(
        "replicatedJobs",
        failurePolicy=record(
            maxRestarts=COUNT,
            restartStrategy=one("Recreate", "BlockingRecreate", "InPlaceRestart"),
            rules=several(RULE),
        ),
        replicatedJobs=several(
            record("name", "template", name=LABEL, replicas=COUNT, template=record(spec=JOB))
        ),
        ttlSecondsAfterFinished=COUNT,
    ),
)

EXIT_CODE: Schema = {"type": "integer", "minimum": 0, "maximum": 255}
TASK = record(
    name=TEXT,
    workdir=TEXT,
    num_nodes={"type": "integer"},
    resources=record(
        infra={"type": "string", "pattern": "^gcp(/[^/]+(/[^/]+)?)?$"},
        accelerators=TEXT,
        accelerator_args=record(
            runtime_version=TEXT,
            tpu_name=TEXT,
            tpu_vm={"type": "boolean"},
            gcp_queued_resource={"type": "boolean"},
        ),
        use_spot={"type": "boolean"},
        disk_size={"type": "integer"},
        job_recovery=record(
            strategy=TEXT, max_restarts_on_errors=COUNT, recover_on_exit_codes=several(EXIT_CODE)
        ),
    ),
    envs=table({"type": ["string", "number", "null"]}),
    secrets=table({"type": ["string", "number", "null"]}),
    file_mounts=table({}),
    setup=TEXT,
    run=TEXT,
)
