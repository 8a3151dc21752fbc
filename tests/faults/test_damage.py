"""Files of the store that somebody else cut short or in which a bit flipped."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.errors import RunError
from tasks.records import PAIRED
from tasks.store import Store
from tests.conftest import Curated, copy_store, curate_stages, files_below

Damage = Callable[[bytes], bytes]


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes, bit: int = -1) -> bytes:
    """One bit; without a number, one of the first quarter, where a table has its first columns."""
    bit = len(data) * 2 if bit < 0 else bit
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def flipped_early(data: bytes) -> bytes:
    """In the first column: most of a small table of pairs is its description."""
    return flipped(data, min(len(data) * 2, 8 * 300))


def published(run: Curated) -> list[str]:
    return [str(version) for version in run.versions]


@pytest.fixture(scope="module")
def interrupted(fake_run: Curated, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run that ended before it made pairs."""
    store = copy_store(fake_run.store, tmp_path_factory.mktemp("damage") / "store")
    shutil.rmtree(Path(store.url) / "pairs")
    shutil.rmtree(Path(store.url) / "subsets")
    return store


@pytest.mark.parametrize("damage", [truncated, flipped])
@pytest.mark.parametrize(
    "where", ["prompts/shards", "prompts/*/manifest.json", "prompts/sources/*.json", "completions", "rewards"]
)
def test_a_damaged_file_is_named_and_once_removed_is_the_only_one_made_again(
    where: str, damage: Damage, interrupted: Store, fake_run: Curated, tmp_path: Path
) -> None:
    store = copy_store(interrupted, tmp_path / "store")
    folder = Path(store.url)
    file = next(path for path in sorted(folder.glob(where if "*" in where else f"{where}/**/*.parquet")))
    file.write_bytes(damage(file.read_bytes()))
    name = str(file.relative_to(folder))
    with pytest.raises(RunError, match=f"{name} in .* is damaged; remove it.* and run again"):
        curate_stages(fake_run.config, store)
    file.unlink()
    before = files_below(folder)
    again = curate_stages(fake_run.config, store)
    assert published(again) == published(fake_run)
    after = files_below(folder)
    assert {path: after[path] for path in before} == before
    stages = ("prompts", "completions", "rewards")
    assert [path for path in after if path not in before and path.startswith(stages)] == [name]


def answered_otherwise(store: Store) -> str:
    """A file of completions that an engine made again, with other texts; returns its path."""
    (path, *_) = store.list("completions")
    table = store.read_table(path)
    digests = [[digest + 1 for digest in row] for row in table["text_digests"].to_pylist()]
    column = table.schema.get_field_index("text_digests")
    store.remove_file(path)
    store.create_table(path, table.set_column(column, table.field(column), pa.array(digests, table.field(column).type)))
    return path


def test_rewards_of_texts_that_are_answered_otherwise_now_are_told(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    for folder in ("pairs", "subsets"):
        shutil.rmtree(Path(store.url) / folder)
    path = answered_otherwise(store)
    with pytest.raises(RunError, match=rf"rewards/.* rates other texts than those of {path} now; remove it and run"):
        curate_stages(fake_run.config, store)
    for rewards in Path(store.url).glob(f"rewards/*/{path.removeprefix('completions/')}"):
        rewards.unlink()
    assert curate_stages(fake_run.config, store).versions


def test_pairs_of_texts_that_are_answered_otherwise_now_are_told(fake_run: Curated, tmp_path: Path) -> None:
    """Also where their rewards were made again, which the table of pairs does not show by its name."""
    store = copy_store(fake_run.store, tmp_path / "store")
    shutil.rmtree(Path(store.url) / "subsets")
    path = answered_otherwise(store)
    for rewards in Path(store.url).glob(f"rewards/*/{path.removeprefix('completions/')}"):
        rewards.unlink()
    with pytest.raises(RunError, match=rf"{path} has other texts now than pairs/\w+ was made of; remove that and run"):
        curate_stages(fake_run.config, store)
    # The same where a run ended between the table of pairs and its manifest: the table that is there stays.
    for manifest in Path(store.url).glob("pairs/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(RunError, match=rf"{path} has other texts now"):
        curate_stages(fake_run.config, store)
    shutil.rmtree(Path(store.url) / "pairs")
    assert curate_stages(fake_run.config, store).versions


def test_pairs_of_before_they_kept_seals_are_published_as_ever(fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    shutil.rmtree(Path(store.url) / "subsets")
    for file in Path(store.url).glob("pairs/*/pairs.parquet"):
        assert PAIRED in pq.read_metadata(file).metadata
        table = pq.read_table(file)
        file.unlink()
        pq.write_table(table, file)
        assert PAIRED not in pq.read_metadata(file).metadata
    assert published(curate_stages(fake_run.config, store)) == published(fake_run)


@pytest.mark.parametrize("damage", [truncated, flipped_early])
@pytest.mark.parametrize("where", ["pairs/*/pairs.parquet", "pairs/*/manifest.json", "pairs/*/selections/*.parquet"])
def test_damaged_pairs_are_named_and_made_again(where: str, damage: Damage, fake_run: Curated, tmp_path: Path) -> None:
    store = copy_store(fake_run.store, tmp_path / "store")
    shutil.rmtree(Path(store.url) / "subsets")
    for file in sorted(Path(store.url).glob(where)):
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RunError, match=r"is damaged; remove it.* and run again"):
        curate_stages(fake_run.config, store)
    for file in sorted(Path(store.url).glob(where)):
        file.unlink()
    assert published(curate_stages(fake_run.config, store)) == published(fake_run)


def test_no_bit_of_a_file_flips_unnoticed(fake_run: Curated, store: Store) -> None:
    """A thousand bits of each kind of file: an error, or the same content."""
    rng = random.Random(0)
    for where in ("completions", "rewards", "prompts/shards", "pairs"):
        path = next(name for name in fake_run.store.list(where) if name.endswith(".parquet"))
        whole, raw = fake_run.store.read_table(path), fake_run.store.read(path)
        for number, bit in enumerate(rng.sample(range(8 * len(raw)), 1000)):
            changed = f"{where}/{number}.parquet"
            store.create(changed, flipped(raw, bit))
            check_same_or_told(lambda changed=changed: store.read_table(changed), whole)  # type: ignore[misc]
    path = next(name for name in fake_run.store.list("prompts") if name.endswith("manifest.json"))
    whole, raw = fake_run.store.read_json(path), fake_run.store.read(path)
    for bit in rng.sample(range(8 * len(raw)), min(1000, 8 * len(raw))):
        store.create(f"json/{bit}.json", flipped(raw, bit))
        check_same_or_told(lambda bit=bit: without_seal(store.read_json(f"json/{bit}.json")), whole)  # type: ignore[misc]


def check_same_or_told(read: Callable[[], Any], whole: Any) -> None:
    try:
        found = read()
    except RunError as error:
        assert "is damaged; remove it" in str(error)
    else:
        assert repr(plain(found)) == repr(plain(whole))  # NaN is not equal to itself


def plain(value: Any) -> Any:
    return value.to_pylist() if isinstance(value, pa.Table) else value


def without_seal(value: dict[str, Any]) -> dict[str, Any]:
    """A bit of the seal's own key makes it another key, and the content stays."""
    return {key: value[key] for key in value if key == "shards"}
