"""What a run costs: in its report, by stage and by pair, and as Prometheus series of a real Ray cluster."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import reporting
from flows.markdown import cost_lines
from tasks.costs import Speed, cost_of, known_speed, remember_speed
from tasks.prometheus import PoolSeries
from tasks.sections import GeneratorConfig, PricesConfig
from tasks.store import Store
from tests.conftest import curate_values, generator, prompts, scorer, write_jsonl
from tests.services import environment, judge_endpoint, prefsieve, ray_head
from tests.test_judge import rating

STAGES = [{"gpu_seconds": 1800.0, "paid_tokens": 0}, {"gpu_seconds": 5400.0, "paid_tokens": 250_000}]


def test_a_run_costs_its_gpu_hours_and_its_tokens_and_a_pair_its_share() -> None:
    prices = PricesConfig(gpu_hour=2.5, million_tokens=4, currency="EUR")
    cost = cost_of(STAGES, {"top": 100, "none": 0}, prices)
    assert cost == {
        "gpu_seconds": 7200.0,
        "paid_tokens": 250_000,
        "amount": 6.0,  # 2 h x 2.5 + 0.25 x 4
        "currency": "EUR",
        "unpriced": [],
        "per_pair": {"top": {"gpu_seconds": 72.0, "amount": 0.06}},
    }
    assert cost_lines(cost) == ["Cost: 2 GPU hours and 250,000 tokens of endpoints = 6 EUR, 0.06 per pair of top."]


def test_without_prices_there_is_no_amount_and_without_work_no_cost() -> None:
    cost = cost_of(STAGES, {"top": 100}, PricesConfig())
    assert cost["amount"] is None
    assert cost["per_pair"]["top"] == {"gpu_seconds": 72.0, "amount": None}
    [line] = cost_lines(cost)
    assert "2 GPU hours" in line and "`prices`" in line
    nothing = cost_of([{"gpu_seconds": 0.0, "paid_tokens": 0}], {"top": 100}, PricesConfig(gpu_hour=1))
    assert nothing["amount"] == 0
    assert cost_lines(nothing) == ["Cost: nothing; no GPU was held, no endpoint asked."]


@pytest.mark.parametrize(
    ("prices", "amount", "without"),
    [({"gpu_hour": 2}, "4", "tokens of endpoints"), ({"million_tokens": 4}, "1", "GPU hours")],
)
def test_what_has_no_price_is_not_free(prices: dict[str, float], amount: str, without: str) -> None:
    [line] = cost_lines(cost_of(STAGES, {}, PricesConfig(**prices)))
    said = f"Cost: 2 GPU hours and 250,000 tokens of endpoints = {amount} USD. Without {without}: `prices` has none"
    assert line.startswith(said)


def test_what_a_run_inside_of_another_cost_is_in_the_reports_sum() -> None:
    inner, outer = STAGES
    cost = reporting.cost_of("experiment", [outer], PricesConfig(gpu_hour=1), before=[inner])
    assert (cost["gpu_seconds"], cost["amount"]) == (7200, 2)


def test_an_estimate_counts_a_start_once_for_each_engine_that_has_a_file(tmp_path: Path) -> None:
    store, config = Store(tmp_path), GeneratorConfig(name="g", model="m", workers=4, gpus=1)
    remember_speed(store, "generate", "f" * 64, Speed(100, 1000, busy_seconds=10, engine_starts=2, start_seconds=120))
    remember_speed(store, "generate", "f" * 64, Speed(300, 3000, busy_seconds=30, engine_starts=2, start_seconds=120))
    speed = known_speed(store, "generate", "f" * 64)
    assert speed == Speed(400, 4000, 40, 4, 240)
    # 36,000 samples take engines an hour; each takes a minute to start
    assert speed.estimate(36_000, 100, config) == "about 360,000 tokens, 16 min 0 s with 4 engines, 1.1 GPU hours"
    assert speed.estimate(36_000, 1, config) == "about 360,000 tokens, 1 h 1 min with 1 engine, 1 GPU hours"


def test_a_run_on_a_cluster_says_what_it_cost_and_so_does_the_clusters_metrics_port(
    prefect_api: str, tmp_path: Path
) -> None:
    """A generator on a (logical) GPU, a judge that is paid by the token, and now and then does not answer at once."""

    def answer(data: dict[str, Any], before: int) -> Any:
        return 503 if not before and len(data["response"]) % 3 == 0 else rating(data)

    source = write_jsonl(tmp_path / "prompts.jsonl", [*prompts(12), {"prompt": ""}, {"prompt": "Once more?"}])
    with ray_head(tmp_path / "head", gpus=1) as head, judge_endpoint(answer) as endpoint:
        asked = {"base_url": endpoint.url, "retries": 2}
        values = curate_values(
            source,
            ingest={"source": str(source), "shard_size": 4, "max_quarantined": 0.5},
            generate={"samples": 2, "generators": [generator("costly", gpus=1)]},
            score={
                "scorers": [scorer(), {"name": "judge", "type": "judge", "model": "judge-1", "judge": asked}],
            },
            prices={"gpu_hour": 3600, "million_tokens": 1000},
        )
        path = tmp_path / "curate.yaml"
        path.write_text(yaml.safe_dump(values))
        env = environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(tmp_path / "home"), **head.environment)
        command = ("curate", path, "--store", tmp_path / "store", "--set", f"ray_address={head.gcs}")
        started = time.monotonic()
        done = prefsieve(*command, "--json", env=env)
        elapsed = time.monotonic() - started
        assert done.returncode == 0, done.stderr
        shown = series(head.metrics, wait_for="ray_prefsieve_cost_total")
        again = prefsieve(*command, env=env)
    report = json.loads(done.stdout)
    rows = {row["stage"]: row for row in report["stages"]}
    assert 0 < rows["generate"]["gpu_seconds"] < elapsed
    unanswered = Counter(body["messages"][-1]["content"] for body in endpoint.asked)
    retried = sum(number - 1 for number in unanswered.values())
    assert rows["score"]["retries"] == retried > 0
    assert rows["score"]["paid_tokens"] == 110 * len(unanswered)
    assert (rows["score"]["gpu_seconds"], rows["generate"]["paid_tokens"]) == (0, 0)
    cost = report["cost"]
    assert cost["amount"] == pytest.approx(rows["generate"]["gpu_seconds"] + rows["score"]["paid_tokens"] / 1000)
    [pairs] = [row["pairs"] for row in report["subsets"]]
    assert cost["per_pair"]["top"]["amount"] == pytest.approx(cost["amount"] / pairs)

    # The process that ran the flow is gone; its numbers are not.
    assert shown["cost_total", "curate"] == pytest.approx(cost["amount"])
    assert shown["cost_per_pair", "top"] == pytest.approx(cost["per_pair"]["top"]["amount"])
    assert shown["tokens_total", "generate", "costly"] == rows["generate"]["tokens"]
    assert shown["gpu_seconds_total", "generate", "costly"] == pytest.approx(rows["generate"]["gpu_seconds"], abs=0.01)
    assert shown["samples_total", "score", "judge"] == shown["samples_total", "generate", "costly"] == 2 * 13
    assert shown["paid_tokens_total", "score", "judge"] == rows["score"]["paid_tokens"]
    assert shown["retries_total", "score", "judge"] == retried
    assert shown["shards_done_total", "generate", "costly"] == 4
    assert shown["dropped_total", "ingest", "empty prompt"] == 1
    assert "Cost: nothing" in again.stdout


def test_how_many_shards_are_open_can_be_seen_while_a_pool_is_at_work(local_ray: Any) -> None:
    [node] = [node for node in local_ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    pool = PoolSeries("generate", "watched", 3)
    pool.add({"tokens": 7})
    shown = series(url, wait_for="watched")
    assert (shown["shards", "generate", "watched"], shown["shards_open", "generate", "watched"]) == (3, 2)
    assert shown["tokens_total", "generate", "watched"] == 7


def series(url: str, wait_for: str) -> dict[tuple[str, ...], float]:
    """Ours, by name and the values of our labels."""
    deadline = time.monotonic() + 60
    while wait_for not in (text := urllib.request.urlopen(url, timeout=10).read().decode()):
        assert time.monotonic() < deadline, text[-2000:]
        time.sleep(1)
    found = {}
    for name, labels, value in re.findall(r"^ray_prefsieve_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        about = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        ours = (about[label] for label in ("stage", "model", "reason", "flow", "subset") if label in about)
        found[(name, *ours)] = float(value)
    return found
