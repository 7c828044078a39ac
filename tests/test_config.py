"""The configuration loader: merging, overrides, and errors a person can act on."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from pipeline.config import SHIPPED, StrictModel, config_digest, dump_yaml, help_text, load_config, merge
from pipeline.errors import ConfigError
from pipeline.tracking.config import TrackingConfig


class Inner(StrictModel):
    rate: float = Field(1e-3, description="A rate.")
    sizes: tuple[int, ...] = Field((1, 2), description="Sizes.")


class Folder(StrictModel):
    kind: Literal["folder"] = Field("folder", description="A folder.")
    depth: int = Field(1, description="How deep.")


class Tar(StrictModel):
    kind: Literal["tar"] = Field("tar", description="A tar.")
    member: str = Field("*", description="Which members.")


class Model(StrictModel):
    name: str = Field(..., description="The name.")
    inner: Inner = Field(Inner(), description="The inner section.")
    source: Annotated[Folder | Tar, Field(discriminator="kind")] = Field(Folder(), description="The source.")
    note: str | None = Field(None, description="A note.")


def write(tmp_path: Path, text: str, name: str = "c.yaml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_files_merge_left_to_right_and_overrides_win(tmp_path: Path) -> None:
    a = write(tmp_path, "name: a\ninner: {rate: 1e-4, sizes: [3]}\n", "a.yaml")
    b = write(tmp_path, "inner: {sizes: [4, 5]}\n", "b.yaml")
    config = load_config(Model, [a, b], ["name=c", "source.kind=tar", "source.member=x.png"])
    assert config.name == "c"
    assert config.inner == Inner(rate=1e-4, sizes=(4, 5))
    assert config.source == Tar(member="x.png")


def test_a_shipped_file_is_found_from_anywhere_and_a_file_that_is_here_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "configs/train/photos_256.yaml"
    assert dict(yaml.safe_load((SHIPPED / "train" / "photos_256.yaml").read_text()))  # what a Model must refuse
    with pytest.raises(ConfigError, match="there is no such key"):
        load_config(Model, [name])
    with pytest.raises(ConfigError, match=r"no configuration file .*; did you mean configs/train/photos_256\.yaml\?"):
        load_config(Model, ["configs/train/photos_265.yaml"])
    (tmp_path / "configs" / "train").mkdir(parents=True)
    write(tmp_path, "name: mine\n", name)
    assert load_config(Model, [name]).name == "mine"


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("2.", 2.0), ("1.5e3", 1500.0), ("3", 3.0)]
)
def test_numbers_are_numbers(text: str, value: float) -> None:
    assert load_config(Model, [], ["name=x", f"inner.rate={text}"]).inner.rate == value


@pytest.mark.parametrize("text", ["1e-4x", "v1e5", "0x1f.jpg", "1.2.3"])
def test_text_that_only_looks_like_a_number_stays_text(text: str) -> None:
    assert load_config(Model, [], [f"name={text}"]).name == text


def test_every_problem_is_reported_at_once_with_the_key_that_was_meant(tmp_path: Path) -> None:
    path = write(tmp_path, "nmae: x\ninner: {rte: 1, sizes: big}\nsource: {kind: foldr}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Model, [path], [])
    text = str(caught.value)
    assert "5 problems" in text
    assert "nmae = x: there is no such key; did you mean name?" in text
    assert "inner.rte = 1: there is no such key; did you mean inner.rate?" in text
    assert "inner.sizes = big" in text
    assert "did you mean folder?" in text
    assert "name: this key is required" in text


def test_problems_inside_a_union_name_the_users_key() -> None:
    with pytest.raises(ConfigError, match=r"source\.depht = 3: there is no such key; did you mean source\.depth\?"):
        load_config(Model, [], ["name=x", "source.kind=folder", "source.depht=3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", r"key 'name' is given twice \(lines 1 and 2\)"),
        ("name: [a\n", "no valid YAML at line"),
        ("- a\n- b\n", "holds a list"),
        ("name: !!python/object:os.system x\n", "could not determine a constructor"),
        ("name: !!binary aGk=\n", "unknown type"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Model, [write(tmp_path, text)], [])


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "name: a\n", "train.yaml")
    with pytest.raises(ConfigError, match=r"did you mean .*train\.yaml"):
        load_config(Model, [str(tmp_path / "trian.yaml")], [])
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Model, [str(tmp_path / "b.yaml")], [])


@pytest.mark.parametrize(
    "text",
    [
        "100% #1",
        "a #b",
        "cat: dog",
        "*.jpg",
        "&x y",
        "@home",
        "!tag x",
        "| x",
        "> y",
        "%x",
        "a, b",
        "- a",
        "? a",
        "`a`",
    ],
)
def test_an_override_is_its_text(text: str) -> None:
    for whole in (text, f"[x] {text}", f"'a' {text}", f"x\ny: {text}"):
        assert load_config(Model, [], [f"name={whole}"]).name == whole


@pytest.mark.parametrize(
    ("text", "value"), [("'a #b'", "a #b"), ('"1"', "1"), ("", ""), ("null", None), ("~", None), ('"a\\tb"', "a\tb")]
)
def test_an_override_in_quotes_is_what_they_hold(text: str, value: str | None) -> None:
    assert load_config(Model, [], ["name=x", f"note={text}"]).note == value


def test_an_override_that_is_meant_to_be_a_list_says_what_is_wrong_with_it() -> None:
    with pytest.raises(ConfigError, match="is no valid YAML"):
        load_config(Model, [], ["name=x", "inner.sizes=[1, 2"])


def test_a_section_without_its_kind_says_so() -> None:
    with pytest.raises(ConfigError, match=r"source\.kind: this key is required"):
        load_config(Model, [], ["name=x", "source.depth=2"])


@pytest.mark.parametrize("name", ["team!", "a//b", "../up", "", "x" * 251])
def test_tags_that_mlflow_would_refuse_are_refused_before_anything(name: str) -> None:
    assert TrackingConfig(tags={"team: vision/a b-c.1": "x"}).tags
    with pytest.raises(ValidationError, match="no name of an MLflow tag"):
        TrackingConfig(tags={name: "x"})
    with pytest.raises(ValidationError, match="over MLflow's 8000"):
        TrackingConfig(tags={"a": "x" * 8001})


def test_a_key_of_another_variant_says_which() -> None:
    with pytest.raises(
        ConfigError, match=r"source\.member = x: there is no such key; it exists where source\.kind = tar"
    ):
        load_config(Model, [], ["name=x", "source.kind=folder", "source.member=x"])


@pytest.mark.parametrize("override", ["name", "=x", "a..b=1", ".a=1"])
def test_bad_overrides_are_explained(override: str) -> None:
    with pytest.raises(ConfigError, match="cannot be understood"):
        load_config(Model, [], [override])


def test_models_are_frozen_and_strict() -> None:
    config = load_config(Model, [], ["name=x"])
    with pytest.raises(Exception, match="frozen"):
        config.name = "y"  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"inner\.rate = fast"):
        load_config(Model, [], ["name=x", "inner.rate=fast"])
    with pytest.raises(ConfigError, match="name = 3"):
        load_config(Model, [], ["name=3"])


def test_the_resolved_configuration_reads_back(tmp_path: Path) -> None:
    config = load_config(Model, [], ["name=x", "source.kind=tar", "inner.rate=1e-7"])
    again = load_config(Model, [write(tmp_path, dump_yaml(config))], [])
    assert again == config
    assert config_digest(again) == config_digest(config)
    assert config_digest(load_config(Model, [], ["name=y"])) != config_digest(config)


values = st.recursive(st.integers(), lambda v: st.dictionaries(st.sampled_from("abc"), v, max_size=3), max_leaves=6)
mappings = st.dictionaries(st.sampled_from("abc"), values, max_size=3)


@pytest.mark.integration
@given(mappings, mappings, mappings)
def test_merging_is_associative_when_shapes_agree(a: dict, b: dict, c: dict) -> None:  # type: ignore[type-arg]
    assert merge(a, {}) == a
    assert merge({}, a) == a
    assert merge(merge(a, b), b) == merge(a, b)


def test_files_take_values_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "s3://b: #1")
    monkeypatch.setenv("DEPTH", "7")
    file = write(
        tmp_path,
        "name: ${env:BUCKET}/x-${env:DEPTH}\n"
        "source: {kind: folder, depth: '${env:DEPTH}'}\nnote: '$DEPTH ${DEPTH}'\n",
    )
    config = load_config(Model, [file])
    assert config.name == "s3://b: #1/x-7"
    assert isinstance(config.source, Folder)
    assert config.source.depth == 7
    assert config.note == "$DEPTH ${DEPTH}"
    # An override is its text: a shell has an environment of its own.
    assert load_config(Model, [file], ["note=${env:DEPTH}"]).note == "${env:DEPTH}"


@pytest.mark.parametrize(
    ("name", "said"), [("NOT_SET_ANYWHERE", "not set"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("HF_TOKEN", "secret")]
)
def test_variables_that_are_not_set_or_secret_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    if said == "secret":
        monkeypatch.setenv(name, "planted")
    file = write(tmp_path, f"name: a\ninner: {{}}\nnote: x ${{env:{name}}}\n")
    with pytest.raises(ConfigError, match=said) as refused:
        load_config(Model, [file])
    assert (refused.value.key, refused.value.value) == ("note", f"${{env:{name}}}")
    assert "planted" not in str(refused.value)


def test_help_lists_every_key_with_type_default_and_description() -> None:
    text = help_text(Model)
    assert "name  (text; required)\n    The name." in text
    assert "inner.rate  (number; default 0.001)" in text
    assert "source.kind  (folder | tar; default folder)" in text
    assert "source.depth  (whole number; default 1; only kind = folder)" in text
    assert "source.member  (text; default *; only kind = tar)" in text


@pytest.mark.parametrize(
    "uri", ["s3://key:planted/Secret@bucket/x", "ftp://u:planted@h/x", "https://planted@h/x", "http://u:planted@h",
     "simplecache::https://u:planted@h/x", "https://a.blob/x?sv=1&sig=planted", "https://h/x?access_token=planted",
     "https://b/x?X-Amz-Signature=planted&part=3", "zip://a.jpg::https://h/x.zip?X-Goog-Signature=planted"]
)  # fmt: skip
def test_passwords_in_uris_are_refused_and_not_shown(uri: str) -> None:
    from pipeline.encode.config import EncodeJobConfig

    with pytest.raises(ConfigError, match="holds a password") as caught:
        load_config(EncodeJobConfig, [], [f"source.uri={uri}"])
    assert "source.uri = " in str(caught.value)
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["abfs://container@account/x", "s3://b/a:b@c", "hf://datasets/u/n@rev", "http://h/@x"]
)
def test_other_uses_of_the_at_sign_pass(uri: str) -> None:
    from pipeline.maintenance.config import VerifyJobConfig

    assert load_config(VerifyJobConfig, [], [f"data.uri={uri}"]).data.uri == uri


@pytest.mark.parametrize(
    ("job", "old", "new"),
    [
        ("encode", "encode.actor_cpus", "encode.num_cpus"),
        ("encode", "encode.actor_gpus", "encode.num_gpus"),
        ("train", "train.cpus_per_worker", "train.num_cpus"),
    ],
)
def test_a_key_that_was_renamed_is_refused_by_its_new_name(job: str, old: str, new: str) -> None:
    module, _, name = importlib.import_module(f"jobs.{job}").JOB.config.partition(":")
    model = getattr(importlib.import_module(module), name)
    with pytest.raises(ConfigError, match=f"{old} = 2: there is no such key; it is called {new} now"):
        load_config(model, [], [f"{old}=2"])
