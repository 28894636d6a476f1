"""The cost model: a line through stages' seconds, and what large runs follow from it."""

import pytest

from brainray.benchmarks import scaling
from brainray.benchmarks.scaling import ASSUMED, NUM_CLASSES, Fit, Plan, Size, Stage
from brainray.models.encoder import Encoder


@pytest.mark.parametrize(("at_held_out", "error"), [(14.0, 0.0), (28.0, 0.5)])
def test_a_line_is_fitted_and_checked_at_the_size_held_out(
    monkeypatch: pytest.MonkeyPatch, at_held_out: float, error: float
) -> None:
    other_load = iter([1.0] * 5)  # during the first of several rounds
    monkeypatch.setattr(scaling, "_seconds", lambda work: work() + next(other_load, 0.0))
    stage = Stage(
        "test",
        "row",
        work=lambda size: size.rows,
        prepare=lambda size: lambda: at_held_out if size.rows == 4 else 2.0 + 3.0 * size.rows,
        sizes=[Size(rows) for rows in (1, 2, 3, 5)],
        held_out=Size(4),
    )
    fit = scaling._fit(stage)
    assert (fit.fixed_s, fit.rate_s) == pytest.approx((2.0, 3.0))
    assert fit.error == pytest.approx(error)
    assert fit.points[-1] == (4, at_held_out)


@pytest.mark.parametrize(("num_nodes", "num_exchanges"), [(1, 0), (2, 62_500 / 256)])
def test_costs_of_a_large_run_follow_from_its_work(num_nodes: int, num_exchanges: float) -> None:
    plan = Plan(1_000_000, 8 * num_nodes)
    fits = {
        scaling._FILES: Fit(20.0 * 0.001, 1e-8, 0.0, []),
        "silhouette": Fit(0.0, 1e-8, 0.0, []),
    }
    costs = plan.costs(fits)
    forward = scaling._forward_flops(plan.side)
    rate = ASSUMED["gpu_bf16"].value * ASSUMED["utilisation"].value
    cpus = num_nodes * ASSUMED["node_cpus"].value * ASSUMED["cpu_efficiency"].value
    num_parameters = sum(p.numel() for p in Encoder("resnet18", NUM_CLASSES).parameters())
    # Every gradient is sent once and received once, as float32.
    exchange = 8 * num_parameters / ASSUMED["network"].value + ASSUMED["latency"].value
    mine = 125_000 / num_nodes
    expected = {
        # All unlabelled slices of a GPU and as many labelled ones, forwards and backwards.
        "each epoch: train (s)": 2 * mine * 3 * forward / rate,
        "each epoch: embed (s)": mine * 1.2 * forward / rate,
        "each epoch: exchange gradients (s)": num_exchanges * exchange,
        "each epoch: silhouette on one CPU (s)": 5_000**2 * 1e-8,
        "once: preprocess, 512 px files (s)": 1_000_000 * (0.001 + 1e-8 * 512**2) / cpus,
        "memory: slices on each GPU (GB)": mine * 256**2 / 1e9,
    }
    assert {name: costs[name] for name in expected} == pytest.approx(expected)
    epoch = sum(value for name, value in costs.items() if name.startswith("each epoch"))
    once = sum(value for name, value in costs.items() if name.startswith("once"))
    hours = (once + 20 * epoch) / 3600
    assert costs["whole run (h)"] == pytest.approx(hours)
    dollars = 8 * num_nodes * hours * ASSUMED["gpu_hour"].value
    assert costs["whole run (USD)"] == pytest.approx(dollars)
