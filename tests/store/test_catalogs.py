"""A catalog says where stores lie and which they must be, and can do nothing else to who reads it."""

from __future__ import annotations

import json
import uuid
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml

from stores import make_plan, make_store
from tubelet.cli.main import main
from tubelet.errors import TubeletError
from tubelet_store.catalog.catalog import Catalog
from tubelet_store.catalog.document import MAX_DEPTH, parse
from tubelet_store.catalog.edit_catalog import add_catalog, add_store, describe, remove
from tubelet_store.reader import Store, open_store
from tubelet_store.storage import open_root


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> tuple[Store, Store]:
    folder = tmp_path_factory.mktemp("stores")
    plan = make_plan(hooks={"blocks.1": 8, "blocks.2": 6})
    return make_store(folder / "a.zarr", plan), make_store(folder / "sub/b.zarr", make_plan(clips=7), seed=1)


@pytest.fixture
def catalog(stores, tmp_path) -> str:
    url = str(tmp_path / "catalog.yaml")
    add_store(url, stores[0].url, describe(stores[0].state, "a", license="CC-BY-4.0", owner="team"))
    add_store(url, stores[1].url, describe(stores[1].state, "b"))
    return url


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: [1, 2.5, no, ~, 'x', \"y\", 2001-01-01, 0x1f, 1e3, .inf, '']\nc: {d: , e: null, f: {}}\ng: []\n",
        "# comment\na:\n  b: |\n    two\n    lines\n  c: >-\n    folded\n    text\n# end\n",
        "a:\n- 1\n- b: 2\n  c: [{d: e}]\n-\n  - x\n",
        json.dumps({"a": {"b": [1, None, True, "t"]}, "c": "{x}"}),
    ],
)
def test_a_plain_text_is_what_safe_load_makes_of_it(text):
    assert parse(text, "t").tree == yaml.safe_load(text)


def bomb() -> str:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (bomb(), "anchor or alias"),
        ("a: &x 1\nb: *x\n", "anchor or alias"),
        ("version: !!python/object/apply:os.system ['true']\n", "uses the tag"),
        ("version: !!int '2'\n", "uses the tag"),
        ("a: !x {}\n", "uses the tag"),
        ("<<: {a: 1}\n", "not valid YAML"),
        ("a: 1\na: 2\n", "duplicate key"),
        ("a: {b: 1, b: 2}\n", "duplicate key"),
        ("? [a]\n: 1\n", "not a string"),
        ("1: 2\n", "not a string"),
        ("a: " + "[" * MAX_DEPTH + "]" * MAX_DEPTH, "nested deeper"),
        ("[" * 100_000, "nested deeper|not a string"),
        ("- 1\n", "no mapping"),
        ("", "no mapping"),
        ("a: 1\n---\nb: 2\n", "second document"),
        ("a: 2001-99-99\n", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: [\n", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_hostile_or_broken_text_is_refused_in_one_line(text, why):
    with pytest.raises(TubeletError, match=why) as caught:
        parse(text, "t.yaml")
    assert "\n" not in str(caught.value)


def test_a_text_too_long_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "c.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TubeletError, match="longer than"):
        Catalog.read(str(tmp_path / "c.yaml"))


def edited(catalog: str, change) -> str:
    tree = yaml.safe_load(Path(catalog).read_text())
    change(tree)
    Path(catalog).write_text(yaml.safe_dump(tree))
    return catalog


KEY = "a/blocks.1"
TOKEN = f"{KEY}.zarr"


def url_of(tree, url):
    for token in (TOKEN, "a/blocks.2.zarr"):
        tree["data"][token]["kwargs"]["url"] = url


HOSTILE = {
    "a function in a url": lambda t: url_of(t, "{func(os:getcwd)}"),
    "a function in the text": lambda t: t["entries"][KEY]["metadata"]["tubelet"].update(owner="{func(os:getcwd)}"),
    "a function deep inside": lambda t: t["metadata"].update(x=[{"y": ["{import(os:system)}"]}]),
    "a function as a key": lambda t: t["metadata"].update({"{func(os:getcwd)}": 1}),
    "a pickle": lambda t: t["entries"][KEY]["metadata"].update(z="{pickle64(gASV)}"),
    "an environment variable": lambda t: url_of(t, "s3://x/{env(AWS_SECRET_ACCESS_KEY)}"),
    "a user parameter": lambda t: t["user_parameters"].update(x="{func(os:getcwd)}"),
    "a user parameter below": lambda t: t["entries"][KEY]["user_parameters"].update(x=1),
    "another reader": lambda t: t["entries"][KEY].update(reader="os:system"),
    "another type of data": lambda t: t["data"][TOKEN].update(datatype="os:system"),
    "another output": lambda t: t["entries"][KEY].update(output_instance="os:system"),
    "more arguments": lambda t: t["entries"][KEY]["kwargs"].update(x="y"),
    "more data arguments": lambda t: t["data"][TOKEN]["kwargs"].update(x="y"),
    "storage options": lambda t: t["data"][TOKEN]["kwargs"].update(storage_options={"secret": "x"}),
    "data that is an entry": lambda t: t["entries"][KEY]["kwargs"].update(data=f"{{data({KEY})}}"),
    "data that is not there": lambda t: t["entries"][KEY]["kwargs"].update(data="{data(none)}"),
    "a path upwards in a key": lambda t: t["entries"].update({"../a": t["entries"].pop(KEY)}),
    "a path upwards inside a key": lambda t: t["entries"].update({"a/../../b": t["entries"].pop(KEY)}),
    "an absolute path as a key": lambda t: t["entries"].update({"/etc/a": t["entries"].pop(KEY)}),
    "a path upwards in a data key": lambda t: t["data"].update({"..": {}}),
    "a path upwards in a url": lambda t: url_of(t, "{CATALOG_DIR}/../../etc"),
    "a path upwards in an absolute url": lambda t: url_of(t, "s3://bucket/../other"),
    "a path upwards in a hook": lambda t: t["entries"][KEY]["metadata"]["tubelet"].update(hook="../x"),
    "a path upwards in a name": lambda t: t["entries"][KEY]["metadata"]["tubelet"].update(store="../x"),
    "an unknown scheme": lambda t: url_of(t, "ssh://host/a.zarr"),
    "a chained scheme": lambda t: url_of(t, "simplecache::s3://bucket/a.zarr"),
    "a scheme behind the folder": lambda t: url_of(t, "{CATALOG_DIR}/s3://bucket/a.zarr"),
    "credentials in a url": lambda t: url_of(t, "s3://key:secret@bucket/a.zarr"),
    "a url that is none": lambda t: url_of(t, ["x"]),
    "another hook's data": lambda t: t["data"][TOKEN]["kwargs"].update(root="activations/blocks.2"),
    "a digest that is none": lambda t: t["entries"][KEY]["metadata"]["tubelet"].update(id="sha256:abc"),
    "two digests for one store": lambda t: t["entries"]["a/blocks.2"]["metadata"]["tubelet"].update(
        id="sha256:" + "0" * 64
    ),
    "two places for one store": lambda t: t["data"][TOKEN]["kwargs"].update(url="{CATALOG_DIR}/other.zarr"),
    "an unknown field": lambda t: t["entries"][KEY]["metadata"]["tubelet"].update(exec="x"),
    "no block of ours": lambda t: t["entries"][KEY].update(metadata={}),
    "another version": lambda t: t.update(version=1),
    "another schema": lambda t: t["metadata"].update(tubelet={"schema": 2}),
    "no entries": lambda t: t.pop("entries"),
    "entries that are a list": lambda t: t.update(entries=[]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_entry_is_refused_in_one_line(catalog, name):
    edited(catalog, HOSTILE[name])
    with pytest.raises(TubeletError) as caught:
        Catalog.read(catalog)
    assert "\n" not in str(caught.value)
    assert "secret@" not in str(caught.value).replace(repr("s3://key:secret@bucket/a.zarr"), "")


def test_a_remote_catalog_points_at_no_path_of_the_readers_machine(catalog):
    url = f"memory://{uuid.uuid4().hex}/catalog.yaml"
    folder, name = url.rsplit("/", 1)
    text = Path(catalog).read_text()
    assert "url: /" in text
    open_root(folder).replace(name, text.encode())
    with pytest.raises(TubeletError, match="path of the reader's machine"):
        Catalog.read(url)
    open_root(folder).replace(name, text.replace("url: /", "url: file:///").encode())
    with pytest.raises(TubeletError, match="path of the reader's machine"):
        Catalog.read(url)


def test_intake_opens_what_we_write_and_reads_through_dask(stores, catalog):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        intake = pytest.importorskip("intake")
        add_catalog(f"{Path(catalog).parent}/top.yaml", catalog, "team")
        opened = intake.open_catalog(catalog)
        nested = intake.open_catalog(f"{Path(catalog).parent}/top.yaml")["team"].read()
    assert set(opened.entries) == {"a/blocks.1", "a/blocks.2", "b/blocks.1"}
    for reader in (opened, nested):
        array = reader["a/blocks.2"].read()
        assert type(array).__module__.startswith("dask")
        np.testing.assert_array_equal(array.compute(), stores[0]["blocks.2"][:])


def test_a_name_opens_the_store_it_means(stores, catalog):
    for name in ("a", "a/blocks.2"):
        store = open_store(f"{catalog}#{name}")
        assert store.identity == stores[0].identity
    with pytest.raises(TubeletError, match=r"no store 'aa'. Did you mean 'a'"):
        open_store(f"{catalog}#aa")
    with pytest.raises(TubeletError, match="No catalog at"):
        open_store(f"{catalog}.yaml#a")


def test_another_store_in_its_place_is_an_error(tmp_path):
    catalog = str(tmp_path / "catalog.yaml")
    store = make_store(tmp_path / "s.zarr")
    add_store(catalog, store.url, describe(store.state, "s"))
    (tmp_path / "s.zarr").rename(tmp_path / "gone")
    assert main(["catalog", "check", "--catalog", catalog]) == 1
    make_store(tmp_path / "s.zarr", seed=9)
    with pytest.raises(TubeletError, match=f"not the store that the catalog means.*{store.identity}"):
        open_store(f"{catalog}#s")
    assert main(["catalog", "check", "s", "--catalog", catalog]) == 1


def test_a_new_version_takes_the_name_and_the_old_digest_still_opens(stores, catalog):
    first, second = stores
    kept = add_store(catalog, second.url, describe(second.state, "a"), replace=True)
    assert open_store(f"{catalog}#a").identity == second.identity
    assert open_store(f"{catalog}#{kept}").identity == first.identity
    assert Catalog.read(catalog).find("a").about.parents == (first.identity,)


COMMENTED = """\
# top
version: 2   # intake
metadata: {tubelet: {schema: 1}}
user_parameters: {}
aliases: {}
# the data
data:
    # about x
    x/blocks.1.zarr:
        datatype: intake.readers.datatypes:Zarr
        kwargs: {url: "{CATALOG_DIR}/x.zarr", root: activations/blocks.1}
        metadata: {}
        user_parameters: {}   # none

# the entries
entries:
    # about x
    x/blocks.1:
        reader: intake.readers.readers:DaskZarr
        kwargs: {data: "{data(x/blocks.1.zarr)}"}
        output_instance: dask.array:Array
        user_parameters: {}
        metadata:
            tubelet: {store: x, hook: blocks.1, shape: [null, 4, 15, 8], dtype: float16, description: |
                }"""
COMMENTED = COMMENTED.replace(", description: |\n                }", "}   # no digest")


@pytest.mark.parametrize("end", ["", "\n", "\n\n# the end\n"])
def test_editing_touches_no_other_line(stores, tmp_path, end):
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text(COMMENTED + end)
    before = COMMENTED.splitlines()
    add_store(str(catalog), stores[0].url, describe(stores[0].state, "a"))
    after = catalog.read_text().splitlines()
    assert [line for line in after if line in before and line.strip()] == [line for line in before if line.strip()]
    assert [entry.name for entry in Catalog.read(str(catalog)).stores] == ["x", "a"]
    remove(str(catalog), "a")
    assert catalog.read_text().rstrip() == (COMMENTED + end).rstrip()
    remove(str(catalog), "x")
    left = catalog.read_text()
    assert "about x" not in left
    assert "# the entries" in left
    assert Catalog.read(str(catalog)).stores == []
    add_store(str(catalog), stores[1].url, describe(stores[1].state, "b"))
    assert [entry.name for entry in Catalog.read(str(catalog)).stores] == ["b"]


def test_a_catalog_in_braces_is_read_but_not_edited(stores, catalog):
    Path(catalog).write_text(json.dumps(yaml.safe_load(Path(catalog).read_text())))
    assert len(Catalog.read(catalog).stores) == 2
    with pytest.raises(TubeletError, match="written in braces"):
        remove(catalog, "a")
    assert len(Catalog.read(catalog).stores) == 2


def test_names_in_use_and_names_unknown(stores, catalog):
    before = Path(catalog).read_text()
    with pytest.raises(TubeletError, match="already has a store 'a'"):
        add_store(catalog, stores[1].url, describe(stores[1].state, "a"))
    with pytest.raises(TubeletError, match="lists no store 'z'"):
        remove(catalog, "z")
    assert Path(catalog).read_text() == before


def test_nested_catalogs_are_read_once_whatever_their_circle(stores, tmp_path):
    one, two = str(tmp_path / "one.yaml"), f"memory://{uuid.uuid4().hex}/two.yaml"
    add_store(one, stores[0].url, describe(stores[0].state, "a"))
    folder, name = two.rsplit("/", 1)
    open_root(folder).replace(
        name, b"version: 2\nmetadata: {}\nuser_parameters: {}\naliases: {}\ndata: {}\nentries: {}\n"
    )
    add_catalog(two, two, "myself")
    add_catalog(one, two, "other")
    add_catalog(one, one, "me")
    catalog = Catalog.read(one)
    assert [entry.name for entry in catalog.stores] == ["a"]
    assert catalog.problems == []
    top = str(tmp_path / "top.yaml")
    add_catalog(top, one, "team")
    assert open_store(f"{top}#team/a").identity == stores[0].identity


def test_a_chain_of_catalogs_ends_and_a_broken_one_hides_nothing(stores, tmp_path):
    urls = [str(tmp_path / f"{i}.yaml") for i in range(8)]
    add_store(urls[7], stores[0].url, describe(stores[0].state, "deep"))
    for above, below in zip(reversed(urls[:-1]), reversed(urls[1:]), strict=True):
        add_catalog(above, below, "n")
    add_store(urls[0], stores[0].url, describe(stores[0].state, "mine"))
    catalog = Catalog.read(urls[0])
    assert [entry.name for entry in catalog.stores] == ["mine"]
    assert ["nested too deep" in problem for problem in catalog.problems] == [True]
    Path(urls[1]).write_text("a: &a 1")
    catalog = Catalog.read(urls[0])
    assert [entry.name for entry in catalog.stores] == ["mine"]
    assert "anchor" in catalog.problems[0]


def test_search_by_every_field(stores, catalog):
    found = Catalog.read(catalog)
    names = lambda **words: [entry.name for entry in found.search(**words)]  # noqa: E731
    assert names() == ["a", "b"]
    assert names(license="cc-by") == ["a"]
    assert names(hook="blocks.2") == ["a"]
    assert names(dataset="TEST") == ["a", "b"]
    assert names(backbone="videomae") == []
    assert names(text="team") == ["a"]


def test_the_verb(stores, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["catalog", "list"]) == 2
    assert main(["catalog", "add", "a", stores[0].url, "--license", "CC0-1.0"]) == 0
    assert main(["catalog", "add", "team", "catalog.yaml", "--catalog", "top.yaml"]) == 0
    capsys.readouterr()
    assert main(["catalog", "list", "--catalog", "top.yaml", "--format", "json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["name"], record["id"], record["license"]) == ("team/a", stores[0].identity, "CC0-1.0")
    assert main(["catalog", "show", "a"]) == 0
    assert stores[0].identity in capsys.readouterr().out
    assert main(["catalog", "check"]) == 0
    assert main(["catalog", "remove", "a"]) == 0
    assert main(["catalog", "show", "a"]) == 2
    assert main(["catalog", "show"]) == 2
