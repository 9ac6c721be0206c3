"""Operations whose derivatives along a line are known, by kind."""

from typing import Final

# Linear in some arguments at once where no other moves, by their numbers.
LINEAR: Final[dict[str, tuple[tuple[int, ...], ...]]] = {
    "t transpose permute expand unsqueeze squeeze slice select unbind split unfold "
    "split_with_sizes unsafe_split unsafe_split_with_sizes alias mean sum neg diagonal "
    "avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d repeat "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
    "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d "
    "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d im2col "
    "col2im pixel_shuffle pixel_unshuffle channel_shuffle index_select index gather "
    "take flip roll cumsum trace tril triu _to_copy cat stack div": ((0,),),
    "lerp slice_scatter select_scatter": ((0, 1),),
    "masked_fill constant_pad_nd index_put": ((0, 2),),
    "index_add scatter_add scatter": ((0, 3),),
    "where": ((1, 2),),
    "mm bmm mv dot mul": ((0,), (1,)),
    "addmm baddbmm": ((0, 1), (0, 2)),
    "convolution": ((0, 2), (1, 2)),
}
# Of single elements, though torch has no tag that says so.
SINGLE: Final = "hardswish log_sigmoid_forward _prelu_kernel"
# Of what lies along a dimension, which the second argument names.
ROWS: Final = "_log_softmax _safe_softmax _softmax"
# What does not move whatever it is given.
CONSTANT: Final = (
    "bernoulli ceil detach empty_like floor full_like new_empty new_full new_ones "
    "new_zeros ones_like rand_like randn_like round sign trunc zeros_like"
)
# Functions of single elements of two tensors, added up.
ADDED: Final = (
    "binary_cross_entropy binary_cross_entropy_with_logits huber_loss mse_loss "
    "smooth_l1_loss soft_margin_loss"
)
# What is found along some dimensions, which the second argument names.
REDUCED: Final = "linalg_vector_norm logsumexp norm std std_mean var var_mean"
# Of straight pieces.
STRAIGHT: Final = (
    "abs add adaptive_max_pool2d adaptive_max_pool3d amax amin clamp clamp_max "
    "clamp_min clone copy hardshrink hardsigmoid hardtanh leaky_relu max "
    "max_pool2d_with_indices max_pool3d_with_indices maximum min minimum "
    "nll_loss2d_forward nll_loss_forward relu softshrink sort sub threshold topk view "
    "_unsafe_view"
)
