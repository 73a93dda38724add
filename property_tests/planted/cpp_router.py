"""Planted bugs of the C++ router, as those of `planted.cpp`."""

from planted.cpp import CppBug

BITS, STRIDES, REFUSED = (
    "test_native_router.test_bits_are_those_of_the_stages",
    "test_native_router.test_any_logits_of_any_dtype_and_stride",
    "test_native_router.test_wrong_arguments_raise_in_words",
)

BUGS = (
    CppBug(
        BITS,
        "ties go to the highest id",
        "router.cpp",
        "first = std::min(first, keys[i] == key ? i : int32_t(BLOCK))",
        "first = keys[i] == key ? i : first",
    ),
    CppBug(BITS, "-0 is less than 0", "router.cpp", "bit_cast<int32_t>(x + 0.f)", "bit_cast<int32_t>(x)"),
    CppBug(
        BITS,
        "NaN counts as a number",
        "router.cpp",
        "std::fabs(x) < INF ? x : other",
        "std::fabs(x) == INF ? other : x",
    ),
    CppBug(
        BITS,
        "a group is worth its best expert where it is to be its two best",
        "router.cpp",
        "return top2 ? first + second : first;",
        "return first;",
    ),
    CppBug(BITS, "the bias is in the weights", "router.cpp", "(after ? z : scores)[i]", "(after ? z : values)[i]"),
    CppBug(
        BITS,
        "scores of groups that are not kept stay",
        "router.cpp",
        "std::fill_n(scores + g * size, size, 0.f)",
        "(void)0",
    ),
    CppBug(BITS, "weights are divided by a norm of 0", "router.cpp", "total > 0 ? total : 1;", "total;"),
    CppBug(BITS, "the least norm has no effect", "router.cpp", "std::max(total, r.minimum)", "total"),
    CppBug(
        BITS,
        "rows are summed in another order",
        "router.cpp",
        "x[i] += x[i + size];",
        "x[i] = x[2 * i] + x[2 * i + 1];",
    ),
    CppBug(STRIDES, "the rows' stride has no effect", "router.cpp", "[t * stride + i]", "[t * n + i]"),
    CppBug(
        BITS,
        "a scale on the output is on the weights too",
        "router_arguments.h",
        'word_in(router, "scale_on") == "weights" ? ',
        "true ? ",
    ),
    CppBug(
        REFUSED,
        "keys of an inner object are the outer one's",
        "router_arguments.h",
        "inside == 1 && end",
        "inside && end",
    ),
    CppBug(
        REFUSED, "a bias of too few experts is accepted", "binding.cpp", "bias->size(0) == n)", "bias->size(0) <= n)"
    ),
    CppBug(
        REFUSED,
        "more experts than the kept groups have are chosen",
        "binding.cpp",
        "router.top_k <= router.kept * size",
        "router.top_k > 0",
    ),
)
