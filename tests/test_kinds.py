"""Every kind of operator keeps the promises that are made of all of them.

One row a kind, one test an operation. The truth is a decomposition by NumPy of a matrix
that NumPy writes out from the weight.
"""

import ast
import itertools as it
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import spectrax
from spectrax import internal
from spectrax._enclosures._drift import arrays_of, drift_bound
from spectrax._norms import exact_norm
from spectrax._norms._power_iteration import residual_norm

from .helpers import true_norm


class Kronecker(lx.AbstractLinearOperator):
    """A kind of someone else's that knows its norm: `X` to `left X right^T`."""

    left: jax.Array
    right: jax.Array

    def mv(self, vector):
        return self.left @ vector @ self.right.T

    def as_matrix(self):
        return jnp.kron(self.left, self.right)

    def transpose(self):
        return Kronecker(self.left.T, self.right.T)

    def in_structure(self):
        shape = self.left.shape[1], self.right.shape[1]
        return jax.ShapeDtypeStruct(shape, self.left.dtype)

    def out_structure(self):
        shape = self.left.shape[0], self.right.shape[0]
        return jax.ShapeDtypeStruct(shape, self.left.dtype)

    def factors(self):
        return lx.MatrixLinearOperator(self.left), lx.MatrixLinearOperator(self.right)


internal.register_without_structure(Kronecker)


@lx.conj.register
def _(operator: Kronecker):
    return Kronecker(jnp.conj(operator.left), jnp.conj(operator.right))


@internal.converged_norm.register
def _(operator: Kronecker, find: internal.TripletFinder):
    left, right = (internal.converged_norm(one, find) for one in operator.factors())
    return left * right


@internal.enclose.register
def _(operator: Kronecker, effort: internal.Effort):
    a, b = (internal.enclose(one, effort) for one in operator.factors())
    return internal.Ends(a.times(b.lower).lower, a.times(b.upper).upper)


class Sums(lx.AbstractLinearOperator):
    """A kind of which nothing is known: sums from the start, each times a weight."""

    weight: jax.Array

    def mv(self, vector):
        return self.weight * jnp.cumsum(vector)

    def as_matrix(self):
        return jax.jacfwd(self.mv)(jnp.zeros_like(self.weight))

    def transpose(self):
        return lx.FunctionLinearOperator(self.mv, self.in_structure()).T

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.weight.shape, self.weight.dtype)

    def out_structure(self):
        return self.in_structure()


internal.register_without_structure(Sums)


@lx.conj.register
def _(operator: Sums):
    return Sums(jnp.conj(operator.weight))


# The matrix of each kind, by NumPy.

CONV = eqx.filter_eval_shape(
    eqx.nn.Conv1d, 4, 2, 3, stride=2, padding=2, padding_mode="CIRCULAR", groups=2,
    key=jr.key(0),
)  # fmt: skip
TRANSPOSED = eqx.filter_eval_shape(
    eqx.nn.ConvTranspose1d, 2, 3, 3, stride=2, padding=1, key=jr.key(0)
)
LATTICE = eqx.filter_eval_shape(eqx.nn.Conv1d, 2, 3, 3, padding=1, key=jr.key(0))
SIZE = 5


def _of_layer(layer: Any, weight: Any, **options: Any) -> Any:
    layer = eqx.tree_at(lambda one: (one.weight, one.bias), layer, (weight, None))
    return spectrax.layer_operator(layer, **options)


def convolution(weight):
    return _of_layer(CONV, weight, input_size=(SIZE,))


def transposed_convolution(weight):
    return _of_layer(TRANSPOSED, weight, input_size=(SIZE,))


def lattice(weight):
    return _of_layer(LATTICE, weight)


def kronecker(weights):
    return Kronecker(*weights)


def _convolution_matrix(weight: np.ndarray) -> np.ndarray:
    outputs = (SIZE + 4 - 3) // 2 + 1
    matrix = np.zeros((2, outputs, 4, SIZE))
    for o, i, c, t in it.product(range(2), range(outputs), range(2), range(3)):
        # Two channels for each output: the groups.
        matrix[o, i, 2 * o + c, (2 * i + t - 2) % SIZE] += weight[o, c, t]
    return matrix.reshape(2 * outputs, 4 * SIZE)


def _transposed_matrix(weight: np.ndarray) -> np.ndarray:
    size = 2 * (SIZE - 1) + 3 - 2
    matrix = np.zeros((3, size, 2, SIZE))
    for j, t in it.product(range(SIZE), range(3)):
        # Entry `j` lies at `2 j`, and the kernel is read backward from there.
        place = 2 * j + (2 - t) - 1
        if 0 <= place < size:
            matrix[:, place, :, j] += weight[:, :, t]
    return matrix.reshape(3 * size, 2 * SIZE)


def _fourier_matrix(weight: np.ndarray) -> np.ndarray:
    out, in_, modes = weight.shape
    matrix = np.zeros((out, modes, in_, modes), weight.dtype)
    for mode in range(modes):
        matrix[:, mode, :, mode] = weight[:, :, mode]
    return matrix.reshape(out * modes, in_ * modes)


class Row(NamedTuple):
    """A kind. `matrix` has its norm; if it has `products`, it is its matrix."""

    name: str
    build: Callable[[Any], Any]
    shapes: tuple[tuple[int, ...], ...]
    matrix: Callable[..., np.ndarray]
    provable: bool = True
    linear: bool = True
    products: bool = True
    imaginary: bool = False
    positive: bool = False

    def draw(self, seed: int, dtype: Any = np.float64) -> Any:
        """Its weight, or several."""
        rng = np.random.default_rng(seed)
        arrays = [rng.normal(size=shape) for shape in self.shapes]
        if self.imaginary:
            arrays = [array + 1j * rng.normal(size=array.shape) for array in arrays]
            dtype = np.result_type(dtype, np.complex64)
        if self.positive:
            arrays = [np.abs(array) for array in arrays]
        arrays = [jnp.asarray(array, dtype) for array in arrays]
        return arrays[0] if len(arrays) == 1 else tuple(arrays)

    def truth(self, weight: Any) -> np.ndarray:
        """The matrix."""
        arrays = jax.tree.leaves(weight)
        return self.matrix(*map(np.asarray, arrays))

    def norm(self, weight: Any) -> float:
        return true_norm(self.truth(weight))


ROWS = [
    Row("matrix", lx.MatrixLinearOperator, ((5, 4),), lambda weight: weight),
    Row(
        "a matrix for each Fourier mode",
        spectrax.fourier_multiplier,
        ((3, 2, 5),),
        _fourier_matrix,
        imaginary=True,
    ),
    Row("convolution of one size", convolution, ((2, 2, 3),), _convolution_matrix),
    Row(
        "transposed convolution of one size",
        transposed_convolution,
        ((3, 2, 3),),
        _transposed_matrix,
    ),
    # With positive taps the supremum is at the frequency zero: that of their sum.
    Row(
        "convolution at every size",
        lattice,
        ((3, 2, 3),),
        lambda weight: weight.sum(axis=2),
        products=False,
        positive=True,
    ),
    Row("Kronecker product", kronecker, ((4, 3), (2, 3)), np.kron, linear=False),
    Row(
        "sums",
        Sums,
        ((6,),),
        lambda weight: weight[:, None] * np.tri(len(weight)),
        provable=False,
        linear=False,
    ),
]
WITH_PRODUCTS = [row for row in ROWS if row.products]
every_kind = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
every_finite_kind = pytest.mark.parametrize(
    "row", WITH_PRODUCTS, ids=lambda row: row.name
)


@eqx.filter_jit
def started(operator: Any) -> Any:
    return spectrax.init_power_state(operator, num_steps=0, key=jr.key(1))


@eqx.filter_jit
def stepped(operator: Any, state: Any) -> tuple[Any, jax.Array, jax.Array]:
    """A step later: the vectors, their value and their residual."""
    state = spectrax.power_iterate(operator, state)
    value = spectrax.singular_value(operator, state)
    return state, value, residual_norm(operator, state)


@eqx.filter_jit
def solved(operator: Any) -> spectrax.NormSolution:
    return spectrax.spectral_norm(operator, with_result=True)


def converged(operator: Any) -> tuple[Any, jax.Array, jax.Array]:
    found = stepped(operator, started(operator))
    for _ in range(80):
        found = stepped(operator, found[0])
    return found


@every_finite_kind
def test_products_are_those_of_the_matrix(row: Row):
    weight = row.draw(0)
    operator, matrix = row.build(weight), row.truth(weight)
    rng = np.random.default_rng(1)
    dtype = internal.accumulation_dtype(operator)

    def block(size: int) -> np.ndarray:
        rows = rng.normal(size=(2, size))
        rows = rows + 1j * rng.normal(size=(2, size)) if row.imaginary else rows
        return rows.astype(dtype)

    rows, columns = block(matrix.shape[1]), block(matrix.shape[0])
    apart = {"rtol": 0, "atol": 1e-12}
    found = internal.apply_rows(operator, jnp.asarray(rows))
    np.testing.assert_allclose(found, rows @ matrix.T, **apart)
    found = internal.adjoint_rows(operator, jnp.asarray(columns))
    np.testing.assert_allclose(found, columns @ matrix.conj(), **apart)
    np.testing.assert_allclose(operator.as_matrix(), matrix, **apart)
    np.testing.assert_allclose(operator.T.as_matrix(), matrix.T, **apart)
    np.testing.assert_allclose(lx.conj(operator).as_matrix(), matrix.conj(), **apart)
    np.testing.assert_allclose(
        lx.materialise(operator).as_matrix(), lx.linearise(operator).as_matrix()
    )


@every_kind
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtype_is_float32_at_least(row: Row, dtype: Any):
    operator = row.build(row.draw(0, dtype))
    found = internal.accumulation_dtype(operator)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    complex_ = row.imaginary or not row.products
    assert found == (np.result_type(wide, np.complex64) if complex_ else wide)
    state = jax.eval_shape(started, operator)
    kept, value, residual = jax.eval_shape(stepped, operator, state)
    norm = jax.eval_shape(solved, operator).value
    assert value.dtype == residual.dtype == norm.dtype == wide
    assert [x.dtype for x in jax.tree.leaves(kept)] == [
        x.dtype for x in jax.tree.leaves(state)
    ]


@every_kind
def test_power_iteration_converges_from_below(row: Row):
    weight = row.draw(1)
    operator, truth = row.build(weight), row.norm(weight)
    state = started(operator)
    before = float(spectrax.singular_value(operator, state))
    for _ in range(3):
        state, value, _ = stepped(operator, state)
        # A convolution at every size adds a little to its vectors at each step.
        assert before * (1 - 1e-3) <= value <= truth * (1 + 1e-12)
        before = float(value)
    state, value, residual = converged(operator)
    assert truth * (1 - 1e-6) <= value <= truth * (1 + 1e-12)
    assert residual <= (1e-5 if row.products else 1e-2)


@every_kind
def test_converged_norms_are_the_truth(row: Row):
    weight = row.draw(3)
    operator, truth = row.build(weight), row.norm(weight)
    found = solved(operator)
    assert found.value == pytest.approx(truth, rel=1e-10)
    assert found.residual <= 1e-10
    assert found.result == lx.RESULTS.successful
    assert residual_norm(operator, started(operator)) >= 1e-2
    assert eqx.filter_jit(exact_norm)(operator) == pytest.approx(truth, rel=1e-10)
    assert internal.reference_norm(operator) == pytest.approx(truth, rel=1e-10)
    assert internal.current_norm(operator, 0.99 * truth) <= truth * (1 + 1e-12)


def test_residual_of_modes_is_that_of_the_largest():
    row = ROWS[1]
    operator = row.build(row.draw(1))
    state, _, _ = converged(operator)
    norms = np.linalg.norm(operator.matrices(), 2, axis=(1, 2))
    for mode in range(len(norms)):
        # A little of the second pair in the first.
        u = state.u.at[mode, 0].add(0.01 * state.u[mode, 1])
        found = residual_norm(operator, eqx.tree_at(lambda s: s.u, state, u))
        assert found > 1e-3 if mode == norms.argmax() else found <= 1e-5


@every_kind
def test_derivatives_are_those_of_the_truth(row: Row):
    weight, direction = row.draw(4), row.draw(5)

    def norm(weight: Any) -> jax.Array:
        return spectrax.spectral_norm(row.build(weight))

    def value(weight: Any) -> jax.Array:
        return spectrax.singular_value(row.build(weight), state)

    def moved(step: float) -> float:
        after = jax.tree.map(lambda w, d: w + step * d, weight, direction)
        return row.norm(after)

    state, _, _ = converged(row.build(weight))
    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    for function, apart in ((norm, 1e-6), (value, 1e-3)):
        gradient = jax.jit(jax.grad(function))(weight)
        # JAX's gradient in a complex number is the conjugate of the derivative.
        products = jax.tree.map(lambda g, d: jnp.sum(g * d).real, gradient, direction)
        assert sum(jax.tree.leaves(products)) == pytest.approx(expected, rel=apart)


@every_kind
def test_enclosures_contain_the_truth(row: Row):
    weight = row.draw(6)
    operator, truth = row.build(weight), row.norm(weight)
    box = spectrax.enclose_norm(operator)
    assert box.lower <= truth * (1 + 1e-12)
    assert truth <= box.upper * (1 + 1e-12)
    assert internal.is_provable(operator) == row.provable == bool(box.upper < math.inf)
    assert box.lower >= truth * 0.95
    if row.provable:
        assert box.upper <= truth * 1.05
        assert internal.default_width(operator) <= 1e-2
    else:
        box = spectrax.enclose_norm(operator, materialise=True)
        assert truth * (1 - 1e-12) <= box.upper <= truth * 1.01
    form = internal.dense_form(operator) if row.products else None
    if form is not None:
        assert true_norm(form.matrix) == pytest.approx(truth, rel=1e-9)
        assert form.error <= 1e-9


@every_kind
def test_bounds_with_a_probability(row: Row):
    weight = row.draw(6)
    operator = row.build(weight)
    if not row.products:
        with pytest.raises(TypeError, match="between spaces of finite size"):
            spectrax.probable_upper_bound(operator, key=jr.key(0))
        return
    assert internal.smaller_side(operator) == min(row.truth(weight).shape) * (
        1 + row.imaginary
    )
    bound = spectrax.probable_upper_bound(operator, key=jr.key(0))
    assert row.norm(weight) <= bound <= 1.2 * row.norm(weight)


@every_kind
def test_perturbations_are_bounded(row: Row):
    before, change = row.draw(7), row.draw(8)
    factor = internal.perturbation_factor(row.build(before))
    after = jax.tree.map(lambda w, d: w + 1e-2 * d, before, change)
    found = drift_bound(row.build(after), arrays_of(row.build(before)))
    assert drift_bound(row.build(before), arrays_of(row.build(before))) == 0
    if not row.linear:
        assert factor is None
        assert found == math.inf
        return
    assert factor is not None
    # Changes of each entry alone, and of all of them: it is reached for no kind by
    # more than the root of its number of taps.
    size = np.linalg.norm(1e-2 * change)
    difference = 1e-2 * row.norm(change)
    assert difference <= factor * size * (1 + 1e-12)
    # Of complex numbers the distance is that of their real form.
    slack = math.sqrt(2) if row.imaginary else 1
    assert difference <= found <= slack * factor * size * (1 + 1e-6)
    for entry in np.eye(change.size):
        one = row.norm(jnp.asarray(entry.reshape(change.shape), change.dtype))
        assert one <= factor * (1 + 1e-12)


@every_kind
def test_transformations_change_nothing(row: Row):
    weights = [row.draw(seed) for seed in (9, 10)]
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), *weights)

    operators = [row.build(weight) for weight in weights]
    states = [converged(operator)[0] for operator in operators]
    state = jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)

    def values(weight: Any, state: Any) -> tuple[jax.Array, jax.Array]:
        operator = row.build(weight)
        return stepped(operator, state)[1], solved(operator).value

    found = jax.jit(jax.vmap(values))(stack, state)
    for operator, state, *both in zip(operators, states, *found, strict=True):
        later, value, _ = stepped(operator, state)
        np.testing.assert_allclose(both, (value, solved(operator).value), rtol=1e-9)
        eager = spectrax.singular_value(operator, later)
        np.testing.assert_allclose(eager, value, rtol=1e-12)


@every_kind
def test_pickled_ones_go_on_where_they_were(row: Row):
    operator = row.build(row.draw(11))
    state = started(operator)
    again = pickle.loads(pickle.dumps((operator, state)))
    assert eqx.tree_equal(again, (operator, state))
    went_on = [stepped(*both) for both in (again, (operator, state))]
    assert eqx.tree_equal(*went_on)


# What a kind knows of itself is registered, and not asked for.

SOURCE = Path(spectrax.__file__).parent
KINDS = ("Convolution", "LatticeConvolution", "FourierMultiplier")
HOMES = {"_certify_kernel.py"}


def _names(node: ast.AST) -> set[str]:
    inside = ast.walk(node)
    return {
        one.attr if isinstance(one, ast.Attribute) else one.id
        for one in inside
        if isinstance(one, ast.Attribute | ast.Name)
    }


def test_no_kind_is_asked_for():
    """Not by its class, and not by a look into a function that a user handed over."""
    forbidden = {*KINDS, "Conv", "ConvTranspose", "MatrixLinearOperator"}
    forbidden |= {"FunctionLinearOperator"}
    asked = [
        (path.name, node.lineno)
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name not in HOMES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in ("isinstance", "getattr")
        and (
            _names(node.args[1]) & forbidden
            or (isinstance(node.args[1], ast.Constant) and node.args[1].value == "fn")
        )
    ]
    assert asked == []
