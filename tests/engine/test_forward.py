from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from brainray.engine.forward import infer
from brainray.models.encoder import Encoder

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_with_slices_of_their_own_find_what_one_forward_pass_finds() -> None:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", num_classes=2)
    images = torch.rand(150, 1, 32, 32)
    parts = infer(encoder, [images], CPU, "fp32")
    few = infer(encoder, [images[:9], images[:1]], CPU, "fp32")
    assert [len(part.z) for part in few] == [5, 4, 1]  # no thread is idle
    with torch.inference_mode():
        whole = encoder(images)
    assert [len(part.z) for part in parts] == [75, 75]
    torch.testing.assert_close(torch.cat([part.z for part in parts]), whole.z, rtol=1e-4, atol=1e-5)
    assert not any(part.logits.requires_grad for part in parts)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("num_threads", [1, 2])
def test_large_slices_are_embedded_a_few_at_a_time(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    for batch, sizes in (
        (torch.ones(40, 1, 128, 128), [16, 16, 8]),
        (torch.ones(3, 1, 1024, 1024), [1, 1, 1]),
        (torch.ones(0, 1, 128, 128), [0]),
    ):
        assert [len(part) for part in infer(torch.nn.Flatten(), [batch], CPU, "fp32")] == sizes


@pytest.mark.usefixtures("two_threads")
def test_precision_reaches_every_thread() -> None:
    parts = infer(torch.nn.Linear(4, 4), [torch.ones(200, 4)], CPU, "bf16")
    assert {part.dtype for part in parts} == {torch.bfloat16}


@pytest.mark.usefixtures("two_threads")
def test_the_process_keeps_its_threads() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        infer(torch.nn.Linear(4, 4), [torch.ones(200, 5)], CPU, "fp32")
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 2
