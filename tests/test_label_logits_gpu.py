"""cce::label_logits on a GPU, against its definition in higher precision."""

import numpy as np
import pytest
import torch

import cce_ext  # noqa: F401  (loads the operators)

pytestmark = pytest.mark.gpu

label_logits = torch.ops.cce.label_logits
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense(e, c, bias, targets, *, ignore_index=-100, softcap=None):
    """The definition, in plain torch and in the accumulator's precision."""
    dtype = accumulator(e.dtype)
    targets = targets.long()
    inside = (targets >= 0) & (targets < len(c))
    y = torch.where(inside, targets, 0)
    z = (e.to(dtype) * c[y].to(dtype)).sum(-1)
    if bias is not None:
        z = z + bias[y].to(dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = torch.where(inside, z, torch.nan)
    return torch.where(targets == ignore_index, 0, z)


def exact(e, c, bias, targets, *, ignore_index=-100, softcap=None):
    """The definition in long double, so that float64 has a reference too, and a typical size of its sums."""
    e, c, bias = (None if x is None else x.double().cpu().numpy().astype(np.longdouble) for x in (e, c, bias))
    targets = targets.cpu().numpy()
    inside = (targets >= 0) & (targets < len(c))
    y = np.where(inside, targets, 0)
    terms = e * c[y]
    z = terms.sum(-1)
    if bias is not None:
        z = z + bias[y]
    size = max(np.sqrt((terms**2).sum(-1)).max(), np.abs(z).max())
    if softcap is not None:
        z = softcap * np.tanh(z / softcap)
    return np.where(targets == ignore_index, 0, np.where(inside, z, np.nan)), size


def check(e, c, bias, targets, **options):
    """At most twice the error of the same sum in the same precision in plain torch, and two roundings."""
    out = label_logits(e, c, bias, targets, **options)
    assert out.dtype == accumulator(e.dtype) and out.shape == targets.shape and out.device == e.device
    expected, size = exact(e, c, bias, targets, **options)
    assert np.array_equal(out.isnan().cpu().numpy(), np.isnan(expected))

    def error(values):
        return np.nanmax(np.abs(values.double().cpu().numpy() - expected), initial=0)

    roundings = 2 * torch.finfo(out.dtype).eps * size
    assert error(out) <= 2 * error(dense(e, c, bias, targets, **options)) + roundings
    return out


def inputs(n, d, v, dtype, device="cuda", index=torch.int64, scale=None):
    e = torch.randn(n, d, device=device, dtype=torch.float64).to(dtype)
    c = (torch.randn(v, d, device=device, dtype=torch.float64) * (scale or d**-0.5)).to(dtype)
    return e, c, torch.randint(0, v, (n,), device=device).to(index)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "v"),
    [(1, 1, 1), (3, 8, 5), (5, 7, 11), (33, 64, 100), (129, 65, 1000), (257, 1000, 333), (64, 2304, 4099)],
)
def test_sizes(n, d, v, dtype, index):
    e, c, targets = inputs(n, d, v, dtype, index=index)
    check(e, c, None, targets)


@pytest.mark.parametrize("softcap", [None, 0.7, 30.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(dtype, with_bias, softcap):
    e, c, targets = inputs(200, 129, 77, dtype, scale=1.0)
    bias = torch.randn(77, device="cuda").to(dtype) if with_bias else None
    check(e, c, bias, targets, softcap=softcap)


@pytest.mark.parametrize("ignore_index", [-100, 3, 2**40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_ignored_and_bad_targets(dtype, ignore_index):
    e, c, targets = inputs(64, 96, 10, dtype)
    bad = [-1, -101, 10, 11, 2**31, -(2**62), 2**62]
    targets[: len(bad)] = torch.tensor(bad, device="cuda")
    targets[10:20] = ignore_index
    bias = torch.randn(10, device="cuda").to(dtype)
    out = check(e, c, bias, targets, ignore_index=ignore_index, softcap=5.0)
    assert out[: len(bad)].isnan().all()
    assert (out[10:20] == 0).all()


def test_empty():
    for n, d, v in [(0, 16, 5), (4, 0, 5), (4, 16, 0), (0, 0, 0)]:
        e = torch.zeros(n, d, device="cuda")
        c = torch.zeros(v, d, device="cuda")
        bias = torch.arange(v, device="cuda", dtype=torch.float32)
        out = label_logits(e, c, bias, torch.full((n,), 3, device="cuda"))
        assert out.shape == (n,)
        assert out.isnan().all() if v == 0 else (out == 3).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """Rows of a wider tensor at aligned and unaligned places, repeated rows, columns, and strided vectors."""
    n, d, v = 70, 200, 90
    wide_e, wide_c, targets = inputs(n, 256, v, dtype)
    bias = torch.randn(2 * v, device="cuda").to(dtype)[::2]
    targets = targets.repeat_interleave(3)[::3]
    for e in (wide_e[:, :d], wide_e[:, 1 : d + 1], wide_e[:, 3 : d + 2], wide_e[:1, :d].expand(n, d)):
        for c in (wide_c[:, : e.shape[1]], wide_c[:, 5 : e.shape[1] + 5]):
            check(e, c, bias, targets)
    check(wide_e[::2], wide_c[::3], None, torch.div(targets[: n // 2], 3, rounding_mode="floor"))
    column_major = wide_c.t().contiguous().t()
    check(wide_e.t().contiguous().t(), column_major, bias, targets)
    check(wide_e[:, ::2], wide_c[:, ::2], bias[:1].expand(v), targets[:1].expand(n))


def test_vector_and_element_loads_agree():
    """The same numbers, read in 16-byte vectors and one by one."""
    e, c, targets = inputs(500, 1024, 300, torch.float32)
    shifted = torch.empty(500, 1025, device="cuda")[:, 1:].copy_(e)
    torch.testing.assert_close(
        label_logits(e, c, None, targets), label_logits(shifted, c, None, targets), rtol=1e-5, atol=1e-5
    )


def test_deterministic():
    e, c, targets = inputs(4000, 777, 1000, torch.bfloat16)
    first = label_logits(e, c, None, targets)
    assert all(torch.equal(first, label_logits(e, c, None, targets)) for _ in range(5))


def test_runs_on_the_current_stream():
    """On a side stream, before its producer has run: only that stream's order makes the result right."""
    e, c, targets = inputs(256, 512, 100, torch.float32)
    late = torch.zeros_like(e)
    label_logits(e, c, None, targets)  # a kernel's first launch loads it, which waits for the whole device
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(e)
        out = label_logits(late, c, None, targets)
    stream.synchronize()
    torch.testing.assert_close(out, dense(e, c, None, targets), rtol=1e-4, atol=1e-4)


def test_cuda_graph():
    e, c, targets = inputs(300, 256, 100, torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        label_logits(e, c, None, targets)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = label_logits(e, c, None, targets)
    for _ in range(2):
        for captured, new in zip((e, c, targets), inputs(300, 256, 100, torch.bfloat16), strict=True):
            captured.copy_(new)
        graph.replay()
        torch.testing.assert_close(out, label_logits(e, c, None, targets), rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current():
    with torch.cuda.device(0):
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            e, c, targets = inputs(100, 72, 50, torch.bfloat16, device=device)
            check(e, c, None, targets)
            assert torch.cuda.current_device() == 0
            assert torch.ones(1, device="cuda").device.index == 0


def test_offsets_past_2_to_31():
    v, d = 600_000, 4096
    if torch.cuda.mem_get_info()[0] < 2 * v * d + (1 << 30):
        pytest.skip("needs 6 GB of GPU memory")
    assert v * d > 2**31
    big = torch.zeros(v, d, device="cuda", dtype=torch.bfloat16)
    rows = torch.tensor([0, 1, 524_287, 524_288, 524_289, v - 2, v - 1], device="cuda")
    big[rows] = torch.randn(len(rows), d, device="cuda").bfloat16()
    e = torch.randn(len(rows), d, device="cuda").bfloat16()
    out = label_logits(e, big, None, rows)
    torch.testing.assert_close(out, dense(e, big, None, rows), rtol=1e-4, atol=1e-4)
    assert (out != 0).all()
    # the other way round: the tokens are past 2^31 elements
    targets = torch.randint(0, len(rows), (v,), device="cuda")
    out = label_logits(big, e, None, targets)
    torch.testing.assert_close(out[rows], dense(big[rows], e, None, targets[rows]), rtol=1e-4, atol=1e-4)
    assert out.count_nonzero() == len(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"e": torch.zeros(3)}, r"e must be \[N, D\], but is float32 \[3\] on cuda:0"),
        ({"e": torch.zeros(3, 4, dtype=torch.int32)}, r"e must be float16, .* but is int32 \[3, 4\]"),
        ({"c": torch.zeros(5, 6)}, r"c must be \[V, D\] with D = 4 as in e, but is float32 \[5, 6\]"),
        ({"c": torch.zeros(5, 4).half()}, r"c must have e's dtype, float32, but is float16 \[5, 4\]"),
        ({"targets": torch.zeros(2).long()}, r"targets must be \[N\] with N = 3 as in e, but is int64 \[2\]"),
        ({"targets": torch.zeros(3)}, r"targets must be int32 or int64, but is float32 \[3\]"),
        ({"bias": torch.zeros(4)}, r"bias must be \[V\] with V = 5 as in c, but is float32 \[4\]"),
        ({"bias": torch.zeros(5).double()}, r"bias must have e's dtype, float32, but is float64"),
        ({"softcap": -1.0}, r"softcap must be positive and finite, but is -1"),
        ({"softcap": float("nan")}, r"softcap must be positive and finite, but is nan"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = dict(e=torch.zeros(3, 4), c=torch.zeros(5, 4), bias=None, targets=torch.zeros(3).long())
    arguments.update(change)
    arguments = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        label_logits(**arguments)


@pytest.mark.parametrize("name", ["e", "c", "targets", "bias"])
def test_error_for_another_device(name):
    arguments = dict(e=torch.zeros(3, 4), c=torch.zeros(5, 4), bias=torch.zeros(5), targets=torch.arange(3))
    arguments = {k: v if k == name else v.cuda() for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=rf"label_logits: {name} must be on .* but is .* on cpu"):
        label_logits(**arguments)
