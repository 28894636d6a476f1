"""The benchmark of the intracranial strip counts every head alike, and leaves the threads alone."""

from dataclasses import replace
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest

from brainray.benchmarks import intracranial
from brainray.benchmarks.intracranial import _Scored, run
from brainray.benchmarks.result import CaseOptions
from brainray.config_text import load_config
from brainray.mri.phantom import make_series


def test_heads_are_measured_beside_phantoms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intracranial, "_NUM_QUICK_PHANTOMS", 2)
    series = make_series("notumor", np.random.default_rng(0), 7, 96)
    for kind, field in (("", "image"), ("_mask", "brain_mask")):
        stack = np.stack([getattr(one, field) for one in series], axis=-1).astype(np.uint8)
        voxels = stack.repeat(8, axis=2).transpose(1, 0, 2)[::-1, ::-1]
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / f"head{kind}.nii.gz")
    num_threads = cv2.getNumThreads()
    options = CaseOptions(True, tmp_path, 0, tmp_path, load_config(None, []))
    found = {measure.name: measure for measure in run(options).measures}
    assert cv2.getNumThreads() == num_threads
    assert found["head"].value == found["heads, mean"].value
    assert found["heads, axial"].value > found["heads, Otsu's strip"].value
    assert found["phantoms, coronal"].at_least == 0.93


def test_every_head_counts_alike() -> None:
    one = _Scored("one", "axial", 100, 100, 0.5, 0.4, True, 1.0)
    scored = [one] * 9 + [replace(one, head="other", dice=0.9)]
    assert intracranial._by_head(scored, "dice") == pytest.approx(0.7)
