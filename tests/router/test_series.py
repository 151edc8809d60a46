from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from router.series import Counters, Histograms


def samples(registry):
    text = generate_latest(registry).decode()
    return {
        (s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }


def test_counters_as_prometheus_reads_them():
    registry = CollectorRegistry()
    requests = Counters(registry, "requests", "Requests.", ("model", "code"))
    requests.labels("m", "200").inc()
    requests.labels("m", "200").inc(2.5)
    requests.labels('quoted "\n', "500")
    assert samples(registry) == {
        ("requests_total", "200", "m"): 3.5,
        ("requests_total", "500", 'quoted "\n'): 0,
    }


def test_histograms_as_prometheus_reads_them():
    registry = CollectorRegistry()
    seconds = Histograms(registry, "seconds", "Time.", (), (0.1, 1, 10)).labels()
    for value in (0.0, 0.1, 0.5, 1.0, 5.0, 100.0):
        seconds.observe(value)
    assert samples(registry) == {
        ("seconds_bucket", "0.1"): 2,  # a bound belongs to its bucket
        ("seconds_bucket", "1.0"): 4,
        ("seconds_bucket", "10.0"): 5,
        ("seconds_bucket", "+Inf"): 6,
        ("seconds_count",): 6,
        ("seconds_sum",): 106.6,
    }
