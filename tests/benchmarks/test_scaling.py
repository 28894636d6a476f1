"""The cost model: a line through stages' seconds, and what large runs follow from it."""

import pytest

from brainray.benchmarks import scaling
from brainray.benchmarks.scaling import ASSUMED, Fit, Plan, Size, Stage


@pytest.mark.parametrize(("at_held_out", "error"), [(14.0, 0.0), (28.0, 0.5)])
def test_a_line_is_fitted_and_checked_at_the_size_held_out(
    monkeypatch: pytest.MonkeyPatch, at_held_out: float, error: float
) -> None:
    monkeypatch.setattr(scaling, "_seconds", lambda work: work())
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


def test_costs_of_a_large_run_follow_from_its_work() -> None:
    plan = Plan(1_000_000, 8)
    fits = {
        scaling._FILES: Fit(20.0 * 0.001, 1e-8, 0.0, []),
        "silhouette": Fit(0.0, 1e-8, 0.0, []),
    }
    costs = plan.costs(fits)
    forward = scaling._forward_flops(plan.side)
    rate = ASSUMED["gpu_bf16"].value * ASSUMED["utilisation"].value
    cpus = ASSUMED["node_cpus"].value * ASSUMED["cpu_efficiency"].value
    expected = {
        # 125,000 unlabelled slices on each GPU and as many labelled ones, forwards and backwards.
        "each epoch: train (s)": 250_000 * 3 * forward / rate,
        "each epoch: embed (s)": 125_000 * 1.2 * forward / rate,
        "each epoch: exchange gradients (s)": 0.0,
        "each epoch: silhouette on one CPU (s)": 5_000**2 * 1e-8,
        "once: preprocess, 512 px files (s)": 1_000_000 * (0.001 + 1e-8 * 512**2) / cpus,
        "memory: slices on each GPU (GB)": 125_000 * 256**2 / 1e9,
    }
    assert {name: costs[name] for name in expected} == pytest.approx(expected)
    epoch = sum(value for name, value in costs.items() if name.startswith("each epoch"))
    once = sum(value for name, value in costs.items() if name.startswith("once"))
    assert costs["whole run (h)"] == pytest.approx((once + 20 * epoch) / 3600)
