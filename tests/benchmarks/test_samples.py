"""Which files a quick benchmark takes."""

from brainray.benchmarks.samples import spread


def test_files_that_are_spread_keep_the_share_of_every_class() -> None:
    files = [*"a" * 46, *"b" * 47, *"c" * 61, *"d" * 45]  # 199, sorted by class
    taken = spread(files, 100)
    assert len(taken) == 100
    for name in "abcd":
        assert abs(taken.count(name) - files.count(name) * 100 / 199) <= 1
    assert spread(files, 1000) == files
    assert spread([], 3) == []
