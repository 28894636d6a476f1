"""Base class of the clusterers: fitted tensors and numbers that are part of `state_dict`."""

from typing import Any

import torch
from torch import Tensor, nn

from brainray.errors import ClusteringError


class FittedModule(nn.Module):
    """Base class: a buffer per fitted tensor, empty before `fit`, plus plain fitted numbers.

    A state also loads into a module that is not fitted, or was fitted with different shapes.
    """

    _fitted_numbers: tuple[str, ...] = ()

    def _register_fitted(self, *names: str) -> None:
        for name in names:
            self.register_buffer(name, torch.empty(0))

    def _check_is_fitted(self) -> None:
        if any(buffer.numel() == 0 for buffer in self.buffers()):
            raise ClusteringError(
                f"this {type(self).__name__} has not been fitted: call fit or load a fitted state"
            )

    def get_extra_state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._fitted_numbers}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name in self._fitted_numbers:
            setattr(self, name, state[name])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, buffer in list(self.named_buffers(recurse=False)):
            saved = state_dict.get(prefix + name)
            # nn.Module copies into existing buffers and rejects different shapes.
            if isinstance(saved, Tensor):
                setattr(self, name, torch.empty_like(saved, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
