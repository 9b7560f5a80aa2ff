"""The door for libraries that add a kind of operator: functions to register with.

Each is a `functools.singledispatch` function of an operator. What is not registered for
a kind works as for any lineax operator, by its products.
"""

from .._certify import certified_in_memory as certified_in_memory
from .._enclosures import (
    default_width as default_width,
    dense_form as dense_form,
    DenseForm as DenseForm,
    Effort as Effort,
    enclose as enclose,
    enclose_in_memory as enclose_in_memory,
    Ends as Ends,
    is_provable as is_provable,
    perturbation_factor as perturbation_factor,
)
from .._norms import (
    converged_norm as converged_norm,
    converged_residual as converged_residual,
    current_norm as current_norm,
    init_vectors as init_vectors,
    reference_norm as reference_norm,
    smaller_side as smaller_side,
    step_vectors as step_vectors,
    TripletFinder as TripletFinder,
    vectors_residual as vectors_residual,
    vectors_value as vectors_value,
)
from .._operators import (
    accumulation_dtype as accumulation_dtype,
    adjoint_rows as adjoint_rows,
    apply_rows as apply_rows,
    as_operator as as_operator,
    Axis as Axis,
    Convolution as Convolution,
    FourierMultiplier as FourierMultiplier,
    register_without_structure as register_without_structure,
)
