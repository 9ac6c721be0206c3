"""Operations whose derivatives along a line are known, by kind."""

from typing import Final

# Linear in the first argument.
LINEAR: Final = (
    "t transpose permute expand unsqueeze squeeze slice select unbind split unfold "
    "split_with_sizes unsafe_split unsafe_split_with_sizes alias mean sum neg diagonal "
    "avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d repeat "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
    "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d "
    "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d im2col "
    "col2im pixel_shuffle pixel_unshuffle channel_shuffle index_select index gather "
    "take flip roll cumsum trace tril triu _to_copy"
)
# Of single elements.
SINGLE: Final = (
    "abs asinh atan celu clamp clamp_max clamp_min cos cosh elu erf erfc exp exp2 "
    "expm1 gelu hardshrink hardswish hardtanh leaky_relu log log10 log1p log2 "
    "log_sigmoid_forward logit mish pow reciprocal rsqrt rsub sigmoid silu sin sinc "
    "sinh softplus softshrink sqrt tan tanh threshold"
)
# Of what lies along a dimension, which the second argument names.
ROWS: Final = "_log_softmax _safe_softmax _softmax"
# What bends and has no rule of its own, whatever moves.
SMOOTH: Final = (
    "_prelu_kernel _trilinear addcdiv addcmul atan2 baddbmm cumprod glu hypot "
    "linalg_cross logaddexp logcumsumexp prod xlogy"
)
# What does not move whatever it is given.
CONSTANT: Final = (
    "bernoulli ceil detach empty_like floor full_like new_empty new_full new_ones "
    "new_zeros ones_like rand_like randn_like round sign trunc zeros_like"
)
# The largest or smallest along dimensions, and of two.
EXTREME: Final = "amax amin"
LARGER: Final = "maximum minimum"
# Values and the places where they were.
CHOSEN: Final = "max min sort topk"
# A loss of labels: linear in the log-probabilities that it is given.
LABELS: Final = "nll_loss_forward nll_loss2d_forward"
# Functions of single elements of two tensors, added up.
ADDED: Final = (
    "binary_cross_entropy binary_cross_entropy_with_logits huber_loss mse_loss "
    "smooth_l1_loss soft_margin_loss"
)
# What is found along some dimensions, which the second argument names.
REDUCED: Final = "linalg_vector_norm logsumexp norm std std_mean var var_mean"
# Linear in each of some arguments.
PRODUCTS: Final = "addmm bmm convolution dot lerp mm mul mv"
NORMALIZED: Final = "native_batch_norm native_group_norm native_layer_norm"
# Of straight pieces.
STRAIGHT: Final = (
    "abs clamp clamp_max clamp_min hardshrink hardtanh leaky_relu softshrink threshold"
)
