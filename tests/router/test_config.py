import pytest
import yaml

from router.config import AUTOSCALING_POLICY, load, parse
from router.errors import ConfigError

MODEL = {"name": "m", "engine": "simulated", "source": "demo"}


def test_a_fleet_needs_no_more_than_a_model():
    fleet = parse({"models": [MODEL]})
    assert (fleet.models[0].name, fleet.models[0].replicas.max) == ("m", 1)
    assert (fleet.router.port, fleet.router.admin_port, fleet.router.policy) == (8000, 8001, "kv_aware")


def test_routers_know_what_is_promised_of_models_but_not_what_nobody_said():
    promised = {**MODEL, "name": "n", "slo": {"ttft_s": 1.0}}
    fleet = parse({"models": [MODEL, promised], "router": {"slos": {"lora": {"tpot_s": 0.1}}}})
    assert {name: slo.ttft_s for name, slo in fleet.slos.items()} == {"n": 1.0, "lora": 2.0}


def test_a_model_may_have_other_names():
    fleet = parse({"models": [MODEL], "router": {"aliases": {"gpt-4o": "m", "o1": "m"}}})
    assert fleet.router.aliases == {"gpt-4o": "m", "o1": "m"}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_on_loopback_admin_ports_need_no_key(host):
    assert parse({"models": [MODEL], "router": {"admin_host": host}}).router.admin_key is None


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({}, "models: Field required"),
        ({"models": []}, "models: List should have at least 1 item"),
        ({"models": [MODEL, MODEL]}, "models: the name 'm' is given twice"),
        ({"models": [{**MODEL, "replica": 2}]}, "models.0.replica: Extra inputs are not permitted"),
        ({"models": [{**MODEL, "replicas": 0}]}, "models.0.replicas.max: Input should be greater than"),
        (
            {"models": [{**MODEL, "replicas": {"min": 3, "max": 2}}]},
            "models.0.replicas: min, initial, max: 3, 3, 2 are not in order",
        ),
        (
            {"models": [{**MODEL, "replicas": {"max": 2, "initial": 0}}]},
            "models.0.replicas: min, initial, max: 1, 0, 2 are not in order",
        ),
        ({"models": [{**MODEL, "replicas": {"min": 1}}]}, "models.0.replicas.max: Field required"),
        ({"models": [{**MODEL, "replicas": {"max": 2, "busy": 1}}]}, "models.0.replicas.busy: Input should"),
        ({"models": [{**MODEL, "replicas": True}]}, "models.0.replicas: Input should be"),
        (
            {"models": [MODEL], "router": {"scaling": {"n": {"max": 2}}}},
            "router.scaling: 'n' is no model of this fleet",
        ),
        ({"models": [{**MODEL, "engine": "tgi"}]}, "models.0.engine: "),
        ({"models": [{**MODEL, "slo": {"ttft_s": 0}}]}, "models.0.slo.ttft_s: Input should be greater than"),
        ({"models": [{**MODEL, "slo": {"ttft_times": 0.9}}]}, "models.0.slo.ttft_times: Input should be"),
        ({"models": [{**MODEL, "slo": {"tpot_s": float("nan")}}]}, "models.0.slo.tpot_s: Input should be"),
        ({"models": [{**MODEL, "slo": {"ttft": 1}}]}, "models.0.slo.ttft: Extra inputs are not permitted"),
        ({"models": [MODEL], "router": {"port": 70000}}, "router.port: Input should be less than"),
        (
            {"models": [MODEL], "router": {"policy": "best"}},
            "router.policy: 'best' is not a policy; known are kv_aware, least_requests, power_of_two, "
            "consistent_hash, round_robin, random",
        ),
        (
            {"models": [MODEL], "router": {"aliases": {"a": "b", "b": "m"}}},
            "router.aliases: 'a' stands for 'b', which is an alias itself",
        ),
        ({"models": [MODEL], "router": {"aliases": {"a": "a"}}}, "router.aliases: 'a' stands for 'a'"),
        (
            {"models": [MODEL], "router": {"aliases": {"m": "x"}}},
            "router.aliases: 'm' is the name of a model",
        ),
        ({"models": [MODEL], "router": {"aliases": {"a": ""}}}, "router.aliases.a: String should have"),
        ({"models": [MODEL], "router": {"limits": {"idle_s": 0}}}, "router.limits.idle_s: "),
        ({"models": [MODEL], "router": {"decisions": {"keep": -1}}}, "router.decisions.keep: "),
        ({"models": [MODEL], "router": {"decisions": {"log": 1}}}, "router.decisions.log: Extra inputs"),
        ({"models": [MODEL], "router": {"tenants": {"keys": ["k"]}}}, "router.tenants.keys.0: String should"),
        (
            {"models": [MODEL], "router": {"tenants": {"file": "tenants.yaml"}}},
            "router.tenants.file: 'tenants.yaml' is not an absolute path",
        ),
        (
            {"models": [MODEL], "router": {"tenants": {"file": "/f", "keys": [f"sha256:{'0' * 64}"]}}},
            "router.tenants: keys: they belong into the file",
        ),
        (
            {"models": [MODEL], "router": {"admin_host": "0.0.0.0"}},
            "router: admin_key: admin_host 0.0.0.0 can be reached from other machines",
        ),
        (
            {"models": [MODEL], "router": {"admin_host": "node-7"}},
            "router: admin_key: admin_host node-7 can be reached",
        ),
        ({"models": [MODEL], "router": {"admin_key": "k"}}, "router.admin_key: String should match"),
        ({"models": [MODEL], "router": {"admission": {"awaiting": 0}}}, "router.admission.awaiting: "),
        ({"models": [MODEL], "router": {"admission": {"queue": 1}}}, "router.admission.queue: Extra inputs"),
        ({"models": [MODEL], "router": {"replicas": 0}}, "router.replicas: Input should be greater than"),
        (
            {"models": [MODEL], "router": {"replicas": 2, "shards": 3}},
            "router: shards: 3 need as many router processes, not 2",
        ),
        (
            {"models": [MODEL], "router": {"admin_port": 65535, "replicas": 2}},
            "router: admin_port: 2 router processes need ports up to 65536",
        ),
        (
            {"models": [MODEL], "router": {"port": 8002, "replicas": 2}},
            "router: admin_port: 8001 to 8002 are admin ports, port 8002 too",
        ),
        (
            {"models": [MODEL], "router": {"cors": {"allowed_origins": ["*"], "allow_credentials": True}}},
            "router.cors: allow_credentials: name the allowed_origins",
        ),
        (
            {"models": [MODEL], "router": {"cors": {"allowed_headers": ["a b"]}}},
            "router.cors.allowed_headers.0: ",
        ),
        ({"models": [MODEL], "rooter": {}}, "rooter: Extra inputs are not permitted"),
    ],
)
def test_errors_name_the_key(args, told):
    with pytest.raises(ConfigError) as raised:
        parse(args)
    assert str(raised.value).startswith(told)


def test_a_serve_config_file_is_loaded_whole(tmp_path):
    document = {
        "proxy_location": "Disabled",
        "applications": [{"name": "herd", "import_path": "router.app:build", "args": {"models": [MODEL]}}],
    }
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(document))
    assert load(path) == document


def test_a_range_of_replicas_needs_whom_serve_asks(tmp_path):
    model = {**MODEL, "replicas": {"min": 0, "max": 2}}
    application = {"name": "herd", "import_path": "router.app:build", "args": {"models": [model]}}
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    with pytest.raises(ConfigError, match=r"applications\.0\.autoscaling_policy: .*as_routers_decide"):
        load(path)
    application["autoscaling_policy"] = {"policy_function": AUTOSCALING_POLICY}
    path.write_text(yaml.safe_dump({"applications": [application]}))
    assert load(path)["applications"] == [application]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "not YAML: while parsing a flow node expected"),
        ("a: \0", "not YAML: unacceptable character"),
        ("- 1", "applications: exactly one"),
        ("applications: []", "applications: exactly one"),
        ("applications: [{}, {}]", "applications: exactly one"),
        ("applications: [{}]", "models: Field required"),
        ("applications: [{args: [1]}]", "args: "),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, told):
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert str(raised.value).startswith(f"{path}: {told}")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load(tmp_path / "none.yaml")
