"""bench.checks.fuzz: it passes what is right, and finds each way in which the portable path is broken here."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmark needs tqdm")

from bench.checks import fuzz, fuzz_cases
from cce_ext import control_variate, portable, sampling

SAMPLED = fuzz_cases.Case(40, 24, 2000, dtype="float32", filter_eps=2.0**-5, bias=True, needs="ecb", ignored="few")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Smaller cases, and one thread, as the program takes on a CPU."""
    monkeypatch.setitem(fuzz_cases.LARGEST, "cpu", (64, 64, 4000))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def found_by(case: fuzz_cases.Case) -> list[str]:
    trial = fuzz.Trial(case, "cpu")
    trial.run()
    return trial.failures


def test_what_is_right_passes(capsys):
    assert fuzz.main(["--device", "cpu", "--cases", "25"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["impl", "dtype", "cases", "draws", "failures", "seconds"]
    total = lines[-1].split()
    assert total[:2] == ["all", "25"] and int(total[2]) > 0 and total[3] == "0"
    assert sum(int(line.split()[2]) for line in lines[1:-1]) == 25


def test_the_time_limit(capsys):
    assert fuzz.main(["--device", "cpu", "--seconds", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["all", "1"]


def test_without_the_device(capsys, monkeypatch):
    monkeypatch.setattr(fuzz, "HAS_CUDA", False)
    assert fuzz.main(["--device", "cuda", "--cases", "1"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_a_function_of_seed_and_number(device):
    cases = [fuzz_cases.draw_case(3, k, device) for k in range(300)]
    assert cases == [fuzz_cases.draw_case(3, k, device) for k in range(300)]
    assert len({*cases, *(fuzz_cases.draw_case(4, k, device) for k in range(300))}) == 600
    assert all(fuzz_cases.Case(**json.loads(json.dumps(asdict(case)))) == case for case in cases)
    for name, values in fuzz_cases.CHOICES.items():
        assert {getattr(case, name) for case in cases} == set(values), f"{name}: not all are drawn"
    assert {case.dtype for case in cases} == set(fuzz_cases.DTYPES[device])
    # Where dE's sums begin to lie in dC, on both sides.
    assert {-1, 0, 1} <= {case.v - 12 * case.n for case in cases}
    assert all(min(case.n, case.d, case.v) > 0 and case.n * case.v <= fuzz_cases.LOGITS[device] for case in cases)


def test_a_case_gives_the_same_tensors_again():
    case = replace(SAMPLED, dtype="bfloat16", e_layout="wide", c_layout="transposed", stride=2, lse=True, shift=1)
    one, two = fuzz_cases.Problem(case, "cpu"), fuzz_cases.Problem(case, "cpu")
    for name in ("e", "c", "bias", "targets", "labels", "g_nll", "g_lse"):
        assert torch.equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("layout", ["plain", *fuzz_cases.CHOICES["e_layout"]])
def test_layouts_hold_the_same_numbers(layout):
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = fuzz_cases.lay_out(x, layout)
    assert torch.equal(y, x[:1].expand(7, 12) if layout == "expanded" else x)
    aligned = y.data_ptr() % 16 == 0 and y.stride(0) * 2 % 16 == 0 and y.stride(1) == 1
    assert aligned == (layout in ("wide", "expanded"))


# ---- what is broken must be found ----


def gradients_that(change):
    """The portable backward, with change(grads, targets) made to what it returns."""
    backward = portable.lce_backward

    def broken(*args, **options):
        grads = [None if g is None else g.clone() for g in backward(*args, **options)]
        change(dict(zip("ecb", grads, strict=True)), args[6])
        return tuple(grads)

    return [(portable, "lce_backward", broken)]


def lose_the_last_tile(grads, targets):
    if grads["c"] is not None:
        grads["c"][(len(grads["c"]) - 1) // sampling.TILE_COLUMNS * sampling.TILE_COLUMNS :] = 0.0


def scale_up(grads, targets):
    if grads["e"] is not None:
        grads["e"] *= 1.02


def drop_a_token(grads, targets):
    if grads["e"] is not None:
        grads["e"][len(targets) // 2] = 0.0


def put_nan_in_a_row(grads, targets):
    if grads["c"] is not None:
        grads["c"][-1] = float("nan")


def move_ignored_tokens(grads, targets):
    if grads["e"] is not None:
        grads["e"][targets == fuzz_cases.IGNORE] = 1e-30


def a_forward_that(change):
    """change: of nll, lse and the map."""
    forward = portable.lce_forward

    def changed(*args, **options):
        out = forward(*args, **options)
        return *change(*out[:3]), *out[3:]

    return [(portable, "lce_forward", changed)]


def weigh_by_one(self, rows, q, v0, width, visits=portable.Gradients.visits):
    return visits(self, rows, None, v0, width)


def stay_where_nobody_visits(a, live, lse, share, softcap, visited, q, *others):
    """Biased: it is there where nobody visits, and nothing is taken off where somebody does."""
    return control_variate.remainders(a, live, lse, share, softcap, visited, torch.ones_like(q), *others)


def halve(*inputs):
    return control_variate.remainders(*inputs) / 2


def spread_evenly(self, t0, t1, spread=control_variate.ControlVariate.spread):
    self.mean = torch.zeros_like(self.mean)
    return spread(self, t0, t1)


def visit_too_rarely(seed, first_tile, q, live):
    """A biased rule: the weights are 1/q, the visits are fewer. It is the check's own rule as well."""
    return sampling.draw_visits(seed, first_tile, torch.where(q < 1, 0.7 * q, q), live)


def fail(*args, **options):
    raise RuntimeError("out of\nluck")


BREAKS = {
    "the last tile of dC is lost": lambda: gradients_that(lose_the_last_tile),
    "dE is 2 % too large": lambda: gradients_that(scale_up),
    "dE lacks a token": lambda: gradients_that(drop_a_token),
    "NaN in a row of dC": lambda: gradients_that(put_nan_in_a_row),
    "an ignored token has a gradient": lambda: gradients_that(move_ignored_tokens),
    "the forward differs from call to call": lambda: a_forward_that(
        lambda nll, lse, tile_map: (nll * (1 + 1e-6 * torch.rand(())), lse, tile_map)
    ),
    "the map's masses are too high": lambda: a_forward_that(lambda nll, lse, tile_map: (nll, lse, tile_map + 16)),
    "the map's norms are too low": lambda: a_forward_that(lambda nll, lse, tile_map: (nll, lse, tile_map | 7)),
    "visits are not weighed by 1/q": lambda: [(portable.Gradients, "visits", weigh_by_one)],
    "the control variate is not weighed by 1/q": lambda: [(portable, "remainders", stay_where_nobody_visits)],
    "the control variate is too small": lambda: [(portable, "remainders", halve)],
    "the control variate's mean token is another": lambda: [(control_variate.ControlVariate, "spread", spread_evenly)],
    "visits are too few": lambda: [(module, "draw_visits", visit_too_rarely) for module in (portable, fuzz)],
    "a call raises": lambda: [(portable, "lce_backward", fail)],
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_found_and_repeated(name, capsys, monkeypatch):
    broken = BREAKS[name]()
    with monkeypatch.context() as patch:
        for target in broken:
            patch.setattr(*target)
        assert fuzz.main(["--device", "cpu", "--cases", "24", "--seed", "1"]) == 1
        lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("python -m bench.checks.fuzz")]
        assert lines and all(re.search(r"  # .+", line) for line in lines)
        # As a shell reads it, up to the comment.
        program = shlex.split(lines[0], comments=True)
        assert program[:3] == ["python", "-m", "bench.checks.fuzz"]
        assert fuzz.main(program[3:]) == 1
        assert lines[0] in capsys.readouterr().out.splitlines()
    assert fuzz.main(program[3:]) == 0, "it is right again"


def test_a_device_that_is_lost_ends_the_run(capsys, monkeypatch):
    monkeypatch.setattr(portable, "lce_backward", fail)
    monkeypatch.setattr(fuzz, "device_is_lost", lambda device: True)
    assert fuzz.main(["--device", "cpu", "--cases", "5"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: out of luck" in out and out.splitlines()[-1].split()[:2] == ["all", "1"]


def test_the_softcap_and_the_filter_are_looked_at(monkeypatch):
    assert found_by(SAMPLED) == []
    filtered = replace(SAMPLED, impl="cce_threshold", filter_eps=0.5, softcap=5.0, labels="one tile")
    assert found_by(filtered) == []
    backward = portable.lce_backward
    for change in ({"eps": 0.0005}, {"softcap": 5.05}):

        def with_other_options(*args, options, change=change, **needs):
            return backward(*args, options=replace(options, **change), **needs)

        monkeypatch.setattr(portable, "lce_backward", with_other_options)
        assert any("dc is off" in failure for failure in found_by(filtered))
