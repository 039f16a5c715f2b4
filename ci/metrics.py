"""Parses an exposition, from a URL (in both formats) or a file, with Prometheus' own parsers. For ci/metrics.sh."""
import sys
import urllib.request

from prometheus_client import parser
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics


def scrape(accept):
    request = urllib.request.Request(sys.argv[1], headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def check(families, label):
    families = list(families)
    samples = {(s.name, s.labels.get("vcpu")): s.value for f in families for s in f.samples}
    kinds = {f.name: f.type for f in families}
    assert set(kinds.values()) == {"counter", "gauge"}, kinds
    assert samples["dirtylimit_vcpus", None] == 2
    assert samples["dirtylimit_vcpu_limit_bytes_per_second", "0"] == 10 << 20
    assert samples["dirtylimit_vm_limit_bytes_per_second", None] == 40 << 20
    assert ("dirtylimit_vcpu_limit_bytes_per_second", "1") not in samples, "it has no limit"
    for name in "net_dirtied_bytes_total", "gross_dirtied_bytes_total", "paused_seconds_total":
        assert samples["dirtylimit_vcpu_" + name, "0"] > 0, name
    print(f"metrics: {label}: {len(families)} families, {len(samples)} samples")


if sys.argv[1].startswith("http"):
    kind, text = scrape("application/openmetrics-text; version=1.0.0")
    assert kind == "application/openmetrics-text; version=1.0.0; charset=utf-8", kind
    families = list(parse_openmetrics(text))
    units = {f.unit for f in families}
    assert units == {"", "bytes", "seconds", "bytes_per_second"}, units
    check(families, "OpenMetrics")
    kind, text = scrape("text/plain")
    assert kind == "text/plain; version=0.0.4; charset=utf-8", kind
    check(parser.text_string_to_metric_families(text), "Prometheus' text")
else:
    with open(sys.argv[1], encoding="utf-8") as file:
        check(parser.text_string_to_metric_families(file.read()), "the file")
