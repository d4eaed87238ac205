"""Each operation, saved and read back, against torch or numpy on the same numbers, in float32 and float16."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgestill.runtimes.mil.registry import OPERATIONS

F = torch.nn.functional
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4)).astype(np.float32)
Y = RNG.normal(size=(3, 4)).astype(np.float32) + 3
W = RNG.normal(size=(5, 4)).astype(np.float32)
GAMMA = RNG.normal(size=4).astype(np.float32)


def t(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x, np.float32))


# MIL operation -> (how the builder writes it, what it means in torch); x [2, 3, 4] and y [3, 4], y about 3.
FLOAT: dict[str, tuple[Any, Any]] = {
    "add": (lambda mb, x, y: mb.add(x=x, y=y), lambda x, y: x + y),
    "sub": (lambda mb, x, y: mb.sub(x=x, y=y), lambda x, y: x - y),
    "mul": (lambda mb, x, y: mb.mul(x=x, y=y), lambda x, y: x * y),
    "real_div": (lambda mb, x, y: mb.real_div(x=x, y=y), lambda x, y: x / y),
    "floor_div": (lambda mb, x, y: mb.floor_div(x=x, y=y), lambda x, y: torch.floor(x / y)),
    "mod": (lambda mb, x, y: mb.mod(x=x, y=y), lambda x, y: torch.remainder(x, y)),
    "pow": (lambda mb, x, y: mb.pow(x=y, y=x), lambda x, y: y**x),
    "maximum": (lambda mb, x, y: mb.maximum(x=x, y=y), torch.maximum),
    "minimum": (lambda mb, x, y: mb.minimum(x=x, y=y), torch.minimum),
    "abs": (lambda mb, x, y: mb.abs(x=x), lambda x, y: x.abs()),
    "ceil": (lambda mb, x, y: mb.ceil(x=x), lambda x, y: x.ceil()),
    "floor": (lambda mb, x, y: mb.floor(x=x), lambda x, y: x.floor()),
    "round": (lambda mb, x, y: mb.round(x=x), lambda x, y: x.round()),
    "sign": (lambda mb, x, y: mb.sign(x=x), lambda x, y: x.sign()),
    "cos": (lambda mb, x, y: mb.cos(x=x), lambda x, y: x.cos()),
    "sin": (lambda mb, x, y: mb.sin(x=x), lambda x, y: x.sin()),
    "tan": (lambda mb, x, y: mb.tan(x=y), lambda x, y: y.tan()),
    "tanh": (lambda mb, x, y: mb.tanh(x=x), lambda x, y: x.tanh()),
    "exp": (lambda mb, x, y: mb.exp(x=x), lambda x, y: x.exp()),
    "exp2": (lambda mb, x, y: mb.exp2(x=x), lambda x, y: torch.exp2(x)),
    "erf": (lambda mb, x, y: mb.erf(x=x), lambda x, y: torch.erf(x)),
    "log": (lambda mb, x, y: mb.log(x=y), lambda x, y: y.log()),
    "sqrt": (lambda mb, x, y: mb.sqrt(x=y), lambda x, y: y.sqrt()),
    "rsqrt": (lambda mb, x, y: mb.rsqrt(x=y), lambda x, y: y.rsqrt()),
    "inverse": (lambda mb, x, y: mb.inverse(x=y, epsilon=np.float32(0)), lambda x, y: 1 / y),
    "square": (lambda mb, x, y: mb.square(x=x), lambda x, y: x * x),
    "relu": (lambda mb, x, y: mb.relu(x=x), lambda x, y: F.relu(x)),
    "relu6": (lambda mb, x, y: mb.relu6(x=y), lambda x, y: F.relu6(y)),
    "leaky_relu": (lambda mb, x, y: mb.leaky_relu(x=x, alpha=np.float32(0.1)), lambda x, y: F.leaky_relu(x, 0.1)),
    "sigmoid": (lambda mb, x, y: mb.sigmoid(x=x), lambda x, y: x.sigmoid()),
    "silu": (lambda mb, x, y: mb.silu(x=x), lambda x, y: F.silu(x)),
    "softplus": (lambda mb, x, y: mb.softplus(x=x), lambda x, y: F.softplus(x)),
    "softsign": (lambda mb, x, y: mb.softsign(x=x), lambda x, y: F.softsign(x)),
    "gelu": (lambda mb, x, y: mb.gelu(x=x, mode="EXACT"), lambda x, y: F.gelu(x)),
    "clip": (
        lambda mb, x, y: mb.clip(x=x, alpha=np.float32(-0.5), beta=np.float32(0.5)),
        lambda x, y: x.clip(-0.5, 0.5),
    ),
    "linear_activation": (
        lambda mb, x, y: mb.linear_activation(x=x, alpha=np.float32(2), beta=np.float32(1)),
        lambda x, y: 2 * x + 1,
    ),
    "reduce_sum": (lambda mb, x, y: mb.reduce_sum(x=x, axes=[1], keep_dims=True), lambda x, y: x.sum(1, True)),
    "reduce_mean": (lambda mb, x, y: mb.reduce_mean(x=x, axes=[-1]), lambda x, y: x.mean(-1)),
    "reduce_max": (lambda mb, x, y: mb.reduce_max(x=x, axes=[0, 2]), lambda x, y: x.amax((0, 2))),
    "reduce_min": (lambda mb, x, y: mb.reduce_min(x=x, axes=[2]), lambda x, y: x.amin(2)),
    "reduce_prod": (lambda mb, x, y: mb.reduce_prod(x=x, axes=[2]), lambda x, y: x.prod(2)),
    "reduce_sum_square": (lambda mb, x, y: mb.reduce_sum_square(x=x, axes=[2]), lambda x, y: (x * x).sum(2)),
    "reduce_l1_norm": (lambda mb, x, y: mb.reduce_l1_norm(x=x, axes=[2]), lambda x, y: x.abs().sum(2)),
    "reduce_l2_norm": (lambda mb, x, y: mb.reduce_l2_norm(x=x, axes=[2]), lambda x, y: x.norm(dim=2)),
    "reduce_log_sum": (lambda mb, x, y: mb.reduce_log_sum(x=y, axes=[1]), lambda x, y: y.sum(1).log()),
    "reduce_log_sum_exp": (lambda mb, x, y: mb.reduce_log_sum_exp(x=x, axes=[1]), lambda x, y: x.logsumexp(1)),
    "softmax": (lambda mb, x, y: mb.softmax(x=x, axis=1), lambda x, y: x.softmax(1)),
    "layer_norm": (
        lambda mb, x, y: mb.layer_norm(x=x, axes=[-1], gamma=GAMMA, beta=GAMMA, epsilon=np.float32(1e-3)),
        lambda x, y: F.layer_norm(x, (4,), t(GAMMA), t(GAMMA), 1e-3),
    ),
    "cumsum": (lambda mb, x, y: mb.cumsum(x=x, axis=1), lambda x, y: x.cumsum(1)),
    "linear": (lambda mb, x, y: mb.linear(x=x, weight=W, bias=W[:, 0]), lambda x, y: F.linear(x, t(W), t(W[:, 0]))),
    "matmul": (lambda mb, x, y: mb.matmul(x=x, y=y, transpose_y=True), lambda x, y: x @ y.T),
    "scaled_dot_product_attention": (
        lambda mb, x, y: mb.scaled_dot_product_attention(query=x, key=x, value=x),
        lambda x, y: F.scaled_dot_product_attention(x, x, x),
    ),
    "reshape": (lambda mb, x, y: mb.reshape(x=x, shape=[4, -1]), lambda x, y: x.reshape(4, -1)),
    "transpose": (lambda mb, x, y: mb.transpose(x=x, perm=[2, 0, 1]), lambda x, y: x.permute(2, 0, 1)),
    "expand_dims": (lambda mb, x, y: mb.expand_dims(x=x, axes=[1]), lambda x, y: x[:, None]),
    "concat": (lambda mb, x, y: mb.concat(values=[x, x], axis=1), lambda x, y: torch.cat([x, x], 1)),
    "stack": (lambda mb, x, y: mb.stack(values=[x, x], axis=1), lambda x, y: torch.stack([x, x], 1)),
    "tile": (lambda mb, x, y: mb.tile(x=x, reps=[2, 1, 3]), lambda x, y: x.repeat(2, 1, 3)),
    "reverse": (lambda mb, x, y: mb.reverse(x=x, axes=[1]), lambda x, y: x.flip(1)),
    "pad": (
        lambda mb, x, y: mb.pad(x=x, pad=[1, 0, 0, 2], mode="constant", constant_val=np.float32(7)),
        lambda x, y: F.pad(x, (0, 2, 1, 0), value=7.0),
    ),
    "band_part": (lambda mb, x, y: mb.band_part(x=x, lower=-1, upper=0), lambda x, y: x.tril()),
    "slice_by_index": (
        lambda mb, x, y: mb.slice_by_index(
            x=x, begin=[0, -2, 3], end=[1, 0, 0], stride=[1, 1, -2], begin_mask=[False] * 3,
            end_mask=[False, True, True], squeeze_mask=[True, False, False],
        ),
        lambda x, y: x[0, -2:].flip(-1)[:, ::2],
    ),
    "slice_by_size": (
        lambda mb, x, y: mb.slice_by_size(x=x, begin=[1, 0, 1], size=[1, -1, 2]),
        lambda x, y: x[1:, :, 1:3],
    ),
    "slice_update": (
        lambda mb, x, y: mb.slice_update(
            x=x, update=y, begin=[1, 0, 0], end=[2, 3, 4], squeeze_mask=[True, False, False]
        ),
        lambda x, y: torch.stack([x[0], y]),
    ),
    "gather": (lambda mb, x, y: mb.gather(x=x, indices=[2, 0], axis=1), lambda x, y: x[:, [2, 0]]),
    "gather_nd": (lambda mb, x, y: mb.gather_nd(x=x, indices=[[1, 2], [0, 0]]), lambda x, y: x[[1, 0], [2, 0]]),
    "gather_along_axis": (
        lambda mb, x, y: mb.gather_along_axis(x=y, indices=[[0, 1, 2, 0]], axis=0),
        lambda x, y: torch.take_along_dim(y, torch.tensor([[0, 1, 2, 0]]), 0),
    ),
    "select": (
        lambda mb, x, y: mb.select(cond=mb.greater(x=x, y=np.float32(0)), a=x, b=mb.mul(x=x, y=np.float32(2))),
        lambda x, y: torch.where(x > 0, x, 2 * x),
    ),
    "fill_like": (
        lambda mb, x, y: mb.add(x=mb.fill_like(ref_tensor=x, value=np.float32(2)), y=x), lambda x, y: x + 2
    ),
    "squeeze": (
        lambda mb, x, y: mb.squeeze(x=mb.slice_by_size(x=x, begin=[0, 0, 0], size=[1, 3, 4]), axes=[0]),
        lambda x, y: x[0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_float_operations(interpret: Any, dtype: str) -> None:
    # Constants of the table are float32, and MIL wants the type of the other argument.
    keep = {k: v for k, v in FLOAT.items() if dtype == "float32" or k not in _WITH_CONSTANTS}
    names = list(keep)
    interpreter = interpret(
        lambda mb, x, y: tuple(mb.identity(x=keep[n][0](mb, x, y), name=f"out_{n}") for n in names),
        ((2, 3, 4), dtype), ((3, 4), dtype),
    )  # fmt: skip
    kinds = {operation.kind for operation in interpreter.program.operations}
    assert set(names) <= kinds
    x, y = (v.astype(dtype).astype(np.float32) for v in (X, Y))
    results = interpreter.run({"input0": x, "input1": y})
    for name in names:
        want = keep[name][1](t(x), t(y)).numpy()
        got = results[f"out_{name}"]
        assert got.shape == want.shape, name
        if dtype == "float16":
            assert np.array_equal(got, got.astype(np.float16).astype(np.float32)), f"{name} is not rounded"
            np.testing.assert_allclose(got, want, rtol=2**-10, atol=2**-14, err_msg=name)
        else:
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6, err_msg=name)


_WITH_CONSTANTS = {
    "inverse", "leaky_relu", "clip", "linear_activation", "layer_norm", "linear", "pad", "select", "fill_like",
}  # fmt: skip


def test_integers_and_booleans(interpret: Any) -> None:
    def body(mb: Any, a: Any, b: Any) -> tuple[Any, ...]:
        rows = {
            "shape": mb.shape(x=a),
            "real_div": mb.real_div(x=a, y=b),
            "cast": mb.cast(x=mb.cast(x=a, dtype="fp16"), dtype="int32"),
            "equal": mb.cast(x=mb.equal(x=a, y=b), dtype="int32"),
            "not_equal": mb.cast(x=mb.not_equal(x=a, y=b), dtype="int32"),
            "less": mb.cast(x=mb.less(x=a, y=b), dtype="int32"),
            "less_equal": mb.cast(x=mb.less_equal(x=a, y=b), dtype="int32"),
            "greater": mb.cast(x=mb.greater(x=a, y=b), dtype="int32"),
            "greater_equal": mb.cast(x=mb.greater_equal(x=a, y=b), dtype="int32"),
            "logical_and": mb.cast(x=mb.logical_and(x=mb.less(x=a, y=b), y=mb.greater(x=a, y=0)), dtype="int32"),
            "logical_or": mb.cast(x=mb.logical_or(x=mb.less(x=a, y=b), y=mb.greater(x=a, y=0)), dtype="int32"),
            "logical_xor": mb.cast(x=mb.logical_xor(x=mb.less(x=a, y=b), y=mb.greater(x=a, y=0)), dtype="int32"),
            "logical_not": mb.cast(x=mb.logical_not(x=mb.less(x=a, y=b)), dtype="int32"),
            "range_1d": mb.range_1d(start=1, end=8, step=3),
            "fill": mb.fill(shape=[2, 2], value=5),
            "one_hot": mb.one_hot(indices=[2, 0], one_hot_vector_size=3),
            "reduce_argmax": mb.reduce_argmax(x=mb.cast(x=a, dtype="fp32"), axis=0),
            "reduce_argmin": mb.reduce_argmin(x=mb.cast(x=a, dtype="fp32"), axis=0),
        }
        return tuple(mb.identity(x=value, name=f"out_{name}") for name, value in rows.items())

    a, b = np.array([-7, 3, 9, 4], np.int32), np.array([2, 3, 4, 5], np.int32)
    results = interpret(body, ((4,), "int32"), ((4,), "int32")).run({"input0": a, "input1": b})
    want = {
        "shape": [4], "real_div": [-3, 1, 2, 0], "cast": a, "equal": a == b, "not_equal": a != b, "less": a < b,
        "less_equal": a <= b, "greater": a > b, "greater_equal": a >= b, "logical_and": (a < b) & (a > 0),
        "logical_or": (a < b) | (a > 0), "logical_xor": (a < b) ^ (a > 0), "logical_not": a >= b,
        "range_1d": [1, 4, 7], "fill": [[5, 5], [5, 5]], "one_hot": [[0, 0, 1], [1, 0, 0]], "reduce_argmax": 2,
        "reduce_argmin": 0,
    }  # fmt: skip
    for name, value in want.items():
        np.testing.assert_array_equal(results[f"out_{name}"], np.asarray(value, np.int32), err_msg=name)


def test_split_topk_einsum_interleave(interpret: Any) -> None:
    def body(mb: Any, x: Any) -> tuple[Any, ...]:
        first, second = mb.split(x=x, split_sizes=[1, 3], axis=2)
        values, places = mb.topk(x=x, k=2, axis=-1)
        y = mb.einsum(values=(x, mb.transpose(x=x, perm=[2, 1, 0])), equation="chw,whr->chr")
        mixed = mb.concat(values=[x, mb.relu(x=x)], axis=1, interleave=True)
        backwards = mb.cumsum(x=x, axis=2, exclusive=True, reverse=True)
        named = {"a": first, "b": second, "v": values, "p": places, "e": y, "i": mixed, "c": backwards}
        return tuple(mb.identity(x=value, name=f"out_{name}") for name, value in named.items())

    results = interpret(body, ((2, 3, 4), "float32")).run({"input0": X})
    top = torch.topk(t(X), 2)
    np.testing.assert_array_equal(results["out_a"], X[:, :, :1])
    np.testing.assert_array_equal(results["out_b"], X[:, :, 1:])
    np.testing.assert_array_equal(results["out_v"], top.values.numpy())
    np.testing.assert_array_equal(results["out_p"], top.indices.numpy())
    np.testing.assert_allclose(results["out_e"], np.einsum("chw,rhw->chr", X, X), rtol=1e-5, atol=1e-6)
    want = np.stack([X, np.maximum(X, 0)], 2).reshape(2, 6, 4)
    np.testing.assert_array_equal(results["out_i"], want)
    np.testing.assert_allclose(results["out_c"], np.flip(np.cumsum(np.flip(X, 2), 2), 2) - X, rtol=1e-5, atol=1e-6)


def test_gelu_approximations(interpret: Any) -> None:
    interpreter = interpret(
        lambda mb, x: tuple(mb.gelu(x=x, mode=f"{kind}_APPROXIMATION", name=kind) for kind in ("TANH", "SIGMOID")),
        ((2, 3, 4), "float32"),
    )  # fmt: skip
    results = interpreter.run({"input0": X})
    np.testing.assert_allclose(results["TANH"], F.gelu(t(X), approximate="tanh").numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(results["SIGMOID"], (t(X) * torch.sigmoid(1.702 * t(X))).numpy(), rtol=1e-5, atol=1e-6)


def test_every_registered_operation_is_tested() -> None:
    elsewhere = {
        "shape", "cast", "identity", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal",
        "logical_and", "logical_or", "logical_xor", "logical_not", "range_1d", "fill", "one_hot", "reduce_argmax",
        "reduce_argmin", "split", "topk", "einsum",
        "constexpr_affine_dequantize", "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense", "constexpr_cast",
        "constexpr_sparse_to_dense", "constexpr_lut_to_sparse", "constexpr_sparse_blockwise_shift_scale",
    }  # fmt: skip
    assert set(OPERATIONS) == set(FLOAT) | elsewhere
