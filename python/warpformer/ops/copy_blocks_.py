from torch import Tensor

from warpformer import _C
from warpformer.ops._library import dispatch, executor, is_direct, register


def copy_blocks_(cache: Tensor, old_blocks: Tensor, new_blocks: Tensor, count: int) -> None:
    """Copies the first slots of blocks of a paged cache, in place: for each i, one after the other,

        cache[new_blocks[i], :count] = cache[old_blocks[i], :count]

    as a sequence needs it that goes on behind tokens which others share.

    Args:
        cache: [blocks, block_size, ...], contiguous: keys, values or scales as `cached_attention` has them.
        old_blocks, new_blocks: [n] int64.
        count: slots of a block, from 0 to block_size.

    Returns:
        Nothing.

    Raises:
        InputError: shapes or dtypes do not fit, `cache` is not contiguous, a slot or (on the CPU) a block is
            not there. Nothing is written then. A GPU leaves out copies of and to blocks that are not there.
        TypeError: an argument is not a tensor.

    An op of torch.library that mutates the cache; it has no gradient. Source: Kwon et al., "Efficient Memory
    Management for Large Language Model Serving with PagedAttention" (2023), 4.4: copy-on-write.
    """
    if is_direct(cache, old_blocks, new_blocks):
        _copy_blocks(cache, old_blocks, new_blocks, count)
    else:
        dispatch("copy_blocks_", cache, old_blocks, new_blocks, count)


def _copy_blocks(cache, old_blocks, new_blocks, count):
    _C.copy_blocks_(cache, old_blocks, new_blocks, count, executor(cache))


register(
    "copy_blocks_(Tensor(a!) cache, Tensor old_blocks, Tensor new_blocks, int count) -> ()",
    _copy_blocks,
    lambda *args: None,
)
