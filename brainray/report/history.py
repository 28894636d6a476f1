"""What a run logged: one flat dict of metrics an epoch, oldest first."""

from collections.abc import Mapping, Sequence

History = Sequence[Mapping[str, float]]
