"""Attention over pages as Triton kernels: writing, attending, and joining parts of the keys.

Imported only where Triton is there. The online softmax is Milakov and Gimelshein's (2018) as
FlashAttention uses it; sharing out one sequence's keys among programs is Flash-Decoding.
"""

import triton
import triton.language as tl

# What changes from step to step must not choose between compiled variants of a kernel: compiling
# one takes a second, and sequences would wait for it in the middle of their answers. Nor what
# differs between a trial and what comes after it, such as the width of the tables: all would be
# compiled twice.


@triton.jit(do_not_specialize=["positions", "key_ends", "seats", "table", "table_stride"])
def write_kernel(
    keys,
    values,
    key_plane,
    value_plane,
    positions,
    key_ends,
    seats,
    table,
    key_stride,
    value_stride,
    plane_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    """One program stores one token's keys and values, ``WIDTH`` numbers each.

    ``IS_FP8``: as float8 e4m3, whose bits the planes are bytes of.
    """
    token = tl.program_id(0)
    if tl.load(key_ends + token) > 0:
        position = tl.load(positions + token)
        entry = tl.load(seats + token) * table_stride + position // BLOCK_SIZE
        slot = tl.load(table + entry).to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
        column = tl.arange(0, PADDED_WIDTH)
        there = column < WIDTH
        key = tl.load(keys + token * key_stride + column, mask=there)
        value = tl.load(values + token * value_stride + column, mask=there)
        if IS_FP8:
            key = fp8_bits(key)
            value = fp8_bits(value)
        tl.store(key_plane + slot * plane_stride + column, key, mask=there)
        tl.store(value_plane + slot * plane_stride + column, value, mask=there)


@triton.jit
def fp8_bits(numbers):
    """What ``KVCache.write`` rounds to: the nearest number of float8, the largest for larger ones.

    In integers, as Triton's interpreter rounds some numbers wrongly.
    """
    limited = tl.minimum(tl.maximum(numbers.to(tl.float32), -448.0), 448.0)
    bits = limited.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # Below 2**-6 the last bit stands for 2**-9, which it does beside 2**14 in float32 too.
    beside = magnitude.to(tl.float32, bitcast=True) + 16384.0
    small = beside.to(tl.uint32, bitcast=True) - (141 << 23)
    # To the nearest, and of two as near to the even one; then the exponent counts from 7, not 127.
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - (120 << 23)) >> 20
    return (sign | tl.where(magnitude < (121 << 23), small, normal)).to(tl.uint8)


@triton.jit(
    do_not_specialize=[
        "positions",
        "key_ends",
        "seats",
        "table",
        "tiles",
        "table_stride",
        "num_splits",
    ]
)
def attend_kernel(
    output,
    partial_output,
    partial_maximum,
    partial_sum,
    query,
    key_plane,
    value_plane,
    positions,
    key_ends,
    seats,
    table,
    tiles,
    query_stride,
    plane_stride,
    table_stride,
    scale_log2,
    num_splits,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes one tile of tokens for one KV head, over one split of its keys.

    Rows are the tile's tokens times the query heads that share the KV head. ``WINDOW`` 0: none.
    ``scale_log2``: the exponents are taken to the base two, for which a GPU has an instruction.
    ``IS_SPLIT``: the result goes to ``partial_*`` in float32, else to ``output``.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    first_token = tl.load(tiles + tile * 2)
    num_tokens = tl.load(tiles + tile * 2 + 1)

    row = tl.arange(0, TILE_ROWS)
    dim = tl.arange(0, HEAD_DIM)
    token = first_token + row // PADDED_GROUP_SIZE
    head_in_group = row % PADDED_GROUP_SIZE
    head = kv_head * GROUP_SIZE + head_in_group
    there = (row // PADDED_GROUP_SIZE < num_tokens) & (head_in_group < GROUP_SIZE)
    queries = tl.load(
        query + (token * query_stride + head * HEAD_DIM)[:, None] + dim[None, :],
        mask=there[:, None],
        other=0.0,
    )
    position = tl.load(positions + token, mask=there, other=0).to(tl.int32)
    key_end = tl.load(key_ends + token, mask=there, other=0).to(tl.int32)

    first_key = 0
    last_key = tl.max(key_end, 0)
    if WINDOW > 0:
        # The tokens of a tile follow each other, so that the first one looks back furthest.
        first_key = tl.maximum(tl.load(positions + first_token).to(tl.int32) - WINDOW + 1, 0)
    num_keys = tl.maximum(last_key - first_key, 0)
    keys_per_split = tl.cdiv(tl.cdiv(num_keys, num_splits), TILE_KEYS) * TILE_KEYS
    first_key += split * keys_per_split
    last_key = tl.minimum(first_key + keys_per_split, last_key)
    table_row = table + tl.load(seats + first_token) * table_stride

    maximum = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    result = tl.zeros([TILE_ROWS, HEAD_DIM], tl.float32)
    for start in range(first_key, last_key, TILE_KEYS):
        key_position = start + tl.arange(0, TILE_KEYS)
        in_split = key_position < last_key
        block = tl.load(table_row + key_position // BLOCK_SIZE, mask=in_split, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + key_position % BLOCK_SIZE
        place = slot * plane_stride + kv_head * HEAD_DIM
        keys = tl.load(
            key_plane + place[None, :] + dim[:, None], mask=in_split[None, :], other=0.0
        )  # [HEAD_DIM, TILE_KEYS]
        # The cache may hold another type than the model computes with.
        scores = tl.dot(queries, keys.to(queries.dtype), input_precision=PRECISION) * scale_log2
        visible = in_split[None, :] & (key_position[None, :] < key_end[:, None])
        if WINDOW > 0:
            visible = visible & (key_position[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen no key yet: minus infinity less minus infinity is no number.
        reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(maximum - reference)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(
            value_plane + place[:, None] + dim[None, :], mask=in_split[:, None], other=0.0
        )  # [TILE_KEYS, HEAD_DIM]
        result = tl.dot(
            weights.to(queries.dtype),
            values.to(queries.dtype),
            result * shrink[:, None],
            input_precision=PRECISION,
        )
        maximum = new_maximum

    if IS_SPLIT:
        part = (tile * tl.num_programs(1) + kv_head) * TILE_ROWS + row
        part = part * num_splits + split
        tl.store(
            partial_output + (part * HEAD_DIM)[:, None] + dim[None, :],
            result,
            mask=(there & (total > 0.0))[:, None],
        )
        tl.store(partial_maximum + part, maximum, mask=there)
        tl.store(partial_sum + part, total, mask=there)
    else:
        result = result / tl.where(total == 0.0, 1.0, total)[:, None]
        place = ((token * NUM_HEADS + head) * HEAD_DIM)[:, None] + dim[None, :]
        tl.store(output + place, result.to(output.dtype.element_ty), mask=there[:, None])


@triton.jit(do_not_specialize=["tiles", "num_splits"])
def join_kernel(
    output,
    partial_output,
    partial_maximum,
    partial_sum,
    tiles,
    num_splits,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """One program joins the splits of one query head for the tokens of one tile."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    first_token = tl.load(tiles + tile * 2)
    num_tokens = tl.load(tiles + tile * 2 + 1)
    split = tl.arange(0, MAX_SPLITS)
    dim = tl.arange(0, HEAD_DIM)
    first_row = (tile * (NUM_HEADS // GROUP_SIZE) + head // GROUP_SIZE) * TILE_ROWS
    for index in range(0, num_tokens):
        row = first_row + index * PADDED_GROUP_SIZE + head % GROUP_SIZE
        parts = row * num_splits + split
        totals = tl.load(partial_sum + parts, mask=split < num_splits, other=0.0)
        # Of a split without keys there is no output, and memory may hold anything.
        is_used = totals > 0.0
        maxima = tl.load(partial_maximum + parts, mask=is_used, other=float("-inf"))
        highest = tl.max(maxima, 0)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(maxima - highest)
        total = tl.sum(weights * totals, 0)
        # All at once: one after the other, each would take as long as all together.
        outputs = tl.load(
            partial_output + (parts * HEAD_DIM)[:, None] + dim[None, :],
            mask=is_used[:, None],
            other=0.0,
        )  # [MAX_SPLITS, HEAD_DIM]
        result = tl.sum(outputs * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
        place = ((first_token + index) * NUM_HEADS + head) * HEAD_DIM + dim
        tl.store(output + place, result.to(output.dtype.element_ty))
