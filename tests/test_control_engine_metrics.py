"""Many workers' metrics as one text, read back with Prometheus' own parser."""

from prometheus_client.parser import text_string_to_metric_families

from sglfast.control.engine_metrics import merged

A, B = "http://10.0.0.1:30000", "http://10.0.0.2:30000"
TEXT = """\
# HELP sglang:num_running_reqs The number of running requests.
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="m",note="a } b"} 3.0
# HELP sglang:ttft_seconds Time to first token.
# TYPE sglang:ttft_seconds histogram
sglang:ttft_seconds_bucket{le="0.1"} 1
sglang:ttft_seconds_bucket{le="+Inf"} 2
sglang:ttft_seconds_count 2
sglang:ttft_seconds_sum 0.5
# HELP process_cpu_seconds_total CPU.
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total 17.5 1700000000000
untyped_thing{} 1
"""


def test_every_family_stands_once_and_every_sample_says_whose_it_is() -> None:
    text = merged([(A, TEXT), (B, TEXT.replace("3.0", "4.0"))])
    families = list(text_string_to_metric_families(text))
    assert [(family.name, family.type) for family in families] == [
        ("sglang_num_running_reqs", "gauge"), ("sglang_ttft_seconds", "histogram"), ("process_cpu_seconds", "counter"),
        ("untyped_thing", "unknown"), ("untyped_thing", "unknown"),
    ]  # fmt: skip
    running = {sample.labels["worker_addr"]: sample for sample in families[0].samples}
    assert {url: sample.value for url, sample in running.items()} == {A: 3.0, B: 4.0}
    assert running[A].labels == {"worker_addr": A, "model_name": "m", "note": "a } b"}
    assert len(families[1].samples) == 8
    assert {sample.labels["worker_addr"] for family in families for sample in family.samples} == {A, B}
    assert text.count("# TYPE") == text.count("# HELP") == 3
    assert 'process_cpu_seconds_total{worker_addr="http://10.0.0.1:30000"} 17.5 1700000000000\n' in text


def test_what_is_no_metric_is_dropped() -> None:
    assert merged([(A, "<html>\nnot a metric\n# EOF\n\n{} 1\nname\n1name 2\n# a comment\ngood 1\r\n")]) == (
        f'good{{worker_addr="{A}"}} 1\n'
    )  # fmt: skip
    assert merged([]) == merged([(A, "")]) == ""


def test_other_engines_names_and_odd_urls_are_kept() -> None:
    assert merged([('http://a"b\\', "vllm:num_requests 1")]) == 'vllm:num_requests{worker_addr="http://a\\"b\\\\"} 1\n'


def test_a_family_that_one_worker_does_not_describe_stands_together_all_the_same() -> None:
    text = merged([(A, "x_total 1\ny 2"), (B, "# TYPE y gauge\ny 3\n# TYPE x_total counter\nx_total 4")])
    names = [line.partition("{")[0] for line in text.splitlines() if not line.startswith("#")]
    assert names == ["x_total", "x_total", "y", "y"]
