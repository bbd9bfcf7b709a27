"""Checks what no schema of Kubernetes knows: rendered manifests against this project.

In: rendered manifests, one file per argument. Out: a line for each thing that is wrong, and exit status 1.
"""

import json
import pathlib
import re
import sys

import jsonschema
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = {"conclave-router": "router/src/config.rs", "conclave-expert-worker": "expert-worker/src/config.rs"}
# Kinds that kubernetes-validate has no schema of.
CRDS = {"PodMonitor": json.loads((ROOT / "deploy/check/podmonitor.schema.json").read_text())}


def flags(program):
    """Names of a program's flags as environment variables."""
    fields = re.findall(r"^    pub (\w+): ", (ROOT / CONFIG[program]).read_text(), re.MULTILINE)
    return {f"CONCLAVE_{field.upper()}" for field in fields}


def wrong_with_settings():
    """Flags that the schema of `settings` does not know, and names in it that are no flags."""
    schema = json.loads((ROOT / "deploy/helm/conclave/values.schema.json").read_text())
    nodes = {"conclave-router": schema["properties"]["router"], "conclave-expert-worker": schema["definitions"]["worker"]}
    for program, node in nodes.items():
        named = {f"CONCLAVE_{name.replace('-', '_').upper()}" for name in node["properties"]["settings"]["properties"]}
        for name in sorted(named ^ flags(program)):
            yield f"values.schema.json: {name} is in one of {program}'s flags and its settings, not in both"


def adapter_metrics():
    """Metrics that the rules for the prometheus-adapter make."""
    for rule in yaml.safe_load((ROOT / "deploy/prometheus/adapter-values.yaml").read_text())["rules"]["custom"]:
        series, name = rule["seriesQuery"].split("{")[0], rule["name"]
        yield re.sub(name.get("matches", ".*"), name["as"].replace("${1}", r"\1"), series, count=1)


def environment(container):
    """A container's variables by name; those that the API server fills in have no value."""
    return {entry["name"]: entry.get("value") for entry in container.get("env", [])}


def wrong_with_environment(command, variables):
    """Variables that look like flags and are none."""
    program = command[0]
    if program in CONFIG:
        for name in sorted(variables):
            if name.startswith("CONCLAVE_") and name not in flags(program):
                yield f"{name} is no flag of {program}"


def wrong_with_pod(pod):
    """A pod that could not drain, or may do more than it needs."""
    security = pod.get("securityContext", {})
    if not (security.get("runAsNonRoot") and security.get("seccompProfile", {}).get("type") == "RuntimeDefault"):
        yield "the pod may run as root, or without seccomp's default"
    if pod.get("automountServiceAccountToken") is not False:
        yield "the pod gets a token of its service account"
    for container in pod["containers"] + pod.get("initContainers", []):
        own = container.get("securityContext", {})
        if own.get("capabilities", {}).get("drop") != ["ALL"] or not own.get("readOnlyRootFilesystem"):
            yield f"{container['name']} keeps capabilities, or may write to its root"
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']} may gain privileges"
        variables = environment(container)
        yield from wrong_with_environment(container["command"], variables)
        pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        drain = int(variables.get("CONCLAVE_DRAIN_GRACE") or 0)
        if drain and pod["terminationGracePeriodSeconds"] <= pause + drain:
            yield f"{container['name']} would be killed while it drains"


def wrong_with(manifest, metrics):
    """All of one manifest's problems."""
    kind, spec = manifest["kind"], manifest.get("spec", {})
    if kind in CRDS:
        for error in jsonschema.Draft7Validator(CRDS[kind]).iter_errors(manifest):
            yield f"{error.json_path}: {error.message}"
    if kind in ("Deployment", "StatefulSet"):
        yield from wrong_with_pod(spec["template"]["spec"])
        if not set(spec["selector"]["matchLabels"].items()) <= set(spec["template"]["metadata"]["labels"].items()):
            yield "the selector does not match its own pods"
    if kind == "Pod":
        yield from wrong_with_pod(spec)
    if kind == "HorizontalPodAutoscaler":
        for metric in spec["metrics"]:
            if metric["type"] == "Pods" and metric["pods"]["metric"]["name"] not in metrics:
                yield f"no rule of the adapter makes {metric['pods']['metric']['name']}"


def main():
    metrics, problems = set(adapter_metrics()), list(wrong_with_settings())
    for path in sys.argv[1:]:
        for manifest in yaml.safe_load_all(pathlib.Path(path).read_text()):
            if manifest:
                name = f"{pathlib.Path(path).name}: {manifest['kind']}/{manifest['metadata']['name']}"
                problems += [f"{name}: {problem}" for problem in wrong_with(manifest, metrics)]
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
    for name, service in compose["services"].items():
        found = wrong_with_environment(service["command"], service.get("environment", {}))
        problems += [f"compose.yaml: {name}: {problem}" for problem in found]
    print(*problems, sep="\n" if problems else "", end="\n" if problems else "")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
