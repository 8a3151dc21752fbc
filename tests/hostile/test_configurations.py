"""Hostile configurations, arguments and manifests through the command line: one message, a status, nothing written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tasks.costs import SPENT, Speed, known_costs, known_speed, remember_cost, remember_speed
from tasks.errors import ConfigError, RunError
from tasks.job import Job
from tasks.samples import Held, name_part, rows_of
from tasks.store import Store, to_json
from tasks.versions import content_version, damage, fetch_version, find_version
from tests.conftest import Command, copy_store, curate_values, files_below, prompts, write_jsonl
from tests.hostile.corpus import TEXTS, HostileConfiguration, hostile_configurations
from tests.hostile.test_rows import publish_import
from tests.services import ROOT


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PREFSIEVE_STORE", str(folder / "store"))
    write_jsonl(folder / "prompts.jsonl", prompts(4))
    return folder


@pytest.mark.parametrize("one", hostile_configurations(), ids=lambda one: one.name)
def test_a_hostile_configuration_ends_with_status_2_and_one_message(
    one: HostileConfiguration, cli: Command, place: Path
) -> None:
    content = yaml.safe_dump(curate_values("prompts.jsonl")).encode() if one.content is None else one.content
    (place / "curate.yaml").write_bytes(content)
    before = files_below(place.parent)
    for flags in (["--dry-run"], ["--json"]):
        started = time.monotonic()
        status, out, err = cli("curate", "curate.yaml", *one.options, *flags)
        assert (status, out) == (2, ""), err
        assert err.startswith("prefsieve: ") and one.words in err
        assert len(err) < 4000, "a message, not the value that is wrong"
        assert time.monotonic() - started < 10
    there = files_below(place.parent)
    new = {path for path in there if path not in before and not path.startswith("here/store/")}
    assert not new and {path: there[path] for path in before} == before


ESCAPES = ["../../evil", "/tmp/evil", "..", ".", "a/b", "a\\..\\b", "top@../x", "~", "top\n", "", 5]
NAMED = {
    "tinyworld/curate": ["subset.0.name", "pair.0.name", "generate.generators.0.name", "score.scorers.0.name"],
    "tinyworld/train": ["name", "subset"],
    "tinyworld/evaluate": ["evaluate.policy", "generate.generators.0.name"],
    "experiments/pvar": ["name", "subsets.0", "curate.subset.0.name"],
}


@pytest.mark.parametrize(("config", "field"), [(config, field) for config, fields in NAMED.items() for field in fields])
def test_no_name_of_anything_in_a_configuration_is_a_path(config: str, field: str, cli: Command, place: Path) -> None:
    kind, name = config.split("/")
    flow = name if kind == "tinyworld" else "experiment"
    (place / "c.yaml").write_bytes((ROOT / "configs" / f"{config}.yaml").read_bytes())
    before = files_below(place.parent)
    for value in ESCAPES:
        status, out, err = cli(flow, "c.yaml", "--set", f"{field}={json.dumps(value)}", "--json")
        assert (status, out) == (2, ""), value
        assert err.startswith("prefsieve: ") and field in err, (value, err)
    assert files_below(place.parent) == before


@pytest.mark.parametrize("wanted", ["policy:../../x", "policy:x@../y", "policy:/etc", "policy:.."])
def test_no_training_starts_from_a_policy_outside_the_store(
    wanted: str, cli: Command, shelf: Store, place: Path
) -> None:
    (place / "c.yaml").write_bytes((ROOT / "configs" / "tinyworld" / "train.yaml").read_bytes())
    before = files_below(place.parent), files_below(Path(shelf.url))
    changes = ("--set", f"store={shelf.url}", "--set", "subset=top", "--set", f"policy.model={wanted}")
    status, out, err = cli("train", "c.yaml", *changes, "--json")
    assert (status, out) == (2, "") and "policy" in err and wanted.removeprefix("policy:") in err, err
    assert (files_below(place.parent), files_below(Path(shelf.url))) == before


@pytest.mark.parametrize(
    "url", ["../beside", "../here/../beside", "{tmp}/beside", "file://{tmp}/beside", "./a/../../beside"]
)
def test_a_store_elsewhere_is_written_there_and_nowhere_else(url: str, place: Path) -> None:
    """A folder may be anywhere: who runs it says where."""
    rows = [{"prompt": f"p{i}", "text": f"t{j}", "score": i * j} for i in range(4) for j in range(2)]
    (place / "prompts.jsonl").unlink()
    write_jsonl(place / "source" / "p.jsonl", rows)
    before = files_below(place.parent)
    values = {
        "store": url.format(tmp=place.parent),
        "import": {"source": "source/p.jsonl", "ratings": [{"name": "score"}]},
        "subset": [{"name": "top", "steps": [{"rank": "pvar", "fraction": 0.5}]}],
    }
    published = publish_import(values)
    assert (place.parent / "beside" / published / "manifest.json").is_file()
    new = {path for path in files_below(place.parent) if path not in before}
    assert new and all(path.startswith("beside/") for path in new)
    assert sorted(path.name for path in place.parent.iterdir()) == ["beside", "here"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with the subset `top`; read it only."""
    folder = tmp_path_factory.mktemp("shelf")
    rows = [{"prompt": f"p{i}", "text": f"t{j}", "score": i * j} for i in range(8) for j in range(3)]
    values = {
        "store": str(folder / "store"),
        "import": {"source": str(write_jsonl(folder / "p.jsonl", rows)), "ratings": [{"name": "score"}]},
        "subset": [{"name": "top", "steps": [{"rank": "pvar", "fraction": 0.5}]}],
    }
    publish_import(values)
    return Store(folder / "store")


@pytest.mark.parametrize("flow", ["train", "evaluate", "experiment", "curate"])
@pytest.mark.parametrize(
    "content", [b"a: &a [*a]", b"x: .nan", b"{}", b"subset: ../../x\nname: ../x\npolicy: {model: x}"]
)
def test_every_flow_refuses_what_is_no_configuration(flow: str, content: bytes, cli: Command, place: Path) -> None:
    (place / "c.yaml").write_bytes(content)
    for command in ([flow, "c.yaml", "--dry-run"], [flow, "c.yaml"], ["doctor", "c.yaml"]):
        status, out, err = cli(*command)
        assert (status, out) == (2, "") and err.startswith("prefsieve: ")


NAMES = [
    "..",
    "../..",
    "../../../etc/passwd",
    "/etc/passwd",
    "top/../top",
    "top@../../x",
    "top@*",
    "",
    "@",
    "*",
    "a" * 9000,
]


@pytest.mark.parametrize("command", ["show", "verify"])
@pytest.mark.parametrize(
    "wanted", [*NAMES, *(text for text in TEXTS.values() if "\x00" not in text)], ids=lambda w: w[:20]
)
def test_no_name_of_a_subset_leads_out_of_the_store(
    command: str, wanted: str, cli: Command, shelf: Store, tmp_path: Path
) -> None:
    if wanted.startswith("-"):
        wanted = f"./{wanted}"
    status, out, err = cli(command, wanted, "--store", shelf.url, "--json")
    assert (status, out) == (2, "") and err.startswith("prefsieve: ")
    assert not list(tmp_path.iterdir())


# --- what lies in the store and is not ours


@pytest.fixture
def published(shelf: Store, tmp_path: Path) -> tuple[Store, Path]:
    """The subset `top`, free to be changed; its folder."""
    store = copy_store(shelf, tmp_path / "store")
    return store, Path(store.full(find_version(store, "top").place))


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "broken UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "NaN": b"NaN",
    "a number of too many digits": b"9" * 5000,
    "lists without end": b"[" * 200_000,
    "mappings without end": b'{"a":' * 200_000,
    "an empty mapping": b"{}",
    "content that is none": b'{"content": 5, "version": "x"}',
    "content without counts": b'{"content": {}, "version": "x"}',
    "counts that do not add up": b'{"content": {"counts": {"into": 1, "out": 5}}}',
    "counts that are texts": b'{"content": {"counts": {"into": "a", "out": "b"}}}',
    "a pickle": b"\x80\x04\x95cos\nsystem\n.",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_manifest_is_told_by_every_command(
    content: bytes, cli: Command, published: tuple[Store, Path], tmp_path: Path
) -> None:
    store, folder = published
    (folder / "manifest.json").write_bytes(content)
    for command in (["show", "top"], ["subsets"], ["verify", "top"], ["show", "top", "--row", "00000000"]):
        status, out, err = cli(*command, "--store", store.url)
        assert status == 1 and "manifest.json" in out + err
    with pytest.raises(RunError, match="is damaged"):
        find_version(store, "top")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


@pytest.mark.parametrize(
    "content",
    [*BROKEN.values(), b'{"version": "../../.."}', b'{"version": ["x"]}', b'{"version": "*"}', b'{"version": 7}'],
)
def test_a_broken_pointer_is_told_and_never_followed_outside(
    content: bytes, cli: Command, published: tuple[Store, Path]
) -> None:
    store, folder = published
    (folder.parent / "latest.json").write_bytes(content)
    for command in ("show", "verify"):
        status, out, err = cli(command, "top", "--store", store.url, "--json")
        assert status in (1, 2) and out == "" and err.startswith("prefsieve: ")


def reseal(store: Store, folder: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """A manifest that somebody made to look whole: content changed, digests made anew. Returns NAME@VERSION."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest["content"])
    version = content_version(manifest["content"])
    manifest = {**manifest, "version": version}
    del manifest["sha256"]
    sealed = {**manifest, "sha256": hashlib.sha256(to_json(manifest)).hexdigest()}
    target = folder.parent / version
    shutil.copytree(folder, target)
    (target / "manifest.json").write_bytes(to_json(sealed))
    (folder.parent / "latest.json").write_bytes(to_json({"version": version}))
    return f"top@{version}"


ASTRAY = ["../evil", "data/../../evil", "/tmp/evil", "data//evil", "", ".", "..", "a\\..\\b", "a\x00b", 5, None, ["a"]]


@pytest.mark.parametrize("path", ASTRAY, ids=repr)
def test_a_manifest_that_names_files_outside_its_folder_is_refused_and_nothing_is_written(
    path: Any, cli: Command, published: tuple[Store, Path], tmp_path: Path
) -> None:
    store, folder = published
    evil = b"evil"
    listed = {"path": path, "bytes": len(evil), "sha256": hashlib.sha256(evil).hexdigest()}
    wanted = reseal(store, folder, lambda content: content["files"].append(listed))
    (folder.parent / "evil").write_bytes(evil)  # so that the digest would be right
    before = files_below(tmp_path)
    status, out, _ = cli("verify", wanted, "--store", store.url)
    assert status == 1 and "manifest.json" in out
    for command in ("show", "subsets"):
        arguments = [wanted] if command == "show" else []
        status, out, err = cli(command, *arguments, "--store", store.url)
        assert (status, out) == (1, "") and "is damaged" in err
    with pytest.raises(RunError, match="is damaged"):
        find_version(store, wanted)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("path", ASTRAY[:4], ids=repr)
def test_a_version_whose_manifest_leads_outside_is_not_fetched(
    path: str, published: tuple[Store, Path], tmp_path: Path
) -> None:
    store, folder = published
    version = find_version(store, "top")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["content"]["files"].append({"path": path, "bytes": 1, "sha256": "x"})
    (folder / "manifest.json").write_bytes(to_json(manifest))
    with pytest.raises(ConfigError, match="is damaged"):
        fetch_version(store, version, "", tmp_path / "target" / "deep")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    assert damage(store, version)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.clear() or content.update(name="top", counts={"into": 0, "out": 0}, files=[]),
        lambda content: content.update(summary=None),
        lambda content: content.update(summary={"rows": "many", "mean_pvar": [], "mean_margin": {}}),
        lambda content: content.update(explanation=5),
        lambda content: content.update(explanation={"steps": "x", "metrics": 7, "sources": []}),
        lambda content: content.update(subset={"steps": [{"rank": None}]}),
        lambda content: content.update(funnel=[1, "x", None]),
        lambda content: content.update(files=[]),
        lambda content: content.update(parents="x", pairing=[1]),
    ],
)
def test_a_whole_manifest_of_somebody_else_is_told_or_shown_in_part(
    change: Any, cli: Command, published: tuple[Store, Path]
) -> None:
    store, folder = published
    wanted = reseal(store, folder, change)
    for command in (["subsets"], ["show", wanted], ["verify", wanted], ["show", wanted, "--row", "00000000"]):
        for flags in ([], ["--json"]):
            status, out, err = cli(*command, *flags, "--store", store.url)
            assert status in (0, 1, 2)
            assert status == 0 or err.startswith("prefsieve: ") or "problems" in out or "not in the manifest" in out


def test_a_manifest_of_another_name_is_refused(cli: Command, published: tuple[Store, Path]) -> None:
    store, folder = published
    folder.parent.rename(folder.parent.with_name("other"))
    status, out, err = cli("show", "other", "--store", store.url)
    assert (status, out) == (1, "") and "content's name differs" in err


@pytest.mark.parametrize("files", [["../../evil"], ["/tmp/evil"], "evil", [["a"]], [5], None])
def test_a_checkpoint_that_names_files_outside_is_refused(files: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    complete = "policies/p/checkpoints/i/a/checkpoint-5/complete.json"
    store.create_json(complete, {"files": files})
    store.create("policies/p/checkpoints/i/a/evil", b"evil")
    job = object.__new__(Job)
    job.store = store
    with pytest.raises(RunError, match="is damaged"):
        job._fetched(complete, tmp_path / "room")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_files_of_strangers_in_the_store_do_not_end_a_run(place: Path) -> None:
    from tasks.ingest import ingest
    from tasks.sections import IngestConfig

    store = Store(place / "store")
    for name in ("x", "a.b.c.d", "..", "a.99999999999.b", "zz.1.zz", "a.-1.b"):
        store.create(f"prompts/cuts/{name}.", b"")
        store.create(f"prompts/cuts/{name}x", b"")
    assert ingest(IngestConfig(source="prompts.jsonl"), store).counts.out == 4


@pytest.mark.parametrize(
    "content", [*BROKEN.values(), b'{"set": 5, "counts": []}', b'{"set": "x", "counts": {"into": 1}}']
)
def test_a_broken_record_of_a_source_ends_in_words(content: bytes, place: Path) -> None:
    from tasks.ingest import ingest, inputs_digest, pointer
    from tasks.sections import IngestConfig

    store, config = Store(place / "store"), IngestConfig(source="prompts.jsonl")
    store.create(pointer(inputs_digest(config)), content)
    with pytest.raises((RunError, ConfigError)):
        ingest(config, store)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(1000) + b"PAR1", b"\x80\x04.", b"{}"])
def test_a_broken_table_ends_in_words(content: bytes, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.create("t.parquet", content)
    with pytest.raises(RunError, match=r"t\.parquet in .* is damaged"):
        store.read_table("t.parquet")


SHAPES = [
    b"[]",
    b"{}",
    b"5",
    b"null",
    b'{"shards": 5}',
    b'{"shards": [1]}',
    b'{"shards": [{"digest": "x"}]}',
    b'{"counts": []}',
    b'{"counts": {"into": 1}}',
    b'{"counts": {"into": 1, "out": 1, "dropped": []}}',
]


@pytest.mark.parametrize("content", SHAPES, ids=lambda content: content.decode())
@pytest.mark.parametrize(
    "where", ["prompts/*/manifest.json", "fingerprints/*.json", "pairs/*/manifest.json", "pairs/*/selections/*.json"]
)
def test_json_of_another_shape_in_the_store_ends_in_words(
    where: str, content: bytes, shelf: Store, tmp_path: Path
) -> None:
    store = copy_store(shelf, tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "subsets")
    files = sorted((tmp_path / "store").glob(where))
    assert files
    for file in files:
        file.write_bytes(content)
    source = Path(shelf.url).parent / "p.jsonl"
    values = {
        "store": store.url,
        "import": {"source": str(source), "ratings": [{"name": "score"}]},
        "subset": [{"name": "top", "steps": [{"rank": "pvar", "fraction": 0.5}]}],
    }
    with contextlib.suppress(RunError, ConfigError):
        publish_import(values)


@pytest.mark.parametrize("content", [*BROKEN.values(), b'{"seconds": "x"}', b'{"seconds": -1}', b'{"seconds": null}'])
def test_what_is_no_cost_is_passed_over(content: bytes, tmp_path: Path) -> None:
    store = Store(tmp_path)
    remember_cost(store, "train", "good", 5)
    store.create("costs/train/bad.json", content)
    assert known_costs(store, "train", ["bad", "good", "none"]) == {"good": 5}
    store.create("costs/generate/f/1.json", content)
    store.create_json("costs/generate/f/2.json", dict.fromkeys(SPENT, 0))
    assert known_speed(store, "generate", "f") is None
    remember_speed(store, "generate", "f", Speed(1, 2, 3, 4, 5))
    assert known_speed(store, "generate", "f") == Speed(1, 2, 3, 4, 5)


@pytest.mark.parametrize("content", [b"{}", b"5", b"null", b'["x"]', b"[[1]]", b"[1e400]", b"[-1]", b"[%d]" % 10**30])
def test_rows_of_a_part_that_are_none_end_in_words(content: bytes, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.create("prompts/rows/x.json", content)
    with pytest.raises(RunError, match=r"x\.json in .* is damaged"):
        rows_of(store)(Held(0, 1, "x"))


def test_no_bit_of_the_rows_of_a_part_flips_unnoticed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    part = name_part(store, np.array([3, 5, 17, 42]), 64)
    file = tmp_path / "prompts" / "rows" / f"{part}.json"
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(changed)
        with contextlib.suppress(RunError):
            rows = rows_of(store)(Held(0, 1, part))
            assert rows is not None and rows.tolist() == [3, 5, 17, 42], changed
