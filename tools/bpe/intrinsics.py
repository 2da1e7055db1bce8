"""What compiled code needs and Numba cannot name: pointers, unaligned words, bit counts, two words or 64 bytes at once.

A pointer is indexed like an array; it has no bounds, no negative index and no reference count. Whoever takes one keeps
its array alive. Passing arrays to small functions in a hot loop costs an atomic increment and decrement for each.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tools.bpe.memory import HASH, HASH_2

BYTE, WORD = ir.IntType(8), ir.IntType(64)


@intrinsic
def pointer(typingctx, array):
    """Return a pointer to an array's first element."""

    def codegen(context, builder, signature, args):
        return context.make_array(signature.args[0])(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def load64(typingctx, place, index):
    """Return eight bytes from place[index] on, any alignment, as a uint64."""

    def codegen(context, builder, signature, args):
        address = builder.bitcast(builder.gep(args[0], [args[1]]), WORD.as_pointer())
        return builder.load(address, align=1)

    return types.uint64(place, types.int64), codegen


@intrinsic
def store64(typingctx, place, index, value):
    """Write a uint64 over eight bytes from place[index] on, any alignment."""

    def codegen(context, builder, signature, args):
        address = builder.bitcast(builder.gep(args[0], [args[1]]), WORD.as_pointer())
        builder.store(args[2], address, align=1)
        return context.get_dummy_value()

    return types.void(place, types.int64, types.uint64), codegen


@intrinsic
def prefetch(typingctx, place, index):
    """Have the cache line of place[index] fetched."""

    def codegen(context, builder, signature, args):
        number = ir.IntType(32)
        prefetch_type = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), number, number, number])
        function = cgutils.get_or_insert_function(builder.module, prefetch_type, "llvm.prefetch.p0")
        address = builder.bitcast(builder.gep(args[0], [args[1]]), BYTE.as_pointer())
        builder.call(function, [address, number(0), number(3), number(1)])  # to read, to all levels, data
        return context.get_dummy_value()

    return types.void(place, types.uint64), codegen


@intrinsic
def store_key(typingctx, text, i, n, shapes, keys, k):
    """Write text[i : i + 16] & shapes[4n : 4n + 2] | shapes[4n + 2 : 4n + 4] to keys[k : k + 2]; return a hash of both.

    In one vector: word by word it takes half as long again.
    """

    def codegen(context, builder, signature, args):
        pair = ir.VectorType(WORD, 2)

        def address(place, index):
            return builder.bitcast(builder.gep(place, [index]), pair.as_pointer())

        text, i, n, shapes, keys, k = args
        mask, end = (builder.add(builder.shl(n, WORD(2)), WORD(offset)) for offset in (0, 2))
        key = builder.load(address(text, i), align=1)
        key = builder.and_(key, builder.load(address(shapes, mask), align=8))
        key = builder.or_(key, builder.load(address(shapes, end), align=8))
        builder.store(key, address(keys, k), align=8)
        factors = ir.Constant(pair, [WORD(int(HASH)), WORD(int(HASH_2))])
        product = builder.mul(key, factors)
        low, high = (builder.extract_element(product, ir.IntType(32)(lane)) for lane in range(2))
        return builder.add(low, high)

    return types.uint64(text, types.int64, types.int64, shapes, keys, types.int64), codegen


@intrinsic
def copy_bytes(typingctx, target, source, index, count):
    """Copy count bytes from source[index] on to target."""

    def codegen(context, builder, signature, args):
        cgutils.raw_memcpy(builder, args[0], builder.gep(args[1], [args[2]]), args[3], 1)
        return context.get_dummy_value()

    return types.void(target, source, types.int64, types.int64), codegen


@intrinsic
def trailing_zeros(typingctx, value):
    """Return the number of zero bits below the lowest one bit of a uint64; 64 for zero."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), codegen


@intrinsic
def leading_zeros(typingctx, value):
    """Return the number of zero bits above the highest one bit of a uint64; 64 for zero."""

    def codegen(context, builder, signature, args):
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), codegen


@intrinsic
def popcount(typingctx, value):
    """Return the number of one bits."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.uint64), codegen


@intrinsic
def byte_masks(typingctx, place, index):
    """Return six bit masks over the 64 bytes from place[index] on, the first byte's bit the lowest.

    ASCII letters, ASCII digits, ASCII white space, blanks, apostrophes, first bytes of characters beyond ASCII.
    """

    def codegen(context, builder, signature, args):
        block_type = ir.VectorType(BYTE, 64)

        def splat(value):
            return ir.Constant(block_type, [ir.Constant(BYTE, value)] * 64)

        def between(block, first, last):
            return builder.icmp_unsigned("<=", builder.sub(block, splat(first)), splat(last - first))

        address = builder.bitcast(builder.gep(args[0], [args[1]]), block_type.as_pointer())
        block = builder.load(address, align=1)
        blanks = builder.icmp_unsigned("==", block, splat(0x20))
        masks = [
            between(builder.or_(block, splat(0x20)), 0x61, 0x7A),
            between(block, 0x30, 0x39),
            builder.or_(between(block, 0x09, 0x0D), blanks),
            blanks,
            builder.icmp_unsigned("==", block, splat(0x27)),
            builder.icmp_unsigned(">=", block, splat(0xC0)),
        ]
        return context.make_tuple(builder, signature.return_type, [builder.bitcast(mask, WORD) for mask in masks])

    return types.UniTuple(types.uint64, 6)(place, types.int64), codegen
