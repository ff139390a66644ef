"""The files of `cluster/`: valid by their own schemas, no secrets, nobody root, every size in one place."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from rairl_ray.actors.placement import Node, bundles, check_against, present_or_promised
from rairl_ray.config.load import from_dict
from rairl_ray.errors import PlacementError

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY_SCHEMAS = ROOT.parent / "shared" / "schemas" / "kuberay"
LAUNCHER = ("aws.yaml", "gcp.yaml")
KUBERAY = {"raycluster": "rayclusters", "rayjob": "rayjobs", "raycronjob": "raycronjobs"}
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def inside(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a document, the document first."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from inside(child)


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, refusing fields that it does not name: Kubernetes drops a misspelt one without a word."""
    schema = copy.deepcopy(schema)
    for part in inside(schema):
        named = isinstance(part.get("properties"), dict) and part.get("type") == "object"
        if named and not part.get("x-kubernetes-preserve-unknown-fields"):
            part.setdefault("additionalProperties", False)
    return schema


def cluster_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = read(f"kuberay/{name}.yaml")["spec"]
    return {"raycluster": lambda: spec, "rayjob": lambda: spec["rayClusterSpec"]}.get(
        name, lambda: spec["jobTemplate"]["rayClusterSpec"]
    )()


def pods(name: str) -> list[dict[str, Any]]:
    """Pod specifications of a file: whatever has containers."""
    return [part for part in inside(read(f"kuberay/{name}.yaml")) if "containers" in part]


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_up_files_are_valid(name: str) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(read(name), schema)
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_up_files_keep_to_the_plan(name: str) -> None:
    config = read(name)
    head, worker = (config["available_node_types"][kind] for kind in ("head", "worker"))
    assert config["head_node_type"] == "head" and head["resources"] == {"CPU": 0, "GPU": 0}
    assert worker["resources"]["GPU"] > 0 and worker["min_workers"] == 0
    spot = re.compile(r"spot", re.IGNORECASE)
    assert spot.search(json.dumps(worker["node_config"])) and not spot.search(json.dumps(head["node_config"]))
    assert (head["labels"], worker["labels"]) == ({"market": "on-demand"}, {"market": "spot"})
    assert config["max_workers"] == worker["max_workers"] and config["idle_timeout_minutes"] > 0
    assert any("cluster/node.sh" in command for command in config["setup_commands"])
    for kind in ("head", "worker"):
        assert any("RAY_AUTH_MODE=token" in command for command in config[f"{kind}_start_ray_commands"])
    assert not config["provider"]["cache_stopped_nodes"]


@pytest.mark.parametrize("name", LAUNCHER)
def test_what_one_chooses_stands_in_metadata_alone(name: str) -> None:
    text = (CLUSTER / name).read_text()
    chosen = re.findall(r"^  \w+: &(\w+)(?: (.+))?$", text.split("max_workers:")[0], re.MULTILINE)
    assert len(chosen) >= 10
    body = text[text.index("\nmax_workers:") :]
    for anchor, value in chosen:
        assert f"*{anchor}" in body, f"{anchor} is not used"
        if value and len(value) > 3 and "CHANGE-ME" not in value:
            assert value not in body, f"{value} is written twice"
    assert "CHANGE-ME" not in body and "CHANGE-ME" in text


def test_the_node_script_installs_the_lock_and_refuses_the_placeholder() -> None:
    assert "RAIRL_LOCK=requirements/cuda.txt bash requirements/install.sh" in (CLUSTER / "node.sh").read_text()
    for name in LAUNCHER:
        command = read(name)["metadata"]["prepare"].split()[2:]
        result = subprocess.run(
            ["bash", str(CLUSTER / "node.sh"), *command], capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 2 and "CHANGE-ME" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_are_valid_field_by_field(name: str) -> None:
    path = KUBERAY_SCHEMAS / f"{KUBERAY[name]}.v1.json"
    if not path.is_file():
        pytest.skip("needs KubeRay's schemas in ../shared/schemas/kuberay, which are not here")
    # Not `validate`: it checks the schema each time, for seconds.
    schema = jsonschema.Draft202012Validator(closed(json.loads(path.read_text())))
    document = read(f"kuberay/{name}.yaml")
    schema.validate(document)
    misspelt = copy.deepcopy(document)
    next(part for part in inside(misspelt) if "enableInTreeAutoscaling" in part)["enableInTreeAutoscalling"] = (
        True
    )
    with pytest.raises(jsonschema.ValidationError, match="enableInTreeAutoscalling"):
        schema.validate(misspelt)


def test_kuberay_jobs_bring_the_same_cluster() -> None:
    assert cluster_spec("rayjob") == cluster_spec("raycluster") == cluster_spec("raycronjob")
    job, nightly = read("kuberay/rayjob.yaml")["spec"], read("kuberay/raycronjob.yaml")["spec"]
    assert nightly["jobTemplate"] == job and nightly["suspend"] is True
    assert job["shutdownAfterJobFinishes"] is True


def test_the_kuberay_head_takes_no_work_and_workers_come_and_go() -> None:
    spec = cluster_spec("raycluster")
    assert spec["rayVersion"] == ray.__version__
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["enableInTreeAutoscaling"] is True and spec["authOptions"]["mode"] == "token"
    (group,) = spec["workerGroupSpecs"]
    assert group["labels"] == {"market": "on-demand"}
    assert group["minReplicas"] == 0 < group["maxReplicas"]
    assert int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) > 0


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_pods_are_safe_and_sized(name: str) -> None:
    assert pods(name)
    for pod in pods(name):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] >= 1000
        for container in pod["containers"]:
            inner = container["securityContext"]
            assert inner["allowPrivilegeEscalation"] is False and inner["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert re.search(r":[\w.-]+$", container["image"]) and not container["image"].endswith(":latest")
            if container["name"].startswith("ray-"):
                assert {"readinessProbe", "livenessProbe"} <= container.keys()
                mounted = {mount["name"] for mount in container["volumeMounts"]}
                assert mounted == {volume["name"] for volume in pod["volumes"]} >= {"shared", "shm"}
            for variable in container.get("env", ()):
                if re.search("TOKEN|PASSWORD|SECRET|KEY", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"] and "value" not in variable
    autoscaler = cluster_spec(name)["autoscalerOptions"]
    assert autoscaler["resources"]["requests"] == autoscaler["resources"]["limits"]


def test_kustomize_finds_what_it_names() -> None:
    listed = read("kuberay/kustomization.yaml")
    assert all((CLUSTER / "kuberay" / name).is_file() for name in listed["resources"])
    claims = {
        v["persistentVolumeClaim"]["claimName"]
        for v in inside(cluster_spec("raycluster"))
        if "persistentVolumeClaim" in v
    }
    assert claims == {read("kuberay/storage.yaml")["metadata"]["name"]}
    images = {
        part["image"].rpartition(":")[0] for part in inside(cluster_spec("raycluster")) if "image" in part
    }
    assert images == {image["name"] for image in listed["images"]}


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_run_is_planned_on_workers_that_are_not_there_yet(name: str) -> None:
    worker = read(name)["available_node_types"]["worker"]
    size = {
        "nodes": worker["max_workers"],
        "cpus": worker["resources"]["CPU"],
        "gpus": worker["resources"]["GPU"],
    }
    model = {"policy": {"path": "some/model"}}
    promised = from_dict({"model": model, "cluster": {"address": "auto", "grows_to": size}})
    head = Node({"CPU": 0.0, "memory": 1e9}, {})
    nodes = present_or_promised(promised, [head])
    assert nodes == [Node({"CPU": 48.0, "GPU": 4.0})] * 2
    check_against(bundles(promised, "gpu"), nodes)
    plain = from_dict({"model": model, "cluster": {"address": "auto"}})
    assert present_or_promised(plain, [head]) == [head]
    with pytest.raises(PlacementError, match="cluster has 0"):
        check_against(bundles(plain, "gpu"), [head])


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continuation lines joined, comments left out."""
    lines = [line for line in (CLUSTER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    parts = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(first.upper(), rest) for first, rest in parts]


def test_the_dockerfile_is_pinned_and_nobody_is_root() -> None:
    stages: dict[str, str] = {}
    user: dict[str, str] = {}
    stage = ""
    for instruction, rest in instructions():
        assert instruction in {"FROM", "SHELL", "RUN", "USER", "WORKDIR", "ENV", "COPY", "CMD"}, instruction
        if instruction == "FROM":
            base, _, stage = re.fullmatch(r"(\S+) (AS) (\w+)", rest).groups()  # type: ignore[union-attr]
            assert base in stages or re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", base), (
                f"{base} is not pinned"
            )
            stages[stage], user[stage] = base, user.get(base, "root")
        elif instruction == "USER":
            user[stage] = rest
        elif instruction == "ENV":
            assert not re.search(r"TOKEN|PASSWORD|SECRET|_KEY", rest), rest
        elif instruction == "COPY":
            assert "://" not in rest and rest.startswith("--chown=1000:1000 "), rest
        elif instruction == "RUN":
            assert not re.search(r"curl|wget|sudo", rest)
            if "apt-get install" in rest:
                assert "--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists" in rest
    assert {"cpu", "cuda"} <= stages.keys()
    assert {user["cpu"], user["cuda"]} == {"1000:1000"}


def test_the_image_holds_what_the_installer_needs() -> None:
    copied = " ".join(rest for instruction, rest in instructions() if instruction == "COPY").split()
    assert all(
        (ROOT / name).exists() for name in copied if not name.startswith("--") and name not in (".", "./")
    )
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    assert {".git", ".venv", "**/runs"} <= set(ignored) and "requirements" not in ignored


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CLUSTER)))
def test_no_secret_lies_in_a_file(path: Path) -> None:
    text = path.read_text()
    for pattern in (
        r"AKIA[0-9A-Z]{16}",
        r"\bhf_[A-Za-z0-9]{20,}",
        r"-----BEGIN",
        r"\bghp_\w{20,}",
        r"\b[0-9a-f]{40,}\b",
    ):
        assert not re.search(pattern, text), f"{path.name} holds something like {pattern}"


@pytest.mark.parametrize(
    "path",
    [ROOT / "requirements" / "install.sh", *(p for p in FILES if p.suffix in (".sh", ".sbatch"))],
    ids=lambda p: p.name,
)
def test_shell_scripts_pass_shellcheck(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not here; Debian: apt install shellcheck")
    result = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
