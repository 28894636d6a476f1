"""Paths in settings: which are made absolute, and which folders may be used together."""

import sys
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from brainray.config_text import load_config
from brainray.errors import ConfigError
from brainray.orchestration.paths import check_paths, resolve_paths, resolve_tracking_uri


def test_every_path_in_settings_is_made_absolute_and_no_name_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    features = "{a: {weights: w.pt}, b: {weights: imagenet}, c: {weights: 'run:one'}}"
    given = ["labels=l.csv", "checkpoint=best", "sources={x: data, y: 's3://bucket/y'}"]
    config = resolve_paths(
        load_config(None, [*given, "encoder.weights=e.pt", f"study.features={features}"])
    )
    assert (config.labels, config.checkpoint) == (f"{tmp_path}/l.csv", f"{tmp_path}/best")
    assert config.sources == {"x": f"{tmp_path}/data", "y": "s3://bucket/y"}
    assert config.encoder.weights == f"{tmp_path}/e.pt"
    weights = {name: feature.weights for name, feature in config.study.features.items()}
    assert weights == {"a": f"{tmp_path}/w.pt", "b": "imagenet", "c": "run:one"}
    assert resolve_paths(load_config(None, ["encoder.weights=random"])).encoder.weights == "random"


def test_the_database_of_a_relative_uri_is_below_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = tmp_path / "50%25 é?#"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    for given in ("a%20b.db", "~/a%20b.db"):
        read = make_url(resolve_tracking_uri("tracking.uri", f"sqlite:///{given}?timeout=5"))
        assert (read.database, read.query) == (f"{here}/a b.db", {"timeout": "5"})
    for whole in ("sqlite:////data/50%25 é.db", "http://host:5000/~a%20b"):
        assert resolve_tracking_uri("tracking.uri", whole) == whole


def test_a_path_that_the_locale_cannot_write_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    assert resolve_paths(load_config(None, ["source=/data/size"])).source == "/data/size"
    with pytest.raises(ConfigError, match=r"source=/data/größe: .* iso8859-1.* PYTHONUTF8=1"):
        resolve_paths(load_config(None, ["source=/data/größe"]))


@pytest.mark.parametrize(
    ("storage", "is_refused"), [("data", True), ("link", True), ("data/out", False), (".", False)]
)
def test_storage_may_lie_in_a_source_or_hold_it_but_not_be_it(
    tmp_path: Path, storage: str, is_refused: bool
) -> None:
    (tmp_path / "data" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("data")
    config = load_config(None, [f"storage={tmp_path / storage}", f"sources.x={tmp_path}/data"])
    check_paths(config, ["source"])  # not what this job reads
    if is_refused:
        with pytest.raises(ConfigError, match=r"is sources\.x itself"):
            check_paths(config, ["sources"])
    else:
        check_paths(config, ["sources"])
