"""A look at the constrained weights of a model."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._constrained import Constrained, is_constrained
from ._constraints import apply_scale
from ._enclosures import enclose_norm
from ._norms import current_norm, reference_norm
from ._select import search_weights
from ._tree import as_path, follow, nodes, path_string
from ._wrapped import without_wrappers


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One constrained weight, in numbers.

    - `path`: where it is in the model; `[i]` behind it is its place in a stack.
    - `layer`: the type of the layer that it belongs to.
    - `shape`: of the weight, without stacked axes.
    - `sigma`: the norm of the raw weight, as the estimator sees it.
    - `norm`: the norm of the constrained weight by the same estimate. Of a convolution
        at every input size, all frequencies are looked at anew, so that a state that
        lags behind the weights shows.
    - `bound`: the norm that is allowed.
    - `residual`: `|A^H u - sigma v| / sigma`: how far the estimate is from converged.
    - `kind`: what the estimator says of `sigma` and `norm`: `"estimate"`, never above
        the truth, `"upper bound"`, never below it, or `"exact"`.
    - `true_norm`: the norm of the constrained weight, computed independently of the
        state; `None` if it was not asked for.
    - `lower`, `upper`: what the norm of the constrained weight, as it is stored, is
        proven to lie between: [`spectrax.enclose_norm`][]. `None` if not asked for.
    """

    path: str
    layer: str
    shape: tuple[int, ...]
    sigma: float
    norm: float
    bound: float
    residual: float
    kind: str
    true_norm: float | None
    lower: float | None = None
    upper: float | None = None


@dataclasses.dataclass(frozen=True)
class Summary(Sequence[SummaryRow]):
    """What [`spectrax.summary`][] returns: a sequence of rows, which prints as a table.

    - `rows`: one [`spectrax.SummaryRow`][] for each constrained weight.
    - `unconstrained`: path and shape of each layer's weight without a constraint, and
        of each array with two or more axes that belongs to no layer of a known type.
    """

    rows: tuple[SummaryRow, ...]
    unconstrained: tuple[tuple[str, tuple[int, ...]], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[SummaryRow]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> SummaryRow: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[SummaryRow, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __str__(self) -> str:
        header = ["path", "layer", "shape", "sigma", "norm", "kind"]
        header += ["bound", "residual"]
        with_ends = any(row.upper is not None for row in self.rows)
        if with_ends:
            header += ["proven from", "to"]
        with_truth = any(row.true_norm is not None for row in self.rows)
        if with_truth:
            header.append("true norm")
        table = [header]
        for row in self.rows:
            cells = [
                row.path,
                row.layer,
                "x".join(map(str, row.shape)),
                f"{row.sigma:.6g}",
                f"{row.norm:.6f}",
                row.kind,
                f"{row.bound:.6f}",
                f"{row.residual:.1e}",
            ]
            if with_ends:
                cells += [
                    _rounded(row.lower, math.floor),
                    _rounded(row.upper, math.ceil),
                ]
            if with_truth:
                cells.append(_rounded(row.true_norm, round))
            table.append(cells)
        lines = _aligned(table, left=3)
        lines.insert(1, "-" * len(lines[0]))
        if self.unconstrained:
            names = (f"{path} {shape}" for path, shape in self.unconstrained)
            lines.append("not constrained: " + ", ".join(names))
        return "\n".join(lines)

    __repr__ = __str__


def summary(
    model: PyTree,
    state: eqx.nn.State,
    *,
    enclosure: bool = True,
    true_norm: bool = False,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Summary:
    """The constrained weights of a model: norms, bounds, and how converged they are.

    **Kind:** `sigma` and `norm` are what the estimator says, by default an estimate.
    `lower` and `upper` are proven bounds on the norm of the constrained weight as it is
    stored, by [`spectrax.enclose_norm`][]; printed, they are rounded outward. With
    `true_norm=True` that norm is computed as well: exactly for matrices, by a singular
    value decomposition in float64; for a convolution at every input size by one at the
    best frequency that a search finds; for an operator too large to be written out
    (2^24 entries) converged with [`spectrax.spectral_norm`][].

    **Arguments:**

    - `model`: what `wrap` returned, or any pytree with such modules in it. Concrete
        arrays: not under `jit`.
    - `state`: the model's state. It stays valid and nothing advances.
    - `enclosure`: whether to compute the proven bounds.
    - `true_norm`: whether to compute the true norms.
    - `progress`: wraps the sequence of weights while the table is made, as `tqdm.tqdm`
        does, which then shows how far it has come.

    **Returns:**

    A [`spectrax.Summary`][]: print it, iterate over its rows, or index it. Stacks of
    weights have one row for each.

    **Cost:** an enclosure of each weight, for matrices compiled once for each shape;
    without, a few products with it, and for a convolution at every input size a search.
    With `true_norm=True` a decomposition of each.

    **Raises:** `ValueError` if nothing in `model` is wrapped or, by Equinox, if `state`
    is an old one.

    !!! Example

        ```python
        import equinox as eqx
        import jax
        import spectrax

        key = jax.random.key(0)
        mlp = eqx.nn.MLP(16, 16, width_size=16, depth=2, key=key)
        model, state = spectrax.constrain(mlp)
        table = spectrax.summary(model, state, true_norm=True)
        print(table)
        worst = max(row.true_norm / row.bound for row in table)
        ```
    """
    bare = without_wrappers(model)
    weights = [
        (as_path(key_path), node)
        for key_path, node in nodes(bare, is_constrained)
        if is_constrained(node)
    ]
    if not weights:
        raise ValueError(
            "`spectrax.summary` expected a model with something constrained in it, got "
            f"{type(model).__name__} with nothing. Constrain it first: `model, state = "
            "spectrax.constrain(model)`."
        )
    rows: list[SummaryRow] = []
    for path, node in progress(weights):
        layer = type(follow(bare, path[:-1])).__name__
        rows += _rows(node, state, path_string(path), layer, enclosure, true_norm)
    return Summary(tuple(rows), tuple(_unconstrained(bare)))


def _rows(
    node: Constrained,
    state: eqx.nn.State,
    name: str,
    layer: str,
    with_ends: bool,  # noqa: FBT001
    with_truth: bool,  # noqa: FBT001
) -> list[SummaryRow]:
    sigma = node.norm(state)
    scale = node.rule(state).scale(sigma)
    residual = node.residual(state)
    scaled = eqx.tree_at(lambda n: n.weight, node, apply_scale(node.weight, scale))
    operators = scaled.operators()
    bound = jnp.broadcast_to(node.bound(state), sigma.shape)
    rows = []
    for index in np.ndindex(sigma.shape):
        operator = _at(operators, index)
        suffix = "".join(f"[{i}]" for i in index)
        box = enclose_norm(operator) if with_ends else None
        rows.append(
            SummaryRow(
                path=name + suffix,
                layer=layer,
                shape=node.weight.shape[node.stack_ndim :],
                sigma=float(sigma[index]),
                norm=current_norm(
                    operator, float(jnp.abs(sigma[index]) * scale[index])
                ),
                bound=float(bound[index]),
                residual=float(residual[index]),
                kind=node.estimator.kind,
                lower=None if box is None else float(box.lower),
                upper=None if box is None else float(box.upper),
                true_norm=reference_norm(operator) if with_truth else None,
            )
        )
    return rows


def _rounded(value: float | None, direction: Callable[[float], int]) -> str:
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    return f"{direction(value * 1e6) / 1e6:.6f}"


def _at(stack: PyTree, index: tuple[int, ...]) -> PyTree:
    """One element of a stack of pytrees."""
    return jtu.tree_map(lambda x: x[index] if eqx.is_array(x) else x, stack)


def _unconstrained(model: PyTree) -> list[tuple[str, tuple[int, ...]]]:
    """The weights and the unknown matrices that are left without constrained ones."""
    rest = jtu.tree_map(
        lambda node: None if is_constrained(node) else node,
        model,
        is_leaf=is_constrained,
    )
    weights, strangers = search_weights(rest)
    return [(path_string(p), follow(rest, p).shape) for p in weights + strangers]


def _aligned(table: list[list[str]], left: int) -> list[str]:
    """Columns of equal width, the first `left` of them aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        lines.append("  ".join(padded).rstrip())
    return lines
