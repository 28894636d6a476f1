"""Checkpoints: whole, safe to load, and keyed by sample."""

import ast
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from brainray import layout
from brainray.config import TrainConfig
from brainray.config_text import load_config
from brainray.engine.recluster import recluster
from brainray.engine.shard import PixelScale
from brainray.engine.state import (
    Checkpoint,
    TrainerState,
    checkpoint_bytes,
    checkpoint_state,
    delete_other_predictions,
    keep_as_best,
    load_checkpoint,
    load_trainer,
    newest_readable_epoch,
    restore_best,
    restore_checkpoint,
    rows_of_keys,
    save_resumable,
    state_to_bytes,
    trainer_bytes,
)
from brainray.errors import CheckpointError
from brainray.models.encoder import Encoder
from brainray.schema import FITTED
from brainray.storage import Folder


def checkpoint() -> tuple[Checkpoint, Tensor]:
    config = load_config(None, ["clustering.num_clusters=3", "clustering.pca_dim=4"])
    encoder = Encoder("resnet18", num_classes=2)
    z = torch.nn.functional.normalize(torch.randn(60, 512))
    labels = torch.arange(60) % 2
    fitted = recluster(z, torch.arange(60), labels, config=config.clustering, num_classes=2, seed=0)
    return Checkpoint(config, ["a", "b"], PixelScale(0.2, 0.3), 7, encoder, fitted.model), z


def test_an_epoch_of_smaller_slices_predicts_at_its_own_size() -> None:
    saved, _ = checkpoint()
    growing = {"image_size": 128, "start_image_size": 64, "growth_epochs": 8, "num_epochs": 10}
    config = saved.config.model_copy(update={"train": TrainConfig.model_validate(growing)})
    sides = [replace(saved, config=config, epoch=epoch).image_size for epoch in (1, 7, 9)]
    assert sides == [64, 96, 128]


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    saved, z = checkpoint()
    Folder(tmp_path).write_bytes(layout.MODEL, checkpoint_bytes(saved))
    loaded = load_checkpoint(Folder(tmp_path))
    assert loaded.config == saved.config
    assert (loaded.classes, loaded.epoch, loaded.scale) == (["a", "b"], 7, PixelScale(0.2, 0.3))
    for one, two in zip(saved.encoder.parameters(), loaded.encoder.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(saved.clusters.responsibilities(z), loaded.clusters.responsibilities(z))
    assert torch.equal(saved.clusters.class_of_cluster, loaded.clusters.class_of_cluster)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 half a zip"])
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / layout.MODEL).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{layout.MODEL} is not a checkpoint"):
        load_checkpoint(Folder(tmp_path))


def test_a_state_dict_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, tmp_path / layout.MODEL)
    with pytest.raises(CheckpointError, match="is not a brainray-checkpoint/1"):
        load_checkpoint(Folder(tmp_path))
    with pytest.raises(CheckpointError, match=rf"contains no {layout.MODEL}"):
        load_checkpoint(Folder(tmp_path / "absent"))


def test_what_is_no_dictionary_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(3)], tmp_path / layout.MODEL)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it contains a list"):
        load_checkpoint(Folder(tmp_path))


def test_weights_of_another_encoder_than_configured_are_refused() -> None:
    state = checkpoint_state(checkpoint()[0])
    del state["encoder"]["head.bias"]
    with pytest.raises(CheckpointError, match=r"^a\.pt does not match its config: .*head\.bias"):
        restore_checkpoint(state, "a.pt")


def test_a_trainer_state_comes_back_as_it_was(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    state = TrainerState(
        optimizer.state_dict(),
        torch.arange(2),
        torch.rand(2, 4),
        torch.rand(2, 3),
        {"head.weight": torch.rand(3, 5)},
        [{"epoch": 1.0}],
    )
    Folder(tmp_path).write_bytes(layout.TRAINER, trainer_bytes(state))
    loaded = load_trainer(Folder(tmp_path))
    assert loaded.history == state.history
    assert torch.equal(loaded.responsibilities, state.responsibilities)
    assert torch.equal(loaded.probabilities, state.probabilities)
    assert loaded.trained is not None
    assert state.trained is not None
    assert torch.equal(loaded.trained["head.weight"], state.trained["head.weight"])
    assert torch.equal(loaded.optimizer["state"][0]["exp_avg"], torch.full((3,), 0.1))


def resumable(epoch: int) -> tuple[Checkpoint, TrainerState]:
    saved, _ = checkpoint()
    at = replace(saved, epoch=epoch)
    state = TrainerState(
        {}, torch.arange(2), torch.rand(9000, 3), torch.rand(2, 2), None, [{"epoch": epoch}]
    )
    return at, state


@pytest.fixture(scope="module")
def run_of_three_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    for epoch in (1, 2, 3):
        save_resumable(Folder(folder), *resumable(epoch))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def poison(path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(path.with_name("harm")),)

    torch.save({"format": Harmful()}, path)


def test_two_checkpoints_are_kept_and_the_newest_is_found(
    run_of_three_epochs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Folder(run_of_three_epochs)
    assert run.names() == ["epoch-0002", "epoch-0003"]
    found = newest_readable_epoch(run)
    said = capsys.readouterr().out.splitlines()
    assert (found, said) == (3, [])


def test_the_state_of_another_version_is_no_state(tmp_path: Path) -> None:
    Folder(tmp_path).write_bytes(layout.TRAINER, state_to_bytes({"optimizer": {}, "momentum": 1}))
    with pytest.raises(CheckpointError, match=r"trainer\.pt was written by another version"):
        load_trainer(Folder(tmp_path))


@pytest.mark.parametrize("harm", [cut, flip_a_bit, poison, Path.unlink])
@pytest.mark.parametrize("name", [layout.MODEL, layout.TRAINER])
def test_the_newest_checkpoint_that_is_whole_is_the_one_to_go_on_from(
    run_of_three_epochs: Path,
    tmp_path: Path,
    harm: Callable[[Path], None],
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(run_of_three_epochs, tmp_path, dirs_exist_ok=True)
    run = Folder(tmp_path)
    harm(tmp_path / "epoch-0003" / name)
    found = newest_readable_epoch(run)
    said = capsys.readouterr().out.splitlines()
    assert found == 2
    assert f"epoch-0003/{name} is not" in said[0] or f"epoch-0003 contains no {name}" in said[0]
    assert not (tmp_path / "epoch-0003" / "harm").exists()


def best_of(run: Folder) -> int:
    return load_checkpoint(run / layout.BEST).epoch


def test_what_was_chosen_before_the_newest_epoch_can_be_the_best_again(tmp_path: Path) -> None:
    run = Folder(tmp_path)
    fitted = pa.table({"sample_id": ["a"], "coordinates": [[0.5]], "log_likelihood": [1.0]})
    fitted = fitted.cast(FITTED)
    history = [
        {"train/image_size": 64.0, "validation/score": score, "validation/score_error": 0.0}
        for score in (0.8, 0.7, 0.7, 0.9)  # the first is chosen, and then the last
    ]
    saved, state = resumable(1)
    for epoch in (1, 2, 3, 4):
        at = replace(state, history=history[:epoch])
        chosen = fitted if epoch in (1, 4) else None
        save_resumable(run, replace(saved, epoch=epoch), at, chosen)
    assert run.names() == ["epoch-0001", "epoch-0003", "epoch-0004"]
    restore_best(run, 4)  # as if the job had been killed before
    assert best_of(run) == 4
    restore_best(run, 1)
    assert best_of(run) == 1
    assert (run / layout.BEST).read_table(layout.FITTED).equals(fitted)
    cut(tmp_path / layout.BEST / layout.MODEL)
    restore_best(run, 1)
    assert best_of(run) == 1


def test_the_best_outlives_its_epochs_checkpoint(tmp_path: Path) -> None:
    run = Folder(tmp_path)
    fitted = pa.table({"sample_id": ["a"], "coordinates": [[0.5]], "log_likelihood": [1.0]})
    save_resumable(run, *resumable(1), fitted.cast(FITTED))
    keep_as_best(run, 1)
    cut(tmp_path / "epoch-0001" / layout.MODEL)
    restore_best(run, 1)
    assert best_of(run) == 1
    (run / "epoch-0001").delete()  # as by earlier versions
    restore_best(run, 1)
    assert best_of(run) == 1


def test_a_lost_best_is_refused_before_training_goes_on(tmp_path: Path) -> None:
    run = Folder(tmp_path)
    fitted = pa.table({"sample_id": ["a"], "coordinates": [[0.5]], "log_likelihood": [1.0]})
    save_resumable(run, *resumable(1), fitted.cast(FITTED))
    keep_as_best(run, 1)
    with pytest.raises(CheckpointError, match=r"epoch 2 is lost \(.*best is of another epoch\)"):
        restore_best(run, 2)
    assert best_of(run) == 1
    cut(tmp_path / "epoch-0001" / layout.MODEL)
    cut(tmp_path / layout.BEST / layout.MODEL)
    with pytest.raises(CheckpointError, match=r"epoch 1 is lost \(.*not a checkpoint.*restore"):
        restore_best(run, 1)
    save_resumable(run, *resumable(1))  # as by earlier versions, without the fitted slices
    with pytest.raises(CheckpointError, match="epoch 1 is lost"):
        restore_best(run, 1)


def test_a_model_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is next to it is there if it is."""
    run, written = Folder(tmp_path), list[str]()
    write_bytes = Folder.write_bytes

    def record(folder: Folder, name: str, content: bytes) -> None:
        written.append(name)
        write_bytes(folder, name, content)

    monkeypatch.setattr(Folder, "write_bytes", record)
    fitted = pa.table({"sample_id": ["a"], "coordinates": [[0.5]], "log_likelihood": [1.0]})
    save_resumable(run, *resumable(1), fitted.cast(FITTED))
    assert written[-2:] == [layout.TRAINER, layout.MODEL]
    keep_as_best(run, 1)
    assert written[-2:] == [layout.FITTED, layout.MODEL]


def test_epochs_after_a_restored_checkpoint_are_kept_beside_damaged_later_ones(
    tmp_path: Path,
) -> None:
    run, (saved, state) = Folder(tmp_path), resumable(2)
    for epoch in (5, 6):
        run.write_bytes(f"{layout.checkpoint_folder(epoch)}/{layout.MODEL}", b"damaged")
    for epoch in (2, 3):
        save_resumable(run, replace(saved, epoch=epoch), state)
    assert newest_readable_epoch(run) == 3


def test_predictions_that_nothing_shows_any_longer_are_deleted(tmp_path: Path) -> None:
    run = Folder(tmp_path)
    delete_other_predictions(run, {1})
    for epoch in (1, 2, 3, 4):
        run.write_bytes(layout.predictions_file(epoch), b"")
    delete_other_predictions(run, {2, 4, 9})
    assert (run / "predictions").names() == ["epoch-0002.parquet", "epoch-0004.parquet"]


def loads_without_weights_only(source: str) -> list[int]:
    """Lines of calls that may run what a file holds."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    lines = []
    for call in calls:
        name = ast.unparse(call.func)
        options = {word.arg: ast.unparse(word.value) for word in call.keywords}
        unsafe = name == "torch.load" and options.get("weights_only") != "True"
        unsafe |= name.rpartition(".")[0] in {"pickle", "cloudpickle", "joblib", "dill"}
        unsafe |= options.get("allow_pickle") == "True"
        if unsafe:
            lines.append(call.lineno)
    return lines


def test_weights_are_loaded_without_running_code() -> None:
    assert loads_without_weights_only("torch.load(a)\npickle.loads(b)\nnp.load(c)") == [1, 2]
    project = Path(__file__).parents[2]
    files = [*project.glob("brainray/**/*.py"), *project.glob("jobs/*.py")]
    found = {
        path.relative_to(project).as_posix()
        for path in files
        if loads_without_weights_only(path.read_text())
    }
    # What the processes of one call have just written, in a folder of their own.
    assert found == {"brainray/dist.py"}


def test_without_any_checkpoint_a_run_begins_unless_it_has_finished_epochs(tmp_path: Path) -> None:
    run = Folder(tmp_path)
    save_resumable(run, *resumable(1))
    cut(tmp_path / "epoch-0001" / layout.MODEL)
    assert newest_readable_epoch(run) == 0
    run.write_json_lines(layout.METRICS, [{"epoch": 1.0}])
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be read"):
        newest_readable_epoch(run)


def test_rows_are_found_by_key_whatever_their_order() -> None:
    keys = torch.tensor([30, -10, 20])
    values = torch.tensor([[3.0], [1.0], [2.0]])
    found = rows_of_keys(keys, values, torch.tensor([-10, 20]))
    assert found.tolist() == [[1.0], [2.0]]
    with pytest.raises(CheckpointError, match="unknown to the checkpoint"):
        rows_of_keys(keys, values, torch.tensor([25]))
    with pytest.raises(CheckpointError, match="unknown to the checkpoint"):
        rows_of_keys(keys, values, torch.tensor([99]))
