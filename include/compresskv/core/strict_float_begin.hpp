// From here to strict_float_end.hpp the compiler keeps to the floating-point arithmetic that is written,
// whatever its flags say (-ffast-math, -Ofast, -ffinite-math-only, -mfma, -ffp-contract=fast, ...): no sum is
// regrouped, no division becomes a reciprocal, no product is fused unless the code says fma, NaN and infinity
// are what they are. So a result has the same bits in every build. No include guard: it is included once a
// region, after all others.
//
// What the flags still reach is code of other headers, so a region
// - writes `a + b` on registers, not _mm256_add_ps(a, b): in clang the intrinsic brings the flags along;
// - adds up in loops of its own, not by std::accumulate; fuses by kernel::fused, which is inlined in every
// build;
// - calls no algorithm of std with a lambda in a hot loop: g++ does not inline across the border.
// Outside a region NaN and infinity are tested by their bits (core/float_bits.hpp) before numbers are
// compared.
//
// The flags also set the processor to take denormal numbers for zero: see core/float_mode.hpp.
#if defined(__clang__)
#pragma float_control(push)
#pragma float_control(precise, on)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("no-unsafe-math-optimizations", "no-associative-math", "no-reciprocal-math", \
                     "no-finite-math-only", "signed-zeros", "trapping-math", "fp-contract=off")
#endif
