"""What `herd up` would run, from flags and from files."""

from pathlib import Path

import pytest
import yaml
from support import ROOT

from router import plan
from router.errors import ConfigError
from workers.vllm_engine import Place

CPU = Place("cpu", "there is no NVIDIA GPU")
GPU = Place("cuda", "there is an NVIDIA GPU")
NOWHERE = Place(None, "vLLM is not installed")


@pytest.mark.parametrize(
    ("engine", "model", "place", "kind", "says"),
    [
        ("auto", None, CPU, "vllm", "vLLM on the CPU (there is no NVIDIA GPU) with the demo model"),
        ("auto", None, NOWHERE, "simulated", "simulated because vLLM is not installed"),
        ("auto", None, GPU, "simulated", "no --model is given"),
        ("auto", "org/model", GPU, "vllm", "vLLM on GPUs (there is an NVIDIA GPU) with org/model"),
        ("simulated", None, CPU, "simulated", "simulated; its timing"),
        ("vllm", None, GPU, "vllm", "noise"),
    ],
)
def test_which_engine_and_why(engine: str, model: str | None, place: Place, kind: str, says: str) -> None:
    planned = plan.from_flags(engine, model, None, place)
    assert [m.engine for m in planned.fleet.models] == [kind]
    assert says in planned.engine


def test_vllm_where_it_cannot_run_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        plan.from_flags("vllm", None, None, NOWHERE)


def test_a_folder_is_served_under_its_last_name(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    (model,) = plan.from_flags("simulated", str(tmp_path / "my-model"), 3, CPU).fleet.models
    assert (model.name, model.source, model.replicas.max) == ("my-model", str(tmp_path / "my-model"), 3)


def test_ports_given_replace_those_of_the_file_and_zero_becomes_a_port() -> None:
    planned = plan.from_flags("simulated", None, None, CPU).on_ports(0, 7001)
    assert planned.fleet.router.port > 0
    assert planned.fleet.router.admin_port == 7001
    assert planned.on_ports(None, None).fleet == planned.fleet


@pytest.mark.parametrize("name", ["simulated", "single-machine", "gpu"])
def test_the_files_that_ship_are_plans(name: str) -> None:
    path = Path(__file__).parents[2] / "deploy" / f"{name}.yaml"
    planned = plan.from_file(path)
    assert planned.name == "herd"
    assert planned.document["proxy_location"] == "Disabled"
    assert planned.document["applications"][0]["import_path"] == "router.app:build"


def test_keys_come_beside_what_the_file_says_of_tenants() -> None:
    args = {"models": [{"name": "m", "engine": "simulated", "source": "demo"}]}
    key, other = (f"sha256:{digit * 64}" for digit in "12")
    bare = plan.Plan(plan.document(args), "")
    assert bare.for_tenants({}, None).fleet == bare.fleet
    router = bare.for_tenants({"keys": [key]}, other).fleet.router
    assert (router.tenants.keys, router.admin_key) == ((key,), other)
    with_file = plan.Plan(plan.document({**args, "router": {"tenants": {"file": "/f"}}}), "")
    assert with_file.for_tenants({}, None).fleet.router.tenants.file == "/f"
    with pytest.raises(ConfigError, match="keys: they belong into the file"):
        _ = with_file.for_tenants({"keys": [key]}, None).fleet


def test_a_file_with_an_unknown_key_is_refused_by_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    model = {"name": "m", "engine": "simulated", "source": "demo", "replica": 2}
    path.write_text(yaml.safe_dump(plan.document({"models": [model]})))
    with pytest.raises(ConfigError, match=r"fleet\.yaml: models\.0\.replica"):
        plan.from_file(path)


def test_a_file_may_run_on_another_kind_of_engine():
    path = ROOT / "deploy" / "single-machine.yaml"
    assert [m.engine for m in plan.from_file(path).fleet.models] == ["vllm"]
    planned = plan.from_file(path, "simulated")
    assert [m.engine for m in planned.fleet.models] == ["simulated"]
    assert "simulated" in planned.engine
