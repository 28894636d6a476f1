"""Everything that a study has computed: what its report is made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from brainray.config import Config
from brainray.orchestration.study.data import StudiedFeatures, StudiedSet
from brainray.orchestration.study.grid import Grid, Outcome
from brainray.storage import Folder


@dataclass(frozen=True)
class StudyResults:
    """Everything the report is made from."""

    config: Config
    folder: Folder
    sets: Mapping[str, StudiedSet]
    features: StudiedFeatures
    grid: Grid
    main: Sequence[Outcome]
    varied: Sequence[Outcome]
