"""Configuration is validated at the door, and survives the way to a file and back."""

import time
from pathlib import Path

import pytest
import yaml

from brainray.config import AugmentConfig
from brainray.config_text import flatten, known_keys, load_config, parse_config, parse_yaml, to_yaml
from brainray.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_name_their_command(path: Path) -> None:
    assert load_config(path).name
    assert f"--config configs/{path.name}" in path.read_text().split("\n\n")[0]


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train:\n  num_epochs: 3\n  image_size: 64\n")
    config = load_config(path, ["train.num_epochs=7", "train.learning_rate=1e-3"])
    assert config.train.num_epochs == 7
    assert config.train.image_size == 64
    assert config.train.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.num_epoch=3", "unknown key 'train.num_epoch' (did you mean 'train.num_epochs'?)"),
        ("nonsense=1", "unknown key 'nonsense' (known keys: name, dataset, run, "),
        ("trian.num_epochs=5", "unknown key 'trian' (did you mean 'train'?)"),
        ("study.features.a.lamda_cluster=1", "(did you mean 'study.features.a.lambda_cluster'?)"),
        ("study.features={v1.2: {weight: a}}", "(did you mean 'study.features.v1.2.weights'?)"),
        ("study.features.a.x=1", "(known keys: study.features.a.encoder, study.features.a.wei"),
        ("train=3", "train: this is a section: set the keys within it, not '3'"),
        ("evaluation.siblings=a", "evaluation.siblings: write a list, such as [a, b], not 'a'"),
        ("tune.space.train.learning_rate.log=[1, 2]", "train.learning_rate.log needs one of choi"),
        ("tune.space.train.learning_rate={log: [1, 2]}", "train.learning_rate needs one of choic"),
        ("num_epochs=5", "(did you mean 'train.num_epochs' or 'self_supervision.num_epochs'?)"),
        ("num_epoch=5", "(did you mean 'train.num_epochs' or 'self_supervision.num_epochs'?)"),
        ("objective.name=magic", "objective.name: Input should be 'joint', 'supervised'"),
        ("train.num_epochs=0", "train.num_epochs: Input should be greater than or equal to 1"),
        ("train.learning_rate=nan", "train.learning_rate: Input should be a finite number"),
        ("train.learning_rate=.nan", "train.learning_rate: Input should be a valid number"),
        ("split.labelled_fraction=1.5", "split.labelled_fraction"),
        ("train.growth_epochs=20", "leaves no epoch of train.num_epochs (20)"),
        ("name=../escape", "not a plain name"),
        ("storage", "write dotted.key=value"),
        ("tracking.uri=mlflow:5000", "'mlflow:5000' has no scheme: write http://mlflow:5000"),
        ("registry.name=mri/x", "registry.name: 'mri/x' is no name for MLflow"),
        ("registry.name=mri:1", "registry.name: 'mri:1' is no name for MLflow"),
        ("registry.name=' '", "registry.name: ' ' is no name for MLflow"),
        ("seed.deeper=1", "seed"),
    ],
)
def test_a_bad_override_names_the_key_and_the_remedy(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_section_without_keys_has_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train:\n  # num_epochs: 3\naugment_unlabelled:\nclasses:\n  map:\n")
    assert load_config(path) == load_config(None)
    with pytest.raises(ConfigError, match="unknown key 'trian'"):
        load_config(None, ["trian=null"])
    with pytest.raises(ConfigError, match="num_epochs: Input should be a valid integer, not None"):
        load_config(None, ["train.num_epochs="])


def test_a_section_that_a_file_leaves_empty_can_be_set(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train:\n  # num_epochs: 3\nclasses:\n  map:\n")
    config = load_config(tmp_path / "a.yaml", ["train.num_epochs=5", "classes.map.a=b"])
    assert (config.train.num_epochs, config.classes.map) == (5, {"a": "b"})


def test_names_of_a_file_are_text_as_those_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "study:\n  features:\n"
        "    64: {encoder: resnet18, image_size: 64}\n    128: {encoder: pixels}\n"
        "classes:\n  map:\n    1.50: a\n    true: b\n    null: c\n"
    )
    overrides = ["study.features.64.pretext=contrastive", "study.features.128="]
    config = load_config(tmp_path / "a.yaml", overrides)
    (feature,) = config.study.features.values()
    assert (feature.image_size, feature.pretext) == (64, "contrastive")
    assert config.classes.map == {"1.50": "a", "true": "b", "null": "c"}


def test_an_unknown_key_below_a_name_that_looks_like_a_key_is_named() -> None:
    hint = r"key 'study\.features\.v1\.weights\.encodr' .*'study\.features\.v1\.weights\.encoder'"
    with pytest.raises(ConfigError, match=hint):
        parse_config({"study": {"features": {"v1.weights": {"encodr": "x"}}}})


def test_a_search_is_set_by_kind_or_at_once() -> None:
    settings = ["train.learning_rate.log_uniform=[0.1, 1]", "augment.policy={choice: [weak, none]}"]
    config = load_config(None, [f"tune.space.{setting}" for setting in settings])
    assert config.tune.space == {
        "train.learning_rate": {"log_uniform": [0.1, 1]},
        "augment.policy": {"choice": ["weak", "none"]},
    }


def test_names_and_paths_are_taken_as_written() -> None:
    settings = ["name=7", "source=/data/a #1", "classes.map.0=notumor", "classes.map.a=#2"]
    config = load_config(None, settings)
    assert config.name == "7"
    assert config.source == "/data/a #1"
    assert config.classes.map == {"0": "notumor", "a": "#2"}


@pytest.mark.parametrize("name", ["010", "1_000", "20240101_1", "1e3", "1.10", "no", "true"])
def test_a_name_that_looks_like_a_number_stays_what_was_written(name: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"run: {name}\nevaluation: {{siblings: [{name}]}}\nclasses:\n  map:\n    x: {name}\n"
    )
    config = load_config(path)
    assert (config.run, config.evaluation.siblings) == (name, (name,))
    assert config.classes.map == {"x": name}
    settings = [f"run={name}", f"evaluation.siblings=[{name}]", f"classes.map.x={name}"]
    assert load_config(None, settings) == config
    assert parse_config(parse_yaml(to_yaml(config).encode(), "here")) == config
    assert parse_config(yaml.safe_load(to_yaml(config))) == config


def test_values_of_a_search_are_the_numbers_that_they_read_as() -> None:
    key = "train.learning_rate"
    config = load_config(None, [f"tune.space.{key}.choice=[4, .5, 1e-4, true, false, 1.x]"])
    assert repr(config.tune.space[key]) == "{'choice': [4, 0.5, 0.0001, True, False, '1.x']}"
    assert parse_config(parse_yaml(to_yaml(config).encode(), "here")) == config
    assert parse_config(yaml.safe_load(to_yaml(config))) == config


def test_class_names_may_hold_what_yaml_and_keys_do_not(tmp_path: Path) -> None:
    overrides = ["1.glioma=glioma", "grade=2=low", "a b=c", "odd=null"]
    config = load_config(None, [f"classes.map.{override}" for override in overrides])
    assert config.classes.map == {"1.glioma": "glioma", "grade=2": "low", "a b": "c", "odd": None}
    assert parse_config(yaml.safe_load(to_yaml(config))) == config
    path = tmp_path / "c.yaml"
    path.write_text("classes:\n  map: {yes: tumor, no: notumor}\ntrain: {learning_rate: 1e-4}\n")
    assert load_config(path).classes.map == {"yes": "tumor", "no": "notumor"}
    assert load_config(path).train.learning_rate == 1e-4


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2\n", "!!python/object:os.system {}\n"])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(path)


NESTED = "a: " + "[" * 20_000
BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("name: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("name: !!python/name:os.system", "could not determine a constructor"),
        (BOMB, "aliases"),
        (NESTED, "is not valid YAML"),
        ("seed: 2024-99-99", "seed: Input should be a valid integer"),
        ("name: x\n" + "#" * 1_000_000, "larger than 1000000 bytes"),
        ("seed: 1\nname: a\nseed: 2", "the key 'seed' occurs twice .*line 3"),
        ("train: {learning_rate: .inf}", "train.learning_rate: Input should be a valid number"),
        ("name: " + "x" * 900_000, "not a plain name"),
        ("train: {num_epochs: " + "x" * 900_000 + "}", "train.num_epochs: "),
    ],
    ids=[
        "apply",
        "name",
        "bomb",
        "nested",
        "date",
        "oversized",
        "twice",
        "infinite",
        "long",
        "input",
    ],
)
def test_a_hostile_file_is_refused_in_a_short_line(
    tmp_path: Path, content: str, reason: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    started = time.process_time()
    with pytest.raises(ConfigError, match=reason) as error:
        load_config(path)
    assert time.process_time() - started < 5
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("text", ["[" * 5000, "2024-99-99", "*a", "!!python/name:os.system"])
def test_a_hostile_override_is_taken_as_text(text: str) -> None:
    assert load_config(None, [f"source={text}"]).source == text


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match="no such config file: nowhere"):
        load_config("nowhere.yaml")


def test_yaml_round_trip_changes_nothing() -> None:
    config = load_config(None, ["classes.map.glioma_tumor=glioma", "train.learning_rate=3e-4"])
    assert parse_config(yaml.safe_load(to_yaml(config))) == config


def test_a_policy_wins_over_what_another_brought_to_a_saved_config() -> None:
    saved = parse_yaml(to_yaml(load_config("configs/strong.yaml")).encode(), "saved")
    assert parse_config(saved) == load_config("configs/strong.yaml")
    saved["augment"]["policy"] = "strong"
    changed = parse_config(saved).augment
    assert changed.cutout_probability == AugmentConfig(policy="strong").cutout_probability > 0
    assert changed.bias_field == 0.15  # set by hand


def test_one_strength_leaves_the_others_of_its_section_as_they_were() -> None:
    overrides = ["augment_unlabelled.max_noise_std=0.1", "self_supervision.augment.max_zoom=0.3"]
    config, default = load_config(None, overrides), load_config(None)
    noisy = default.augment_unlabelled.model_copy(update={"max_noise_std": 0.1})
    assert config.augment_unlabelled == noisy
    zoomed = default.self_supervision.augment.model_copy(update={"max_zoom": 0.3})
    assert config.self_supervision.augment == zoomed
    assert config.augment == default.augment


def test_a_path_with_a_colon_is_a_path() -> None:
    assert load_config(None, ["source=/data/new scans: A"]).source == "/data/new scans: A"
    mapped = load_config(None, ["classes.map={a: b}"])
    assert mapped.classes.map == {"a": "b"}


def test_a_domain_of_a_search_can_be_set_by_its_dotted_key() -> None:
    overrides = ["tune.space.train.learning_rate.log_uniform=[1e-4, 1e-3]"]
    overrides += ["tune.space.objective.name.choice=[joint]"]
    assert load_config(None, overrides).tune.space == {
        "train.learning_rate": {"log_uniform": [1e-4, 1e-3]},
        "objective.name": {"choice": ["joint"]},
    }


def test_flatten_gives_every_set_value_its_dotted_key() -> None:
    flat = flatten(load_config(None, ["classes.map.a=b"]))
    assert flat["train.num_epochs"] == 20
    assert flat["classes.map.a"] == "b"
    assert flat["evaluation.tsne_epochs"] == "1,5,10,15,20"
    assert "name" not in flat
    assert set(flat) <= {*known_keys(), "classes.map.a"}


def test_a_feature_of_the_file_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("study: {features: {a: {encoder: pixels}, b: {}}}")
    features = load_config(tmp_path / "c.yaml", ["study.features.b=null"]).study.features
    assert list(features) == ["a"]


def test_an_objective_without_pseudo_labels_takes_none_of_a_subject() -> None:
    with pytest.raises(ConfigError, match=r"objective\.name=joint does not learn pseudo-labels"):
        load_config(None, ["objective.inherit_labels=subject"])
