"""Families of operations, by the bare name of what a node calls (see ``dataflow.op_name``)."""
from __future__ import annotations

# What may be a router's decision (see ``routing``): a choice, by the indices of the largest, or gates for all.
PICKS = {"topk", "argmax", "max", "sort", "argsort", "kthvalue", "multinomial"}
GATES = {"softmax", "sigmoid", "relu", "gumbel_softmax", "softplus"}
SELECTORS = PICKS | GATES
EXCHANGES = {"all_to_all_single", "all_to_all", "all_gather_into_tensor", "all_gather_tensor",
              "reduce_scatter_tensor", "all_reduce", "all_to_all_single_autograd", "rounded_all_to_all", "sum_over_group"}
ATTENTION = {"scaled_dot_product_attention", "flex_attention", "conv1d", "causal_conv1d", "scan", "associative_scan"}
PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__", "mm"}
SCALES = {"mul", "imul", "div", "truediv", "itruediv"}
LINEAR_MAPS = {"linear", "matmul", "mm", "addmm", "bmm", "einsum", "__matmul__", "baddbmm", "addbmm"}
VIEWS = {"view", "reshape", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "clone",
          "alias", "expand", "expand_as", "transpose", "permute", "chunk", "split", "getitem", "detach", "unbind",
          "narrow", "select", "movedim", "swapaxes", "view_as", "reshape_as", "tensor_split", "copy_to_group"}
CASTS = {"to", "type", "float", "type_as", "half", "bfloat16", "double", "_to_copy"}
TO_WHOLE_NUMBERS = {"long", "int", "bool"}
ELEMENTWISE = {"add", "sub", "mul", "div", "truediv", "neg", "exp", "log", "sqrt", "rsqrt", "pow", "softmax",
                "log_softmax", "sigmoid", "relu", "relu_", "tanh", "silu", "gelu", "softplus", "logsigmoid", "where",
                "masked_fill", "clamp", "clip", "dropout", "iadd", "imul", "isub", "itruediv", "square", "abs",
                "sum", "mean", "rms_norm", "layer_norm", "clamp_min", "clamp_max", "minimum", "maximum", "mish",
                "hardtanh", "elu", "leaky_relu", "reciprocal", "float_power", "var", "norm", "rsub", "eq", "ge", "gt",
                "le", "lt", "relu6", "normalize", "amax", "sinh", "cosh", "asinh", "arcsinh", "ne", "round", "floor",
                "ceil", "trunc", "sign", "erf", "log1p", "expm1", "logical_and", "logical_or", "logical_not",
                "and_", "or_", "invert", "__and__", "__or__", "mod", "remainder", "floordiv", "floor_divide"}
EXPERT_MAPS = LINEAR_MAPS | {"_grouped_mm", "grouped_mm", "grouped_mm_fallback", "scaled_grouped_mm", "getitem",
                               "index_select", "embedding"}
TOKEN_WISE = VIEWS | CASTS | TO_WHOLE_NUMBERS | ELEMENTWISE | LINEAR_MAPS | {"cat", "stack"}
TRANSPOSES = {"transpose", "permute", "t", "mT", "T", "movedim", "moveaxis", "swapaxes", "swapdims"}
# Along one axis: position of that argument, and what it is where it is not given.
ALONG_AN_AXIS = {"topk": (2, -1), "sort": (1, -1), "argsort": (1, -1), "kthvalue": (2, -1), "max": (1, None),
                 "min": (1, None), "argmax": (1, None), "argmin": (1, None), "amin": (1, None), "logsumexp": (1, None),
                 "cumsum": (1, None), "cumprod": (1, None), "logcumsumexp": (1, None), "cummax": (1, None),
                 "gather": (1, None), "scatter": (1, None), "scatter_": (1, None), "scatter_add": (1, None)}
# Where tokens may enter the experts: as a factor, or by being picked with indices that the router chose.
TAKES_TOKENS = LINEAR_MAPS | EXPERT_MAPS | {"mul", "imul", "masked_fill", "index_select", "gather", "take_along_dim",
                                               "embedding", "topk", "sort", "argsort", "repeat_interleave"} | EXCHANGES
# The same, into empty memory.
FILLS_SLOTS = {"index_add", "index_copy", "index_put", "scatter", "scatter_add", "setitem"}
TAKES_A_LIKENESS = {"type_as", "to", "expand_as", "view_as", "reshape_as"}    # of the second argument, not its value
MAKES_MEMORY = {"zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "ones_like", "full_like",
                 "new_full", "full", "ones", "new_ones"}
# What stands before the first state (embeddings put together) or after the last one (head, loss) and mixes no tokens in
# a way that a block would.
HARMLESS_OUTSIDE = MAKES_MEMORY | {
    "embedding", "masked_scatter", "index_put", "index_put_", "setitem", "index_copy", "slice_scatter", "select_scatter",
    "scatter", "gather", "take_along_dim", "index_select", "select", "narrow", "unbind", "pad", "repeat",
    "repeat_interleave", "movedim", "swapaxes", "t", "identity", "marker", "cross_entropy", "nll_loss", "kl_div", "topk",
    "argmax", "max", "min", "sort", "argsort", "kthvalue", "multinomial", "scatter_", "one_hot", "tril", "triu", "sin",
    "cos", "outer", "expm1", "std", "lerp", "addcmul", "group_norm"}
