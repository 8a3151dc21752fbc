"""What a store costs: requests to an S3 server grow with the shards, by so many each and no more."""

from __future__ import annotations

from pathlib import Path

from benchmarks.scale import per_shard, requested

FEW, MANY = 4, 20

# ingest      the shard, and where it was cut                                                        2
# generate    is it there, its prompts, three for the engine's faults, the completions               6
# score       is it there, its prompts and completions, three for the engine's faults, the rewards   7
# pair        its prompts, completions and rewards, and of some the rewards for PVar's prior         4
# publish     its prompts and completions, for each of two subsets that take a pair of it            4
MOST = 2 + 6 + 7 + 4 + 4
MOST_AGAIN = 2  # its completions and its rewards: what is missing there is in these files alone
ALL_ELSE = 110  # handles, manifests, pages of listings, the published files


def test_a_shard_costs_a_bounded_number_of_requests(prefect_api: str, tmp_path: Path) -> None:
    runs = [requested(tmp_path / str(shards), shards, PREFECT_API_URL=prefect_api) for shards in (FEW, MANY)]
    first, again = per_shard(runs, "first"), per_shard(runs, "again")
    assert 0 < first["all"] <= MOST, first
    assert 0 < again["all"] <= MOST_AGAIN, again
    for run in runs:
        assert run["first"]["all"] <= MOST * run["shards"] + ALL_ELSE, run
        assert run["again"]["all"] <= MOST_AGAIN * run["shards"] + ALL_ELSE, run
