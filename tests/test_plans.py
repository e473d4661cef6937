"""How the kernels' work is cut and ordered: C++ that decides on the host, for every GPU there is."""

import numpy as np
import pytest

# Multiprocessors and the shared memory of a block: A100, RTX 3090, RTX 4090, H200, B200.
GPUS = {
    "sm_80": (108, 163 * 1024),
    "sm_86": (82, 99 * 1024),
    "sm_89": (128, 99 * 1024),
    "sm_90": (132, 227 * 1024),
    "sm_100": (148, 227 * 1024),
}
SHAPES = [
    (8192, 2304, 256000),
    (8192, 768, 50304),
    (1, 8, 1),
    (128, 4096, 128256),
    (65536, 4096, 128256),
    (300, 72, 257),
]

HOPPER = {"major": 9, "has_sm90": True}

gpus = pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS.keys())
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@gpus
@shapes
def test_forward_units_cover_every_block_once(host, gpu, shape):
    n, _, v = shape
    plan = host.plan_lce_forward(n, v, *gpu)
    seen = {}
    for row, first, end, split in plan["units"]:
        assert first < end
        for column in range(first, end):
            assert seen.setdefault((row, column), split) == split
    assert len(seen) == sum(end - first for _, first, end, _ in plan["units"]) == -(-n // 128) * -(-v // 256)
    # Of fewer tokens, where some are ignored, there may be more units.
    assert plan["shared_bytes"] <= gpu[1] and plan["blocks"] == gpu[0]
    assert plan["splits"] == 1 or plan["splits"] * n * 4 <= 3 << 19, "partial sums stay under 1.5 MB"


@gpus
@shapes
@pytest.mark.parametrize("hopper", [False, True], ids=["sm80", "sm90"])
def test_partial_sums_have_room_for_any_number_of_live_rows(host, gpu, shape, hopper):
    """The device chooses the splits for the rows that count, as a plan for so many tokens would."""
    n, _, v = shape
    options = HOPPER if hopper and gpu[1] > 200 << 10 else {}
    room = host.plan_lce_forward(n, v, *gpu, **options)["partials"]
    assert room <= max(n, 3 << 17)
    for rows in sorted({1, 2, 127, 128, 129, n // 10, n // 2, n - 1, n} - {0}):
        if rows <= n:
            assert host.plan_lce_forward(rows, v, *gpu, **options)["splits"] * rows <= room


@shapes
def test_partial_sums_have_no_more_room_than_all_tokens_need(host, shape):
    """Where all count the host knows what the device will choose. Of few tokens it does not search."""
    n, _, v = shape
    plan, some = (host.plan_lce_forward(n, v, *GPUS["sm_90"], **HOPPER, all_count=x) for x in (True, False))
    assert plan["splits"] == some["splits"] and 0 < plan["splits"] * n <= plan["partials"] <= some["partials"]
    assert plan["partials"] == (some["partials"] if n == 128 else plan["splits"] * n)


@pytest.mark.parametrize(
    ("n", "v", "least"), [(8192, 256000, 0.97), (8192, 128256, 0.96), (1024, 128256, 0.94), (65536, 128256, 0.96)]
)
def test_the_last_wave_of_the_forward_is_full(host, n, v, least):
    """Share of the time in which a multiprocessor of an H200 has work, if every column block takes as long."""
    multiprocessors, shared = GPUS["sm_90"]
    plan = host.plan_lce_forward(n, v, multiprocessors, shared)
    load = [0] * multiprocessors
    for k, (_, first, end, _) in enumerate(plan["units"]):
        load[k % multiprocessors] += end - first
    assert sum(load) / (max(load) * multiprocessors) >= least


def test_neighbouring_units_share_their_columns(host):
    """What runs side by side reads the same rows of C: at most one run of columns for 16 blocks of rows."""
    units = host.plan_lce_forward(8192, 256000, *GPUS["sm_90"])["units"]
    for k in range(0, len(units) - 16, 16):
        group = units[k : k + 16]
        assert len({(first, end) for _, first, end, _ in group}) == 1 and len({row for row, *_ in group}) == 16


@shapes
@pytest.mark.parametrize("multiprocessors", [132, 114, 7])
def test_hopper_units_cover_every_block_once(host, multiprocessors, shape):
    n, _, v = shape
    shared = GPUS["sm_90"][1]
    plan = host.plan_lce_forward(n, v, multiprocessors, shared, **HOPPER)
    cluster = plan["cluster"]
    assert plan["kernel"] == "sm90" and cluster == (2 if n > 128 else 1) and plan["stages"] == 4
    assert ("pairs" in plan["kernel_reason"]) == (cluster == 2)
    # A cluster's blocks take neighbouring blocks of rows and the same columns; the last may have no rows.
    seen = {}
    for rows, first, end, split in plan["units"]:
        assert first < end
        for rank in range(cluster):
            for column in range(first, end):
                assert seen.setdefault((rows * cluster + rank, column), split) == split
    row_blocks = -(-n // 128)
    assert len(seen) == sum(end - first for _, first, end, _ in plan["units"]) * cluster
    assert len(seen) == -(-row_blocks // cluster) * cluster * -(-v // 256)
    assert {row for row, _ in seen} == set(range(-(-row_blocks // cluster) * cluster))
    assert plan["blocks"] == cluster * (multiprocessors // cluster)
    assert plan["splits"] == 1 or plan["splits"] * n * 4 <= 3 << 19, "partial sums stay under 1.5 MB"
    # Four stages of 128 rows of e and 256 of c, two barriers each, and where the first multiple of 1024 lies.
    assert plan["shared_bytes"] == 4 * 48 * 1024 + 64 + 1024 <= shared


@pytest.mark.parametrize(("n", "v", "least"), [(8192, 256000, 0.97), (8192, 128256, 0.96), (65536, 128256, 0.96)])
def test_the_last_wave_of_pairs_is_full(host, n, v, least):
    plan = host.plan_lce_forward(n, v, *GPUS["sm_90"], **HOPPER)
    load = [0] * 66
    for k, (_, first, end, _) in enumerate(plan["units"]):
        load[k % 66] += end - first
    assert plan["cluster"] == 2 and sum(load) / (max(load) * 66) >= least
    # As many rows of e stay in L2 as without clusters.
    for k in range(0, len(plan["units"]) - 8, 8):
        assert len({(first, end) for _, first, end, _ in plan["units"][k : k + 8]}) == 1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"major": 8, "minor": 9}, "compute capability"),
        ({"major": 10}, "compute capability"),
        ({"has_sm90": False}, "CCE_KERNELS"),
        ({"shared_bytes": 99 * 1024}, "shared memory"),
        ({"e_row_stride": 0}, "overlap"),
        ({"c_row_stride": 56}, "overlap"),
    ],
    ids=str,
)
def test_where_hopper_kernels_are_not_taken(host, changed, reason):
    options = {"multiprocessors": 132, "shared_bytes": 227 * 1024} | HOPPER
    assert host.plan_lce_forward(300, 1000, **options)["kernel"] == "sm90"
    plan = host.plan_lce_forward(300, 1000, **options | changed)
    assert plan["kernel"] == "sm80" and plan["cluster"] == 1 and reason in plan["kernel_reason"]


def test_the_stride_of_a_single_row_does_not_count(host):
    plan = host.plan_lce_forward(1, 1, *GPUS["sm_90"], **HOPPER, e_row_stride=0, c_row_stride=1)
    assert plan["kernel"] == "sm90" and plan["cluster"] == 1


@gpus
@shapes
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_exact_chunks_fit(host, gpu, shape, needs):
    n, d, v = shape
    plan = host.plan_exact(n, d, v, *needs, *gpu)
    columns = plan["chunk_columns"]
    assert columns % 256 == 0 and plan["chunks"] == -(-v // columns) and plan["shared_bytes"] <= gpu[1]
    assert plan["kernel"] == "sm80" and plan["units"] == -(-n // 128) * (columns // 256)
    bytes_e, bytes_c = needs[0] * n * d * 2, needs[1] * v * d * 2
    # Sums of e's gradient, a chunk and cuBLAS's workspace, over the gradients.
    over = bytes_e + columns * n * 2 + 2**25
    assert columns == 256 or columns * n * 2 <= 2**25 or over <= (bytes_e + bytes_c) / 7


@pytest.mark.parametrize(("d", "v"), [(2304, 256000), (4096, 128256)])
def test_the_exact_backward_keeps_to_its_memory(host, d, v):
    """Of 8192 tokens on an H200: at its peak at most 1.15 times the gradients."""
    n = 8192
    plan = host.plan_exact(n, d, v, True, True, *GPUS["sm_90"], **HOPPER)
    assert plan["kernel"] == "sm90" and plan["cluster"] == 2
    sums, gradient_e, gradient_c = n * d * 4, n * d * 2, v * d * 2
    # With the workspace that cuBLAS may ask for then; e's gradient is allocated when dz is gone.
    during = gradient_c + sums + n * plan["chunk_columns"] * 2 + 2**25
    after = gradient_c + sums + gradient_e
    assert max(during, after) <= 1.15 * (gradient_e + gradient_c)
    # The last wave of dz is not left to few.
    waves = plan["units"] / 66
    assert waves / -(-plan["units"] // 66) > 0.9


each_capability = pytest.mark.parametrize("capability", [(8, 0, True), (9, 0, False), (9, 0, True)], ids=str)


@gpus
@shapes
@each_capability
def test_visits_have_room(host, gpu, shape, capability):
    n, d, v = shape
    plan = host.plan_visits(n, d, v, True, True, False, *gpu, *capability)
    hopper = plan["kernel"] == "sm90"
    assert hopper == (capability == (9, 0, True) and gpu[1] >= plan["shared_bytes"] and gpu[1] > 200 << 10)
    assert plan["reason"].startswith("wgmma" if hopper else "mma.sync")
    assert plan["columns"] == (256 if hopper else 128) and plan["shared_bytes"] <= gpu[1]
    strips, rows = -(-v // plan["columns"]), n + 1
    assert plan["strips"] == strips and plan["tiles"] == -(-v // 256)
    # Every pair visited, and the control variate's row: the most that there can be.
    padded = -(-rows // 16) * 16 if hopper else rows
    assert plan["centroids"] == 1
    assert plan["capacity"] >= padded and plan["buffer"] == plan["capacity"] + padded
    assert plan["max_chunks"] * plan["capacity"] >= strips * padded
    # However few the tokens, a chunk has strips for all multiprocessors; but no rows that there cannot be.
    assert plan["capacity"] >= min((1 << 21) // plan["columns"], strips * padded)
    assert plan["capacity"] <= max(strips * padded, -(-384 * n // 256))
    slices = -(-d // 128)
    most = sum(-(-slices // host.slices_per_item(visits, slices)) for visits in [rows] * strips)
    lenders = strips - plan["first_borrowed"]
    rounds = -(-n // 256) * slices if hopper else -(-n // 64)
    assert plan["max_items"] >= (strips + lenders) * -(-rows // 128) + most + rounds
    assert plan["words"] * 32 >= n and plan["words"] % 4 == 0
    assert plan["residual_stride"] >= n and plan["residual_stride"] % 8 == 0
    alone = host.plan_visits(n, d, v, True, False, False, *gpu, *capability)
    assert alone["slices"] == 0 and alone["centroids"] == int(hopper)
    assert host.plan_visits(n, d, v, False, True, False, *gpu, *capability)["centroids"] == 1


@gpus
@shapes
@each_capability
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_the_sums_of_e_lie_in_rows_that_are_written_last(host, gpu, shape, capability, needs):
    n, d, v = shape
    plan = host.plan_visits(n, d, v, *needs, False, *gpu, *capability)
    strips, columns, first = plan["strips"], plan["columns"], plan["first_borrowed"]
    # Hopper's kernel needs the residual masses for as long.
    residual = -(-plan["tiles"] * plan["residual_stride"] // d) if plan["kernel"] == "sm90" else 0
    assert (first < strips) == (all(needs) and v >= 6 * (2 * n + residual))
    if first < strips:
        assert first * columns * d <= plan["residual_begin"] <= plan["sums_begin"]
        assert plan["sums_begin"] - plan["residual_begin"] >= residual * d
        assert (v * d - plan["sums_begin"]) * 2 >= n * d * 4
        assert plan["sums_begin"] * 2 % 16 == 0 and plan["residual_begin"] * 2 % 16 == 0


@gpus
@pytest.mark.parametrize("d", [8, 768, 2304, 4096, 16384, 65536])
def test_a_pass_for_centroids_fits_any_width(host, gpu, d):
    """As many rows of C at a time as fit; none where one does not."""
    group = host.plan_visits(100, d, 5000, True, True, False, *gpu)["centroid_group"]
    room = gpu[1] - 2048 - 4 * d
    assert group * 2 * d <= max(room, 0)
    assert group > 0 or room < 2 * d
    assert group <= 256 and (group < 8 or group % 8 == 0)


def test_slices_of_an_item(host):
    assert [host.slices_per_item(n, 18) for n in (0, 64, 65, 400, 1000, 8192)] == [18, 18, 18, 6, 3, 1]
    assert host.slices_per_item(10, 3) == 3


def test_a_swizzled_tile_has_no_bank_conflicts(host):
    offsets = {host.swizzled_offset(row, chunk) for row in range(64) for chunk in range(8)}
    assert offsets == set(range(0, 64 * 128, 16)), "a permutation"
    for first in range(0, 64, 8):
        for chunk in range(8):
            # ldmatrix reads a chunk of eight neighbouring rows; a copy writes all chunks of one row.
            assert len({host.swizzled_offset(first + r, chunk) % 128 for r in range(8)}) == 8
            assert len({host.swizzled_offset(first, c) % 128 for c in range(8)}) == 8


def bf16(rng, rows, columns, stride):
    """Small whole numbers, exact in bf16, as its bits, in rows that lie further apart; and their values."""
    values = rng.integers(-3, 4, (rows, stride)).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    return bits[:, :columns], values[:, :columns]


def values_of(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(("m", "n", "k"), [(3, 8, 5), (1, 16, 7), (12, 8, 1)])
def test_products_of_cublas(host, m, n, k):
    """Row-major products in terms of a column-major library, and its modes as they were found."""
    rng = np.random.default_rng(0)
    a, a_values = bf16(rng, m, k, k + 3)
    b, b_values = bf16(rng, k, n, n + 8)
    sums = np.full((m, n), np.nan, np.float32)
    for add, expected in ((False, a_values @ b_values), (True, 2 * a_values @ b_values)):
        assert host.blas_product(a, b, sums, add=add)["error"] is None
        assert np.array_equal(sums, expected)

    t, t_values = bf16(rng, k, m, m + 5)
    out = np.empty((m, n), np.uint16)
    modes = host.blas_product(t, b, out, transposed=True)
    assert np.array_equal(values_of(out), t_values.T @ b_values)
    # No sums in 16 bits; and torch's own mode afterwards.
    assert modes == {"error": None, "gemm_math_mode": 16, "math_mode": 3, "pointer_mode": 0}
    modes = host.blas_product(t, b, out, transposed=True, factors=np.array([0.5, 0.0], np.float32))
    assert np.array_equal(values_of(out), t_values.T @ b_values / 2) and modes["pointer_mode"] == 0


def test_errors_of_cublas_are_kept(host):
    a, _ = bf16(np.random.default_rng(0), 2, 2, 2)
    done = host.blas_product(a, a, np.zeros((2, 2), np.float32), status=13)
    assert done["error"] == "failed" and done["math_mode"] == 3
    assert "cuBLAS" in host.error_without_cublas()
