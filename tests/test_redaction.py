"""What is secret is shown nowhere."""

import sys

import pytest

from brainray.config_text import flatten, load_config, to_yaml
from brainray.errors import ConfigError
from brainray.redaction import command_line, redacted


def test_a_command_with_bytes_that_are_no_text_can_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--set", "source=/data/\udce9", "api_key=abc"])
    assert command_line() == r"train.py --set 'source=/data/\udce9' api_key=***"
    assert command_line().encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at http://user:hunter2@host:5000/x failed", "at http://***@host:5000/x failed"),
        ("postgresql+psycopg2://u:hunter2@db/m", "postgresql+psycopg2://***@db/m"),
        ("https://hunter2@host", "https://***@host"),
        ("http://user:p@hunter2@host:5000/x", "http://***@host:5000/x"),
        ("mysql+pymysql://u:Zx/9+k=@db:3306/m", "mysql+pymysql://***@db:3306/m"),
        ('mysql://u:it\'s/"me"@db/m is away', "mysql://***@db/m is away"),
        ("hdfs://namenode:8020/user/a@b", "hdfs://namenode:8020/user/a@b"),
        ("s3://b/x?access_key=AKIA&secret_key=hunter2", "s3://b/x?access_key=***&secret_key=***"),
        ("AWS_SECRET_ACCESS_KEY=hunter2 next", "AWS_SECRET_ACCESS_KEY=*** next"),
        ("https://a.blob/x?sp=r&sig=hunter2%3D", "https://a.blob/x?sp=r&sig=***"),
        ("Authorization: Bearer hunter2hunter2", "Authorization: Bearer ***"),
        ('{"Authorization": "Basic aHVudGVyMjpodW50ZXIy"}', '{"Authorization": "Basic ***"}'),
        ("/data/Basic radiology/x", "/data/Basic radiology/x"),
        ("--set tracking.uri=http://u:hunter2@h a.b=1", "--set tracking.uri=http://***@h a.b=1"),
        ("mail me@host, augment.max_blur_sigma=1", "mail me@host, augment.max_blur_sigma=1"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
    ],
)
def test_secrets_are_starred_and_the_rest_stays(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert redacted(expected) == expected


@pytest.mark.parametrize(
    "key", ["storage", "source", "labels", "checkpoint", "sources.one", "encoder.weights"]
)
def test_a_uri_with_a_secret_is_refused_without_showing_it(key: str) -> None:
    for uri in ("s3://KEY:hunter2@bucket/x", "s3://bucket/x?secret_key=hunter2"):
        with pytest.raises(ConfigError, match=rf"{key}: .* contains a password or key") as error:
            load_config(None, [f"{key}={uri}"])
        assert "hunter2" not in str(error.value)
    path = "/data/num_tokens=5/x"  # a folder of this machine, and no query
    assert path in to_yaml(load_config(None, [f"{key}={path}"]))


def test_what_is_kept_of_a_config_has_no_password() -> None:
    config = load_config(None, ["tracking.uri=http://u:hunter2@host:5000"])
    assert config.tracking.uri == "http://u:hunter2@host:5000"
    kept = config.without_secrets()
    assert "hunter2" not in to_yaml(config) + str(flatten(kept))
    assert kept.tracking.uri == "http://***@host:5000"
